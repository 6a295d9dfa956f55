// Rows are taken some at a time, as many as their blocks' results have room for: first every block
// of keys for itself, then those of each query joined.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace smoe {
namespace {

// Multiplications for which a second thread costs more than it gives.
constexpr std::size_t LITTLE = 1 << 16;
constexpr std::size_t ROOM = ATTENTION_SCRATCH / sizeof(float);

// Some rows of one sequence, and the blocks of keys that any of them sees.
struct RowBlock {
    const KeyValues* state;
    std::size_t row, rows;      // of the step
    std::size_t position;       // of the first in its sequence
    std::size_t first, blocks;  // of keys
    std::size_t results;        // where theirs begin: [rows][heads][blocks][2 + value_width]
    std::size_t items;          // where theirs begin
};

struct Scratch {
    std::vector<RowBlock> some;
    std::vector<float> results;
};

struct Work {
    const Variant& variant;
    const Attention& a;
    Heads q, y;
    std::size_t group;     // heads that read the same keys
    std::size_t together;  // of them in one item
    std::size_t width;     // of a block's result
    float* results;

    std::size_t from(std::size_t position) const {
        return a.window && position >= a.window ? position + 1 - a.window : 0;
    }
    // Items of a head of keys.
    std::size_t shares() const { return (group + together - 1) / together; }
    std::size_t items(const RowBlock& rows) const {
        return rows.state->kv_heads * shares() * rows.blocks;
    }
    // Of the results of these rows.
    std::size_t numbers(const RowBlock& rows) const {
        return rows.rows * a.heads * rows.blocks * width;
    }
    float* result(const RowBlock& rows, std::size_t row, std::size_t head) const {
        return results + rows.results + (row * a.heads + head) * rows.blocks * width;
    }

    // Item i of these rows: a head of keys, a share of those that read them, a block.
    void attend(const RowBlock& rows, std::size_t i) const {
        const std::size_t at = i % rows.blocks, share = i / rows.blocks % shares();
        const std::size_t begin = (rows.first + at) * BLOCK_KEYS, end = begin + BLOCK_KEYS;
        KeyBlock block = {};
        block.state = rows.state, block.head = i / rows.blocks / shares();
        block.scale = a.scale, block.softcap = a.softcap;
        const std::size_t head = block.head * group + share * together;
        const std::size_t heads = std::min(together, group - share * together);
        for (std::size_t r = 0; r < rows.rows; ++r) {
            const std::size_t position = rows.position + r;
            const std::size_t first = std::max(from(position), begin);
            const std::size_t last = std::min(position + 1, end);
            if (first >= last) continue;
            for (std::size_t h = head; h < head + heads; ++h) {
                block.q[block.queries] = q.data + (rows.row + r) * q.row + h * q.head;
                block.from[block.queries] = first, block.to[block.queries] = last;
                block.out[block.queries++] = result(rows, r, h) + at * width;
            }
        }
        if (block.queries) variant.attend(block);
    }

