// From the description of a program to what runs: operands resolved, shapes checked.
#pragma once
#include <stdexcept>

#include "program.h"

namespace smoe {

// Throws std::invalid_argument unless it holds.
inline void require(bool holds, const std::string& sentence) {
    if (!holds) throw std::invalid_argument(sentence);
}

// Where a constant lies, checked against the weights.
Weight weight_of(const ConstantAbout& about, const std::uint8_t* weights, std::size_t nbytes);

// One operation. `where` begins its sentences.
Op build(const OpAbout& about, const ProgramAbout& program, const std::uint8_t* weights,
         std::size_t nbytes, const RowKernels& kernels, const std::string& where);

inline Place place_of(const BufferAbout& b) {
    if (b.crossing) return b.kept ? Place::kept : Place::step;
    return b.scanned ? Place::scan : Place::scratch;
}

// Bytes a row of all buffers that lie in one place.
std::size_t row_bytes(const ProgramAbout& program, Place place);

}  // namespace smoe
