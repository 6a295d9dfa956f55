// The Python face of programs: plain numbers in, as runtime/program/flatten.py makes them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <tuple>
#include <vector>

#include "mixture.h"
#include "module.h"
#include "program.h"
#include "program_scan.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace smoe;

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Records = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Addresses = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// kind, size, kept, crossing, scanned, offset
using BufferTuple = std::tuple<std::string, std::size_t, bool, bool, bool, std::size_t>;
// form, n_out, n_in, group, wide, offset
using ConstantTuple = std::tuple<std::string, std::size_t, std::size_t, std::size_t, bool,
                                 std::size_t>;
// heads, key_width, value_width, latent
using StateTuple = std::tuple<std::size_t, std::size_t, std::size_t, bool>;
// kind, heads, key_width, value_width, latent
using LayoutTuple = std::tuple<std::string, std::size_t, std::size_t, std::size_t, bool>;
// source, offset, shape, strides
using ViewTuple = std::tuple<std::ptrdiff_t, std::size_t, std::vector<std::size_t>,
                             std::vector<std::ptrdiff_t>>;
// kind, how, operands, weight, state, numbers
using OpTuple = std::tuple<std::string, std::string, std::vector<ViewTuple>, std::ptrdiff_t,
                           std::size_t, std::vector<double>>;

namespace {

template <std::size_t N>
std::size_t position(const char* const (&names)[N], const std::string& name,
                     const char* sentence) {
    const auto found = std::find(std::begin(names), std::end(names), name);
    require(found != std::end(names), sentence);
    return std::size_t(found - std::begin(names));
}

ProgramAbout about(const std::vector<BufferTuple>& buffers,
                   const std::vector<ConstantTuple>& constants,
                   const std::vector<StateTuple>& states,
                   const std::vector<std::size_t>& recurrent,
                   const std::vector<std::vector<OpTuple>>& segments) {
    const char* const types[] = {"f32", "i64", "bool"};
    const char* const forms[] = {"f32", "bf16", "int8", "int4"};
    ProgramAbout made;
    for (const auto& [kind, size, kept, crossing, scanned, offset] : buffers) {
        const auto type = Type(position(types, kind, "A buffer is f32, i64 or bool."));
        made.buffers.push_back({type, size, kept, crossing, scanned, offset});
    }
    for (const auto& [form, n_out, n_in, group, wide, offset] : constants) {
        const auto f = Form(position(forms, form, "A constant is f32, bf16, int8 or int4."));
        made.constants.push_back({f, n_out, n_in, group, wide, offset});
    }
    for (const auto& [heads, key_width, value_width, latent] : states)
        made.states.push_back({heads, key_width, value_width, latent});
    made.recurrent = recurrent;
    for (const auto& segment : segments) {
        made.segments.emplace_back();
        for (const auto& [kind, how, operands, weight, state, numbers] : segment) {
            OpAbout op = {kind, how, {}, weight, state, numbers};
            for (const auto& [source, offset, shape, strides] : operands)
                op.operands.push_back({source, offset, shape, strides});
            made.segments.back().push_back(std::move(op));
        }
    }
    return made;
}

const std::uint8_t* aligned(const Bytes& weights) {
    require(reinterpret_cast<std::uintptr_t>(weights.data()) % 64 == 0, "Weights lie askew.");
    return weights.data();
}

struct BoundProgram {
    Bytes weights;
    Program program;

    BoundProgram(Bytes weights, const std::vector<BufferTuple>& buffers,
                 const std::vector<ConstantTuple>& constants, const std::vector<StateTuple>& states,
                 const std::vector<std::size_t>& recurrent,
                 const std::vector<std::vector<OpTuple>>& segments, const std::string& variant,
                 std::size_t threads)
        : weights(weights),
          program(about(buffers, constants, states, recurrent, segments), aligned(weights),
                  weights.size(), named(variant), threads) {}
};

struct BoundState {
    Addresses tables, recurrent;  // keeps them alive
    State state;

