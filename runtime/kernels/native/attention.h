// Attention of the new rows of some sequences over what each sequence remembers, which lies in
// blocks of BLOCK_TOKENS (blocks.py).
//
// The keys of a sequence are taken BLOCK_KEYS at a time by their position (block b holds the
// positions b * BLOCK_KEYS ..), each such block alone. Of its keys that a query sees, in rising
// order:
//
//     score[j] = (q . k[j]) * scale, then softcap * tanh(score / softcap) where there is a softcap
//     m = the largest that is a number,  e[j] = exp(score[j] - m)
//     s = sum of e[j],  a = sum of e[j] * v[j]
//
// Dot products add up as dense weights do (ffn.h): in 16 lanes that fold in halves. So does s,
// whose lanes are positions modulo 16; a adds one key to the next. Blocks are joined in rising
// order to M, S, A, which begin with the first block, or with (sink, 1, 0) where there is a sink:
//
//     M' = max(M, m);  S = S * exp(M - M') + s * exp(m - M'), A likewise;  at last y = A / S
//
// Keys and values in float16 are exact in float32. In int8 each token's numbers are rounded in
// groups of STATE_GROUP as activations are (ffn.h): v is code * scale; q is rounded the same way,
// and q . k is, over groups g in rising order,
//
//     sum += (float(sum of products of codes) * scale[g]) * step[g]      with an exact integer sum
//
// So the bits depend on the query and on what it sees: not on how many queries, sequences or
// threads there are; exp and tanh are gate.h's. Blocks in which no query sees a key are not
// touched. Nothing is checked here, and nothing kept but scratch memory of the calling thread, of
// at most ATTENTION_SCRATCH bytes, or that of one block of keys for a few rows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ffn.h"

namespace smoe {

constexpr std::size_t BLOCK_KEYS = 128;
constexpr std::size_t BLOCK_TOKENS = 32;
constexpr std::size_t STATE_GROUP = 128;  // numbers that share a scale
constexpr std::size_t QUERIES = 32;       // that go through a block together
constexpr std::size_t ATTENTION_SCRATCH = 1 << 20;

enum class StateKind { f32, f16, int8 };

// Of a block: `width` numbers for head h and token t, [heads][BLOCK_TOKENS][width], from byte
// `start` on; of int8 ones the scales, [heads][BLOCK_TOKENS][groups], from byte `scales` on.
struct Cells {
    std::size_t start, width, scales, groups;
};

// What one attention remembers of one sequence of up to `context` tokens: addresses of blocks, 0
// where there is none. Values of `value_width` are the first numbers of their cells; where `latent`
// those are the keys.
struct KeyValues {
    const std::int64_t* blocks;
    StateKind kind;
    bool latent;
    std::size_t context, kv_heads, value_width;
    Cells keys, values;

    std::size_t size() const {  // bytes of a number
        return kind == StateKind::f32 ? 4 : kind == StateKind::f16 ? 2 : 1;
    }

    std::uint8_t* block(std::size_t position) const {
        return reinterpret_cast<std::uint8_t*>(std::uintptr_t(blocks[position / BLOCK_TOKENS]));
    }
};

// Laid out as blocks.py says.
KeyValues key_values(const std::int64_t* blocks, StateKind kind, std::size_t context,
                     std::size_t kv_heads, std::size_t key_width, std::size_t value_width,
                     bool latent);

struct Attention {
    std::size_t heads;     // a multiple of kv_heads; head i reads keys of i / (heads / kv_heads)
    float scale, softcap;  // softcap 0: none
    std::size_t window;    // 0: all that lies before
    const float* sinks;    // [heads], or null: a score more, whose value is nothing
};

// Rows `rows` of the step, the first of which is token `past` of its sequence. past + rows is at
// most the state's context; the blocks of these tokens and of all that they see are there.
struct Part {
    const KeyValues* state;
    std::size_t past, rows;
};

// A view of rows: element (r, h, i) at data + r * row + h * head + i.
struct Heads {
    float* data;
    std::size_t row, head;
};

// Keys and values (v is not read where they are latent) of the new rows into their states; then y,
// for every row the interval of keys that it sees, itself the last. All states have the same heads
// and widths.
void attention(const Variant& variant, const Attention& a, const Part* parts, std::size_t count,
               Heads q, Heads k, Heads v, Heads y, std::size_t threads);

// ---- what the kernels of an instruction set are asked (attention_body.h)

// Queries in int8: of each `codes` [width, then zeros up to a multiple of 64], `step` and `sum`
// [groups] as `quantise` leaves them.
struct Codes {
    const std::int8_t* codes;
    const float* step;
    const std::int32_t* sum;
};

// Some queries that read one head of keys, and what each of them sees of one block: at least one
// key, from[i] .. to[i]; both rise with i.
struct KeyBlock {
    const KeyValues* state;
    std::size_t head;
    float scale, softcap;
    std::size_t queries;
    const float* q[QUERIES];
    Codes rounded[QUERIES];  // where the state is int8
    std::size_t from[QUERIES], to[QUERIES];
    float* out[QUERIES];  // a [whole_lanes(value_width)], on a multiple of 64 bytes; m, s
    // Keys that will be asked for next: those of a head in each block of tokens, or null.
    const std::uint8_t* next[BLOCK_KEYS / BLOCK_TOKENS];
};

constexpr std::size_t whole_lanes(std::size_t width) { return (width + 15) / 16 * 16; }

// Numbers of a KeyBlock's result.
constexpr std::size_t result_width(std::size_t value_width) {
    return whole_lanes(value_width) + 16;
}

// `count` results, one behind the other, joined to what lies before them.
struct Join {
    const float* results;
    std::size_t count, width;  // of values
    bool first, last;          // nothing lies before; y becomes A / S
    const float* sink;         // or null
    float* most_sum;           // M, S
    float* y;                  // A
};

}  // namespace smoe
