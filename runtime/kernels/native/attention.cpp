// Rows are taken some at a time, as many as their blocks' results have room for: first every block
// of keys for itself, then those of each query joined. Where the blocks of a few rows have no room,
// they go in rounds.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "pool.h"

namespace smoe {
namespace {

// Multiplications for which a second thread costs more than it gives.
constexpr std::size_t LITTLE = 1 << 16;
constexpr std::size_t ROOM = ATTENTION_SCRATCH / sizeof(float);
constexpr std::size_t NEAR = 64;  // bytes: results and codes lie on a multiple

// Some rows of one sequence, and the blocks of keys that any of them sees.
struct RowBlock {
    const KeyValues* state;
    std::size_t row, rows;      // of the step
    std::size_t position;       // of the first in its sequence
    std::size_t first, blocks;  // of keys
    std::size_t query;          // where the first row's are
    // of this round: blocks of keys, where their results begin ([rows][heads][count][result]), and
    // where their items do
    std::size_t begin, count, results, items;
};

struct Scratch {
    std::vector<RowBlock> some;
    std::vector<float> results, most_sum, steps;
    std::vector<std::int8_t> codes;
    std::vector<std::int32_t> sums;
};

// Room for `count` numbers on a multiple of NEAR bytes.
template <class T>
T* room(std::vector<T>& memory, std::size_t count) {
    if (memory.size() < count + NEAR / sizeof(T)) memory.resize(count + NEAR / sizeof(T));
    const std::size_t past = reinterpret_cast<std::uintptr_t>(memory.data()) % NEAR;
    return memory.data() + (past ? NEAR - past : 0) / sizeof(T);
}

struct Work {
    const Variant& variant;
    const Attention& a;
    Heads q, y;
    std::size_t group;     // heads that read the same keys
    std::size_t together;  // of them in one item
    std::size_t width;     // of values
    float *results, *most_sum, *steps;
    std::int8_t* codes;
    std::int32_t* sums;

    std::size_t from(std::size_t position) const {
        return a.window && position >= a.window ? position + 1 - a.window : 0;
    }
    // Items of a head of keys.
    std::size_t shares() const { return (group + together - 1) / together; }
    std::size_t items(const RowBlock& rows) const {
        return rows.state->kv_heads * shares() * rows.count;
    }
    // Of the results of one block of keys.
    std::size_t numbers(const RowBlock& rows) const {
        return rows.rows * a.heads * result_width(width);
    }
    float* result(const RowBlock& rows, std::size_t row, std::size_t head) const {
        return results + rows.results + (row * a.heads + head) * rows.count * result_width(width);
    }

    std::size_t code_width(const KeyValues& state) const {
        return (state.keys.width + NEAR - 1) / NEAR * NEAR;
    }
    Codes rounded(const KeyValues& state, std::size_t query) const {
        return {codes + query * code_width(state), steps + query * state.keys.groups,
                sums + query * state.keys.groups};
    }
    void round(const KeyValues& state, std::size_t row, std::size_t head, std::size_t query) const {
        const std::size_t width = state.keys.width, groups = state.keys.groups;
        std::int8_t* to = codes + query * code_width(state);
        std::memset(to + width, 0, code_width(state) - width);
        variant.quantise(q.data + row * q.row + head * q.head, width, STATE_GROUP, to,
                         steps + query * groups, sums + query * groups);
    }