    BoundState(Addresses tables, const std::vector<LayoutTuple>& layouts, std::size_t context,
               Addresses recurrent, const std::vector<std::size_t>& sizes)
        : tables(tables), recurrent(recurrent) {
        require(tables.shape(0) == layouts.size() &&
                    context <= tables.shape(1) * BLOCK_TOKENS &&
                    recurrent.shape(0) == sizes.size() && recurrent.shape(1) == 2,
                "Tables are [attentions, blocks of the context], recurrent addresses [n, 2].");
        state = {context, {}, sizes, recurrent.data()};
        for (std::size_t i = 0; i < layouts.size(); ++i) {
            const auto& [kind, heads, key_width, value_width, latent] = layouts[i];
            state.attentions.push_back(key_values(tables.data() + i * tables.shape(1),
                                                  state_kind(kind), context, heads, key_width,
                                                  value_width, latent));
        }
    }
};

struct BoundRows {
    StepRows rows;
    nb::object program;
    std::vector<nb::object> states;

    ~BoundRows() {
        if (program.is_valid()) nb::cast<BoundProgram&>(program).program.end(rows);
    }
};

// state, tokens before, ids
using SpanTuple = std::tuple<nb::object, std::size_t, Indices>;

BoundRows* begin(nb::object self, const std::vector<SpanTuple>& spans, Indices keep) {
    auto made = std::make_unique<BoundRows>();
    for (const auto& [state, past, ids] : spans) {
        made->rows.sequences.push_back(
            {&nb::cast<BoundState&>(state).state, past, 0, ids.shape(0)});
        made->rows.ids.insert(made->rows.ids.end(), ids.data(), ids.data() + ids.shape(0));
        made->states.push_back(state);
    }
    made->rows.keep.assign(keep.data(), keep.data() + keep.shape(0));
    nb::cast<BoundProgram&>(self).program.begin(made->rows);
    made->program = self;
    return made.release();
}

void run(BoundProgram& self, BoundRows& rows, std::size_t segment, std::size_t first,
         std::size_t end) {
    nb::gil_scoped_release unlocked;
    self.program.run(rows.rows, segment, first, end);
}

// layer, level, where, segment, hidden, ids, weights, output
using MixtureTuple = std::tuple<nb::object, std::size_t, Indices, std::size_t, std::size_t,
                                std::size_t, std::size_t, std::size_t>;

struct BoundMixture {
    nb::object program;
    Records records;
    std::vector<MixtureTuple> about;  // keeps layers and arrays alive
    Mixture mixture;

    BoundMixture(nb::object program, const std::vector<MixtureTuple>& about, Records records)
        : program(program), records(records), about(about) {
        mixture.records = records.data();
        mixture.frames = records.shape(0), mixture.nbytes = records.shape(1);
        const Program& p = nb::cast<BoundProgram&>(program).program;
        for (const auto& [layer, level, where, segment, hidden, ids, weights, output] : about) {
            const Layer& l = nb::cast<Layer&>(layer);
            check_records(l, std::int64_t(level), records.data(), records.shape(1));
            require(l.up.n_in == l.down.n_out, "Experts give as much as they take.");
            require(segment + 1 < p.segments(), "The program has no segment after a layer's.");
            for (std::size_t i : {hidden, ids, weights, output})
                require(i < p.buffers().size() && p.buffers()[i].crossing && !p.buffers()[i].kept,
                        "Experts want buffers that cross segments.");
            const auto is = [&](std::size_t i, Type type, std::size_t size) {
                return p.buffers()[i].type == type && p.buffers()[i].size == size;
            };
            const std::size_t top_k = p.buffers()[ids].size;
            require(is(hidden, Type::f32, l.up.n_in) && is(output, Type::f32, l.up.n_in) &&
                        is(ids, Type::i64, top_k) && is(weights, Type::f32, top_k),
                    "Buffers of hidden, ids, weights and output are not those of the experts.");
            mixture.layers.push_back({&l, level, where.data(), where.shape(0), top_k, segment,
                                      hidden, ids, weights, output});
        }
    }
};

std::size_t go_on(BoundProgram& self, BoundRows& rows, BoundMixture& mixture, std::size_t first) {
    require(&nb::cast<BoundProgram&>(mixture.program) == &self &&
                rows.rows.program == &self.program,
            "Rows or experts are of another program.");
    nb::gil_scoped_release unlocked;
    return steps(self.program, rows.rows, mixture.mixture, first);
}

// Buffer i of all rows, [rows, size].
nb::ndarray<nb::numpy> array(nb::handle self, std::size_t i) {
    const BoundRows& rows = nb::cast<BoundRows&>(self);
    const Program& program = nb::cast<BoundProgram&>(rows.program).program;
    require(i < program.buffers().size() && program.buffers()[i].crossing,
          "This buffer does not cross segments.");
    const BufferAbout& b = program.buffers()[i];
    const std::size_t shape[] = {b.kept ? rows.rows.keep.size() : rows.rows.rows, b.size};
    const nb::dlpack::dtype type = b.type == Type::f32   ? nb::dtype<float>()
                                   : b.type == Type::i64 ? nb::dtype<std::int64_t>()
                                                         : nb::dtype<bool>();
    return nb::ndarray<nb::numpy>(program.at(rows.rows, i), 2, shape, self, nullptr, type);
}

}  // namespace