    void join(const RowBlock& rows, std::size_t row, std::size_t head) const {
        const std::size_t position = rows.position + row;
        const std::size_t first = from(position) / BLOCK_KEYS, end = position / BLOCK_KEYS + 1;
        variant.join(result(rows, row, head) + (first - rows.first) * width, end - first, width - 2,
                     a.sinks ? a.sinks + head : nullptr,
                     y.data + (rows.row + row) * y.row + head * y.head);
    }
};

// Numbers [rows][heads][width] of new tokens to where their state has them.
void remember(const Variant& variant, const KeyValues& state, void* into, std::size_t width,
              const Part& part, std::size_t first, Heads from, std::size_t threads) {
    const std::size_t many = part.rows * state.kv_heads * width < LITTLE ? 1 : threads;
    parallel(part.rows, many, [&](std::size_t r) {
        for (std::size_t head = 0; head < state.kv_heads; ++head) {
            const std::size_t to = (head * state.capacity + part.past + r) * width;
            const float* x = from.data + (first + r) * from.row + head * from.head;
            if (state.half)
                variant.to_f16(x, width, static_cast<std::uint16_t*>(into) + to);
            else
                std::memcpy(static_cast<float*>(into) + to, x, width * sizeof(float));
        }
    });
}

// The first of `rows` rows that go through the kernels together: fewer where there are many blocks.
RowBlock row_block(const Work& work, const KeyValues& state, std::size_t row, std::size_t rows,
                   std::size_t position) {
    rows = std::min(rows, std::max<std::size_t>(QUERIES / work.together, 1));
    for (;; rows /= 2) {
        const std::size_t first = work.from(position) / BLOCK_KEYS;
        const std::size_t blocks = (position + rows - 1) / BLOCK_KEYS + 1 - first;
        const RowBlock block = {&state, row, rows, position, first, blocks, 0, 0};
        if (rows == 1 || work.numbers(block) <= ROOM) return block;
    }
}

// All of `some` at once: blocks, then joins.
void run(Work& work, Scratch& scratch, std::size_t threads) {
    std::vector<RowBlock>& some = scratch.some;
    std::size_t items = 0, results = 0, queries = 0, sums = 0;
    for (RowBlock& rows : some) {
        rows.items = items, rows.results = results;
        items += work.items(rows);
        results += work.numbers(rows);
        queries += rows.rows * work.a.heads;
        const std::size_t seen = rows.position + rows.rows - work.from(rows.position);
        sums += rows.rows * work.a.heads * seen * (rows.state->key_width + work.width);
    }
    if (scratch.results.size() < results) scratch.results.resize(results);
    work.results = scratch.results.data();
    parallel(items, sums < LITTLE ? 1 : threads, [&](std::size_t item) {
        const auto after =
            std::upper_bound(some.begin(), some.end(), item,
                             [](std::size_t i, const RowBlock& rows) { return i < rows.items; });
        const RowBlock& rows = after[-1];
        work.attend(rows, item - rows.items);
    });
    const std::size_t first = some.front().row, heads = work.a.heads;
    parallel(queries, results < LITTLE ? 1 : threads, [&](std::size_t query) {
        const std::size_t row = first + query / heads;
        const auto after =
            std::upper_bound(some.begin(), some.end(), row,
                             [](std::size_t r, const RowBlock& rows) { return r < rows.row; });
        work.join(after[-1], row - after[-1].row, query % heads);
    });
}

}  // namespace

void attention(const Variant& variant, const Attention& a, const Part* parts, std::size_t count,
               Heads q, Heads k, Heads v, Heads y, std::size_t threads) {
    static thread_local Scratch mine;
    Scratch& scratch = mine;  // thread_local: the workers must see this thread's
    std::size_t row = 0;
    for (std::size_t p = 0; p < count; row += parts[p++].rows) {
        KeyValues& state = *parts[p].state;
        remember(variant, state, state.keys, state.key_width, parts[p], row, k, threads);
        remember(variant, state, state.values, state.value_width, parts[p], row, v, threads);
    }
    if (row == 0) return;
    const std::size_t group = a.heads / parts[0].state->kv_heads;
    Work work = {variant, a, q, y, group, std::min(group, QUERIES), 2 + parts[0].state->value_width,
                 nullptr};
    std::size_t used = 0;
    scratch.some.clear();
    row = 0;
    for (std::size_t p = 0; p < count; row += parts[p++].rows)
        for (std::size_t r = 0; r < parts[p].rows;) {
            const RowBlock next =
                row_block(work, *parts[p].state, row + r, parts[p].rows - r, parts[p].past + r);
            if (used && used + work.numbers(next) > ROOM) {
                run(work, scratch, threads);
                scratch.some.clear(), used = 0;
            }
            scratch.some.push_back(next);
            used += work.numbers(next), r += next.rows;
        }
    run(work, scratch, threads);
}

}  // namespace smoe
