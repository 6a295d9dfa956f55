// Weights rounded to codes: `round_matrix` of artifacts/nested.py, and int8, bf16 and f16 of
// artifacts/encodings.py, byte for byte. Every instruction set gives the same: no operation is
// contracted, and sums have the order of NumPy's, which is eight running sums over a group, of
// columns that are eight apart, added ((0+1)+(2+3))+((4+5)+(6+7)).
#pragma once
#include <cstddef>
#include <cstdint>

namespace smoe {

constexpr std::size_t MAX_LEVELS = 7, MAX_TABLE = 16, MAX_CANDIDATES = 32, MAX_GROUP = 128;

// What codes stand for, and which scales are tried.
struct Grid {
    std::size_t total, levels;            // bits of a code; planes
    std::size_t bits[MAX_LEVELS];         // of a code that a level has read
    float weight[MAX_LEVELS];             // that a level's squared error has in the sum
    bool table;                           // codes of up to 4 bits: values, else a uniform grid
    float values[MAX_LEVELS][MAX_TABLE];  // of a full code at every level
    float edges[MAX_TABLE - 1];           // between neighbours at the full level
    // Scales tried for a group, in units of its spread: the root of its mean square for a table,
    // else its largest magnitude.
    std::size_t candidates;
    double around[MAX_CANDIDATES];
};

struct Group {
    const float* from;  // `wide` columns; the rest of the group are zeros
    std::size_t wide;
    std::uint8_t* codes;
    float* scale;
};

// An instruction set's way.
struct Rounder {
    const char* name;
    std::size_t at_once;  // groups
    // Rounds `at_once` groups of `size` columns; one that is not there has no `from`.
    void (*groups)(const Grid&, std::size_t size, const Group*);
    // Rows or runs of weights to their codes; f16 says whether a weight was too large for it.
    void (*int8)(const float* w, std::size_t n, std::int8_t* codes, float* scale);
    void (*bf16)(const float* w, std::size_t n, std::uint16_t* out);
    bool (*f16)(const float* w, std::size_t n, std::uint16_t* out);
};

extern const Rounder rounding_portable, rounding_avx2, rounding_avx512;

// Those that this processor runs, best first.
const Rounder* const* rounders(std::size_t* count);

// Codes uint8 [n_out, n_in] and scales [n_out, groups], values of bfloat16, of `w` [n_out, n_in].
// A group that no scale suits, since it is not finite, has codes and a scale of 0.
void round_nested(const Rounder&, const Grid&, const float* w, std::size_t n_out, std::size_t n_in,
                  std::size_t group, std::uint8_t* codes, float* scale, std::size_t threads);

void round_int8(const Rounder&, const float* w, std::size_t n_out, std::size_t n_in,
                std::int8_t* codes, float* scale, std::size_t threads);
void round_bf16(const Rounder&, const float* w, std::size_t n, std::uint16_t* out,
                std::size_t threads);
// False if a weight was too large.
bool round_f16(const Rounder&, const float* w, std::size_t n, std::uint16_t* out,
               std::size_t threads);

}  // namespace smoe
