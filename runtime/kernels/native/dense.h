// Dense weights: 16 lanes of float in as many vectors as an instruction set needs (`Floats`, see
// body.h). Included by body.h, in the namespace of an instruction set; the arithmetic is that of
// ffn.h.
#pragma once
#include <cstring>

#include "ffn.h"

#define SMOE_INLINE inline __attribute__((always_inline))

namespace smoe {
namespace {

constexpr std::size_t LANES = 16;
constexpr std::size_t WIDE = VECTOR / 4;           // lanes of a vector
constexpr std::size_t PIECES = LANES / WIDE;       // vectors
constexpr std::size_t MANY = PIECES == 1 ? 4 : 2;  // rows, and tokens, whose sums fit the registers

struct F32 {
    typedef float T;
    static SMOE_INLINE Floats load(const T* p) { return floats_at(p); }
};

struct BF16 {
    typedef std::uint16_t T;
    static SMOE_INLINE Floats load(const T* p) { return bf16_at(p); }
};

struct F16 {
    typedef std::uint16_t T;
    static SMOE_INLINE Floats load(const T* p) { return f16_at(p); }
};

struct I8 {
    typedef std::int8_t T;
    static SMOE_INLINE Floats load(const T* p) { return int8_at(p); }
};

// 16 columns of R rows of w times those of N tokens, added to the lanes.
template <class W, std::size_t R, std::size_t N>
SMOE_INLINE void add_lanes(const float* const* x, std::size_t k, const typename W::T* w,
                           std::size_t w_stride, Floats (&sum)[R][N][PIECES]) {
    for (std::size_t p = 0; p < PIECES; ++p) {
        Floats a[N];
        for (std::size_t t = 0; t < N; ++t) a[t] = floats_at(x[t] + k + p * WIDE);
        for (std::size_t r = 0; r < R; ++r) {
            const Floats b = W::load(w + r * w_stride + k + p * WIDE);
            for (std::size_t t = 0; t < N; ++t) sum[r][t][p] = sum[r][t][p] + a[t] * b;
        }
    }
}

// The lanes of R rows of w, `w_stride` apart, times N tokens: lanes[r][t]. Rows that end within 16
// columns go on with zeros.
template <class W, std::size_t R, std::size_t N>
SMOE_INLINE void dense_lanes(const float* const* x, std::size_t n_in, const typename W::T* w,
                             std::size_t w_stride, float (*lanes)[N][LANES]) {
    Floats sum[R][N][PIECES];
    for (std::size_t r = 0; r < R; ++r)
        for (std::size_t t = 0; t < N; ++t)
            for (std::size_t p = 0; p < PIECES; ++p) sum[r][t][p] = no_floats();
    const std::size_t rest = n_in % LANES, whole = n_in - rest;
    for (std::size_t k = 0; k < whole; k += LANES) add_lanes<W, R, N>(x, k, w, w_stride, sum);
    if (rest) {
        float x_end[N][LANES] = {};
        typename W::T w_end[R][LANES] = {};
        const float* ends[N];
        for (std::size_t t = 0; t < N; ++t) {
            std::memcpy(x_end[t], x[t] + whole, rest * sizeof(float));
            ends[t] = x_end[t];
        }
        for (std::size_t r = 0; r < R; ++r)
            std::memcpy(w_end[r], w + r * w_stride + whole, rest * sizeof(typename W::T));
        add_lanes<W, R, N>(ends, 0, w_end[0], LANES, sum);
    }
    for (std::size_t r = 0; r < R; ++r)
        for (std::size_t t = 0; t < N; ++t)
            for (std::size_t p = 0; p < PIECES; ++p) put(lanes[r][t] + p * WIDE, sum[r][t][p]);
}

// Lanes to their sum: j with j+8, j+4, j+2, j+1.
SMOE_INLINE float fold(const float* lanes) {
    float a[LANES];
    std::memcpy(a, lanes, sizeof a);
    for (std::size_t half = LANES / 2; half; half /= 2)
        for (std::size_t j = 0; j < half; ++j) a[j] += a[j + half];
    return a[0];
}

typedef float f32x4 __attribute__((vector_size(16)));
typedef std::int32_t i32x4 __attribute__((vector_size(16)));

// The same for four at once.
SMOE_INLINE f32x4 fold4(const float* a, const float* b, const float* c, const float* d) {
    const float* rows[4] = {a, b, c, d};
    f32x4 sum[4];
    for (std::size_t r = 0; r < 4; ++r) {
        f32x4 q[4];
        std::memcpy(q, rows[r], sizeof q);
        sum[r] = (q[0] + q[2]) + (q[1] + q[3]);
    }
    const i32x4 low = {0, 1, 4, 5}, high = {2, 3, 6, 7}, even = {0, 2, 4, 6}, odd = {1, 3, 5, 7};
    const f32x4 ab =
        __builtin_shuffle(sum[0], sum[1], low) + __builtin_shuffle(sum[0], sum[1], high);
    const f32x4 cd =
        __builtin_shuffle(sum[2], sum[3], low) + __builtin_shuffle(sum[2], sum[3], high);
    return __builtin_shuffle(ab, cd, even) + __builtin_shuffle(ab, cd, odd);
}

// R rows of w against N tokens: each weight is loaded once for N tokens.
template <class W, std::size_t R, std::size_t N>
SMOE_INLINE void dense_block(const float* const* x, std::size_t n_in, const typename W::T* w,
                             const float* scale, float* y, std::size_t stride) {
    float lanes[R][N][LANES];
    dense_lanes<W, R, N>(x, n_in, w, n_in, lanes);
    for (std::size_t t = 0; t < N; ++t)
        for (std::size_t r = 0; r < R; ++r) {
            const float sum = fold(lanes[r][t]);
            y[t * stride + r] = scale ? sum * scale[r] : sum;
        }
}

// Some rows against N tokens, R at a time.
template <class W, std::size_t R, std::size_t N>
SMOE_INLINE void dense_rows(const float* const* x, std::size_t n_in, const typename W::T* w,
                            std::size_t rows, const float* scale, float* y, std::size_t stride) {
    std::size_t r = 0;
    for (; r + R <= rows; r += R)
        dense_block<W, R, N>(x, n_in, w + r * n_in, scale ? scale + r : nullptr, y + r, stride);
    for (; r < rows; ++r)
        dense_block<W, 1, N>(x, n_in, w + r * n_in, scale ? scale + r : nullptr, y + r, stride);
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
    for (; t + MANY <= x.n; t += MANY)
        dense_rows<W, MANY, MANY>(x.x + t, m.n_in, data, rows, scale, y + t * stride, stride);
    for (; t < x.n; ++t)
        dense_rows<W, 4, 1>(x.x + t, m.n_in, data, rows, scale, y + t * stride, stride);
    for (t = 0; t < x.n; ++t)
        for (std::size_t r = rows; r < ROWS; ++r) y[t * stride + r] = 0;
}

}  // namespace
}  // namespace smoe
