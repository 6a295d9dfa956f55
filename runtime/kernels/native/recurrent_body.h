// The kernels of recurrent.h, written once; rows_body.h includes it for each instruction set.
#pragma once
#include "lines.h"
#include "recurrent.h"

namespace smoe {
namespace {

constexpr std::size_t STRIP = 4;  // registers of columns that stay in cache over all rows
constexpr std::size_t CACHE_LINE = 64 / sizeof(float);

SMOE_INLINE Register register_at(const float* x) {
    Register v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

SMOE_INLINE void put_register(float* x, Register v) { std::memcpy(x, &v, sizeof v); }

// Columns from c on, as many as N registers of type V have.
template <class V, std::size_t N, bool DECAYS, class Load, class Put>
SMOE_INLINE void delta_columns(const DeltaHead& a, std::size_t c, Load&& load, Put&& put) {
    constexpr std::size_t WIDTH = sizeof(V) / sizeof(float);
    float* const state = a.left + c;
    for (std::size_t r = 0; r < a.rows; ++r) {
        const float* k = a.k.data + r * a.k.row;
        const float* q = a.q.data + r * a.q.row;
        const float* decay = a.decay.data + r * a.decay.row;
        const float* v = a.v.data + r * a.v.row + c;
        const float beta = a.beta.data[r * a.beta.row];
        float* y = a.y.data + r * a.y.row + c;
        const float* before = r ? state : a.found + c;
        V sum[N] = {}, change[N];
        for (std::size_t i = 0; i < a.keys; ++i) {
            float* s = state + i * a.values;
            const float factor = decay[DECAYS ? i : 0];
            for (std::size_t n = 0; n < N; ++n) {
                const V x = load(before + i * a.values + n * WIDTH) * factor;
                put(s + n * WIDTH, x);
                sum[n] = sum[n] + x * k[i];
            }
        }
        for (std::size_t n = 0; n < N; ++n) {
            change[n] = (load(v + n * WIDTH) - sum[n]) * beta;
            sum[n] = V{};
        }
        for (std::size_t i = 0; i < a.keys; ++i) {
            float* s = state + i * a.values;
            for (std::size_t n = 0; n < N; ++n) {
                const V x = load(s + n * WIDTH) + change[n] * k[i];
                put(s + n * WIDTH, x);
                sum[n] = sum[n] + x * q[i];
            }
        }
        for (std::size_t n = 0; n < N; ++n) put(y + n * WIDTH, sum[n]);
    }
}

template <bool DECAYS>
SMOE_INLINE void delta_head(const DeltaHead& a) {
    std::size_t c = 0;
    for (; c + STRIP * WIDE <= a.values; c += STRIP * WIDE)
        delta_columns<Register, STRIP, DECAYS>(a, c, register_at, put_register);
    for (; c + WIDE <= a.values; c += WIDE)
        delta_columns<Register, 1, DECAYS>(a, c, register_at, put_register);
    for (; c < a.values; ++c)
        delta_columns<float, 1, DECAYS>(
            a, c, [](const float* x) { return *x; }, [](float* x, float v) { *x = v; });
}

void delta_rule(const DeltaHead& a) {
    // In the order of memory, which strips are not.
    for (std::size_t i = 0; i < a.keys * a.values; i += CACHE_LINE)
        __builtin_prefetch(a.found + i, 0, 2);
    a.decays ? delta_head<true>(a) : delta_head<false>(a);
}

void convolution(const Taps& a) {
    for (std::size_t r = 0; r < a.rows; ++r)
        pieces(a.numbers, [&](std::size_t first, std::size_t n) {
            float* y = a.y.data + r * a.y.row + first;
            for (std::size_t tap = 0; tap < a.taps; ++tap) {
                const std::size_t at = a.tokens + r + tap + 1 - a.taps;  // of what was and rows
                const float* x = at < a.tokens ? a.found + at * a.width + first
                                               : a.x.data + (at - a.tokens) * a.x.row + first;
                const float* w = a.weight + tap * a.width + first;
                if (tap)
                    each(n, [&](std::size_t i) { y[i] = y[i] + x[i] * w[i]; });
                else
                    each(n, [&](std::size_t i) { y[i] = x[i] * w[i]; });
            }
            if (a.bias) each(n, [&](std::size_t i) { y[i] = y[i] + a.bias[first + i]; });
        });
    for (std::size_t t = 0; t < a.tokens; ++t) {
        const std::size_t at = t + a.rows;
        const float* x = at < a.tokens ? a.found + at * a.width
                                       : a.x.data + (at - a.tokens) * a.x.row;
        std::memcpy(a.left + t * a.width, x, a.numbers * sizeof(float));
    }
}

}  // namespace
}  // namespace smoe
