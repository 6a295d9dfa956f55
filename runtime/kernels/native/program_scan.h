// Operations that take the rows of a sequence one after another.
#pragma once
#include "program.h"

namespace smoe {

constexpr std::size_t SCANS = 4;  // sequences that are scanned at once, at most

// Calls f(sequence, its first row in the block, rows in the block) for those that have some.
template <class F>
void each_sequence(const StepRows& rows, const Block& block, F&& f) {
    const std::size_t end = block.first + block.rows;
    for (const Sequence& s : rows.sequences) {
        const std::size_t first = s.first > block.first ? s.first : block.first;
        const std::size_t last = s.first + s.rows < end ? s.first + s.rows : end;
        if (first < last) f(s, first, last - first);
    }
}

// Says of a segment's operations which of them are scanned together: from a recall on, until all
// that was recalled is stored.
void find_scans(std::vector<Op>& ops, const std::string& where);

// `count` operations, a recall the first and a store the last: all of them for a row before any for
// the next one.
void run_scan(Program& program, const Op* ops, std::size_t count, StepRows& rows,
              const Block& block);

void run_delta_rule(Program& program, const Op& op, StepRows& rows, const Block& block);
void run_convolution(Program& program, const Op& op, StepRows& rows, const Block& block);

}  // namespace smoe
