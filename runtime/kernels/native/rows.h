// Operations on one row of a step, as artifacts/program.py lists them: norms, rotary, softmax,
// top-k, elementwise, gather and scatter. rows.py repeats this arithmetic bit for bit.
//
// A kernel takes *lines*: of each operand a row of `n` numbers, `step` elements apart. Elementwise
// operations have lines of any length, the others take the last axis; whoever calls goes over the
// axes before it. Every result is float32 and every operation below rounded on its own:
//
//   sums      lane j of 16 adds up elements j, j + 16, .. in rising order; then lanes fold in
//             halves, as in ffn.h. A mean is the sum / n.
//   norm      s = (x + residual) + added. rms: s * r * weight + bias, r = 1 / sqrt(mean(s^2) +
//             epsilon); layer: the same of s - mean(s), whose squares are of what was rounded
//   rotary    y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin
//   softmax   e = exp(x - max), e / sum(e); the maximum passes over NaN, the sum does not
//   top_k     falling, equal ones (and NaNs, which come last) by index
//   reduce    sum, max, mean, argmax (the first of the largest); the latter two pass over NaN
//   exp, sigmoid, tanh, erf: functions.h, but that exp is 0 below -87 here. sqrt and division are
//             IEEE's; rsqrt is 1 / sqrt. silu, gelu, gelu_tanh, relu, relu2: functions.h.
//   log, softplus, sin, cos, pow: in double (reals.h), rounded once to float32.
//   max, min  NaN where one of them is
//
// Where no input is f32, binary (but pow), where, and neg, abs, not, sign, floor and copy work on
// int64, which wraps (a division is cut off, by zero it gives 0); all else on float32. Results
// become what the output is: i64 by cutting off (NaN is 0, the rest as near as there is a number),
// bool by "not 0".
//
// gather counts a negative index from the end; one beyond gives 0. scatter leaves out one beyond.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ffn.h"
#include "recurrent.h"

namespace smoe {

enum class Type : std::uint8_t { f32, i64, boolean };
constexpr std::size_t SIZES[] = {4, 8, 1};  // bytes of a number

// How an operation does what it does, by the names of the table. Neighbours belong to one kind;
// `max` to two.
enum class How : std::uint8_t {
    none, rms, layer, halves, neighbours, sum, mean, argmax, max, min, add, sub, mul, div, pow,
    logical_and, logical_or, equal, less, less_equal, greater, greater_equal, neg, abs, exp, log,
    sqrt, rsqrt, reciprocal, sigmoid, tanh, erf, silu, gelu, gelu_tanh, relu, relu2, softplus, sin,
    cos, logical_not, floor, sign, copy
};
constexpr const char* HOWS[] = {
    "", "rms", "layer", "halves", "neighbours", "sum", "mean", "argmax", "max", "min", "add", "sub",
    "mul", "div", "pow", "and", "or", "equal", "less", "less_equal", "greater", "greater_equal",
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "erf", "silu",
    "gelu", "gelu_tanh", "relu", "relu2", "softplus", "sin", "cos", "not", "floor", "sign", "copy"};

constexpr std::size_t OPERANDS = 7;  // at most: inputs, then outputs

// Of an operand, what its kernel works on at once.
struct Line {
    bool there;
    Type type;
    std::size_t n;
    std::ptrdiff_t step;  // in elements
};

struct RowOp {
    How how;
    float number;  // epsilon, or the value of `fill`
    Line line[OPERANDS];
};

// at[i]: where line i begins.
using RowKernel = void (*)(const RowOp& op, void* const* at);

struct RowKernels {
    const char* variant;
    RowKernel norm;     // x, residual?, weight?, bias?, added? -> y, sum?
    RowKernel rotary;   // x, cos, sin -> y
    RowKernel softmax;  // x -> y
    RowKernel top_k;    // x -> values?, ids
    RowKernel reduce;   // x -> y
    RowKernel unary;    // x -> y
    RowKernel binary;   // a, b -> y
    RowKernel where;    // condition, a, b -> y
    RowKernel fill;     // -> y
    RowKernel gather;   // x, at -> y
    RowKernel scatter;  // at, values -> y
    void (*delta_rule)(const DeltaHead& head);
    void (*convolution)(const Taps& taps);
};

extern const RowKernels rows_portable;
#if defined(__x86_64__)
extern const RowKernels rows_avx2, rows_avx512;
#endif

// Those for the instructions that `variant` uses.
const RowKernels& row_kernels(const Variant& variant);

}  // namespace smoe
