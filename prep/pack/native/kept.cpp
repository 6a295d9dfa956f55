#include "kept.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "bits.h"
#include "pool.h"

namespace smoe {
namespace {

constexpr double WHOLE = 0x1.8p52;  // what is added to it is rounded to an integer, to even

enum class Rounding { bf16, f16, none };

inline float through_f16(float x) {
    const std::uint32_t bits = float_to_bits(x), size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return x;  // no number
    const std::uint32_t half = f16_size_of(size);
    if (half >= 0x7C00) return bits_to_float((bits & 0x80000000) | 0x7F800000);
    const float wide =
        half < 0x400 ? float(half) * 0x1p-24f : bits_to_float((half << 13) + 0x38000000);
    return bits >> 31 ? -wide : wide;
}

inline float rounded(Rounding how, float x) {
    return how == Rounding::bf16  ? from_bf16(bf16_of(x))
           : how == Rounding::f16 ? through_f16(x)
                                  : x;
}

// The narrowest type that holds all of a run.
Rounding rounding_of(const float* w, std::size_t n) {
    std::uint32_t low = 0;
    for (std::size_t i = 0; i < n; ++i) low |= float_to_bits(w[i]) & 0xFFFF;
    if (!low) return Rounding::bf16;
    for (std::size_t i = 0; i < n; ++i)
        if (!(through_f16(w[i]) == w[i])) return Rounding::none;
    return Rounding::f16;
}

// Whether codes times the factor are the group's weights; fills them as far as they are.
bool fits(const Kept& kept, Rounding how, const float* w, std::size_t group, float factor,
          std::uint8_t* codes) {
    const double inverse = 1 / (double(factor) * kept.unit);
    for (std::size_t i = 0; i < group; ++i) {
        double step = double(w[i]) * inverse + WHOLE - WHOLE;
        step = step < kept.first ? kept.first : step > kept.last ? kept.last : step;
        const std::int32_t multiple = std::int32_t(step) - kept.first;
        codes[i] = kept.nearest[multiple];
        if (kept.two_zeros) codes[i] += multiple == -kept.first && !std::signbit(w[i]);
        if (!(rounded(how, kept.values[codes[i]] * factor) == w[i])) return false;
    }
    return true;
}

// Factors that the largest weight allows, which is the magnitude of one of the values times the
// factor: first as exact products, then as rounded ones, of the nearest factor and its neighbours.
bool keep_group(const Kept& kept, Rounding how, const float* w, std::size_t group,
                std::uint8_t* codes, float* scale) {
    float largest = 0;
    for (std::size_t i = 0; i < group; ++i) {
        const float size = std::fabs(w[i]);
        largest = size > largest ? size : largest;
    }
    *scale = 0;
    std::memset(codes, kept.zero, group);
    if (largest == 0) return true;
    for (const auto& [exact, move] : {std::pair{true, 0}, {false, 0}, {false, 1}, {false, -1}})
        for (std::size_t m = 0; m < kept.count; ++m) {
            const float magnitude = kept.magnitudes[m];
            const std::int32_t bits = std::int32_t(bf16_of(largest / magnitude)) + move;
            const float factor = from_bf16(std::uint16_t(bits < 0 ? 0 : bits));
            const Rounding product = exact ? Rounding::none : how;
            if (!(factor > 0) || rounded(product, factor * magnitude) != largest) continue;
            if (!fits(kept, product, w, group, factor, codes)) continue;
            *scale = factor;
            return true;
        }
    return false;
}

}  // namespace

bool keep_codes(const Kept& kept, const float* w, std::size_t n_out, std::size_t n_in,
                std::size_t group, std::size_t at_once, std::uint8_t* codes, float* scale,
                std::size_t threads) {
    const std::size_t groups = (n_in + group - 1) / group, all = n_out * groups;
    std::atomic<bool> found{true};
    parallel((all + at_once - 1) / at_once, threads, [&](std::size_t run) {
        const std::size_t first = run * at_once;
        const std::size_t end = first + at_once < all ? first + at_once : all;
        std::vector<float> run_of((end - first) * group);
        for (std::size_t g = first; g < end; ++g) {
            const std::size_t column = g % groups * group, left = n_in - column;
            std::memcpy(&run_of[(g - first) * group], w + g / groups * n_in + column,
                        (left < group ? left : group) * sizeof(float));
        }
        const Rounding how = rounding_of(run_of.data(), run_of.size());
        std::vector<std::uint8_t> own(group);
        for (std::size_t g = first; g < end && found.load(std::memory_order_relaxed); ++g) {
            const float* from = &run_of[(g - first) * group];
            if (!keep_group(kept, how, from, group, own.data(), scale + g))
                found.store(false, std::memory_order_relaxed);
            const std::size_t column = g % groups * group, left = n_in - column;
            std::memcpy(codes + g / groups * n_in + column, own.data(),
                        left < group ? left : group);
        }
    });
    return found.load();
}

}  // namespace smoe
