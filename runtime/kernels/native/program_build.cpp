#include "program_build.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace smoe {
namespace {

constexpr std::size_t LARGEST = std::size_t(1) << 31;  // numbers of a row; of a constant / 64
constexpr std::size_t MOST = std::size_t(1) << 26;     // numbers of a view

// What a kind takes. `needed`: a bit for each operand that must be there. `lines`: its kernel works
// along the operands' last axes; else on elements, all views alike.
struct RowKind {
    const char* name;
    std::size_t inputs, outputs;
    unsigned needed;
    RowKernel RowKernels::*kernel;
    bool lines;
    How first, last;
};

using H = How;
const RowKind ROW_KINDS[] = {
    {"norm", 5, 2, 0x21, &RowKernels::norm, true, H::rms, H::layer},
    {"rotary", 3, 1, 0xf, &RowKernels::rotary, true, H::halves, H::neighbours},
    {"softmax", 1, 1, 0x3, &RowKernels::softmax, true, H::none, H::none},
    {"top_k", 1, 2, 0x5, &RowKernels::top_k, true, H::none, H::none},
    {"reduce", 1, 1, 0x3, &RowKernels::reduce, true, H::sum, H::max},
    {"gather", 2, 1, 0x7, &RowKernels::gather, true, H::none, H::none},
    {"scatter", 2, 1, 0x7, &RowKernels::scatter, true, H::none, H::none},
    {"unary", 1, 1, 0x3, &RowKernels::unary, false, H::neg, H::copy},
    {"binary", 2, 1, 0x7, &RowKernels::binary, false, H::max, H::greater_equal},
    {"where", 3, 1, 0xf, &RowKernels::where, false, H::none, H::none},
    {"fill", 0, 1, 0x1, &RowKernels::fill, false, H::none, H::none},
    {"keep", 1, 1, 0x3, &RowKernels::unary, false, H::none, H::none},
};

bool there(const ViewAbout& view) { return view.source >= 0; }

std::size_t count(const std::vector<std::size_t>& shape) {
    std::size_t n = 1;
    for (std::size_t size : shape) n = n > LARGEST ? n : n * size;  // no further than it need be
    return n;
}

// Whether numbers lie side by side, in their order.
bool contiguous(const ViewAbout& view) {
    std::ptrdiff_t step = 1;
    for (std::size_t a = view.shape.size(); a-- > 0; step *= std::ptrdiff_t(view.shape[a]))
        if (view.shape[a] != 1 && view.strides[a] != step) return false;
    return true;
}

// Whether no two indices lie at one place: strides that rise by at least what lies below them.
bool one_to_one(const ViewAbout& view) {
    std::vector<std::pair<std::size_t, std::size_t>> axes;  // stride, size
    for (std::size_t a = 0; a < view.shape.size(); ++a)
        if (view.shape[a] > 1)
            axes.emplace_back(view.strides[a] < 0 ? 0 - std::size_t(view.strides[a])
                                                  : std::size_t(view.strides[a]),
                              view.shape[a]);
    std::sort(axes.begin(), axes.end());
    std::size_t reach = 0;  // the farthest element so far
    for (const auto& [stride, size] : axes) {
        if (stride <= reach) return false;
        reach += stride * (size - 1);
    }
    return true;
}

class Builder {
  public:
    Builder(const OpAbout& about, const ProgramAbout& program, const std::uint8_t* weights,
            std::size_t nbytes, const std::string& where)
        : about(about), program(program), weights(weights), nbytes(nbytes), where(where) {}

    Op build(const RowKernels& kernels) {
        op.operands = about.operands.size();
        need(op.operands <= OPERANDS, "has too many operands");
        for (std::size_t i = 0; i < op.operands; ++i) operand(i);
        for (const RowKind& kind : ROW_KINDS)
            if (about.kind == kind.name) {
                rows(kind, kernels);
                return op;
            }
        if (about.kind == "product") product();
        else if (about.kind == "head_product") head_product();
        else if (about.kind == "embedding") embedding();
        else if (about.kind == "position") position();
        else if (about.kind == "attention") attention();
        else if (about.kind == "recall") carried(Carries::recall);
        else if (about.kind == "store") carried(Carries::store);
        else if (about.kind == "delta_rule") delta_rule();
        else if (about.kind == "convolution") convolution();
        else need(false, "is of no kind that is known");
        return op;
    }

