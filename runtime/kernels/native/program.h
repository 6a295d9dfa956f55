// The executor of programs (artifacts/program.py): a segment's operations over the rows of a step,
// BLOCK rows at a time, so that what lives inside a segment takes little memory.
//
// A description comes from outside: the constructor checks that every view stays inside its buffer
// or constant and that operands fit each other (std::invalid_argument, a sentence), so that nothing
// a run computes with can lie elsewhere. Whoever describes also says where buffers lie: those that
// cross segments in the memory of a step, the others in scratch; overlaps give wrong numbers and no
// more.
//
// The bits of a row depend on nothing but its own past: rows.h, products.h, attention.h and
// recurrent.h say so of every operation. One run at a time; others wait. Nothing is allocated per
// run once the scratch is as large as the largest block so far.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "products.h"
#include "rows.h"

namespace smoe {

constexpr std::size_t BLOCK = 128;  // rows
constexpr std::size_t RANK = 6;     // axes of a view, at most

// ---- a description

// `size` numbers a row; `offset` bytes a row into the scratch, or, where it crosses segments, into
// the step's memory (that of kept rows where `kept`), or, where no operation outside of one scan
// takes it, into that scan's memory of one row: a multiple of 64.
struct BufferAbout {
    Type type;
    std::size_t size;
    bool kept, crossing, scanned;
    std::size_t offset;
};

// int8 and int4 matrices [n_out, n_in], or float rows; `offset` into the weights.
struct ConstantAbout {
    Form form;
    std::size_t n_out, n_in, group;
    bool wide;
    std::size_t offset;
};

// source: a buffer, after all buffers a constant (f32); -1: absent.
struct ViewAbout {
    std::ptrdiff_t source;
    std::size_t offset;
    std::vector<std::size_t> shape;
    std::vector<std::ptrdiff_t> strides;
};

// Operands are inputs, then outputs, those that are absent too (program.cpp has the kinds). Of
// `numbers` there are up to three.
struct OpAbout {
    std::string kind, how;
    std::vector<ViewAbout> operands;
    std::ptrdiff_t weight;
    std::size_t state;
    std::vector<double> numbers;
};

struct StateAbout {
    std::size_t heads, key_width, value_width;
    bool latent;
};

struct ProgramAbout {
    std::vector<BufferAbout> buffers;
    std::vector<ConstantAbout> constants;
    std::vector<StateAbout> states;
    std::vector<std::size_t> recurrent;  // numbers of each
    std::vector<std::vector<OpAbout>> segments;
};

// ---- a step

// What a program remembers of one sequence of up to `context` tokens: of every attention; and of
// every recurrent state, float32, the addresses of what a step finds and of what it leaves, [n][2],
// which are others from step to step.
struct State {
    std::size_t context;
    std::vector<KeyValues> attentions;
    std::vector<std::size_t> sizes;  // of recurrent state, in numbers
    const std::int64_t* recurrent;

    const float* found(std::size_t i) const { return at(2 * i); }
    float* left(std::size_t i) const { return at(2 * i + 1); }

  private:
    float* at(std::size_t i) const {
        return reinterpret_cast<float*>(std::uintptr_t(recurrent[i]));
    }
};

struct Sequence {
    State* state;
    std::size_t past, first, rows;  // tokens before; rows of the step
};

// Some rows of one sequence, `first` of a block.
struct Run {
    const Sequence* sequence;
    std::size_t first, rows;
};

// Memory on a multiple of 64, zero at first.
struct Memory {
    std::unique_ptr<std::uint8_t, void (*)(void*)> bytes{nullptr, nullptr};
    std::uint8_t* start = nullptr;
    std::size_t size = 0;

    void reserve(std::size_t least);  // what was in it is lost where it grows
};

// The rows of a step, sequence after sequence, and their buffers that cross segments.
struct StepRows {
    const class Program* program = nullptr;  // whose buffers they are
    std::size_t rows = 0;
    std::vector<std::int64_t> ids, keep;  // keep: rising
    std::vector<Sequence> sequences;
    std::vector<Part> parts;  // room for those of a block
    std::vector<Run> runs;    // likewise
    Memory memory, kept;
};

// ---- the executor

enum class Place : std::uint8_t { absent, constant, scratch, scan, step, kept };
enum class Carries : std::uint8_t { nothing, recall, store };

struct Argument {
    Place place;
    std::uint8_t* constant;
    std::size_t unit, row, start;  // bytes: a row of what lies before; a row; in the row
    std::ptrdiff_t outer[RANK];    // bytes
};

// Rows first .. first + rows of a step, of which `kept` from kept_first on are kept; and which
// scan's memory is meant.
struct Block {
    std::size_t first, rows, kept_first, kept, scan;
};

struct Op {
    void (*run)(class Program&, const Op&, StepRows&, const Block&);
    bool kept, whole;            // whole: writes i64
    Carries carries;
    std::size_t scanned;         // operations that are scanned together, this one the first; or 0
    std::size_t operands, work;  // work: numbers that a row touches
    Argument operand[OPERANDS];
    RowKernel kernel;
    RowOp row;
    // Axes before those of a line; heads, n_out of head_product; of delta_rule heads, keys, values
    // (and keys again, where each has a decay), of convolution tokens, width, taps.
    std::size_t rank, shape[RANK];
    Weight weight;
    float scale;
    Attention attention;
    // Elements from head to head of q, k, v, y, or of x, y, or of all that delta_rule takes.
    std::size_t state, heads[6];
};

// A row operation on one row, whose operands begin at `base`.
void one_row(const Op& op, std::uint8_t* const* base);

class Program {
  public:
    // `weights` on a multiple of 64; they are read as long as there is a program.
    Program(const ProgramAbout& about, const std::uint8_t* weights, std::size_t nbytes,
            const Variant& variant, std::size_t threads);

    // Where buffer `i` of a step lies, which crosses segments.
    std::uint8_t* at(const StepRows& rows, std::size_t i) const;

    // Checks ids, keep and sequences of `rows` (std::invalid_argument), and gives it memory.
    void begin(StepRows& rows);
    // Takes the memory back, for the next step.
    void end(StepRows& rows);

    // All rows, or those from `first` to before `end`, which follow those that were run before.
    void run(StepRows& rows, std::size_t segment);
    void run(StepRows& rows, std::size_t segment, std::size_t first, std::size_t end);

    const Variant& variant;
    const RowKernels& rows;
    const std::size_t threads;

    std::uint8_t* at(const Argument& operand, const StepRows& rows, const Block& block) const;

    const std::vector<BufferAbout>& buffers() const { return buffers_; }
    std::size_t segments() const { return segments_.size(); }

  private:
    const std::vector<BufferAbout> buffers_;
    const std::vector<StateAbout> states_;
    const std::vector<std::size_t> recurrent_;
    const std::size_t scratch_row_, scan_row_, step_row_, kept_row_;  // bytes a row
    std::size_t vocabulary_ = std::size_t(1) << 31;
    std::vector<std::vector<Op>> segments_;
    std::mutex running_, spare_;
    Memory scratch_, scans_, memory_, kept_;
};

}  // namespace smoe
