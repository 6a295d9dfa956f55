// Attention of the new rows of some sequences over what each sequence remembers.
//
// The keys of a sequence are taken in blocks of BLOCK_KEYS by their position (block b holds the
// positions b * BLOCK_KEYS ..), each block alone. Of the keys of a block that a query sees, in
// rising order:
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
// So the bits depend on the query and on what it sees: not on how many queries, sequences or
// threads there are. Keys and values in float16 are exact in float32; exp and tanh are gate.h's.
// Only keys that a query sees are read. Nothing is checked here, and nothing kept but scratch
// memory of the calling thread, of at most ATTENTION_SCRATCH bytes or that of one row.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ffn.h"

namespace smoe {

constexpr std::size_t BLOCK_KEYS = 128;
constexpr std::size_t QUERIES = 32;  // that go through a block together
constexpr std::size_t ATTENTION_SCRATCH = 1 << 20;

// What one attention remembers of one sequence: keys [kv_heads][capacity][key_width], values the
// same with value_width, float16 where `half`, else float32.
struct KeyValues {
    void* keys;
    void* values;
    bool half;
    std::size_t capacity, kv_heads, key_width, value_width;
};

struct Attention {
    std::size_t heads;     // a multiple of kv_heads; head i reads keys of i / (heads / kv_heads)
    float scale, softcap;  // softcap 0: none
    std::size_t window;    // 0: all that lies before
    const float* sinks;    // [heads], or null: a score more, whose value is nothing
};

// Rows `rows` of the step, the first of which is token `past` of its sequence. past + rows is at
// most the state's capacity.
struct Part {
    KeyValues* state;
    std::size_t past, rows;
};

// A view of rows: element (r, h, i) at data + r * row + h * head + i.
struct Heads {
    float* data;
    std::size_t row, head;
};

// Keys and values of the new rows into their states (rounded to even where they are float16); then
// y, for every row the interval of keys that it sees, itself the last. All states have the same
// heads and widths.
void attention(const Variant& variant, const Attention& a, const Part* parts, std::size_t count,
               Heads q, Heads k, Heads v, Heads y, std::size_t threads);

// ---- what the kernels of an instruction set are asked (attention_body.h)

// Some queries that read one head of keys, and what each of them sees of one block: at least one
// key, from[i] .. to[i].
struct KeyBlock {
    const KeyValues* state;
    std::size_t head;
    float scale, softcap;
    std::size_t queries;
    const float* q[QUERIES];
    std::size_t from[QUERIES], to[QUERIES];
    float* out[QUERIES];  // m, s, a [value_width]
};

}  // namespace smoe