  private:
    const OpAbout& about;
    const ProgramAbout& program;
    const std::uint8_t* weights;
    const std::size_t nbytes;
    const std::string& where;
    std::size_t inputs = 0;
    Op op = {};

    void need(bool holds, const char* what) const { require(holds, where + " " + what + "."); }

    const ViewAbout& view(std::size_t i) const { return about.operands[i]; }

    float number(std::size_t i) const {
        need(about.numbers.size() > i, "lacks a number");
        return float(about.numbers[i]);
    }

    Type type(std::size_t i) const {
        const std::size_t source = std::size_t(view(i).source);
        return source < program.buffers.size() ? program.buffers[source].type : Type::f32;
    }

    // Argument i: inside of what it is a view of.
    void operand(std::size_t i) {
        const ViewAbout& v = view(i);
        Argument& o = op.operand[i];
        o.place = Place::absent;
        if (!there(v)) return;
        const std::size_t source = std::size_t(v.source), buffers = program.buffers.size();
        need(source < buffers + program.constants.size(), "takes what is not there");
        need(v.shape.size() <= RANK && v.shape.size() == v.strides.size(),
             "has a view of more than 6 axes, or without strides");
        std::size_t size;
        if (source < buffers) {
            const BufferAbout& b = program.buffers[source];
            const std::size_t bytes = SIZES[std::size_t(b.type)];
            size = b.size;
            o.place = place_of(b);
            o.unit = b.offset, o.row = o.place == Place::scan ? 0 : b.size * bytes;
            o.start = v.offset * bytes;
        } else {
            const ConstantAbout& c = program.constants[source - buffers];
            need(c.form == Form::f32, "takes a constant that is not f32");
            const Weight w = weight_of(c, weights, nbytes);
            size = c.n_out * c.n_in;
            o.place = Place::constant;
            o.constant = const_cast<std::uint8_t*>(w.data);
            o.unit = o.row = 0, o.start = v.offset * sizeof(float);
        }
        need(inside(v, size), "looks outside of what it takes");
    }

    static bool inside(const ViewAbout& v, std::size_t size) {
        if (v.offset >= size) return false;
        std::size_t below = 0, above = 0;  // elements from the first
        for (std::size_t a = 0; a < v.shape.size(); ++a) {
            if (v.shape[a] == 0 || v.shape[a] > MOST) return false;
            const bool back = v.strides[a] < 0;
            const std::size_t step = back ? 0 - std::size_t(v.strides[a]) : v.strides[a];
            if (v.shape[a] > 1 && step > (size - 1) / (v.shape[a] - 1)) return false;
            (back ? below : above) += (v.shape[a] - 1) * step;
        }
        return below <= v.offset && above < size - v.offset && count(v.shape) <= MOST;
    }

    // Outputs are buffers; rows are all kept or none, but for constants and those of `free`.
    void check_rows(std::ptrdiff_t free) {
        bool any = false, all = true;
        for (std::size_t i = 0; i < op.operands; ++i) {
            if (!there(view(i))) continue;
            const bool constant = op.operand[i].place == Place::constant;
            need(i < inputs || !constant, "writes to a constant");
            need(i < inputs || one_to_one(view(i)), "writes to one place twice");
            if (constant || std::ptrdiff_t(i) == free) continue;
            const bool kept = program.buffers[std::size_t(view(i).source)].kept;
            any |= kept, all &= kept;
        }
        need(any == all || !any, "mixes all rows with those that are kept");
        op.kept = any;
    }

    void check_count(std::size_t in, std::size_t out, unsigned needed, std::ptrdiff_t free = -1) {
        inputs = in;
        need(op.operands == in + out, "has another number of operands than its kind");
        for (std::size_t i = 0; i < op.operands; ++i)
            need(there(view(i)) || !(needed >> i & 1), "lacks an operand");
        check_rows(free);
    }

    void floats(std::initializer_list<std::size_t> operands) const {
        for (std::size_t i : operands)
            need(!there(view(i)) || type(i) == Type::f32, "wants numbers in f32");
    }

    // Side by side, so many in all.
    void flat(std::size_t i, std::size_t n) const {
        need(type(i) == Type::f32 && contiguous(view(i)) && count(view(i).shape) == n,
             "wants a row of f32 side by side, as long as its matrix says");
    }

    void weight() {
        need(about.weight >= 0 && std::size_t(about.weight) < program.constants.size(),
             "has no weight");
        op.weight = weight_of(program.constants[std::size_t(about.weight)], weights, nbytes);
    }

