// Functions of one number in float32: every operation is rounded on its own, and none comes from
// the C library, so that every machine gives the bits of activations.py. Included in the namespace
// of an instruction set; loops over them become vectors.
#pragma once
#include <cstdint>
#include <cstring>

#include "gate.h"

#define SMOE_INLINE inline __attribute__((always_inline))

namespace smoe {
namespace {

SMOE_INLINE std::uint32_t bits_of(float f) {
    std::uint32_t u;
    std::memcpy(&u, &f, sizeof u);
    return u;
}

SMOE_INLINE float float_of(std::uint32_t u) {
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}

SMOE_INLINE float exp_(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 0.00139345f;
    p = p * r + 0.00836378f;
    p = p * r + 0.04166646f;
    p = p * r + 0.16666573f;
    p = p * r + 0.5f;
    const float y = ((p * r) * r + r) + 1.0f;
    return y * float_of((bits_of(shifted) - (0x4B400000u - 127u)) << 23);
}

SMOE_INLINE float magnitude(float x) { return float_of(bits_of(x) & 0x7FFFFFFFu); }

SMOE_INLINE float sigmoid_(float x) {
    const float e = exp_(-magnitude(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

SMOE_INLINE float tanh_(float x) {
    const float z = x * x, a = magnitude(x);
    float p = -0.00573119f;
    p = p * z + 0.02066472f;
    p = p * z + -0.05374844f;
    p = p * z + 0.13331561f;
    p = p * z + -0.33333287f;
    const float near = (p * z) * x + x, far = 1.0f - 2.0f / (exp_(a * 2.0f) + 1.0f);
    return a < 0.625f ? near : x < 0.0f ? -far : far;
}

SMOE_INLINE float erf_(float x) {
    const float a = magnitude(x), t = 1.0f / (1.0f + a * 0.3275911f);
    float p = 1.061405429f;
    p = p * t + -1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t + -0.284496736f;
    p = p * t + 0.254829592f;
    const float y = 1.0f - (p * t) * exp_(-(a * a));
    return x < 0.0f ? -y : y;
}

SMOE_INLINE float relu_(float x) { return x < 0.0f ? 0.0f : x; }

template <Act A>
SMOE_INLINE float act(float x) {
    switch (A) {
        case Act::silu:
            return x * sigmoid_(x);
        case Act::gelu:
            return (x * 0.5f) * (1.0f + erf_(x * 0.70710678f));
        case Act::gelu_tanh:
            return (x * 0.5f) * (1.0f + tanh_((x + (x * x) * x * 0.044715f) * 0.79788456f));
        case Act::relu:
            return relu_(x);
        case Act::relu2:
            return relu_(x) * relu_(x);
        case Act::sigmoid:
            return sigmoid_(x);
        case Act::tanh:
            return tanh_(x);
        case Act::identity:
            return x;
    }
    return x;
}

}  // namespace
}  // namespace smoe
