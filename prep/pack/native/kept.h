// A checkpoint's own codes, found again in its weights: `kept_codes` of kept.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace smoe {

// The values of 16 or fewer codes, rising: multiples of `unit`, the lowest one `first` of it; and
// for each multiple from there on the nearest code.
struct Kept {
    float values[16];
    std::size_t codes;
    double unit;
    std::int32_t first, last;
    std::uint8_t nearest[256];  // by multiple, counted from `first`
    std::uint8_t zero;          // the code for groups of zeros
    bool two_zeros;        // the code after that of 0 is a zero too, for weights without a sign
    float magnitudes[16];  // of the values but zero, falling
    std::size_t count;     // of them
};

// Codes uint8 [n_out, n_in] and factors float32 [n_out, groups] whose products are `w` float32
// [n_out, n_in] to the bit, rounded as `w` is. False if a group has none; what is in `codes` then
// says nothing. How products were rounded is told in runs of `at_once` groups.
bool keep_codes(const Kept&, const float* w, std::size_t n_out, std::size_t n_in, std::size_t group,
                std::size_t at_once, std::uint8_t* codes, float* scale, std::size_t threads);

}  // namespace smoe
