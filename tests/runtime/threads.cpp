// A small program for the thread sanitizer: several threads use the pool, the kernels and the
// packer at once, as several engines of one process do. Every result is compared with that of one
// thread. `make threads` builds and runs it.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../prep/pack/native/rounding.h"
#include "../../runtime/kernels/native/attention.h"
#include "../../runtime/kernels/native/ffn.h"
#include "../../runtime/kernels/native/pool.h"
#include "../../runtime/kernels/native/products.h"
#include "threads_program.h"

using namespace smoe;

namespace {

constexpr std::size_t CALLERS = 4, ROUNDS = 60, HIDDEN = 96, WIDTH = 80, EXPERTS = 3, TOKENS = 5;

// An expert's record: up, down and gate in float32, one behind the other.
constexpr std::size_t MATRIX = HIDDEN * WIDTH * sizeof(float), RECORD = 3 * MATRIX;

Matrix dense(std::size_t n_out, std::size_t n_in, std::ptrdiff_t data) {
    Matrix m = {};
    m.kind = Weights::f32, m.n_out = n_out, m.n_in = n_in, m.data = data, m.scale = m.bias = -1;
    return m;
}

struct Problem {
    Layer layer = {};
    std::vector<float> records, x;
    std::vector<const std::uint8_t*> at;
    std::vector<std::size_t> levels, starts, tokens;

    Problem() {
        layer.up = dense(WIDTH, HIDDEN, 0), layer.down = dense(HIDDEN, WIDTH, MATRIX);
        layer.gate = dense(WIDTH, HIDDEN, 2 * MATRIX);
        layer.spec = {Kind::gated, Act::silu, 0, 0};
        records.resize(EXPERTS * RECORD / sizeof(float));
        x.resize(TOKENS * HIDDEN);
        for (std::size_t i = 0; i < records.size(); ++i)
            records[i] = float(i * 37 % 101) / 101 - .5f;
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = float(i * 53 % 97) / 97 - .5f;
        starts = {0};
        for (std::size_t e = 0; e < EXPERTS; ++e) {
            at.push_back(reinterpret_cast<const std::uint8_t*>(records.data()) + e * RECORD);
            levels.push_back(1);
            for (std::size_t t = e; t < TOKENS; ++t) tokens.push_back(t);
            starts.push_back(tokens.size());
        }
    }

    std::vector<float> solve(std::size_t threads) const {
        std::vector<float> y(tokens.size() * HIDDEN);
        ffn({&portable, &layer, EXPERTS, at.data(), levels.data(), starts.data(), tokens.data(),
             x.data(), TOKENS, y.data(), threads});
        return y;
    }
};

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "threads: %s\n", what);
    std::exit(1);
}

// Every item once, whoever has the workers, and with fewer and more of them from round to round.
void count_items(std::size_t caller) {
    for (std::size_t round = 0; round < ROUNDS; ++round) {
        std::vector<int> done(1 + (caller * 31 + round * 17) % 200);
        parallel(done.size(), 1 + (round + caller) % 6, [&](std::size_t i) { ++done[i]; });
        for (int times : done) require(times == 1, "an item was not done exactly once");
    }
}

void call_kernels(const Problem& problem, const std::vector<float>& wanted, std::size_t caller) {
    for (std::size_t round = 0; round < ROUNDS; ++round)
        require(problem.solve(1 + (round + caller) % 6) == wanted, "threads changed the bits");
}

// Tokens through a matrix of the backbone in int8, whose output is queries, keys and values of
// attention over what came before.
std::vector<float> attend(const std::vector<float>& numbers, std::size_t threads) {
    constexpr std::size_t HEADS = 8, HEAD = 16, PAST = 200, ROWS_NOW = 8, Q = HEADS * HEAD;
    std::vector<std::uint8_t> codes(Q * HIDDEN);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = std::uint8_t(i * 29);
    Remembered state(StateKind::f16, PAST + ROWS_NOW, HEAD, [](std::size_t i) {
        return std::uint8_t(i % 2 ? 0x38 : i * 7);
    });
    const Weight w = {Form::int8,   Q,
                      HIDDEN,       32,
                      codes.data(), reinterpret_cast<const std::uint8_t*>(numbers.data()),
                      true};
    std::vector<float> q(ROWS_NOW * Q), y(ROWS_NOW * Q);
    product(portable, w, numbers.data(), HIDDEN, ROWS_NOW, nullptr, q.data(), Q, threads);
    const Part part = {&state.values, PAST, ROWS_NOW};
    const Heads heads = {q.data(), Q, HEAD};
    attention(portable, {HEADS, .25f, 0, 0, nullptr}, &part, 1, heads, heads, heads,
              {y.data(), Q, HEAD}, threads);
    return y;
}

void call_backbone(const std::vector<float>& numbers, const std::vector<float>& wanted,
                   std::size_t caller) {
    for (std::size_t round = 0; round < ROUNDS; ++round)
        require(attend(numbers, 1 + (round + caller) % 6) == wanted,
                "threads changed what tokens see");
}

// Weights rounded to codes of two bits, and to float16.
std::vector<std::uint8_t> pack(const std::vector<float>& w, std::size_t threads) {
    Grid grid = {};
    grid.total = 2, grid.levels = 1, grid.bits[0] = 2, grid.weight[0] = 1, grid.table = true;
    for (int code = 0; code < 4; ++code) grid.values[0][code] = float(2 * code - 3);
    for (int edge = 0; edge < 3; ++edge) grid.edges[edge] = float(2 * edge - 2);
    grid.candidates = 2, grid.around[0] = .5, grid.around[1] = .7;
    const std::size_t n_out = w.size() / HIDDEN, groups = (HIDDEN + 31) / 32;
    std::vector<std::uint8_t> codes(w.size());
    std::vector<float> scale(n_out * groups);
    std::vector<std::uint16_t> half(w.size());
    round_nested(rounding_portable, grid, w.data(), n_out, HIDDEN, 32, codes.data(), scale.data(),
                 threads);
    require(round_f16(rounding_portable, w.data(), w.size(), half.data(), threads),
            "a weight was said to be too large");
    for (std::uint16_t bits : half) codes.push_back(std::uint8_t(bits ^ bits >> 8));
    return codes;
}

void call_packer(const std::vector<float>& w, const std::vector<std::uint8_t>& wanted,
                 std::size_t caller) {
    for (std::size_t round = 0; round < ROUNDS; ++round)
        require(pack(w, 1 + (round + caller) % 6) == wanted, "threads changed the codes");
}

void call_program(Shared& shared, const std::vector<float>& wanted) {
    for (std::size_t round = 0; round < ROUNDS / 10; ++round)
        require(shared.solve() == wanted, "threads changed what a program gives");
}

}  // namespace

int main() {
    const Problem problem;
    const std::vector<std::uint8_t> codes = pack(problem.records, 1);
    const std::vector<float> wanted = problem.solve(1), seen = attend(problem.records, 1);
    const std::vector<float> given = Shared(1).solve();
    Shared shared(3);
    std::vector<std::thread> callers;
    for (std::size_t caller = 0; caller < CALLERS; ++caller)
        callers.emplace_back([&, caller] {
            count_items(caller);
            call_kernels(problem, wanted, caller);
            call_backbone(problem.records, seen, caller);
            call_packer(problem.records, codes, caller);
            call_program(shared, given);
        });
    for (std::thread& caller : callers) caller.join();
    std::puts("threads: every item once, the same bits, nothing for the sanitizer to say");
}
