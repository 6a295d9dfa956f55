#include "program_scan.h"

#include <algorithm>
#include <cstring>

#include "pool.h"
#include "program_build.h"

namespace smoe {
namespace {

constexpr std::size_t LITTLE = 1 << 15;  // numbers of a call that a second thread is not worth
constexpr std::size_t SHARE = 1024;      // numbers of a convolution that a thread takes at least

const std::vector<Run>& runs_of(StepRows& rows, const Block& block) {
    rows.runs.clear();
    each_sequence(rows, block, [&](const Sequence& s, std::size_t first, std::size_t n) {
        rows.runs.push_back({&s, first - block.first, n});
    });
    return rows.runs;
}

// What the first of a run's rows finds, and where all of them leave theirs.
const float* found(const Op& op, const Run& run, const Block& block, std::size_t r) {
    const Sequence& s = *run.sequence;
    return block.first + r == s.first ? s.state->found(op.state) : s.state->left(op.state);
}

float* left(const Op& op, const Run& run) { return run.sequence->state->left(op.state); }

// Operand i of a run's rows, from element `start` of each on.
Lane lane(const Program& program, const Op& op, std::size_t i, const StepRows& rows,
          const Block& block, const Run& run, std::size_t start) {
    auto* data = reinterpret_cast<float*>(program.at(op.operand[i], rows, block));
    const std::size_t row = op.operand[i].row / sizeof(float);
    return {data + run.first * row + start, row};
}

void one(const Program& program, const Op& op, const StepRows& rows, const Block& block,
         const Run& run, std::size_t r) {
    std::uint8_t* at[OPERANDS] = {};
    for (std::size_t i = 0; i < op.operands; ++i)
        if (op.operand[i].place != Place::absent)
            at[i] = program.at(op.operand[i], rows, block) + r * op.operand[i].row;
    if (op.carries == Carries::recall)
        std::memcpy(at[0], found(op, run, block, r), op.work * sizeof(float));
    else if (op.carries == Carries::store)
        std::memcpy(left(op, run), at[0], op.work * sizeof(float));
    else
        one_row(op, at);
}

}  // namespace

void find_scans(std::vector<Op>& ops, const std::string& where) {
    std::vector<std::size_t> open;  // states
    std::size_t first = 0;
    for (std::size_t i = 0; i < ops.size(); ++i) {
        const Op& op = ops[i];
        const auto found = std::find(open.begin(), open.end(), op.state);
        if (op.carries == Carries::recall) {
            require(found == open.end(), where + " recalls a state twice.");
            first = open.empty() ? i : first;
            open.push_back(op.state);
        } else if (op.carries == Carries::store) {
            require(found != open.end(), where + " stores a state that it did not recall.");
            open.erase(found);
            if (open.empty()) ops[first].scanned = i + 1 - first;
            continue;
        }
        bool alone = false;  // takes what lies in the memory of a scan
        for (std::size_t o = 0; o < op.operands; ++o) alone |= op.operand[o].place == Place::scan;
        require(open.empty() ? !alone : op.carries == Carries::recall || (op.kernel && !op.kept),
                where + " scans more than operations on a row, or looks into a scan.");
    }
    require(open.empty(), where + " does not store what it recalls.");
}

void run_scan(Program& program, const Op* ops, std::size_t count, StepRows& rows,
              const Block& block) {
    const std::vector<Run>& runs = runs_of(rows, block);
    const std::size_t items = std::min(runs.size(), std::min(program.threads, SCANS));
    parallel(items, items, [&](std::size_t item) {
        Block mine = block;
        mine.scan = item;
        for (std::size_t i = item; i < runs.size(); i += items)
            for (std::size_t r = runs[i].first; r < runs[i].first + runs[i].rows; ++r)
                for (std::size_t o = 0; o < count; ++o)
                    one(program, ops[o], rows, mine, runs[i], r);
    });
}

void run_delta_rule(Program& program, const Op& op, StepRows& rows, const Block& block) {
    enum { Q, K, V, DECAY, BETA, Y };
    const std::vector<Run>& runs = runs_of(rows, block);
    const std::size_t heads = op.shape[0], keys = op.shape[1], values = op.shape[2];
    const std::size_t work = block.rows * heads * keys * values;
    parallel(runs.size() * heads, work < LITTLE ? 1 : program.threads, [&](std::size_t item) {
        const Run& run = runs[item / heads];
        const std::size_t head = item % heads;
        const auto of = [&](std::size_t i) {
            return lane(program, op, i, rows, block, run, head * op.heads[i]);
        };
        const std::size_t start = head * keys * values;
        const DeltaHead a = {found(op, run, block, run.first) + start,
                             left(op, run) + start, keys, values, run.rows,
                             of(Q), of(K), of(V), of(DECAY), of(BETA), of(Y),
                             op.rank == 4};
        program.rows.delta_rule(a);
    });
}

void run_convolution(Program& program, const Op& op, StepRows& rows, const Block& block) {
    enum { X, WEIGHT, BIAS, Y };
    const std::vector<Run>& runs = runs_of(rows, block);
    const std::size_t tokens = op.shape[0], width = op.shape[1], taps = op.shape[2];
    const std::size_t shares = (width + SHARE - 1) / SHARE;
    const bool little = block.rows * width * taps < LITTLE;
    parallel(runs.size() * shares, little ? 1 : program.threads, [&](std::size_t item) {
        const Run& run = runs[item / shares];
        const std::size_t first = item % shares * SHARE;
        const bool biased = op.operand[BIAS].place != Place::absent;
        const Taps a = {found(op, run, block, run.first) + first,
                        left(op, run) + first,
                        lane(program, op, WEIGHT, rows, block, run, first).data,
                        biased ? lane(program, op, BIAS, rows, block, run, first).data : nullptr,
                        tokens, width, taps, std::min(SHARE, width - first), run.rows,
                        lane(program, op, X, rows, block, run, first),
                        lane(program, op, Y, rows, block, run, first)};
        program.rows.convolution(a);
    });
}

}  // namespace smoe
