// Dense weights: 16 lanes of float, as a vector type of the compiler. Included by body.h, in the
// namespace of an instruction set; the arithmetic is that of ffn.h.
#pragma once
#include <cstring>

#include "ffn.h"

#define SMOE_INLINE inline __attribute__((always_inline))

namespace smoe {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef std::uint32_t u32x16 __attribute__((vector_size(64)));
typedef std::uint16_t u16x16 __attribute__((vector_size(32)));
typedef std::int8_t i8x16 __attribute__((vector_size(16)));
constexpr std::size_t LANES = 16;

struct F32 {
    typedef float T;
    static SMOE_INLINE void load(const T* p, f32x16& v) { std::memcpy(&v, p, sizeof v); }
};

struct BF16 {
    typedef std::uint16_t T;
    static SMOE_INLINE void load(const T* p, f32x16& v) {
        u16x16 h;
        std::memcpy(&h, p, sizeof h);
        u32x16 w = __builtin_convertvector(h, u32x16) << 16;
        std::memcpy(&v, &w, sizeof v);
    }
};

// Exact: exponent and mantissa move to where float32 has them and are multiplied by 2^112, which
// gives subnormal numbers their place too; what has the largest exponent is infinite or no number.
struct F16 {
    typedef std::uint16_t T;
    static SMOE_INLINE void load(const T* p, f32x16& v) {
        u16x16 h;
        std::memcpy(&h, p, sizeof h);
        const u32x16 w = __builtin_convertvector(h, u32x16);
        const u32x16 magnitude = (w & 0x7FFFu) << 13;
        f32x16 scaled;
        std::memcpy(&scaled, &magnitude, sizeof scaled);
        scaled *= 0x1p112f;
        u32x16 bits;
        std::memcpy(&bits, &scaled, sizeof bits);
        bits |= (w & 0x8000u) << 16;
        bits |= u32x16((w & 0x7C00u) == 0x7C00u) & 0x7F800000u;
        std::memcpy(&v, &bits, sizeof v);
    }
};

struct I8 {
    typedef std::int8_t T;
    static SMOE_INLINE void load(const T* p, f32x16& v) {
        i8x16 b;
        std::memcpy(&b, p, sizeof b);
        v = __builtin_convertvector(b, f32x16);
    }
};

// The last n < 16 elements of a row, zero behind them.
template <class W>
SMOE_INLINE void load_tail(const typename W::T* p, std::size_t n, f32x16& v) {
    typename W::T padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(typename W::T));
    W::load(padded, v);
}

SMOE_INLINE float fold(const f32x16& v) {
    float a[LANES];
    std::memcpy(a, &v, sizeof a);
    for (std::size_t half = LANES / 2; half; half /= 2)
        for (std::size_t j = 0; j < half; ++j) a[j] += a[j + half];
    return a[0];
}

// R rows of w against N tokens: R*N sums in registers, each weight loaded once for N tokens.
template <class W, std::size_t R, std::size_t N>
SMOE_INLINE void dense_block(const float* const* x, std::size_t n_in, const typename W::T* w,
                             const float* scale, float* y, std::size_t stride) {
    f32x16 sum[R][N] = {};
    const std::size_t whole = n_in - n_in % LANES;
    for (std::size_t k = 0; k <= whole; k += LANES) {
        if (k == whole && whole == n_in) break;
        f32x16 a[N], b;
        for (std::size_t t = 0; t < N; ++t)
            k < whole ? F32::load(x[t] + k, a[t]) : load_tail<F32>(x[t] + k, n_in - k, a[t]);
        for (std::size_t r = 0; r < R; ++r) {
            k < whole ? W::load(w + r * n_in + k, b) : load_tail<W>(w + r * n_in + k, n_in - k, b);
            for (std::size_t t = 0; t < N; ++t) sum[r][t] += a[t] * b;
        }
    }
    for (std::size_t r = 0; r < R; ++r)
        for (std::size_t t = 0; t < N; ++t)
            y[t * stride + r] = scale ? fold(sum[r][t]) * scale[r] : fold(sum[r][t]);
}

template <class W>
void dense_tile(const Operand& w, std::size_t tile, const Rows& x, float* y, std::size_t stride) {
    const Matrix& m = *w.m;
    const auto* data =
        reinterpret_cast<const typename W::T*>(w.record + m.data) + tile * ROWS * m.n_in;
    const float* scale =
        m.scale < 0 ? nullptr : reinterpret_cast<const float*>(w.record + m.scale) + tile * ROWS;
    const std::size_t rows = m.n_out - tile * ROWS < ROWS ? m.n_out - tile * ROWS : ROWS;
    std::size_t t = 0;
    for (; t + 2 <= x.n; t += 2)
        for (std::size_t r = 0; r < rows;) {
            const bool four = r + 4 <= rows;
            (four ? dense_block<W, 4, 2> : dense_block<W, 1, 2>)(x.x + t, m.n_in, data + r * m.n_in,
                                                                 scale ? scale + r : nullptr,
                                                                 y + t * stride + r, stride);
            r += four ? 4 : 1;
        }
    for (; t < x.n; ++t)
        for (std::size_t r = 0; r < rows;) {
            const bool four = r + 4 <= rows;
            (four ? dense_block<W, 4, 1> : dense_block<W, 1, 1>)(x.x + t, m.n_in, data + r * m.n_in,
                                                                 scale ? scale + r : nullptr,
                                                                 y + t * stride + r, stride);
            r += four ? 4 : 1;
        }
    for (t = 0; t < x.n; ++t)
        for (std::size_t r = rows; r < ROWS; ++r) y[t * stride + r] = 0;
}

}  // namespace
}  // namespace smoe
