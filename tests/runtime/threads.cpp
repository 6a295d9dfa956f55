// A small program for the thread sanitizer: several threads use the pool and the kernels at once,
// as several engines of one process do. Every result is compared with that of one thread. `make
// threads` builds and runs it.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../runtime/kernels/native/ffn.h"
#include "../../runtime/kernels/native/pool.h"

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

}  // namespace

int main() {
    const Problem problem;
    const std::vector<float> wanted = problem.solve(1);
    std::vector<std::thread> callers;
    for (std::size_t caller = 0; caller < CALLERS; ++caller)
        callers.emplace_back([&, caller] {
            count_items(caller);
            call_kernels(problem, wanted, caller);
        });
    for (std::thread& caller : callers) caller.join();
    std::puts("threads: every item once, the same bits, nothing for the sanitizer to say");
}