void smoe::bind_program(nb::module_& m) {
    nb::class_<BoundState>(m, "State")
        .def(nb::init<Addresses, const std::vector<LayoutTuple>&, std::size_t, Addresses,
                      const std::vector<std::size_t>&>(),
             "tables"_a.noconvert(), "layouts"_a, "context"_a, "recurrent"_a.noconvert(), "sizes"_a,
             "What a program remembers of a sequence, as program.h says.");
    nb::class_<BoundRows>(m, "Rows")
        .def("array", &array, "buffer"_a, "A view of a buffer that crosses segments: [rows, size].")
        .def_prop_ro("tokens", [](const BoundRows& self) { return self.rows.rows; });
    nb::class_<BoundProgram>(m, "Program")
        .def(nb::init<Bytes, const std::vector<BufferTuple>&, const std::vector<ConstantTuple>&,
                      const std::vector<StateTuple>&, const std::vector<std::size_t>&,
                      const std::vector<std::vector<OpTuple>>&, const std::string&, std::size_t>(),
             "weights"_a.noconvert(), "buffers"_a, "constants"_a, "states"_a, "recurrent"_a,
             "segments"_a,
             "variant"_a, "threads"_a, "Segments of operations, as program.h says; checked.")
        .def(
            "begin",
            [](nb::object self, const std::vector<SpanTuple>& spans, Indices keep) {
                return begin(self, spans, keep);
            },
            "spans"_a, "keep"_a, nb::rv_policy::take_ownership,
            "A step: of every sequence its state, tokens before and ids.")
        .def_prop_ro("block", [](const BoundProgram&) { return smoe::BLOCK; },
                     "Rows that go through a segment together.")
        .def_prop_ro("scans", [](const BoundProgram& self) {
                return std::min(self.program.threads, SCANS);
            }, "Sequences that are scanned at once, at most.")
        .def_prop_ro(
            "kernel_scratch",
            [](const BoundProgram&) { return PRODUCT_SCRATCH + ATTENTION_SCRATCH; },
            "Bytes that products and attention take beside the program's scratch.")
        .def("run", &run, "rows"_a, "segment"_a, "first"_a, "end"_a,
             "Of rows that follow those before. The interpreter lock is released.")
        .def("steps", &go_on, "rows"_a, "mixture"_a, "first"_a,
             "As mixture.h says. The interpreter lock is released.");
    nb::class_<BoundMixture>(m, "Mixture")
        .def(nb::init<nb::object, const std::vector<MixtureTuple>&, Records>(), "program"_a,
             "layers"_a, "records"_a.noconvert(), "The experts of every layer, and their frames.");
}