    void product() {
        check_count(2, 1, 0x5);
        weight();
        flat(0, op.weight.n_in), flat(2, op.weight.n_out);
        if (there(view(1))) {
            need(op.operand[1].place == Place::constant, "wants a bias that is a constant");
            flat(1, op.weight.n_out);
        }
        need(op.operand[0].place != Place::constant, "wants x to be a buffer");
    }

    // [heads, width] of a buffer in f32, of each head side by side.
    void headed(std::size_t i, std::size_t slot) {
        const ViewAbout& x = view(i);
        need(type(i) == Type::f32 && op.operand[i].place != Place::constant &&
                 x.shape.size() == 2 && (x.strides[1] == 1 || x.shape[1] == 1) &&
                 (x.strides[0] >= 0 || x.shape[0] == 1),
             "wants [heads, width] in f32, of each head side by side");
        op.heads[slot] = x.shape[0] == 1 ? x.shape[1] : std::size_t(x.strides[0]);
    }

    void head_product() {
        check_count(1, 1, 0x3);
        weight();
        headed(0, 0), headed(1, 1);
        const std::size_t heads = view(1).shape[0], n_out = view(1).shape[1];
        need(view(0).shape[0] == heads && view(0).shape[1] == op.weight.n_in &&
                 op.weight.n_out == heads * ((n_out + ROWS - 1) / ROWS * ROWS),
             "wants a matrix for each of its heads, on tiles of its own");
        op.shape[0] = heads, op.shape[1] = n_out;
    }

    void embedding() {
        check_count(0, 1, 0x1);
        weight();
        flat(0, op.weight.n_in);
        need(!op.kept, "is of all rows");
        op.scale = number(0);
    }

    void position() {
        check_count(0, 1, 0x1);
        need(!op.kept && count(view(0).shape) == 1 && type(0) != Type::boolean,
             "is one number of all rows, f32 or i64");
        op.whole = type(0) == Type::i64;
    }

    void attention() {
        check_count(4, 1, 0x13);
        need(!op.kept && about.state < program.states.size(), "is of all rows, and has a state");
        const StateAbout& state = program.states[about.state];
        const std::size_t q = 0, k = 1, v = 2, sinks = 3, y = 4;
        need(there(view(v)) != state.latent, "has values exactly where keys do not hold them");
        for (std::size_t i : {q, k, v, y})
            if (there(view(i))) headed(i, i == y ? 3 : i);
        const std::size_t heads = view(q).shape[0];
        need(view(k).shape[0] == state.heads && view(q).shape[1] == state.key_width &&
                 view(k).shape[1] == state.key_width && view(y).shape[1] == state.value_width &&
                 view(y).shape[0] == heads && heads % state.heads == 0 &&
                 (state.latent ? state.value_width <= state.key_width
                               : view(v).shape == std::vector<std::size_t>{state.heads,
                                                                           state.value_width}),
             "has heads that are not those of its state");
        const double window = about.numbers.size() > 1 ? about.numbers[1] : -1;
        need(window >= 0 && window < 9e15, "has a window that is none");
        op.attention = {heads, number(0), number(2), std::size_t(window), nullptr};
        op.state = about.state;
        if (!there(view(sinks))) return;
        need(op.operand[sinks].place == Place::constant, "wants sinks that are a constant");
        flat(sinks, heads);
        const Argument& at = op.operand[sinks];
        op.attention.sinks = reinterpret_cast<const float*>(at.constant + at.start);
    }

    std::size_t recurrent() {
        need(!op.kept && about.state < program.recurrent.size(), "is of all rows, and has a state");
        op.state = about.state;
        return program.recurrent[about.state];
    }

    void carried(Carries how) {
        check_count(how == Carries::store, how == Carries::recall, 0x1);
        op.carries = how, op.work = recurrent();
        flat(0, op.work);
        need(op.operand[0].place != Place::constant, "wants a buffer");
    }

    void delta_rule() {
        check_count(5, 1, 0x3f);
        const std::size_t q = 0, k = 1, v = 2, decay = 3, beta = 4, y = 5, numbers = recurrent();
        for (std::size_t i : {q, k, v, y}) headed(i, i);
        const std::size_t heads = view(v).shape[0], keys = view(k).shape[1];
        const std::size_t values = view(v).shape[1];
        const auto is = [&](std::size_t i, std::size_t width) {
            return view(i).shape == std::vector<std::size_t>{heads, width};
        };
        op.rank = 3, op.shape[0] = heads, op.shape[1] = keys, op.shape[2] = values;
        if (view(decay).shape.size() == 2) {
            headed(decay, decay);
            need(is(decay, keys), "wants a decay for each head, or for each of its keys");
            op.rank = 4;
        } else {
            single(decay, heads);
        }
        single(beta, heads);
        need(is(q, keys) && is(k, keys) && is(v, values) && is(y, values) &&
                 heads * keys * values == numbers,
             "has heads that are not those of its state");
    }

