// Codes into slices of bits: `pack_matrix` of artifacts/nested.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace smoe {

constexpr std::size_t MAX_SLICES = 8;

// A plane of a matrix: uint8 [tiles, blocks, slices, 64], of tiles of 16 rows and blocks of 32
// columns.
struct Plane {
    std::uint8_t* to;
    std::size_t slices;
};

// The most significant bits of `codes` uint8 [n_out, n_in] go to the first plane; all planes
// together have as many slices as codes have bits, at most MAX_SLICES. Rows and columns that fill a
// tile or a block are codes of 0.
void slice_codes(const std::uint8_t* codes, std::size_t n_out, std::size_t n_in,
                 const Plane* planes, std::size_t count, std::size_t threads);

}  // namespace smoe