    // Item i of these rows: a block of keys, a head of them, a share of those that read them.
    void attend(const RowBlock& rows, std::size_t i) const {
        const std::size_t share = i % shares(), head = i / shares() % rows.state->kv_heads;
        const std::size_t at = i / shares() / rows.state->kv_heads;
        const std::size_t begin = (rows.first + rows.begin + at) * BLOCK_KEYS;
        const std::size_t first = head * group + share * together;
        const std::size_t end = std::min(first + together, (head + 1) * group);
        KeyBlock block;
        block.state = rows.state, block.head = head, block.queries = 0;
        block.scale = a.scale, block.softcap = a.softcap;
        for (std::size_t r = 0; r < rows.rows; ++r) {
            const std::size_t position = rows.position + r;
            const std::size_t seen = std::max(from(position), begin);
            const std::size_t last = std::min(position + 1, begin + BLOCK_KEYS);
            if (seen >= last) continue;
            for (std::size_t h = first; h < end; ++h) {
                const std::size_t n = block.queries++;
                block.q[n] = q.data + (rows.row + r) * q.row + h * q.head;
                if (rows.state->kind == StateKind::int8)
                    block.rounded[n] = rounded(*rows.state, rows.query + r * a.heads + h);
                block.from[n] = seen, block.to[n] = last;
                block.out[n] = result(rows, r, h) + at * result_width(width);
            }
        }
        for (std::size_t b = 0; b < BLOCK_KEYS / BLOCK_TOKENS; ++b)
            block.next[b] = share + 1 < shares() ? nullptr : next(rows, head, begin, b);
        if (block.queries) variant.attend(block);
    }

    // Keys of block of tokens b of the item behind those of `head` and the block at `begin`.
    const std::uint8_t* next(const RowBlock& rows, std::size_t head, std::size_t begin,
                             std::size_t b) const {
        const KeyValues& state = *rows.state;
        const bool last = head + 1 == state.kv_heads;
        const std::size_t position = begin + (last ? BLOCK_KEYS : 0) + b * BLOCK_TOKENS;
        const bool seen = position + BLOCK_TOKENS > from(rows.position) &&
                          position < rows.position + rows.rows;
        const std::size_t token = (last ? 0 : head + 1) * BLOCK_TOKENS;
        return seen ? state.block(position) + state.keys.start +
                          token * state.keys.width * state.size()
                    : nullptr;
    }

