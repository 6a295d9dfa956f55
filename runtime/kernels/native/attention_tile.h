// A tile of scores, of some queries and some keys: registers full of sums.
// Included by attention_body.h; the arithmetic is that of attention.h.
#pragma once
#include <utility>

#include "attention.h"

namespace smoe {
namespace {

typedef float Reals __attribute__((vector_size(VECTOR)));
typedef std::int32_t Wholes __attribute__((vector_size(VECTOR)));

constexpr std::size_t KEYS = 4;                      // of a tile, one after the other
constexpr std::size_t SHARING = TOKENS < 8 ? 2 : 4;  // queries of it
constexpr std::size_t ACROSS = WIDE / KEYS;          // columns of it that fold into one vector

typedef float Scores[BLOCK_KEYS];

// ---- sums of vectors

// Two vectors, of which every L lanes become half as many: lane j with j + L / 2. What was of the
// first lies before what was of the second, in all of the vector or, if L is up to 4, within each 4
// lanes.
template <std::size_t L, class V, std::size_t... I>
SMOE_INLINE V halved(V a, V b, std::index_sequence<I...>) {
    if constexpr (L > 4) {
        const Wholes low = {std::int32_t(I / (L / 2) * L + I % (L / 2))...};
        const Wholes high = {std::int32_t(I / (L / 2) * L + I % (L / 2) + L / 2)...};
        return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    } else {
        constexpr std::size_t STEP = L == 4 ? 1 : 2, ON = L / 2;
        const Wholes low = {std::int32_t(I / 4 * 4 + I % 2 * STEP + I % 4 / 2 * WIDE)...};
        const Wholes high = {std::int32_t(I / 4 * 4 + I % 2 * STEP + I % 4 / 2 * WIDE + ON)...};
        return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
}

template <std::size_t L, class V>
SMOE_INLINE V halved(V a, V b) {
    return halved<L>(a, b, std::make_index_sequence<WIDE>());
}

// ACROSS vectors to one: the sum of vector m in lanes 4 m ..
template <class V>
SMOE_INLINE V side_by_side(const V* v) {
    if constexpr (ACROSS == 4)
        return halved<8>(halved<16>(v[0], v[1]), halved<16>(v[2], v[3]));
    else if constexpr (ACROSS == 2)
        return halved<8>(v[0], v[1]);
    else
        return v[0];
}

// Vectors [KEYS][ACROSS] to their sums [ACROSS][KEYS].
template <class V>
SMOE_INLINE V sums(const V (*v)[ACROSS]) {
    V row[KEYS];
    for (std::size_t r = 0; r < KEYS; ++r) row[r] = side_by_side(v[r]);
    return halved<2>(halved<4>(row[0], row[1]), halved<4>(row[2], row[3]));
}

// ---- what lies in blocks

template <class T>
SMOE_INLINE const T* numbers(const KeyValues& state, const Cells& cells, std::size_t head,
                             std::size_t position) {
    const std::size_t token = head * BLOCK_TOKENS + position % BLOCK_TOKENS;
    return reinterpret_cast<const T*>(state.block(position) + cells.start) + token * cells.width;
}

SMOE_INLINE const float* scales(const KeyValues& state, const Cells& cells, std::size_t head,
                                std::size_t position) {
    const std::size_t token = head * BLOCK_TOKENS + position % BLOCK_TOKENS;
    return reinterpret_cast<const float*>(state.block(position) + cells.scales) +
           token * cells.groups;
}

// Brings memory nearer that will be asked for soon.
SMOE_INLINE void fetch(const void* memory, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(static_cast<const char*>(memory) + i, 0, 2);
}

// n numbers times scale as float32, then zeros up to whole lanes.
template <class W>
SMOE_INLINE void widen(const typename W::T* x, std::size_t n, float scale, float* y) {
    const std::size_t rest = n % LANES, whole = n - rest;
    const auto lanes = [&](const typename W::T* from, float* to) {
        for (std::size_t i = 0; i < LANES; i += WIDE) {
            const Reals v = Reals(W::load(from + i));
            put(to + i, Floats(sizeof(typename W::T) == 1 ? v * scale : v));
        }
    };
    for (std::size_t i = 0; i < whole; i += LANES) lanes(x + i, y + i);
    if (!rest) return;
    typename W::T end[LANES] = {};
    std::memcpy(end, x + whole, rest * sizeof(typename W::T));
    lanes(end, y + whole);
}

// ---- scores

// A tile of scores: N queries from i on (the last one again where there are fewer), and G times
// KEYS keys. Column c of it is query c % N and the keys c / N * KEYS .. of them.
template <std::size_t N, std::size_t G>
struct Tile {
    static_assert(N * G % ACROSS == 0, "columns fill vectors");
    typedef Reals Lanes[PIECES][KEYS][N * G];

    const KeyBlock& b;
    std::size_t query[N];

    SMOE_INLINE Tile(const KeyBlock& block, std::size_t i) : b(block) {
        for (std::size_t n = 0; n < N; ++n) query[n] = i + n < b.queries ? i + n : b.queries - 1;
    }

    // Whether any query sees any of the keys from position j on.
    SMOE_INLINE bool sees(std::size_t j) const {
        return b.from[query[0]] < j + G * KEYS && j < b.to[query[N - 1]];
    }

    // Columns first .. first + columns of the queries times those of the keys, which are `stride`
    // apart with zeros behind their ends, added to the lanes; the first ones begin them.
    template <class W>
    SMOE_INLINE void accumulate(std::size_t first, std::size_t columns,
                                const typename W::T* keys, std::size_t stride, Lanes& lanes,
                                const typename W::T* values = nullptr) const {
        const std::size_t rest = columns % LANES, whole = columns - rest;
        const float* q[N];
        for (std::size_t n = 0; n < N; ++n) q[n] = b.q[query[n]] + first;
        float end[N][LANES] = {};
        const float* ends[N] = {};
        if (rest)
            for (std::size_t n = 0; n < N; ++n) {
                std::memcpy(end[n], q[n] + whole, rest * sizeof(float));
                ends[n] = end[n];
            }
        for (std::size_t p = 0; p < PIECES; ++p) {
            Reals sum[KEYS][N * G];
            for (std::size_t r = 0; r < KEYS; ++r)
                for (std::size_t c = 0; c < N * G; ++c)
                    sum[r][c] = first ? lanes[p][r][c] : Reals{};
            for (std::size_t x = p * WIDE; x < whole; x += LANES)
                step<W>(q, x, keys + x, stride, sum, values);
            if (rest) step<W>(ends, p * WIDE, keys + whole + p * WIDE, stride, sum);
            for (std::size_t r = 0; r < KEYS; ++r)
                for (std::size_t c = 0; c < N * G; ++c) lanes[p][r][c] = sum[r][c];
        }
    }

    // The keys are where q + x is. `values` of the same tokens and columns are fetched, or null.
    template <class W>
    SMOE_INLINE void step(const float* const* q, std::size_t x, const typename W::T* keys,
                          std::size_t stride, Reals (&sum)[KEYS][N * G],
                          const typename W::T* values = nullptr) const {
        constexpr std::size_t LINE = 64 / (LANES * sizeof(typename W::T));  // steps
        const std::size_t row = b.state->values.width;
        if (values && x < row)
            for (std::size_t r = x / LANES % LINE; r < G * KEYS; r += LINE)
                fetch(values + r * row + x, 1);
        Reals a[N];
        for (std::size_t n = 0; n < N; ++n) a[n] = Reals(floats_at(q[n] + x));
        for (std::size_t r = 0; r < G * KEYS; ++r) {
            const Reals k = Reals(W::load(keys + r * stride));
            for (std::size_t n = 0; n < N; ++n) {
                Reals& s = sum[r % KEYS][r / KEYS * N + n];
                s = s + a[n] * k;
            }
        }
    }

    // Calls f(c, four) with the sums of every column.
    template <class V, class F>
    static SMOE_INLINE void columns(const V (&lanes)[KEYS][N * G], F&& f) {
        for (std::size_t c = 0; c < N * G; c += ACROSS) {
            V v[KEYS][ACROSS];
            for (std::size_t r = 0; r < KEYS; ++r)
                for (std::size_t m = 0; m < ACROSS; ++m) v[r][m] = lanes[r][c + m];
            const V all = sums(v);
            for (std::size_t m = 0; m < ACROSS; ++m)
                f(c + m, reinterpret_cast<const char*>(&all) + m * 16);
        }
    }

    SMOE_INLINE void fold(const Lanes& lanes, std::size_t at, Scores* scores) const {
        Reals sum[KEYS][N * G];
        for (std::size_t r = 0; r < KEYS; ++r)
            for (std::size_t c = 0; c < N * G; ++c)
                if constexpr (PIECES == 4)
                    sum[r][c] =
                        (lanes[0][r][c] + lanes[2][r][c]) + (lanes[1][r][c] + lanes[3][r][c]);
                else if constexpr (PIECES == 2)
                    sum[r][c] = lanes[0][r][c] + lanes[1][r][c];
                else
                    sum[r][c] = lanes[0][r][c];
        columns(sum, [&](std::size_t c, const char* four) {
            std::memcpy(place(scores, at, c), four, 16);
        });
    }

    SMOE_INLINE float* place(Scores* scores, std::size_t at, std::size_t column) const {
        return scores[query[column % N]] + at + column / N * KEYS;
    }

    // Scores of codes: rows of `width`, whose last vector may hold what lies behind, and `groups`
    // scales of each.
    SMOE_INLINE void multiply(const std::uint8_t* keys, std::size_t width, const float* scale,
                              std::size_t groups, std::size_t at, Scores* scores) const {
        f32x4 score[N * G] = {};
        for (std::size_t g = 0, x = 0; g < groups; ++g) {
            const std::size_t end = width < x + STATE_GROUP ? width : x + STATE_GROUP;
            Sums sum[KEYS][N * G];
            for (std::size_t r = 0; r < KEYS; ++r)
                for (std::size_t c = 0; c < N * G; ++c) sum[r][c] = no_sums();
            for (; x < end; x += VECTOR) step(keys + x, width, x, sum);
            f32x4 own[G];
            for (std::size_t i = 0; i < G; ++i) {
                const float* s = scale + i * KEYS * groups + g;
                own[i] = f32x4{s[0], s[groups], s[2 * groups], s[3 * groups]};
            }
            Wholes lanes[KEYS][N * G];
            for (std::size_t r = 0; r < KEYS; ++r)
                for (std::size_t c = 0; c < N * G; ++c) lanes[r][c] = Wholes(sum[r][c]);
            columns(lanes, [&](std::size_t c, const char* four) {
                const Codes& q = b.rounded[query[c % N]];
                i32x4 exact;
                std::memcpy(&exact, four, sizeof exact);
                exact = exact + q.sum[g];
                const f32x4 real = __builtin_convertvector(exact, f32x4);
                score[c] = score[c] + (real * own[c / N]) * q.step[g];
            });
        }
        for (std::size_t c = 0; c < N * G; ++c) std::memcpy(place(scores, at, c), &score[c], 16);
    }

    SMOE_INLINE void step(const std::uint8_t* keys, std::size_t width, std::size_t x,
                          Sums (&sum)[KEYS][N * G]) const {
        decltype(codes_at(nullptr)) q[N];
        for (std::size_t n = 0; n < N; ++n) q[n] = codes_at(b.rounded[query[n]].codes + x);
        for (std::size_t r = 0; r < G * KEYS; ++r) {
            Bytes k = bytes_at(keys + r * width);
            if (OFFSET) k = add(k, bytes_of(std::uint8_t(OFFSET)));
            for (std::size_t n = 0; n < N; ++n) {
                Sums& s = sum[r % KEYS][r / KEYS * N + n];
                s = dot(s, k, q[n]);
            }
        }
    }
};

}  // namespace
}  // namespace smoe