    // One number in f32 for each head.
    void single(std::size_t i, std::size_t heads) {
        const ViewAbout& x = view(i);
        need(type(i) == Type::f32 && op.operand[i].place != Place::constant &&
                 x.shape == std::vector<std::size_t>{heads} && (x.strides[0] >= 0 || heads == 1),
             "wants [heads] in f32");
        op.heads[i] = heads == 1 ? 0 : std::size_t(x.strides[0]);
    }

    void convolution() {
        check_count(3, 1, 0xb);
        const std::size_t x = 0, weight = 1, bias = 2, y = 3, numbers = recurrent();
        const std::size_t width = count(view(x).shape);
        need(view(weight).shape.size() == 2 && width > 0 && numbers % width == 0,
             "wants a matrix of weights, and a state of as many numbers a token");
        const std::size_t tokens = numbers / width, taps = view(weight).shape[0];
        need(taps <= tokens + 1, "takes more tokens than its state has");
        flat(x, width), flat(weight, taps * width), flat(y, width);
        if (there(view(bias))) flat(bias, width);
        need(op.operand[x].place != Place::constant &&
                 op.operand[weight].place == Place::constant &&
                 (!there(view(bias)) || op.operand[bias].place == Place::constant),
             "wants x to be a buffer, and the others to be constants");
        op.shape[0] = tokens, op.shape[1] = width, op.shape[2] = taps;
    }

    void rows(const RowKind& kind, const RowKernels& kernels) {
        const bool keep = about.kind == "keep";
        check_count(kind.inputs, kind.outputs, kind.needed, keep ? 0 : -1);
        if (keep)
            need(op.kept && !program.buffers[std::size_t(view(0).source)].kept,
                 "wants all rows, and gives those that are kept");
        op.kernel = kernels.*kind.kernel;
        how(kind);
        for (std::size_t i = 0; i < op.operands; ++i)
            op.row.line[i] = {there(view(i)), there(view(i)) ? type(i) : Type::f32, 1, 1};
        const std::size_t y = about.kind == "norm" ? 5 : op.operands - 1;
        const std::size_t line = kind.lines ? 1 : 0;
        std::vector<std::size_t> outer(view(y).shape);
        if (line && about.kind != "reduce") {
            need(!outer.empty(), "wants an axis to work along");
            outer.pop_back();
        }
        for (std::size_t i = 0; i < op.operands; ++i)
            if (there(view(i))) axes(i, outer, line);
        if (line) lines();
        collapse(outer);
        if (!line) last_axis_as_line();
        op.work = count(outer);
        std::size_t longest = 1;
        for (const Line& l : op.row.line) longest = std::max(longest, l.there ? l.n : 1);
        op.work *= longest;
    }

    void how(const RowKind& kind) {
        const auto found = std::find(std::begin(HOWS), std::end(HOWS), about.how);
        op.row.how = about.kind == "keep" ? How::copy : How(found - std::begin(HOWS));
        need(about.kind == "keep" || (found != std::end(HOWS) && kind.first <= op.row.how &&
                                      op.row.how <= kind.last),
             "is done in no way that is known");
        if (about.kind == "norm" || about.kind == "fill") op.row.number = number(0);
    }

    // The axes before the line: all alike, or none (the same line for all).
    void axes(std::size_t i, const std::vector<std::size_t>& outer, std::size_t line) {
        const ViewAbout& v = view(i);
        const bool scalar = about.kind == "reduce" && i == 1;
        const std::size_t own = scalar ? 0 : line;
        need(v.shape.size() >= own, "wants an axis to work along");
        const std::size_t before = v.shape.size() - own;
        const bool once = line && before == 0 && !scalar;  // an output is not, where outer is some
        need(!once || outer.empty() || i < inputs, "has operands of different shapes");
        need(once || std::equal(outer.begin(), outer.end(), v.shape.begin(),
                                v.shape.begin() + std::ptrdiff_t(before)),
             "has operands of different shapes");
        const auto bytes = std::ptrdiff_t(SIZES[std::size_t(type(i))]);
        for (std::size_t a = 0; a < outer.size(); ++a)
            op.operand[i].outer[a] = once ? 0 : v.strides[a] * bytes;
        if (!own) return;
        Line& l = op.row.line[i];
        l.n = v.shape[before];
        l.step = l.n == 1 ? 1 : v.strides[before];
    }

