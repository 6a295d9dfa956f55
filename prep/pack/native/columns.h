// Codes for a block of columns: `choose_columns` of prep/pack/columns.py specifies them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace smoe::calibrated {

constexpr std::size_t MAX_LEVELS = 7, MAX_COLUMNS = 128;

// What codes stand for. Level l has 2^bits[l] values and one fewer edges between them, rising; bits
// rise from level to level, and a code's first bits[l] bits are its place there.
struct Grid {
    std::size_t levels;
    int bits[MAX_LEVELS];
    float weights[MAX_LEVELS];
    const float* values[MAX_LEVELS];
    const float* edges[MAX_LEVELS];
};

// `columns` columns (at most MAX_COLUMNS) of `matrices` matrices of `rows` rows.
struct Shape {
    std::size_t matrices, rows, columns;
};

// Columns to choose codes for. target and before are float [levels, matrices, rows, columns],
// before null where a column is chosen for the first time; along float [levels, matrices, columns,
// columns], or of one level for all; scale float [matrices, rows]; codes uint8 [matrices, rows,
// columns]. Written: codes; and target, which then is by how much columns moved.
struct Block : Shape {
    float* target;
    const float* before;
    const float* along;
    std::size_t along_level;  // floats from one level's to the next: 0 where there is one
    const float* scale;
    std::uint8_t* codes;
};

// Scales to choose from, tried float [candidates, matrices, rows], by what target float [levels,
// matrices, rows, columns] loses at every level once it is rounded at the full one: squares that
// importance weighs, float [levels, matrices, columns] or of one level for all. Written: scale
// float [matrices, rows], the first of the best; 0 where none has a cost that is a number.
struct Search : Shape {
    const float* target;
    const float* importance;
    std::size_t importance_level;  // floats from one level's to the next: 0 where there is one
    std::size_t candidates;
    const float* tried;
    float* scale;
};

// One instruction set's: the rows `first` up to `end` of matrix m.
struct Chooser {
    const char* name;
    void (*rows)(const Grid&, const Block&, std::size_t m, std::size_t first, std::size_t end);
    void (*scales)(const Grid&, const Search&, std::size_t m, std::size_t first, std::size_t end);
};

extern const Chooser columns_portable, columns_avx2, columns_avx512;

// Those that this processor runs, best first.
const Chooser* const* choosers(std::size_t* count);

// Rows are independent of each other, so any number of threads gives the same codes, and every
// instruction set those of the specification.
void choose_columns(const Chooser&, const Grid&, const Block&, std::size_t threads);
void best_scales(const Chooser&, const Grid&, const Search&, std::size_t threads);

}  // namespace smoe::calibrated
