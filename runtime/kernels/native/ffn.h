// Experts on a processor: the contract of every kernel. reference.py repeats this arithmetic bit
// for bit.
//
// An expert is  y = down . inner + down_bias,  inner = act(gate . x + gate_bias) * (up . x +
// up_bias)  (or another gate, see gate.h). Matrices are [n_out, n_in] and of two sorts:
//
//   dense    float32, bfloat16, float16 or int8 rows (int8 with one float32 scale a row),
//            activations in float32.
//
//            Lane j of 16 adds up k = j, j+16, ... in rising order, each product rounded to float32
//            before it is added; a short row behaves as if padded with zeros; then lanes fold in
//            halves: j with j+8, j+4, j+2, j+1; then the scale. Error: at most n_in/16 + 4
//            roundings in sequence.
//
//   nested   codes in slices of bits (artifacts/FORMAT.md), activations quantised to int8 per token
//            and group:
//
//            m = max|x|, q = round_half_even(x * (127 / m)), step = m / 127; m < 1e-30 gives q = 0,
//            step = 0, and an m that is not finite gives q = 0, step = NaN. Then, over groups g in
//            rising order,
//                y += (float(sum_k value[k] * q[k]) * scale[g]) * step[g]
//            with an exact integer sum and three rounded float operations. Error: that of q (half a
//            step per activation), and 3 roundings a group.
//
// No fused multiply-add anywhere (the build sets -ffp-contract=off), so the bits of a token's
// output depend on its input and the expert alone: not on the instruction set, the threads, or how
// many tokens and experts are in the call.
//
// Ownership: nothing is kept but scratch memory per calling thread. Threads: calls may run at once;
// one of them gets the workers, the others run alone. Nothing is checked here; the binding in
// module.cpp does that.
#pragma once
#include <cstddef>
#include <cstdint>

#include "gate.h"

namespace smoe {

constexpr std::size_t ROWS = 16;     // of a tile, which one work item computes for all tokens
constexpr std::size_t COLUMNS = 32;  // of a block: its 512 codes have 64 bytes a bit
constexpr std::size_t SLICE = 64;    // bytes of one bit of a block
constexpr std::size_t SPAN = 2;      // tiles of a backbone's matrix that a work item has at most
constexpr std::size_t MAX_BITS = 8;
constexpr std::size_t MAX_PLANES = 7;

enum class Weights { f32, bf16, f16, i8, nested };

// The value of a code is high[its first 4 bits, or all if it has fewer] + low[the rest]. In the
// kernels bit t of a code (0 the most significant) comes as bit (t + m) % 4 of a nibble, for m of 4
// (FORMAT.md, "nested"): one table for each m.
struct Tables {
    std::int8_t high[4][16], low[4][16];
};

void turn(const std::int8_t* values, std::size_t bits, std::int8_t (*turned)[16]);

// What all records of a layer have in common about one matrix. Offsets are bytes from the record's
// start, or -1.
struct Matrix {
    Weights kind;
    std::size_t n_out, n_in;
    std::ptrdiff_t data;  // of dense weights
    std::ptrdiff_t scale, bias;
    // nested: columns per scale; per plane its offset and how many slices it has; per level the
    // values of codes
    std::size_t group, planes;
    std::ptrdiff_t plane[MAX_PLANES];
    std::size_t slices[MAX_PLANES];
    Tables tables[MAX_PLANES];

    std::size_t tiles() const { return (n_out + ROWS - 1) / ROWS; }
    std::size_t blocks() const { return (n_in + COLUMNS - 1) / COLUMNS; }
    std::size_t groups() const { return group ? (blocks() * COLUMNS + group - 1) / group : 0; }
    std::size_t bits(std::size_t level) const {
        std::size_t n = 0;
        for (std::size_t p = 0; p < level; ++p) n += slices[p];
        return n;
    }
};

// A matrix of one expert at a level, ready to be multiplied.
struct Operand {
    const Matrix* m;
    const std::uint8_t* record;
    std::size_t level;
};

// Activations: n rows, given by pointers. float32 for dense weights; for nested ones int8 [blocks *
// 32], the step of each group, and what each group's sums of products begin with (for kernels whose
// weights carry an offset).
struct Rows {
    std::size_t n;
    const float* const* x;
    const std::int8_t* const* q;
    const float* const* step;
    const std::int32_t* const* sum;
};

struct Weight;    // products.h
struct KeyBlock;  // attention.h
struct Join;

struct Variant {
    const char* name;  // what SMOE_KERNELS may say
    // 16 rows of a matrix (the tile) times n activations: y[t * stride + r], without bias; rows
    // past the end give 0.
    void (*tile)(const Operand& w, std::size_t tile, const Rows& x, float* y, std::size_t stride);
    // x [n] -> q [blocks * 32], step and sum [groups], as above.
    void (*quantise)(const float* x, std::size_t n, std::size_t group, std::int8_t* q, float* step,
                     std::int32_t* sum);
    // inner[i] for i < n, from gate (not read where the gate is plain) and up; may be written over
    // gate or up.
    void (*gate)(const ExpertActivation& spec, const float* gate, const float* up, std::size_t n,
                 float* inner);
    // Up to SPAN tiles of a backbone's matrix, which `m` describes too, as `tile` does one.
    void (*product)(const Weight& w, const Matrix& m, std::size_t tile, std::size_t tiles,
                    const Rows& x, float* y, std::size_t stride);
    // What queries see of a block of keys; blocks joined to an output; float32 to float16, ties to
    // even (attention.h).
    void (*attend)(const KeyBlock& block);
    void (*join)(const Join& join);
    void (*to_f16)(const float* x, std::size_t n, std::uint16_t* y);
};

extern const Variant portable;
#if defined(__x86_64__)
extern const Variant avx2, avx512vnni;
#elif defined(__aarch64__)
extern const Variant neon, neondot;
#endif

// The variants that this processor runs, best first; "portable" is always the last. `count`
// receives how many.
const Variant* const* variants(std::size_t* count);

struct Layer {
    Matrix gate, up, down;  // gate.n_out is 0 where there is none
    ExpertActivation spec;
};

// Several experts in one call: expert i is records[i] at levels[i] and takes the slots starts[i] ..
// starts[i+1]; slot s is row tokens[s] of x [.., hidden]; y [slots, hidden] receives its output,
// before any norm or mixing weight.
struct Call {
    const Variant* variant;
    const Layer* layer;
    std::size_t experts;
    const std::uint8_t* const* records;
    const std::size_t* levels;
    const std::size_t* starts;
    const std::size_t* tokens;
    const float* x;
    std::size_t rows;  // of x
    float* y;
    std::size_t threads;
};

void ffn(const Call& call);

// One matrix of one record times n rows of x [n, n_in]: y [n, tiles * 16], without bias. For tests
// of the parts.
void product(const Variant& variant, const Operand& w, const float* x, std::size_t n, float* y);

}  // namespace smoe