    // What a query saw in this round.
    void join(const RowBlock& rows, std::size_t row, std::size_t head) const {
        const std::size_t position = rows.position + row, before = rows.first + rows.begin;
        const std::size_t first = from(position) / BLOCK_KEYS, end = position / BLOCK_KEYS + 1;
        const std::size_t begin = std::max(first, before);
        const std::size_t stop = std::min(end, before + rows.count);
        if (begin >= stop) return;
        Join j = {};
        j.results = result(rows, row, head) + (begin - before) * result_width(width);
        j.count = stop - begin, j.width = width;
        j.first = begin == first, j.last = stop == end;
        j.sink = a.sinks ? a.sinks + head : nullptr;
        j.most_sum = most_sum + 2 * (rows.query + row * a.heads + head);
        j.y = y.data + (rows.row + row) * y.row + head * y.head;
        variant.join(j);
    }
};

// Numbers of a token to its cells of a block.
void remember(const Variant& variant, const KeyValues& state, const Cells& cells,
              std::size_t position, std::size_t head, const float* x) {
    const std::size_t token = head * BLOCK_TOKENS + position % BLOCK_TOKENS, width = cells.width;
    std::uint8_t* block = state.block(position);
    std::uint8_t* to = block + cells.start;
    if (state.kind == StateKind::f32) {
        std::memcpy(to + token * width * sizeof(float), x, width * sizeof(float));
    } else if (state.kind == StateKind::f16) {
        variant.to_f16(x, width, reinterpret_cast<std::uint16_t*>(to) + token * width);
    } else {
        float* scales = reinterpret_cast<float*>(block + cells.scales) + token * cells.groups;
        for (std::size_t g = 0; g < cells.groups; ++g) {
            const std::size_t first = g * STATE_GROUP, n = std::min(width - first, STATE_GROUP);
            std::int8_t codes[STATE_GROUP];
            std::int32_t sum;
            variant.quantise(x + first, n, STATE_GROUP, codes, scales + g, &sum);
            std::memcpy(to + token * width + first, codes, n);
        }
    }
}

// The new rows of a sequence, from row `first` of the step on, to where its state has them.
void remember(const Variant& variant, const Part& part, std::size_t first, Heads k, Heads v,
              std::size_t threads) {
    const KeyValues& state = *part.state;
    const std::size_t numbers = state.kv_heads * (state.keys.width + state.values.width);
    parallel(part.rows, part.rows * numbers < LITTLE ? 1 : threads, [&](std::size_t r) {
        for (std::size_t head = 0; head < state.kv_heads; ++head) {
            const std::size_t row = first + r, position = part.past + r;
            remember(variant, state, state.keys, position, head,
                     k.data + row * k.row + head * k.head);
            if (!state.latent)
                remember(variant, state, state.values, position, head,
                         v.data + row * v.row + head * v.head);
        }
    });
}

// The first of `rows` rows that go through the kernels together.
RowBlock row_block(const Work& work, const KeyValues& state, std::size_t row, std::size_t rows,
                   std::size_t position) {
    rows = std::min(rows, std::max<std::size_t>(QUERIES / work.together, 1));
    while (rows > 1 && rows * work.a.heads * result_width(work.width) > ROOM) rows /= 2;
    const std::size_t first = work.from(position) / BLOCK_KEYS;
    const std::size_t blocks = (position + rows - 1) / BLOCK_KEYS + 1 - first;
    return {&state, row, rows, position, first, blocks, 0, 0, 0, 0, 0};
}

// The row block that has number i of what `start` counts.
const RowBlock& that_has(const std::vector<RowBlock>& some, std::size_t i,
                         std::size_t RowBlock::* start) {
    const auto after = std::upper_bound(
        some.begin(), some.end(), i,
        [start](std::size_t number, const RowBlock& rows) { return number < rows.*start; });
    return after[-1];
}

// Calls f(i) for items that take long: they are handed out in shorter runs than `parallel`'s.
template <class F>
void in_short_runs(std::size_t items, std::size_t threads, F&& f) {
    const std::size_t run = items / (threads * 32) + 1;
    std::atomic<std::size_t> next{0};
    parallel(std::min(items, threads), threads, [&](std::size_t) {
        for (std::size_t i; (i = next.fetch_add(run, std::memory_order_relaxed)) < items;)
            for (const std::size_t end = std::min(i + run, items); i < end; ++i) f(i);
    });
}

// Numbers queries, and rounds those of states in int8.
std::size_t prepare(Work& work, Scratch& scratch, std::size_t threads) {
    std::size_t queries = 0, codes = 0, groups = 0;
    for (RowBlock& rows : scratch.some) {
        rows.query = queries, queries += rows.rows * work.a.heads;
        if (rows.state->kind != StateKind::int8) continue;
        codes = queries * work.code_width(*rows.state), groups = queries * rows.state->keys.groups;
    }
    work.most_sum = room(scratch.most_sum, 2 * queries);
    if (!codes) return queries;
    work.codes = room(scratch.codes, codes);
    work.steps = room(scratch.steps, groups), work.sums = room(scratch.sums, groups);
    parallel(queries, codes < LITTLE ? 1 : threads, [&](std::size_t query) {
        const RowBlock& rows = that_has(scratch.some, query, &RowBlock::query);
        const std::size_t i = query - rows.query;
        if (rows.state->kind == StateKind::int8)
            work.round(*rows.state, rows.row + i / work.a.heads, i % work.a.heads, query);
    });
    return queries;
}

// Blocks of keys of a round: as many as there is room for, in all rounds alike.
std::size_t blocks_of_round(const Work& work, const RowBlock& rows) {
    const std::size_t most = std::max<std::size_t>(ROOM / work.numbers(rows), 1);
    const std::size_t rounds = (rows.blocks + most - 1) / most;
    return (rows.blocks + rounds - 1) / rounds;
}

// All of `some` at once: blocks, then joins. Only one alone may have no room.
void run(Work& work, Scratch& scratch, std::size_t threads) {
    std::vector<RowBlock>& some = scratch.some;
    const std::size_t queries = prepare(work, scratch, threads), heads = work.a.heads;
    std::size_t blocks = 0;
    for (const RowBlock& rows : some) blocks = std::max(blocks, rows.blocks);
    const std::size_t most = some.size() == 1 ? blocks_of_round(work, some[0]) : blocks;
    for (std::size_t begin = 0; begin < blocks; begin += most) {
        std::size_t items = 0, results = 0, sums = 0;
        for (RowBlock& rows : some) {
            rows.begin = std::min(begin, rows.blocks);
            rows.count = std::min(most, rows.blocks - rows.begin);
            rows.items = items, rows.results = results;
            items += work.items(rows);
            results += work.numbers(rows) * rows.count;
            const std::size_t seen = rows.position + rows.rows - work.from(rows.position);
            sums += rows.rows * heads * std::min(seen, rows.count * BLOCK_KEYS) *
                    (rows.state->keys.width + work.width);
        }
        work.results = room(scratch.results, results);
        in_short_runs(items, sums < LITTLE ? 1 : threads, [&](std::size_t item) {
            const RowBlock& rows = that_has(some, item, &RowBlock::items);
            work.attend(rows, item - rows.items);
        });
        parallel(queries, results < LITTLE ? 1 : threads, [&](std::size_t query) {
            const RowBlock& rows = that_has(some, query, &RowBlock::query);
            work.join(rows, (query - rows.query) / heads, (query - rows.query) % heads);
        });
    }
}

}  // namespace

KeyValues key_values(const std::int64_t* blocks, StateKind kind, std::size_t context,
                     std::size_t kv_heads, std::size_t key_width, std::size_t value_width,
                     bool latent) {
    const std::size_t size = KeyValues{nullptr, kind, latent, 0, 0, 0, {}, {}}.size();
    const std::size_t tokens = kv_heads * BLOCK_TOKENS;
    std::size_t end = 0;
    const auto piece = [&](std::size_t bytes) {
        const std::size_t start = end;
        end += (bytes + 63) / 64 * 64;
        return start;
    };
    const auto groups = [](std::size_t width) { return (width + STATE_GROUP - 1) / STATE_GROUP; };
    Cells keys = {piece(tokens * key_width * size), key_width, 0, groups(key_width)};
    Cells values = keys;
    if (!latent) values = {piece(tokens * value_width * size), value_width, 0, groups(value_width)};
    if (kind == StateKind::int8) {
        keys.scales = piece(tokens * keys.groups * sizeof(float));
        values.scales = latent ? keys.scales : piece(tokens * values.groups * sizeof(float));
    }
    return {blocks, kind, latent, context, kv_heads, value_width, keys, values};
}

void attention(const Variant& variant, const Attention& a, const Part* parts, std::size_t count,
               Heads q, Heads k, Heads v, Heads y, std::size_t threads) {
    static thread_local Scratch mine;
    Scratch& scratch = mine;  // thread_local: the workers must see this thread's
    std::size_t row = 0;
    for (std::size_t p = 0; p < count; row += parts[p++].rows)
        remember(variant, parts[p], row, k, v, threads);
    if (row == 0) return;
    Work work = {variant, a, q, y, a.heads / parts[0].state->kv_heads, 0,
                 parts[0].state->value_width, nullptr, nullptr, nullptr, nullptr, nullptr};
    work.together = std::min(work.group, QUERIES);
    std::size_t used = 0;
    scratch.some.clear();
    row = 0;
    for (std::size_t p = 0; p < count; row += parts[p++].rows)
        for (std::size_t r = 0; r < parts[p].rows;) {
            const RowBlock next =
                row_block(work, *parts[p].state, row + r, parts[p].rows - r, parts[p].past + r);
            const std::size_t one = work.numbers(next), all = one * next.blocks;
            r += next.rows;
            if (used && used + all > ROOM) {
                run(work, scratch, threads);
                scratch.some.clear(), used = 0;
            }
            scratch.some.push_back(next);
            used += all;
        }
    run(work, scratch, threads);
}

}  // namespace smoe
