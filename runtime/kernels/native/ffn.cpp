// The work of one call in four steps, each shared out among threads: quantise, gate and up,
// quantise again, down.
#include "ffn.h"

#include <cstring>
#include <vector>

#include "pool.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace smoe {
namespace {

constexpr std::size_t LITTLE =
    1 << 16;  // weights of a call for which a second thread costs more than it gives

// Tiles of gate and up in one item. Tiles of one matrix lie one behind the other, which processors
// foresee; going to and fro between two matrices costs a third of the speed of one row. Fewer where
// there are many threads.
constexpr std::size_t RUN = 16, ITEMS = 8;  // and items of a thread

std::size_t run_of(std::size_t tiles, std::size_t threads) {
    const std::size_t run = tiles / (ITEMS * threads);
    return run < 1 ? 1 : run < RUN ? run : RUN;
}

// Activations of one step, as the kernels want them.
struct Inputs {
    std::size_t width = 0, groups = 0, group = 0;
    std::vector<const float*> x;
    std::vector<const std::int8_t*> q;
    std::vector<const float*> step;
    std::vector<const std::int32_t*> sum;
    std::vector<std::int8_t> q_of;
    std::vector<float> step_of;
    std::vector<std::int32_t> sum_of;

    // Rows of x for `m`: quantised once each, then `slots` pick them (null: row s for slot s).
    void fill(const Call& call, const Matrix& m, const float* rows, std::size_t count,
              std::size_t stride, const std::size_t* slots, std::size_t slot_count) {
        x.resize(slot_count);
        for (std::size_t s = 0; s < slot_count; ++s) x[s] = rows + (slots ? slots[s] : s) * stride;
        q.clear();  // of the call before
        if (m.kind != Weights::nested) return;
        width = m.blocks() * COLUMNS, groups = m.groups(), group = m.group;
        q_of.resize(count * width);
        step_of.resize(count * groups);
        sum_of.resize(count * groups);
        parallel(count, count * width < LITTLE ? 1 : call.threads, [&](std::size_t r) {
            call.variant->quantise(rows + r * stride, m.n_in, group, &q_of[r * width],
                                   &step_of[r * groups], &sum_of[r * groups]);
        });
        q.resize(slot_count);
        step.resize(slot_count);
        sum.resize(slot_count);
        for (std::size_t s = 0; s < slot_count; ++s) {
            const std::size_t r = slots ? slots[s] : s;
            q[s] = &q_of[r * width], step[s] = &step_of[r * groups], sum[s] = &sum_of[r * groups];
        }
    }

    Rows at(std::size_t first, std::size_t n) const {
        const bool nested = !q.empty();
        return {n, x.data() + first, nested ? q.data() + first : nullptr,
                nested ? step.data() + first : nullptr, nested ? sum.data() + first : nullptr};
    }
};

struct Scratch {
    Inputs in, middle;
    std::vector<float> gate, up, down;
};

void add_bias(const Matrix& m, const std::uint8_t* record, std::size_t tile, float* y,
              std::size_t n, std::size_t stride) {
    if (m.bias < 0) return;
    const float* bias = reinterpret_cast<const float*>(record + m.bias) + tile * ROWS;
    const std::size_t rows = m.n_out - tile * ROWS < ROWS ? m.n_out - tile * ROWS : ROWS;
    for (std::size_t t = 0; t < n; ++t)
        for (std::size_t r = 0; r < rows; ++r) y[t * stride + r] += bias[r];
}

}  // namespace

