// log, exp, softplus, pow, sin and cos in double: sums and products of IEEE's, in the order written
// down here, so that every machine gives the bits of rows.py once they are rounded to float32.
// Included in the namespace of an instruction set.
#pragma once
#include "functions.h"

namespace smoe {
namespace {

SMOE_INLINE std::uint64_t bits_of(double d) {
    std::uint64_t u;
    std::memcpy(&u, &d, sizeof u);
    return u;
}

SMOE_INLINE double double_of(std::uint64_t u) {
    double d;
    std::memcpy(&d, &u, sizeof d);
    return d;
}

template <std::size_t N>
SMOE_INLINE double horner(double x, const double (&coefficients)[N]) {
    double y = coefficients[0];
    for (std::size_t i = 1; i < N; ++i) y = y * x + coefficients[i];
    return y;
}

constexpr double LN2 = 0.693147180559945309;
constexpr double ODD[] = {1.0 / 27, 1.0 / 25, 1.0 / 23, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15,
                          1.0 / 13, 1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};

// log((1 + s) / (1 - s)) for |s| <= 1/3: its series to s^27.
SMOE_INLINE double log_ratio(double s) { return 2.0 * (s * horner(s * s, ODD)); }

// Of a float's value: mantissa in [2/3, 4/3), exponent.
SMOE_INLINE double log_double(double x) {
    const double infinity = double_of(0x7FF0000000000000u), nan = double_of(0x7FF8000000000000u);
    if (!(x > 0.0)) return x == 0.0 ? -infinity : nan;
    if (x == infinity) return x;
    std::int64_t exponent = std::int64_t(bits_of(x) >> 52) - 1023;
    double m = double_of((bits_of(x) & 0xFFFFFFFFFFFFFu) | 0x3FF0000000000000u);
    if (m >= 1.3333333333333333) m = m * 0.5, exponent += 1;
    return double(exponent) * LN2 + log_ratio((m - 1.0) / (m + 1.0));
}

constexpr double FACTORIALS[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                 1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                 1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2,
                                 1.0,              1.0};

// x limited to -200 .. 200, which float32 cannot hold either way; NaN stays.
SMOE_INLINE double exp_double(double x) {
    x = x < -200.0 ? -200.0 : x > 200.0 ? 200.0 : x;
    const double shifted = x * (1.0 / LN2) + 6755399441055744.0, n = shifted - 6755399441055744.0;
    const double y = horner(x - n * LN2, FACTORIALS);
    return y * double_of((bits_of(shifted) - (0x4338000000000000u - 1023u)) << 52);
}

SMOE_INLINE float log_(float x) { return float(log_double(x)); }

// max(x, 0) + log(1 + e^-|x|)
SMOE_INLINE float softplus_(float x) {
    const double e = exp_double(-double(magnitude(x)));
    return float((x < 0.0f ? 0.0 : double(x)) + log_ratio(e / (2.0 + e)));
}

// Whole exponents take a negative base; everything else of one is NaN.
SMOE_INLINE float pow_(float x, float y) {
    if (y == 2.0f) return x * x;
    if (y == 0.0f || x == 1.0f) return 1.0f;
    const double whole = double(std::int64_t(y < -9e15f || y > 9e15f || y != y ? 0.0f : y));
    const bool is_whole = whole == double(y), odd = is_whole && (std::int64_t(whole) & 1);
    if (x < 0.0f && !is_whole) return float_of(0x7FC00000u);
    const float m = float(exp_double(double(y) * log_double(magnitude(x))));
    return x < 0.0f && odd ? -m : m;
}

constexpr double SINE[] = {1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0, -1.0 / 5040.0,
                           1.0 / 120.0,        -1.0 / 6.0,        1.0};
constexpr double COSINE[] = {-1.0 / 87178291200.0, 1.0 / 479001600.0, -1.0 / 3628800.0,
                             1.0 / 40320.0,        -1.0 / 720.0,      1.0 / 24.0,
                             -0.5,                 1.0};

// Of x + quarter * pi / 2, to half a unit of float32 for angles up to 2^20: pi / 2 in two parts,
// of which products of the first with 20 bits are exact. Beyond 2^30: NaN.
SMOE_INLINE float sine(float angle, std::int64_t quarter) {
    if (!(magnitude(angle) <= 1073741824.0f)) return float_of(0x7FC00000u);
    const double x = angle;
    const double shifted = x * 0.636619772367581343 + 6755399441055744.0;
    const double n = shifted - 6755399441055744.0;
    const double r = (x - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
    const std::int64_t turn = std::int64_t(bits_of(shifted)) + quarter;
    const double z = r * r;
    const double y = turn & 1 ? horner(z, COSINE) : r * horner(z, SINE);
    return float(turn & 2 ? -y : y);
}

}  // namespace
}  // namespace smoe
