#include "program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "pool.h"
#include "program_build.h"
#include "program_scan.h"

namespace smoe {
namespace {

constexpr std::size_t LITTLE = 1 << 15;  // numbers of a call that a second thread is not worth
constexpr std::size_t ROW_LARGEST = std::size_t(1) << 31;  // numbers of a buffer's row
constexpr std::size_t SPARE = 8 << 20;   // bytes of a step's memory that are kept for the next one

float* floats_at(const Program& program, const Op& op, std::size_t i, const StepRows& rows,
                 const Block& block) {
    return reinterpret_cast<float*>(program.at(op.operand[i], rows, block));
}

std::size_t stride_of(const Op& op, std::size_t i) { return op.operand[i].row / sizeof(float); }

void run_rows(Program& program, const Op& op, StepRows& rows, const Block& block) {
    const std::size_t n = op.kept ? block.kept : block.rows;
    std::uint8_t* base[OPERANDS] = {};
    for (std::size_t i = 0; i < op.operands; ++i)
        if (op.operand[i].place != Place::absent) base[i] = program.at(op.operand[i], rows, block);
    if (n == 1) return one_row(op, base);
    parallel(n, n * op.work < LITTLE ? 1 : program.threads, [&](std::size_t r) {
        std::uint8_t* at[OPERANDS];
        for (std::size_t i = 0; i < op.operands; ++i) at[i] = base[i] + r * op.operand[i].row;
        one_row(op, at);
    });
}

void run_keep(Program& program, const Op& op, StepRows& rows, const Block& block) {
    const std::uint8_t* from = program.at(op.operand[0], rows, block);
    std::uint8_t* to = program.at(op.operand[1], rows, block);
    for (std::size_t k = 0; k < block.kept; ++k) {
        const std::size_t r = std::size_t(rows.keep[block.kept_first + k]) - block.first;
        std::uint8_t* base[] = {const_cast<std::uint8_t*>(from) + r * op.operand[0].row,
                                to + k * op.operand[1].row};
        one_row(op, base);
    }
}

void run_product(Program& program, const Op& op, StepRows& rows, const Block& block) {
    const float* bias = op.operand[1].place == Place::absent
                            ? nullptr
                            : floats_at(program, op, 1, rows, block);
    product(program.variant, op.weight, floats_at(program, op, 0, rows, block), stride_of(op, 0),
            op.kept ? block.kept : block.rows, bias, floats_at(program, op, 2, rows, block),
            stride_of(op, 2), program.threads);
}

void run_head_product(Program& program, const Op& op, StepRows& rows, const Block& block) {
    const auto heads = [&](std::size_t i) {
        return Heads{floats_at(program, op, i, rows, block), stride_of(op, i), op.heads[i]};
    };
    head_product(program.variant, op.weight, op.shape[0], op.shape[1], heads(0),
                 op.kept ? block.kept : block.rows, heads(1), program.threads);
}

void run_embedding(Program& program, const Op& op, StepRows& rows, const Block& block) {
    embedding(op.weight, rows.ids.data() + block.first, block.rows, op.scale,
              floats_at(program, op, 0, rows, block), stride_of(op, 0));
}

void run_position(Program& program, const Op& op, StepRows& rows, const Block& block) {
    std::uint8_t* to = program.at(op.operand[0], rows, block);
    each_sequence(rows, block, [&](const Sequence& s, std::size_t first, std::size_t n) {
        for (std::size_t r = first; r < first + n; ++r) {
            const std::size_t position = s.past + (r - s.first);
            std::uint8_t* at = to + (r - block.first) * op.operand[0].row;
            if (op.whole)
                *reinterpret_cast<std::int64_t*>(at) = std::int64_t(position);
            else
                *reinterpret_cast<float*>(at) = float(position);
        }
    });
}

void run_attention(Program& program, const Op& op, StepRows& rows, const Block& block) {
    rows.parts.clear();
    each_sequence(rows, block, [&](const Sequence& s, std::size_t first, std::size_t n) {
        rows.parts.push_back({&s.state->attentions[op.state], s.past + (first - s.first), n});
    });
    const auto heads = [&](std::size_t i, std::size_t slot) {
        return Heads{floats_at(program, op, i, rows, block), stride_of(op, i), op.heads[slot]};
    };
    const bool latent = op.operand[2].place == Place::absent;
    attention(program.variant, op.attention, rows.parts.data(), rows.parts.size(), heads(0, 0),
              heads(1, 1), latent ? Heads{} : heads(2, 2), heads(4, 3), program.threads);
}

void (*runner(const std::string& kind))(Program&, const Op&, StepRows&, const Block&) {
    return kind == "product"        ? run_product
           : kind == "head_product" ? run_head_product
           : kind == "attention"    ? run_attention
           : kind == "embedding"    ? run_embedding
           : kind == "position"     ? run_position
           : kind == "keep"         ? run_keep
           : kind == "delta_rule"   ? run_delta_rule
           : kind == "convolution"  ? run_convolution
                                    : run_rows;
}

}  // namespace

// The kernel along every line.
void one_row(const Op& op, std::uint8_t* const* base) {
    void* at[OPERANDS];
    for (std::size_t i = 0; i < op.operands; ++i) at[i] = base[i];
    if (!op.rank) return op.kernel(op.row, at);
    std::size_t index[RANK] = {};
    for (;;) {
        op.kernel(op.row, at);
        std::size_t a = op.rank - 1;
        for (;; --a) {
            const bool more = ++index[a] < op.shape[a];
            const auto back = std::ptrdiff_t(op.shape[a] - 1);
            for (std::size_t i = 0; i < op.operands; ++i)
                at[i] = static_cast<std::uint8_t*>(at[i]) +
                        (more ? op.operand[i].outer[a] : -back * op.operand[i].outer[a]);
            if (more) break;
            index[a] = 0;
            if (a == 0) return;
        }
    }
}

std::size_t row_bytes(const ProgramAbout& program, Place place) {
    std::size_t most = 0;
    for (const BufferAbout& b : program.buffers) {
        require(b.size > 0 && b.size < ROW_LARGEST && b.offset % 64 == 0 &&
                    b.offset < ROW_LARGEST * 64,
                "A buffer is empty, larger than there are, or not on a multiple of 64.");
        if (place_of(b) != place) continue;
        const std::size_t end = b.offset + b.size * SIZES[std::size_t(b.type)];
        most = std::max(most, (end + 63) / 64 * 64);
    }
    return most;
}

void Memory::reserve(std::size_t least) {
    if (least <= size) return;
    size = 0, bytes.reset();
    const std::size_t whole = (least + 63) / 64 * 64 + 64;
    auto* block = static_cast<std::uint8_t*>(std::calloc(1, whole));
    if (!block) throw std::bad_alloc();
    bytes = {block, std::free};
    start = block + (64 - reinterpret_cast<std::uintptr_t>(block) % 64) % 64;
    size = whole - 64;
}

Program::Program(const ProgramAbout& about, const std::uint8_t* weights, std::size_t nbytes,
                 const Variant& variant, std::size_t threads)
    : variant(variant),
      rows(row_kernels(variant)),
      threads(threads),
      buffers_(about.buffers),
      states_(about.states),
      recurrent_(about.recurrent),
      scratch_row_(row_bytes(about, Place::scratch)),
      scan_row_(row_bytes(about, Place::scan)),
      step_row_(row_bytes(about, Place::step)),
      kept_row_(row_bytes(about, Place::kept)) {
    for (std::size_t s = 0; s < about.segments.size(); ++s) {
        segments_.emplace_back();
        for (std::size_t i = 0; i < about.segments[s].size(); ++i) {
            const OpAbout& one = about.segments[s][i];
            const std::string where = "Operation " + std::to_string(i) + " (" + one.kind +
                                      ") of segment " + std::to_string(s) + " of the program";
            segments_.back().push_back(build(one, about, weights, nbytes, rows, where));
            segments_.back().back().run = runner(one.kind);
            if (one.kind == "embedding" && segments_.back().back().weight.n_out < vocabulary_)
                vocabulary_ = segments_.back().back().weight.n_out;
        }
        find_scans(segments_.back(), "Segment " + std::to_string(s) + " of the program");
    }
}

std::uint8_t* Program::at(const Argument& o, const StepRows& rows, const Block& block) const {
    switch (o.place) {
        case Place::constant:
            return o.constant + o.start;
        case Place::scratch:
            return scratch_.start + o.unit * block.rows + o.start;
        case Place::scan:
            return scans_.start + block.scan * scan_row_ + o.unit + o.start;
        case Place::step:
            return rows.memory.start + o.unit * rows.rows + block.first * o.row + o.start;
        case Place::kept:
            return rows.kept.start + o.unit * rows.keep.size() + block.kept_first * o.row +
                   o.start;
        case Place::absent:
            break;
    }
    return nullptr;
}

std::uint8_t* Program::at(const StepRows& rows, std::size_t i) const {
    const BufferAbout& b = buffers_[i];
    return b.kept ? rows.kept.start + b.offset * rows.keep.size()
                  : rows.memory.start + b.offset * rows.rows;
}

void Program::begin(StepRows& rows) {
    std::size_t n = 0;
    for (Sequence& s : rows.sequences) {
        s.first = n, n += s.rows;
        require(s.state->attentions.size() == states_.size() && s.state->sizes == recurrent_,
                "A state is of another program.");
        for (std::size_t i = 0; i < recurrent_.size(); ++i)
            require(s.state->found(i) && s.state->left(i), "A state has no room for a step.");
        const std::size_t context = s.state->context;
        require(s.past <= context && s.rows <= context - s.past,
                "A sequence of " + std::to_string(s.past) + " tokens and " +
                    std::to_string(s.rows) + " new ones is longer than its state of " +
                    std::to_string(context) + "; make one of a longer context.");
        for (std::size_t i = 0; i < states_.size(); ++i) {
            const KeyValues& kv = s.state->attentions[i];
            require(kv.kv_heads == states_[i].heads && kv.keys.width == states_[i].key_width &&
                        kv.value_width == states_[i].value_width && kv.latent == states_[i].latent,
                    "A state is of another program.");
            for (std::size_t position = s.past; position < s.past + s.rows;
                 position += BLOCK_TOKENS - position % BLOCK_TOKENS)
                require(kv.block(position), "A state has no room for the new tokens.");
        }
    }
    rows.rows = n, rows.program = this;
    require(n > 0 && n == rows.ids.size(), "A step has at least one token.");
    for (std::int64_t id : rows.ids)
        require(id >= 0 && std::size_t(id) < vocabulary_,
                "Token id " + std::to_string(id) + " is not one of the program's " +
                    std::to_string(vocabulary_) + ".");
    std::int64_t before = -1;
    for (std::int64_t k : rows.keep) {
        require(k > before && std::size_t(k) < n, "Rows to keep rise, and are rows of the step.");
        before = k;
    }
    rows.parts.reserve(rows.sequences.size());
    {
        const std::lock_guard<std::mutex> lock(spare_);
        std::swap(rows.memory, memory_);
        std::swap(rows.kept, kept_);
    }
    rows.memory.reserve(step_row_ * n);
    rows.kept.reserve(kept_row_ * rows.keep.size());
}

void Program::end(StepRows& rows) {
    const std::lock_guard<std::mutex> lock(spare_);
    if (rows.memory.size > memory_.size && rows.memory.size <= SPARE)
        std::swap(rows.memory, memory_);
    if (rows.kept.size > kept_.size && rows.kept.size <= SPARE) std::swap(rows.kept, kept_);
}

void Program::run(StepRows& rows, std::size_t segment) { run(rows, segment, 0, rows.rows); }

void Program::run(StepRows& rows, std::size_t segment, std::size_t first, std::size_t end) {
    require(segment < segments_.size(), "The program has no such segment.");
    require(first <= end && end <= rows.rows,
            "These are no rows of the step.");
    require(rows.program == this, "The rows are of another program.");
    const std::lock_guard<std::mutex> lock(running_);
    const std::size_t most = rows.rows < BLOCK ? rows.rows : BLOCK;
    scratch_.reserve(scratch_row_ * most);
    scans_.reserve(scan_row_ * (threads < SCANS ? threads : SCANS));
    Block block = {};
    block.first = first;
    while (block.kept_first < rows.keep.size() && std::size_t(rows.keep[block.kept_first]) < first)
        ++block.kept_first;
    for (; block.first < end; block.first += block.rows) {
        const std::size_t left = end - block.first;
        block.rows = left < BLOCK ? left : BLOCK;
        block.kept_first += block.kept, block.kept = 0;
        while (block.kept_first + block.kept < rows.keep.size() &&
               std::size_t(rows.keep[block.kept_first + block.kept]) < block.first + block.rows)
            ++block.kept;
        const std::vector<Op>& ops = segments_[segment];
        for (std::size_t i = 0; i < ops.size(); i += ops[i].scanned ? ops[i].scanned : 1)
            if (ops[i].scanned)
                run_scan(*this, &ops[i], ops[i].scanned, rows, block);
            else if (!ops[i].kept || block.kept)
                ops[i].run(*this, ops[i], rows, block);
    }
}

}  // namespace smoe