void ffn(const Call& call) {
    static thread_local Scratch scratch;
    const Layer& layer = *call.layer;
    const std::size_t slots = call.starts[call.experts], hidden = layer.down.n_out;
    const std::size_t wide = layer.up.tiles() * ROWS, high = layer.down.tiles() * ROWS;
    const bool gated = layer.gate.n_out > 0;
    const std::size_t weights = call.experts * layer.up.n_in * layer.up.n_out;
    const std::size_t threads = weights < LITTLE ? 1 : call.threads;
    scratch.in.fill(call, layer.up, call.x, call.rows, layer.up.n_in, call.tokens, slots);
    scratch.gate.resize(gated ? slots * wide : 0);
    scratch.up.resize(slots * wide);
    scratch.down.resize(slots * high);
    Scratch& s = scratch;  // thread_local: the workers must see this thread's

    const std::size_t tiles = layer.up.tiles(), run = run_of(call.experts * tiles, threads);
    const std::size_t runs = (tiles + run - 1) / run;
    parallel(call.experts * runs, threads, [&](std::size_t item) {
        const std::size_t e = item / runs, begin = item % runs * run, first = call.starts[e];
        const std::size_t end = begin + run < tiles ? begin + run : tiles;
        const std::size_t n = call.starts[e + 1] - first;
        const Rows x = s.in.at(first, n);
        float* up = s.up.data() + first * wide;
        float* gate = gated ? s.gate.data() + first * wide : up;
        const auto multiply = [&](const Matrix& m, float* y) {
            for (std::size_t tile = begin; tile < end; ++tile) {
                float* rows = y + tile * ROWS;
                call.variant->tile({&m, call.records[e], call.levels[e]}, tile, x, rows, wide);
                add_bias(m, call.records[e], tile, rows, n, wide);
            }
        };
        multiply(layer.up, up);
        if (gated) multiply(layer.gate, gate);
        for (std::size_t t = 0; t < n; ++t) {
            const std::size_t at = t * wide + begin * ROWS;
            call.variant->gate(layer.spec, gate + at, up + at, (end - begin) * ROWS, up + at);
        }
    });

    s.middle.fill(call, layer.down, s.up.data(), slots, wide, nullptr, slots);
    parallel(call.experts * layer.down.tiles(), threads, [&](std::size_t item) {
        const std::size_t e = item / layer.down.tiles(), tile = item % layer.down.tiles(),
                          first = call.starts[e];
        const std::size_t n = call.starts[e + 1] - first;
        float* y = s.down.data() + first * high + tile * ROWS;
        call.variant->tile({&layer.down, call.records[e], call.levels[e]}, tile,
                           s.middle.at(first, n), y, high);
        add_bias(layer.down, call.records[e], tile, y, n, high);
        const std::size_t rows = hidden - tile * ROWS < ROWS ? hidden - tile * ROWS : ROWS;
        for (std::size_t t = 0; t < n; ++t)
            std::memcpy(call.y + (first + t) * hidden + tile * ROWS, y + t * high,
                        rows * sizeof(float));
    });
}

void turn(const std::int8_t* values, std::size_t bits, std::int8_t (*turned)[16]) {
    for (std::size_t m = 0; m < 4; ++m)
        for (std::size_t nibble = 0; nibble < 16; ++nibble) {
            std::size_t code = 0;
            for (std::size_t t = 0; t < bits; ++t) code = code << 1 | (nibble >> ((t + m) % 4) & 1);
            turned[m][nibble] = values[code];
        }
}

void product(const Variant& variant, const Operand& w, const float* x, std::size_t n, float* y) {
    Inputs in;
    const Call alone = {&variant, nullptr, 0, nullptr, nullptr, nullptr,
                        nullptr,  nullptr, 0, nullptr, 1};
    in.fill(alone, *w.m, x, n, w.m->n_in, nullptr, n);
    const std::size_t stride = w.m->tiles() * ROWS;
    for (std::size_t tile = 0; tile < w.m->tiles(); ++tile)
        variant.tile(w, tile, in.at(0, n), y + tile * ROWS, stride);
}

const Variant* const* variants(std::size_t* count) {
    static const Variant* found[3];
    static const std::size_t n = [] {
        std::size_t i = 0;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found[i++] = &avx512vnni;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) found[i++] = &avx2;
#elif defined(__aarch64__)
        if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found[i++] = &neondot;
        found[i++] = &neon;
#endif
        found[i++] = &portable;
        return i;
    }();
    *count = n;
    return found;
}

}  // namespace smoe
