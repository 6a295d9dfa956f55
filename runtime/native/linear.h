// The product every expert is made of:  y[t,m] = scale[m] * sum_k x[t,k] * w[m,k]
//
//   x      [tokens, n_in]   float32, row-major          w  [n_out, n_in]  row-major, float32 | bfloat16 | int8
//   scale  [n_out] float32, or null for 1               y  [tokens, n_out] float32, overwritten
//
// Order, which reference.py repeats exactly: lane j of 16 adds up k = j, j+16, j+32, ... in rising order, each
// product rounded to float32 before it is added (no fused multiply-add; the build sets -ffp-contract=off). A row
// shorter than a multiple of 16 behaves as if padded with zeros. Then lanes fold in halves: j with j+8, j+4, j+2, j+1.
// So the bits of y[t,m] depend on row t and row m alone: not on the instruction set, nor on how many tokens are in
// the call. Error: at most (n_in/16 + 4) roundings in sequence.
//
// Ownership: nothing is kept. Threads: no state, no locks; calls may run at once. Nothing is checked here; the
// binding in module.cpp does that.
#pragma once
#include <cstddef>
#include <cstdint>

namespace smoe {

enum class Weights { f32, bf16, i8 };

using Linear = void (*)(const float* x, std::size_t tokens, std::size_t n_in, const void* w, Weights kind,
                        const float* scale, std::size_t n_out, float* y);

struct Variant {
    const char* name;  // what SMOE_KERNELS may say
    Linear linear;
};

// The variants that this processor runs, best first; "portable" is always the last. `count` receives how many.
const Variant* variants(std::size_t* count);

}  // namespace smoe
