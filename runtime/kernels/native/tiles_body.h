// A tile's codes times the activations of tokens: integer sums of a group, times its scale, times
// its step. Included by body.h, which says what the vectors of an instruction set must offer; the
// arithmetic is that of ffn.h.
#pragma once
#include <cstring>

#include "dense.h"

namespace smoe {
namespace {

constexpr std::size_t PARTS = SLICE / VECTOR;  // of a block, each with rows of its own
constexpr std::size_t QUADS = COLUMNS / 4;     // of a block's columns
constexpr std::size_t BLOCK = ROWS * COLUMNS;  // bytes of its codes, one each: quad, row, column
constexpr std::size_t CHUNK = 16;  // blocks that are done for all tokens: two tiles of them stay in
                                   // the nearest cache
constexpr std::size_t AHEAD = 2048;  // bytes that are fetched ahead where codes are read once

// Some columns of tiles that lie one after another: whole groups of codes, one byte each. `stored`
// codes (int8) are the value + 128, others are as `dot` wants them.
template <class S>
struct Panel {                    // S: the type of scales, F32 or BF16
    const std::uint8_t* codes;    // of the first tile, from these columns on
    std::size_t to_next;          // bytes from a tile to the next
    const typename S::T* scales;  // of the first tile: [groups][ROWS], all of its groups
    std::size_t groups;           // of a row
    std::size_t in_group;         // blocks
    std::size_t first, blocks;    // the first block of these columns, and how many
};

// V vectors of rows, the first of which is `row_vector`, times N tokens from t on. Sums of y stay
// in registers; they begin with 0 where these are the first columns, else with y.
template <bool STORED, std::size_t V, std::size_t N, class S>
SMOE_INLINE void multiply(const Panel<S>& p, std::size_t row_vector, const Rows& x, std::size_t t,
                          float* y, std::size_t stride) {
    const std::uint8_t* w[V];
    const typename S::T* scales[V];
    const std::int8_t* q[N];
    Floats total[V][N];
    y += t * stride + row_vector * WIDE;
    for (std::size_t v = 0; v < V; ++v) {
        const std::size_t tile = (row_vector + v) / PARTS, part = (row_vector + v) % PARTS;
        w[v] = p.codes + tile * p.to_next + part * VECTOR;
        scales[v] = p.scales + tile * p.groups * ROWS + part * WIDE;
    }
    for (std::size_t n = 0; n < N; ++n) {
        q[n] = x.q[t + n] + p.first * COLUMNS;
        for (std::size_t v = 0; v < V; ++v)
            total[v][n] = p.first ? floats_at(y + n * stride + v * WIDE) : no_floats();
    }
    for (std::size_t g = p.first / p.in_group, b = 0; b < p.blocks; ++g) {
        Sums sums[V][N];
        for (std::size_t n = 0; n < N; ++n)
            for (std::size_t v = 0; v < V; ++v) sums[v][n] = start(x.sum[t + n][g]);
        const std::size_t end = b + p.in_group < p.blocks ? b + p.in_group : p.blocks;
        for (; b < end; ++b) {
#pragma GCC unroll 8
            for (std::size_t i = 0; i < QUADS; ++i) {
                if (STORED && N == 1) __builtin_prefetch(w[0] + b * BLOCK + i * SLICE + AHEAD);
                Bytes codes[V];
                for (std::size_t v = 0; v < V; ++v) {
                    codes[v] = bytes_at(w[v] + b * BLOCK + i * SLICE);
                    if (STORED && OFFSET == 0) codes[v] = turned(codes[v]);
                }
                for (std::size_t n = 0; n < N; ++n) {
                    const auto quad = quad_at(q[n] + b * COLUMNS + i * 4);
                    for (std::size_t v = 0; v < V; ++v)
                        sums[v][n] = dot(sums[v][n], codes[v], quad);
                }
            }
        }
        for (std::size_t v = 0; v < V; ++v) {
            const Floats scale = S::load(scales[v] + g * ROWS);
            for (std::size_t n = 0; n < N; ++n)
                total[v][n] = scaled(total[v][n], sums[v][n], scale, x.step[t + n][g]);
        }
    }
    for (std::size_t n = 0; n < N; ++n)
        for (std::size_t v = 0; v < V; ++v) put(y + n * stride + v * WIDE, total[v][n]);
}

// The same for all tokens.
template <bool STORED, std::size_t V, class S>
SMOE_INLINE void multiply_all(const Panel<S>& p, std::size_t row_vector, const Rows& x, float* y,
                              std::size_t stride) {
    std::size_t t = 0;
    for (; t + TOKENS / V <= x.n; t += TOKENS / V)
        multiply<STORED, V, TOKENS / V>(p, row_vector, x, t, y, stride);
    for (; t + 2 <= x.n; t += 2) multiply<STORED, V, 2>(p, row_vector, x, t, y, stride);
    for (; t < x.n; ++t) multiply<STORED, V, 1>(p, row_vector, x, t, y, stride);
}

// The rows of `tiles` tiles times all tokens.
template <bool STORED, class S>
void multiply_panel(const Panel<S>& p, std::size_t tiles, const Rows& x, float* y,
                    std::size_t stride) {
    std::size_t v = 0;
    if (x.n == 1) {
        for (; v < tiles * PARTS; v += PARTS) multiply<STORED, PARTS, 1>(p, v, x, 0, y, stride);
        return;
    }
    for (; v + VECTORS <= tiles * PARTS; v += VECTORS)
        multiply_all<STORED, VECTORS>(p, v, x, y, stride);
    for (; v < tiles * PARTS; ++v) multiply_all<STORED, 1>(p, v, x, y, stride);
}

}  // namespace
}  // namespace smoe
