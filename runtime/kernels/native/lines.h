// The lines of row operations, piece by piece: float32 numbers side by side where they lie, others
// by way of a room; and their sums. Included by rows_body.h, once for an instruction set.
#pragma once
#include <limits>

#include "functions.h"
#include "rows.h"

namespace smoe {
namespace {

constexpr std::size_t PIECE = 256;  // a whole number of lanes

// Every second number of a line, or a half of it, is a line.
SMOE_INLINE Line part(const Line& line, std::size_t n, std::ptrdiff_t every) {
    return {line.there, line.type, n, line.step * every};
}

SMOE_INLINE std::ptrdiff_t place(const Line& line, std::size_t i) {
    return std::ptrdiff_t(i) * line.step;
}

SMOE_INLINE float number(const Line& line, const void* at, std::size_t i) {
    if (line.type == Type::f32) return static_cast<const float*>(at)[place(line, i)];
    if (line.type == Type::i64)
        return float(static_cast<const std::int64_t*>(at)[place(line, i)]);
    return static_cast<const std::uint8_t*>(at)[place(line, i)] ? 1.0f : 0.0f;
}

SMOE_INLINE std::int64_t whole(const Line& line, const void* at, std::size_t i) {
    if (line.type == Type::i64) return static_cast<const std::int64_t*>(at)[place(line, i)];
    return static_cast<const std::uint8_t*>(at)[place(line, i)] ? 1 : 0;
}

SMOE_INLINE bool beside(const Line& line) { return line.type == Type::f32 && line.step == 1; }

// Numbers first .. first + n, n at most PIECE: where they lie, or copied to `room`.
SMOE_INLINE const float* floats(const Line& line, const void* at, std::size_t first, std::size_t n,
                                float* room) {
    if (beside(line)) return static_cast<const float*>(at) + first;
    for (std::size_t i = 0; i < n; ++i) room[i] = number(line, at, first + i);
    return room;
}

// Where to write numbers first ..; `store` brings them to their places.
SMOE_INLINE float* target(const Line& line, void* at, std::size_t first, float* room) {
    return beside(line) ? static_cast<float*>(at) + first : room;
}

SMOE_INLINE std::int64_t cut_off(float x) {
    if (x != x) return 0;
    if (x >= 9223372036854775808.0f) return std::numeric_limits<std::int64_t>::max();
    if (x <= -9223372036854775808.0f) return std::numeric_limits<std::int64_t>::min();
    return std::int64_t(x);
}

SMOE_INLINE void put(const Line& line, void* at, std::size_t i, float x) {
    if (line.type == Type::f32)
        static_cast<float*>(at)[place(line, i)] = x;
    else if (line.type == Type::i64)
        static_cast<std::int64_t*>(at)[place(line, i)] = cut_off(x);
    else
        static_cast<std::uint8_t*>(at)[place(line, i)] = x != 0.0f;
}

SMOE_INLINE void put_whole(const Line& line, void* at, std::size_t i, std::int64_t x) {
    if (line.type == Type::f32)
        static_cast<float*>(at)[place(line, i)] = float(x);
    else if (line.type == Type::i64)
        static_cast<std::int64_t*>(at)[place(line, i)] = x;
    else
        static_cast<std::uint8_t*>(at)[place(line, i)] = x != 0;
}

SMOE_INLINE void store(const Line& line, void* at, std::size_t first, std::size_t n,
                       const float* numbers) {
    if (beside(line)) return;  // they were written in their place
    for (std::size_t i = 0; i < n; ++i) put(line, at, first + i, numbers[i]);
}

template <class F>
SMOE_INLINE void pieces(std::size_t n, F&& f) {
    for (std::size_t first = 0; first < n; first += PIECE)
        f(first, n - first < PIECE ? n - first : PIECE);
}

// y[i] = f(a[i], ..): over itself or over something else, so that the numbers are independent.
template <class F>
SMOE_INLINE void each(std::size_t n, F&& f) {
#pragma GCC ivdep
    for (std::size_t i = 0; i < n; ++i) f(i);
}

// ---- sums
// ------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr std::size_t REGISTER = 64;  // bytes
#elif defined(__AVX__)
constexpr std::size_t REGISTER = 32;
#else
constexpr std::size_t REGISTER = 16;
#endif

typedef float Register __attribute__((vector_size(REGISTER)));
constexpr std::size_t LANES = 16, WIDE = REGISTER / sizeof(float);

struct Lanes {
    Register at[LANES / WIDE] = {};
};

SMOE_INLINE float fold(const Lanes& lanes) {
    float a[LANES];
    std::memcpy(a, lanes.at, sizeof a);
    for (std::size_t half = LANES / 2; half; half /= 2)
        for (std::size_t j = 0; j < half; ++j) a[j] += a[j + half];
    return a[0];
}

// lanes += f(numbers), of LANES numbers.
template <class F>
SMOE_INLINE void add_lanes(const float* x, Lanes& lanes, F&& f) {
    for (std::size_t p = 0; p < LANES / WIDE; ++p) {
        Register v;
        std::memcpy(&v, x + p * WIDE, sizeof v);
        lanes.at[p] += f(v);
    }
}

// The same of a piece; what is missing at the end counts as zero.
template <class F>
SMOE_INLINE void add_up(const float* x, std::size_t n, Lanes& lanes, F&& f) {
    const std::size_t whole = n - n % LANES;
    for (std::size_t i = 0; i < whole; i += LANES) add_lanes(x + i, lanes, f);
    if (whole == n) return;
    float end[LANES] = {};
    std::memcpy(end, x + whole, (n - whole) * sizeof(float));
    add_lanes(end, lanes, f);
}

SMOE_INLINE Register itself(const Register& v) { return v; }
SMOE_INLINE Register square(const Register& v) { return v * v; }

float sum_of(const Line& line, const void* at) {
    Lanes lanes;
    float room[PIECE];
    pieces(line.n, [&](std::size_t first, std::size_t n) {
        add_up(floats(line, at, first, n, room), n, lanes, itself);
    });
    return fold(lanes);
}

// NaNs are passed over.
float max_of(const Line& line, const void* at) {
    constexpr float LEAST = -std::numeric_limits<float>::infinity();
    float lanes[LANES], room[PIECE], largest = LEAST;
    for (float& lane : lanes) lane = LEAST;
    pieces(line.n, [&](std::size_t first, std::size_t n) {
        const float* x = floats(line, at, first, n, room);
        std::size_t i = 0;
        for (; i + LANES <= n; i += LANES)
            for (std::size_t j = 0; j < LANES; ++j)
                lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
        for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    });
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
}

}  // namespace
}  // namespace smoe
