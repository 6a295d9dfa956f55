// Queries against a block of keys, and blocks joined. Included after body.h; the arithmetic is that
// of attention.h.
#pragma once
#include <limits>

#include "attention_tile.h"

namespace smoe {
namespace {

constexpr std::size_t PANEL = 640 * KEYS;  // numbers of keys that are float32 at once
constexpr std::size_t STRIP = 64;          // columns of values that are

// ---- scores

// Whether numbers are multiplied where they lie: where N queries read them it would not pay to make
// them float32 first.
template <class W, std::size_t N>
constexpr bool IN_PLACE = sizeof(typename W::T) == 4 || (sizeof(typename W::T) == 2 && N == 1);

// Scores of all queries, of keys that any of them sees, and some beside them.
template <class W, std::size_t N, std::size_t G>
void score(const KeyBlock& b, Scores* scores) {
    typedef typename W::T T;
    constexpr std::size_t R = G * KEYS, COLUMNS_AT_ONCE = PANEL / R;
    const std::size_t width = b.state->keys.width, end = b.to[b.queries - 1];
    alignas(64) float panel[PANEL];
    typename Tile<N, G>::Lanes lanes[N == 1 ? 1 : QUERIES / N];
    for (std::size_t j = b.from[0] / R * R; j < end; j += R) {
        const T* keys = numbers<T>(*b.state, b.state->keys, b.head, j);
        const T* values = numbers<T>(*b.state, b.state->values, b.head, j);
        if (N > 1 && !b.state->latent) fetch(values, R * b.state->values.width * sizeof(T));
        for (std::size_t c = 0; c < width; c += COLUMNS_AT_ONCE) {
            const std::size_t n = width - c < COLUMNS_AT_ONCE ? width - c : COLUMNS_AT_ONCE;
            const auto tiles = [&](auto type, const auto* rows, std::size_t stride,
                                   const auto* ahead) {
                for (std::size_t i = 0; i < b.queries; i += N) {
                    const Tile<N, G> tile(b, i);
                    if (!tile.sees(j)) continue;
                    tile.template accumulate<decltype(type)>(c, n, rows, stride, lanes[i / N],
                                                             ahead);
                    if (c + n == width) tile.fold(lanes[i / N], j % BLOCK_KEYS, scores);
                }
            };
            if constexpr (IN_PLACE<W, N>)
                if (n % LANES == 0) {
                    tiles(W(), keys + c, width, N == 1 ? values + c : nullptr);
                    continue;
                }
            const std::size_t stride = (n + LANES - 1) / LANES * LANES;
            for (std::size_t r = 0; r < R; ++r)
                widen<W>(keys + r * width + c, n, 1, panel + r * stride);
            tiles(F32(), panel, stride, static_cast<const float*>(nullptr));
        }
    }
}

template <std::size_t N, std::size_t G>
void score_rounded(const KeyBlock& b, Scores* scores) {
    const Cells& cells = b.state->keys;
    const std::size_t end = b.to[b.queries - 1];
    for (std::size_t j = b.from[0] / (G * KEYS) * G * KEYS; j < end; j += G * KEYS) {
        const auto* keys = numbers<std::uint8_t>(*b.state, cells, b.head, j);
        const float* scale = smoe::scales(*b.state, cells, b.head, j);
        if (!b.state->latent)
            fetch(numbers<std::uint8_t>(*b.state, b.state->values, b.head, j),
                  G * KEYS * b.state->values.width);
        for (std::size_t i = 0; i < b.queries; i += N) {
            const Tile<N, G> tile(b, i);
            if (tile.sees(j))
                tile.multiply(keys, cells.width, scale, cells.groups, j % BLOCK_KEYS, scores);
        }
    }
}

// ---- weights

// Scores of what a query sees to m, s and, in their place, e.
SMOE_INLINE void weigh(float* scores, std::size_t from, std::size_t to, float scale, float softcap,
                       float* m, float* s) {
    const std::size_t first = from / LANES * LANES, end = (to + LANES - 1) / LANES * LANES;
    const float none = -std::numeric_limits<float>::infinity();
    const auto outside = [&](float x) {
        for (std::size_t j = first; j < from; ++j) scores[j] = x;
        for (std::size_t j = to; j < end; ++j) scores[j] = x;
    };
    const auto each = [&](auto&& f) {
        for (std::size_t j = first; j < end; j += LANES)
            for (std::size_t l = 0; l < LANES; ++l) f(scores[j + l], l);
    };
    outside(0);
    each([&](float& x, std::size_t) { x *= scale; });
    if (softcap != 0) each([&](float& x, std::size_t) { x = softcap * tanh_(x / softcap); });
    outside(none);
    float largest[LANES], lanes[LANES] = {};
    for (float& x : largest) x = none;
    each([&](float& x, std::size_t l) { largest[l] = x > largest[l] ? x : largest[l]; });
    float most = none;
    for (float x : largest) most = x > most ? x : most;
    each([&](float& x, std::size_t) { x = exp_(x - most); });
    outside(0);
    each([&](float& x, std::size_t l) { lanes[l] += x; });
    *m = most, *s = fold(lanes);
}

// ---- values

// Values of BLOCK_TOKENS tokens from position t on, or of as many as the queries see: some columns
// of them, whole lanes. `next`: keys of what comes next, of the same tokens and columns, or null.
template <class W>
struct Strip {
    std::size_t t;
    const typename W::T* values;
    std::size_t stride, first, columns;
    const typename W::T* next;
    std::size_t next_stride;
};

// Weights [query][token] times C vectors of values, of the tokens from .. to, added to the sums of
// N queries.
template <class W, std::size_t N, std::size_t C>
SMOE_INLINE void add_columns(const Strip<W>& s, std::size_t from, std::size_t to,
                             const float* const* e, float* const* a, std::size_t c) {
    Reals sum[N][C];
    for (std::size_t n = 0; n < N; ++n)
        for (std::size_t i = 0; i < C; ++i) sum[n][i] = Reals(floats_at(a[n] + c + i * WIDE));
    for (std::size_t t = from; t < to; ++t) {
        if (N == 1 && s.next)
            fetch(s.next + t * s.next_stride + c, C * WIDE * sizeof(typename W::T));
        Reals v[C];
        for (std::size_t i = 0; i < C; ++i)
            v[i] = Reals(W::load(s.values + t * s.stride + c + i * WIDE));
        for (std::size_t n = 0; n < N; ++n)
            for (std::size_t i = 0; i < C; ++i) sum[n][i] = sum[n][i] + v[i] * e[n][t];
    }
    for (std::size_t n = 0; n < N; ++n)
        for (std::size_t i = 0; i < C; ++i) put(a[n] + c + i * WIDE, Floats(sum[n][i]));
}

template <class W, std::size_t N>
SMOE_INLINE void add_strip(const Strip<W>& s, std::size_t from, std::size_t to,
                           const float* const* e, float* const* a) {
    constexpr std::size_t C = 4;
    if (from >= to) return;
    std::size_t c = 0;
    for (; c + C * WIDE <= s.columns; c += C * WIDE) add_columns<W, N, C>(s, from, to, e, a, c);
    for (; c < s.columns; c += WIDE) add_columns<W, N, 1>(s, from, to, e, a, c);
}

// N queries from i on: tokens that all of them see go together.
template <class W, std::size_t N>
SMOE_INLINE void add_seen(const KeyBlock& b, std::size_t i, const Strip<W>& s,
                          const Scores* scores) {
    const auto clipped = [&](std::size_t x) {
        return x < s.t ? 0 : x - s.t < BLOCK_TOKENS ? x - s.t : BLOCK_TOKENS;
    };
    std::size_t from[N], to[N], begin = 0, end = BLOCK_TOKENS;
    const float* e[N];
    float* a[N];
    for (std::size_t n = 0; n < N; ++n) {
        from[n] = clipped(b.from[i + n]), to[n] = clipped(b.to[i + n]);
        begin = from[n] > begin ? from[n] : begin, end = to[n] < end ? to[n] : end;
        e[n] = scores[i + n] + s.t % BLOCK_KEYS, a[n] = b.out[i + n] + s.first;
    }
    const bool together = begin < end;
    for (std::size_t n = 0; n < N; ++n)
        add_strip<W, 1>(s, from[n], together ? begin : to[n], e + n, a + n);
    if (!together) return;
    add_strip<W, N>(s, begin, end, e, a);
    for (std::size_t n = 0; n < N; ++n)
        add_strip<W, 1>(s, end, to[n], e + n, a + n);
}

// A strip, for all queries, of which there are at least N.
template <class W, std::size_t N>
SMOE_INLINE void add_all(const KeyBlock& b, const Strip<W>& strip, const Scores* scores) {
    std::size_t i = 0;
    for (; i + N <= b.queries; i += N) add_seen<W, N>(b, i, strip, scores);
    for (; N > 2 && i + 2 <= b.queries; i += 2) add_seen<W, 2>(b, i, strip, scores);
    for (; N > 1 && i < b.queries; ++i) add_seen<W, 1>(b, i, strip, scores);
}

template <class W, std::size_t N>
void add_values(const KeyBlock& b, const Scores* scores) {
    typedef typename W::T T;
    const KeyValues& state = *b.state;
    const std::size_t row = state.values.width, width = state.value_width;
    const std::size_t begin = b.from[0], end = b.to[b.queries - 1];
    const std::size_t to_come = BLOCK_TOKENS * state.keys.width * sizeof(T);  // bytes
    alignas(64) float panel[BLOCK_TOKENS * STRIP];
    for (std::size_t t = begin / BLOCK_TOKENS * BLOCK_TOKENS; t < end; t += BLOCK_TOKENS) {
        const std::size_t first = begin > t ? begin - t : 0;
        const std::size_t last = end - t < BLOCK_TOKENS ? end - t : BLOCK_TOKENS;
        const T* values = numbers<T>(state, state.values, b.head, t);
        const std::uint8_t* next = b.next[t % BLOCK_KEYS / BLOCK_TOKENS];
        for (std::size_t c = 0; c < width; c += STRIP) {
            const std::size_t n = width - c < STRIP ? width - c : STRIP;
            if (next && !(IN_PLACE<W, N> && N == 1)) {
                const std::size_t done = to_come * c / width, more = to_come * (c + n) / width;
                fetch(next + done, more - done);
            }
            const std::size_t columns = (n + LANES - 1) / LANES * LANES;
            if constexpr (IN_PLACE<W, N>)
                if (n % LANES == 0) {
                    const T* keys = reinterpret_cast<const T*>(next);
                    const Strip<W> strip = {
                        t,       values + c, row, c,
                        columns, N == 1 && keys ? keys + c : nullptr, state.keys.width};
                    add_all<W, N>(b, strip, scores);
                    continue;
                }
            const float* scale = sizeof(T) == 1 ? smoe::scales(state, state.values, b.head, t) +
                                                      c / STATE_GROUP
                                                : nullptr;
            for (std::size_t r = first; r < last; ++r)
                widen<W>(values + r * row + c, n, scale ? scale[r * state.values.groups] : 1,
                         panel + r * STRIP);
            add_all<F32, N>(b, Strip<F32>{t, panel, STRIP, c, columns, nullptr, 0}, scores);
        }
    }
}

void attend(const KeyBlock& b) {
    alignas(64) Scores scores[QUERIES];
    const bool alone = b.queries == 1;
    switch (b.state->kind) {
        case StateKind::f32:
            (alone ? score<F32, 1, ACROSS> : score<F32, SHARING, 1>)(b, scores);
            break;
        case StateKind::f16:
            (alone ? score<F16, 1, ACROSS> : score<F16, SHARING, 1>)(b, scores);
            break;
        case StateKind::int8:
            (alone ? score_rounded<1, ACROSS> : score_rounded<SHARING, 1>)(b, scores);
    }
    const std::size_t width = whole_lanes(b.state->value_width);
    for (std::size_t i = 0; i < b.queries; ++i) {
        const std::size_t from = b.from[i] % BLOCK_KEYS, to = from + b.to[i] - b.from[i];
        float* out = b.out[i];
        weigh(scores[i], from, to, b.scale, b.softcap, out + width, out + width + 1);
        std::memset(out, 0, width * sizeof(float));
    }
    switch (b.state->kind) {
        case StateKind::f32:
            return (alone ? add_values<F32, 1> : add_values<F32, SHARING>)(b, scores);
        case StateKind::f16:
            return (alone ? add_values<F16, 1> : add_values<F16, SHARING>)(b, scores);
        case StateKind::int8:
            return (alone ? add_values<I8, 1> : add_values<I8, SHARING>)(b, scores);
    }
}

// ---- blocks to an answer

void join(const Join& j) {
    const std::size_t behind = whole_lanes(j.width);
    std::size_t b = 0;
    float most = j.most_sum[0], sum = j.most_sum[1];
    if (j.first) {
        const float* block = j.results;
        most = j.sink ? *j.sink : block[behind], sum = j.sink ? 1 : block[behind + 1];
        for (std::size_t i = 0; i < j.width; ++i) j.y[i] = j.sink ? 0 : block[i];
        b = j.sink ? 0 : 1;
    }
    for (; b < j.count; ++b) {
        const float* block = j.results + b * result_width(j.width);
        const float m = block[behind], next = m > most ? m : most;
        const float old = exp_(most - next), now = exp_(m - next);
        most = next;
        sum = sum * old + block[behind + 1] * now;
        for (std::size_t i = 0; i < j.width; ++i) j.y[i] = j.y[i] * old + block[i] * now;
    }
    j.most_sum[0] = most, j.most_sum[1] = sum;
    if (j.last)
        for (std::size_t i = 0; i < j.width; ++i) j.y[i] /= sum;
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