    void same(std::initializer_list<std::size_t> operands, std::size_t n) const {
        for (std::size_t i : operands)
            need(!there(view(i)) || op.row.line[i].n == n, "has operands of different lengths");
    }

    void lines() {
        const Line* l = op.row.line;
        if (about.kind == "norm") {
            same({0, 1, 2, 3, 4, 5, 6}, l[0].n), floats({0, 1, 2, 3, 4, 5, 6});
        } else if (about.kind == "rotary") {
            need(l[0].n % 2 == 0, "wants an even width");
            same({3}, l[0].n), same({1, 2}, l[0].n / 2), floats({0, 1, 2, 3});
        } else if (about.kind == "softmax") {
            same({1}, l[0].n), floats({0, 1});
        } else if (about.kind == "top_k") {
            need(l[2].n <= l[0].n && type(2) == Type::i64, "wants more than there are, or no i64");
            same({1}, l[2].n), floats({0, 1});
        } else if (about.kind == "reduce") {
            floats({0});
        } else if (about.kind == "gather") {
            need(type(1) == Type::i64, "wants indices in i64");
            same({1}, l[2].n);
        } else {  // scatter
            need(type(0) == Type::i64, "wants indices in i64");
            same({0}, l[1].n);
        }
    }

    // Leaves out axes of one, and joins neighbours that are one for all operands.
    void collapse(const std::vector<std::size_t>& outer) {
        op.rank = 0;
        for (std::size_t a = 0; a < outer.size(); ++a) {
            if (outer[a] == 1) continue;
            bool joins = op.rank > 0;
            for (std::size_t i = 0; i < op.operands && joins; ++i) {
                const std::ptrdiff_t* step = op.operand[i].outer;
                joins = !there(view(i)) ||
                        step[op.rank - 1] == step[a] * std::ptrdiff_t(outer[a]);
            }
            if (!joins) op.shape[op.rank++] = 1;
            op.shape[op.rank - 1] *= outer[a];
            for (std::size_t i = 0; i < op.operands; ++i)
                op.operand[i].outer[op.rank - 1] = op.operand[i].outer[a];
        }
    }

    // Elementwise: the last axis is what a kernel takes at once.
    void last_axis_as_line() {
        if (!op.rank) return;
        --op.rank;
        for (std::size_t i = 0; i < op.operands; ++i) {
            if (!there(view(i))) continue;
            const auto bytes = std::ptrdiff_t(SIZES[std::size_t(type(i))]);
            op.row.line[i].n = op.shape[op.rank];
            op.row.line[i].step = op.operand[i].outer[op.rank] / bytes;
        }
    }
};

}  // namespace

Weight weight_of(const ConstantAbout& about, const std::uint8_t* weights, std::size_t nbytes) {
    const bool tiled = about.form == Form::int8 || about.form == Form::int4;
    require(about.n_out > 0 && about.n_in > 0 && about.n_out < LARGEST && about.n_in < LARGEST &&
                about.n_out <= LARGEST * 64 / about.n_in,
            "A constant is empty, or larger than there are.");
    require(!tiled || about.group == 32 || about.group == 64 || about.group == 128,
            "A constant in int8 or int4 has groups of 32, 64 or 128.");
    Weight w = {about.form, about.n_out, about.n_in, about.group, nullptr, nullptr, about.wide};
    const std::size_t codes = w.bytes(), gap = tiled ? (64 - codes % 64) % 64 : 0;
    const std::size_t all = codes + gap + (tiled ? w.scale_bytes() : 0);
    require(about.offset % 64 == 0 && about.offset <= nbytes && all <= nbytes - about.offset,
            "A constant lies outside of the weights, or not on a multiple of 64.");
    w.data = weights + about.offset;
    w.scales = tiled ? w.data + codes + gap : nullptr;
    return w;
}

Op build(const OpAbout& about, const ProgramAbout& program, const std::uint8_t* weights,
         std::size_t nbytes, const RowKernels& kernels, const std::string& where) {
    return Builder(about, program, weights, nbytes, where).build(kernels);
}

}  // namespace smoe
