// See linear.h for the contract. One body, compiled once per instruction set: vectors of 16 float lanes are a type of
// the compiler, so that AVX-512, AVX2, SSE2 and NEON differ in registers and never in arithmetic.
#include "linear.h"

#include <cstring>

namespace smoe {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef std::uint32_t u32x16 __attribute__((vector_size(64)));
typedef std::uint16_t u16x16 __attribute__((vector_size(32)));
typedef std::int8_t i8x16 __attribute__((vector_size(16)));

#define SMOE_INLINE inline __attribute__((always_inline))
constexpr std::size_t LANES = 16;

struct F32 {
    typedef float T;
    static SMOE_INLINE f32x16 load(const T* p) {
        f32x16 v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
};

struct BF16 {
    typedef std::uint16_t T;
    static SMOE_INLINE f32x16 load(const T* p) {
        u16x16 h;
        std::memcpy(&h, p, sizeof h);
        u32x16 w = __builtin_convertvector(h, u32x16) << 16;
        f32x16 v;
        std::memcpy(&v, &w, sizeof v);
        return v;
    }
};

struct I8 {
    typedef std::int8_t T;
    static SMOE_INLINE f32x16 load(const T* p) {
        i8x16 b;
        std::memcpy(&b, p, sizeof b);
        return __builtin_convertvector(b, f32x16);
    }
};

// The last n < 16 elements of a row, zero behind them.
template <class W>
SMOE_INLINE f32x16 load_tail(const typename W::T* p, std::size_t n) {
    typename W::T padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(typename W::T));
    return W::load(padded);
}

SMOE_INLINE float fold(f32x16 v) {
    float a[LANES];
    std::memcpy(a, &v, sizeof a);
    for (std::size_t half = LANES / 2; half; half /= 2)
        for (std::size_t j = 0; j < half; ++j) a[j] += a[j + half];
    return a[0];
}

// R rows of w against N tokens: R*N sums in registers, each weight loaded once for N tokens.
template <class W, std::size_t R, std::size_t N>
SMOE_INLINE void block(const float* x, std::size_t n_in, const typename W::T* w, const float* scale,
                       std::size_t n_out, float* y) {
    f32x16 sum[R][N] = {};
    const std::size_t whole = n_in - n_in % LANES;
    for (std::size_t k = 0; k < whole; k += LANES) {
        f32x16 a[N];
        for (std::size_t t = 0; t < N; ++t) a[t] = F32::load(x + t * n_in + k);
        for (std::size_t r = 0; r < R; ++r) {
            const f32x16 b = W::load(w + r * n_in + k);
            for (std::size_t t = 0; t < N; ++t) sum[r][t] += a[t] * b;
        }
    }
    if (whole < n_in)
        for (std::size_t r = 0; r < R; ++r) {
            const f32x16 b = load_tail<W>(w + r * n_in + whole, n_in - whole);
            for (std::size_t t = 0; t < N; ++t) sum[r][t] += load_tail<F32>(x + t * n_in + whole, n_in - whole) * b;
        }
    for (std::size_t r = 0; r < R; ++r)
        for (std::size_t t = 0; t < N; ++t) y[t * n_out + r] = scale ? fold(sum[r][t]) * scale[r] : fold(sum[r][t]);
}

template <class W, std::size_t N>
SMOE_INLINE void rows(const float* x, std::size_t n_in, const typename W::T* w, const float* scale, std::size_t n_out,
                      float* y) {
    std::size_t m = 0;
    for (; m + 4 <= n_out; m += 4) block<W, 4, N>(x, n_in, w + m * n_in, scale ? scale + m : nullptr, n_out, y + m);
    for (; m < n_out; ++m) block<W, 1, N>(x, n_in, w + m * n_in, scale ? scale + m : nullptr, n_out, y + m);
}

template <class W>
SMOE_INLINE void tokens_of(const float* x, std::size_t tokens, std::size_t n_in, const void* w, const float* scale,
                           std::size_t n_out, float* y) {
    const auto* typed = static_cast<const typename W::T*>(w);
    std::size_t t = 0;
    for (; t + 4 <= tokens; t += 4) rows<W, 4>(x + t * n_in, n_in, typed, scale, n_out, y + t * n_out);
    for (; t < tokens; ++t) rows<W, 1>(x + t * n_in, n_in, typed, scale, n_out, y + t * n_out);
}

SMOE_INLINE void linear(const float* x, std::size_t tokens, std::size_t n_in, const void* w, Weights kind,
                        const float* scale, std::size_t n_out, float* y) {
    switch (kind) {
        case Weights::f32: return tokens_of<F32>(x, tokens, n_in, w, scale, n_out, y);
        case Weights::bf16: return tokens_of<BF16>(x, tokens, n_in, w, scale, n_out, y);
        case Weights::i8: return tokens_of<I8>(x, tokens, n_in, w, scale, n_out, y);
    }
}

#define SMOE_VARIANT(name, attribute)                                                                              \
    attribute void name(const float* x, std::size_t tokens, std::size_t n_in, const void* w, Weights kind,         \
                        const float* scale, std::size_t n_out, float* y) {                                        \
        linear(x, tokens, n_in, w, kind, scale, n_out, y);                                                         \
    }

SMOE_VARIANT(portable, )
#if defined(__x86_64__)
SMOE_VARIANT(avx2, __attribute__((target("avx2"))))
SMOE_VARIANT(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

}  // namespace

const Variant* variants(std::size_t* count) {
    static Variant found[3];
    static const std::size_t n = [] {
        std::size_t i = 0;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl"))
            found[i++] = {"avx512", avx512};
        if (__builtin_cpu_supports("avx2")) found[i++] = {"avx2", avx2};
#endif
        found[i++] = {"portable", portable};
        return i;
    }();
    *count = n;
    return found;
}

}  // namespace smoe
