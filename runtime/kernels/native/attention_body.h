// Queries against a block of keys, and blocks joined. Included after body.h; the arithmetic is that
// of attention.h.
#pragma once
#include <limits>

#include "attention.h"

namespace smoe {
namespace {

constexpr std::size_t KEYS = 4;                              // that are multiplied together
constexpr std::size_t SHARING = PIECES == 1 ? 4 : 1;         // queries that share a load of keys
constexpr std::size_t VALUES_SHARING = PIECES == 1 ? 4 : 2;  // the same of values
constexpr std::size_t FETCHED = 2048;                        // bytes that are fetched ahead

// Where scores of the block begin in memory, and what lies in it: [queries][BLOCK_KEYS].
typedef float Scores[BLOCK_KEYS];

// Scores of N queries from `i` on, for R keys from position j on.
template <class W, std::size_t R, std::size_t N>
SMOE_INLINE void score(const KeyBlock& b, const typename W::T* keys, std::size_t j, std::size_t i,
                       Scores* scores) {
    const std::size_t width = b.state->key_width, at = j % BLOCK_KEYS;
    float lanes[R][N][LANES];
    dense_lanes<W, R, N>(b.q + i, width, keys + j * width, width, lanes);
    for (std::size_t n = 0; n < N; ++n) {
        if (R == KEYS) {
            const f32x4 four = fold4(lanes[0][n], lanes[R > 1][n], lanes[R > 2 ? 2 : 0][n],
                                     lanes[R > 3 ? 3 : 0][n]);
            std::memcpy(scores[i + n] + at, &four, sizeof four);
        } else {
            for (std::size_t r = 0; r < R; ++r) scores[i + n][at + r] = fold(lanes[r][n]);
        }
    }
}

template <class W, std::size_t R>
SMOE_INLINE void score_all(const KeyBlock& b, const typename W::T* keys, std::size_t j,
                           Scores* scores) {
    std::size_t i = 0;
    for (; i + SHARING <= b.queries; i += SHARING)  // what they see rises with them
        if (b.from[i] < j + R && j < b.to[i + SHARING - 1])
            score<W, R, SHARING>(b, keys, j, i, scores);
    for (; i < b.queries; ++i)
        if (b.from[i] < j + R && j < b.to[i]) score<W, R, 1>(b, keys, j, i, scores);
}

// Scores of what a query sees to m, s and, in their place, e.
SMOE_INLINE void weigh(float* scores, std::size_t from, std::size_t to, float scale, float softcap,
                       float* m, float* s) {
    const std::size_t first = from / LANES * LANES, end = (to + LANES - 1) / LANES * LANES;
    for (std::size_t j = from; j < to; ++j) scores[j] *= scale;
    if (softcap != 0)
        for (std::size_t j = from; j < to; ++j) scores[j] = softcap * tanh_(scores[j] / softcap);
    const float none = -std::numeric_limits<float>::infinity();
    for (std::size_t j = first; j < from; ++j) scores[j] = none;
    for (std::size_t j = to; j < end; ++j) scores[j] = none;
    float largest[LANES], lanes[LANES] = {};
    for (std::size_t l = 0; l < LANES; ++l) largest[l] = none;
    for (std::size_t j = first; j < end; j += LANES)
        for (std::size_t l = 0; l < LANES; ++l)
            largest[l] = scores[j + l] > largest[l] ? scores[j + l] : largest[l];
    float most = none;
    for (std::size_t l = 0; l < LANES; ++l) most = largest[l] > most ? largest[l] : most;
    for (std::size_t j = first; j < end; ++j) scores[j] = exp_(scores[j] - most);
    for (std::size_t j = first; j < from; ++j) scores[j] = 0;
    for (std::size_t j = to; j < end; ++j) scores[j] = 0;
    for (std::size_t j = first; j < end; j += LANES)
        for (std::size_t l = 0; l < LANES; ++l) lanes[l] += scores[j + l];
    *m = most, *s = fold(lanes);
}

// C vectors of values from column c on, of the keys from .. to, added to the sums of N queries.
template <class W, std::size_t N, std::size_t C>
SMOE_INLINE void add_columns(const typename W::T* values, std::size_t width, std::size_t c,
                             std::size_t from, std::size_t to, const Scores* e, float* const* out) {
    constexpr std::size_t LINE = 64 / sizeof(typename W::T);
    Floats sum[N][C];
    for (std::size_t n = 0; n < N; ++n)
        for (std::size_t i = 0; i < C; ++i) sum[n][i] = floats_at(out[n] + 2 + c + i * WIDE);
    for (std::size_t j = from; j < to; ++j) {
        const typename W::T* row = values + j * width + c;
        for (std::size_t i = 0; i < C * WIDE; i += LINE)
            __builtin_prefetch(row + i + FETCHED / sizeof(typename W::T));
        Floats v[C];
        for (std::size_t i = 0; i < C; ++i) v[i] = W::load(row + i * WIDE);
        for (std::size_t n = 0; n < N; ++n) {
            const float weight = e[n][j % BLOCK_KEYS];
            for (std::size_t i = 0; i < C; ++i) sum[n][i] = sum[n][i] + v[i] * weight;
        }
    }
    for (std::size_t n = 0; n < N; ++n)
        for (std::size_t i = 0; i < C; ++i) put(out[n] + 2 + c + i * WIDE, sum[n][i]);
}

template <class W, std::size_t N>
SMOE_INLINE void add_values(const typename W::T* values, std::size_t width, std::size_t from,
                            std::size_t to, const Scores* e, float* const* out) {
    constexpr std::size_t C = N > 2 ? 4 : 8 / N;
    std::size_t c = 0;
    for (; c + C * WIDE <= width; c += C * WIDE)
        add_columns<W, N, C>(values, width, c, from, to, e, out);
    for (; c + WIDE <= width; c += WIDE) add_columns<W, N, 1>(values, width, c, from, to, e, out);
    if (c == width) return;
    for (std::size_t j = from; j < to; ++j) {
        typename W::T end[WIDE] = {};
        float v[WIDE];
        std::memcpy(end, values + j * width + c, (width - c) * sizeof(typename W::T));
        put(v, W::load(end));
        for (std::size_t n = 0; n < N; ++n)
            for (std::size_t i = 0; i < width - c; ++i)
                out[n][2 + c + i] += v[i] * e[n][j % BLOCK_KEYS];
    }
}

// The same for N queries that see different keys: those that all of them see go together.
template <class W, std::size_t N>
SMOE_INLINE void add_seen(const KeyBlock& b, const typename W::T* values, std::size_t i,
                          const Scores* e) {
    const std::size_t width = b.state->value_width;
    std::size_t from = b.from[i], to = b.to[i];
    for (std::size_t n = 1; n < N; ++n) {
        from = b.from[i + n] > from ? b.from[i + n] : from;
        to = b.to[i + n] < to ? b.to[i + n] : to;
    }
    const bool together = from < to;
    for (std::size_t n = 0; n < N; ++n)
        add_values<W, 1>(values, width, b.from[i + n], together ? from : b.to[i + n], e + i + n,
                         b.out + i + n);
    if (!together) return;
    add_values<W, N>(values, width, from, to, e + i, b.out + i);
    for (std::size_t n = 0; n < N; ++n)
        add_values<W, 1>(values, width, to, b.to[i + n], e + i + n, b.out + i + n);
}

template <class W>
void attend_as(const KeyBlock& b) {
    typedef typename W::T T;
    const KeyValues& state = *b.state;
    const T* keys = static_cast<const T*>(state.keys) + b.head * state.capacity * state.key_width;
    const T* values =
        static_cast<const T*>(state.values) + b.head * state.capacity * state.value_width;
    alignas(64) Scores scores[QUERIES];
    std::size_t j = b.from[0];
    const std::size_t end = b.to[b.queries - 1];
    for (; j + KEYS <= end; j += KEYS) {
        const T* ahead = keys + j * state.key_width + FETCHED / sizeof(T);
        for (std::size_t k = 0; k < KEYS * state.key_width; k += 64 / sizeof(T))
            __builtin_prefetch(ahead + k);
        score_all<W, KEYS>(b, keys, j, scores);
    }
    for (; j < end; ++j) score_all<W, 1>(b, keys, j, scores);
    for (std::size_t i = 0; i < b.queries; ++i) {
        const std::size_t from = b.from[i] % BLOCK_KEYS, to = from + b.to[i] - b.from[i];
        weigh(scores[i], from, to, b.scale, b.softcap, b.out[i], b.out[i] + 1);
        std::memset(b.out[i] + 2, 0, state.value_width * sizeof(float));
    }
    std::size_t i = 0;
    for (; i + VALUES_SHARING <= b.queries; i += VALUES_SHARING)
        add_seen<W, VALUES_SHARING>(b, values, i, scores);
    for (; i < b.queries; ++i) add_seen<W, 1>(b, values, i, scores);
}

void attend(const KeyBlock& b) { b.state->half ? attend_as<F16>(b) : attend_as<F32>(b); }

// `count` blocks, each m, s and a [width], one behind the other, and perhaps a sink.
void join(const float* blocks, std::size_t count, std::size_t width, const float* sink, float* y) {
    float most = sink ? *sink : blocks[0], sum = sink ? 1 : blocks[1];
    for (std::size_t i = 0; i < width; ++i) y[i] = sink ? 0 : blocks[2 + i];
    for (std::size_t b = sink ? 0 : 1; b < count; ++b) {
        const float* block = blocks + b * (2 + width);
        const float next = block[0] > most ? block[0] : most;
        const float old = exp_(most - next), now = exp_(block[0] - next);
        most = next;
        sum = sum * old + block[1] * now;
        for (std::size_t i = 0; i < width; ++i) y[i] = y[i] * old + block[2 + i] * now;
    }
    for (std::size_t i = 0; i < width; ++i) y[i] /= sum;
}

void to_f16(const float* x, std::size_t n, std::uint16_t* y) {
    std::size_t i = 0;
    for (; i + WIDE <= n; i += WIDE) put_f16(y + i, floats_at(x + i));
    if (i == n) return;
    float end[WIDE] = {};
    std::uint16_t halves[WIDE];
    std::memcpy(end, x + i, (n - i) * sizeof(float));
    put_f16(halves, floats_at(end));
    std::memcpy(y + i, halves, (n - i) * sizeof(std::uint16_t));
}

}  // namespace
}  // namespace smoe
