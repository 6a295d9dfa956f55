// The Python face of the kernels: checks everything once, lets go of the interpreter lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "ffn.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace smoe;

using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Records = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const std::int8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// kind, n_out, n_in, data, scale, bias, group, [(offset, slices)], tables int8 [planes, 2, 16]
using About = std::tuple<std::string, std::size_t, std::size_t, std::ptrdiff_t, std::ptrdiff_t,
                         std::ptrdiff_t, std::size_t,
                         std::vector<std::tuple<std::ptrdiff_t, std::size_t>>, Values>;

static Matrix matrix(const About& about) {
    Matrix m = {};
    const auto& [kind, n_out, n_in, data, scale, bias, group, planes, tables] = about;
    require(kind == "f32" || kind == "bf16" || kind == "f16" || kind == "int8" || kind == "nested",
            "kind: f32, bf16, f16, int8 or nested");
    m.kind = kind == "f32"    ? Weights::f32
             : kind == "bf16" ? Weights::bf16
             : kind == "f16"  ? Weights::f16
             : kind == "int8" ? Weights::i8
                              : Weights::nested;
    m.n_out = n_out, m.n_in = n_in, m.data = data, m.scale = scale, m.bias = bias;
    if (m.kind != Weights::nested) {
        require(data >= 0 && (scale >= 0) == (m.kind == Weights::i8),
                "dense weights have data, int8 ones a scale");
        return m;
    }
    require(scale >= 0 && (group == 32 || group == 64 || group == 128),
            "nested: a scale, groups of 32, 64 or 128");
    require(!planes.empty() && planes.size() <= MAX_PLANES, "nested: 1 to 7 planes");
    require(tables.shape(0) == planes.size() && tables.shape(1) == 2 && tables.shape(2) == 16,
            "tables [planes, 2, 16]");
    m.group = group, m.planes = planes.size();
    for (std::size_t p = 0; p < planes.size(); ++p) {
        std::tie(m.plane[p], m.slices[p]) = planes[p];
        require(m.plane[p] >= 0 && m.slices[p] >= 1 && m.slices[p] <= MAX_BITS,
                "nested: a plane has an offset and slices");
        const std::size_t bits = m.bits(p + 1);
        require(bits <= MAX_BITS, "nested: 2 to 8 bits");
        turn(&tables(p, 0, 0), bits < 4 ? bits : 4, m.tables[p].high);
        turn(&tables(p, 1, 0), bits < 4 ? 0 : bits - 4, m.tables[p].low);
    }
    require(m.bits(1) >= 2, "nested: 2 to 8 bits");
    return m;
}

// Bytes of a record that `m` reads at a level.
static std::size_t end_of(const Matrix& m, std::size_t level) {
    const std::size_t bias = m.bias < 0 ? 0 : m.bias + m.n_out * 4;
    if (m.kind != Weights::nested) {
        const std::size_t size = m.kind == Weights::f32 ? 4 : m.kind == Weights::i8 ? 1 : 2;
        const std::size_t scale = m.scale < 0 ? 0 : m.scale + m.n_out * 4;
        return std::max({m.data + m.n_out * m.n_in * size, scale, bias});
    }
    std::size_t end = std::max(m.scale + m.tiles() * m.groups() * ROWS * 2, bias);
    for (std::size_t p = 0; p < level; ++p)
        end = std::max(end, m.plane[p] + m.tiles() * m.blocks() * m.slices[p] * SLICE);
    return end;
}

// The position of `name` in `names`.
template <std::size_t N>
static std::size_t position(const char* const (&names)[N], const std::string& name) {
    const auto found = std::find(names, names + N, name);
    require(found != names + N, "there is no activation of this name or kind");
    return found - names;
}

static ExpertActivation activation(const std::string& kind, const std::string& act, float alpha,
                                   float limit) {
    const Kind k = Kind(position(KINDS, kind));
    const bool named = k == Kind::gated || k == Kind::plain || k == Kind::bounded;
    return {k, named ? Act(position(ACTS, act)) : Act::identity, alpha, limit};
}

static Layer layer(const std::vector<About>& matrices, const ExpertActivation& spec) {
    require(matrices.size() == 2 || matrices.size() == 3, "matrices: up, down, and perhaps gate");
    Layer l = {};
    l.up = matrix(matrices[0]), l.down = matrix(matrices[1]);
    if (matrices.size() == 3) l.gate = matrix(matrices[2]);
    l.spec = spec;
    require(l.up.n_out == l.down.n_in && l.up.n_out > 0 && l.up.n_in > 0 && l.down.n_out > 0,
            "up and down disagree");
    require((l.spec.kind == Kind::plain) == (matrices.size() == 2),
            "a plain gate has no gate matrix, the others do");
    require(matrices.size() == 2 || (l.gate.n_out == l.up.n_out && l.gate.n_in == l.up.n_in &&
                                     l.gate.kind == l.up.kind && l.gate.group == l.up.group),
            "gate and up disagree");
    for (const Matrix* m : {&l.up, &l.down, &l.gate})
        require(m->n_out == 0 || (m->kind == l.up.kind && m->planes == l.up.planes),
                "matrices have different planes");
    return l;
}

void smoe::check_records(const Layer& l, std::int64_t level, const void* data,
                         std::size_t nbytes) {
    require(1 <= level && level <= std::int64_t(std::max<std::size_t>(l.up.planes, 1)),
            "level out of range");
    for (const Matrix* m : {&l.up, &l.down, &l.gate})
        require(m->n_out == 0 || end_of(*m, level) <= nbytes,
                "records are shorter than their level");
    require((reinterpret_cast<std::uintptr_t>(data) | nbytes) % 4 == 0,
            "records lie askew");
}

static void run(const Layer& l, const std::string& variant, Records records, Indices frames,
                Indices levels, Indices starts, Indices tokens, Floats x, Output y,
                std::size_t threads) {
    const std::size_t n = frames.shape(0), slots = tokens.shape(0);
    require(levels.shape(0) == n && starts.shape(0) == n + 1 && y.shape(0) == slots,
            "frames, levels, starts, y disagree");
    require(x.shape(1) == l.up.n_in && y.shape(1) == l.down.n_out,
            "x or y is not as wide as the experts");
    require(starts(0) == 0 && starts(n) == std::int64_t(slots),
            "starts go from 0 to the number of slots");
    std::vector<const std::uint8_t*> at(n);
    std::vector<std::size_t> level(n), start(n + 1), token(slots);
    for (std::size_t i = 0; i < n; ++i) {
        require(0 <= frames(i) && frames(i) < std::int64_t(records.shape(0)),
                "there is no such frame");
        require(starts(i) <= starts(i + 1), "starts must rise");
        check_records(l, levels(i), records.data(), records.shape(1));
        at[i] = records.data() + frames(i) * records.shape(1);
        level[i] = levels(i), start[i + 1] = starts(i + 1);
    }
    for (std::size_t i = 0; i < slots; ++i) {
        require(0 <= tokens(i) && tokens(i) < std::int64_t(x.shape(0)), "there is no such token");
        token[i] = tokens(i);
    }
    const Call call = {&named(variant), &l,       n,          at.data(), level.data(), start.data(),
                       token.data(),    x.data(), x.shape(0), y.data(),  threads};
    nb::gil_scoped_release unlocked;
    ffn(call);
}

static void one_product(const Layer& l, const std::string& variant, const std::string& name,
                        Records record, std::int64_t level, Floats x, Output y) {
    const Matrix& m = name == "down" ? l.down : name == "gate" ? l.gate : l.up;
    check_records(l, level, record.data(), record.shape(1));
    require(record.shape(0) == 1 && x.shape(1) == m.n_in && y.shape(0) == x.shape(0) &&
                y.shape(1) == m.tiles() * ROWS,
            "x [n, n_in], y [n, n_out padded to 16] and one record");
    product(named(variant), {&m, record.data(), std::size_t(level)}, x.data(), x.shape(0),
            y.data());
}

static void between(const Layer& l, const std::string& variant, Floats gate, Floats up, Output y) {
    require(gate.size() == up.size() && y.size() == up.size(), "gate, up and y disagree");
    named(variant).gate(l.spec, gate.data(), up.data(), up.size(), y.data());
}

NB_MODULE(_native, m) {
    m.doc() = "Expert kernels. The contract is in ffn.h, the specification in reference.py.";
    m.def(
        "variants",
        [] {
            std::size_t count;
            const Variant* const* found = variants(&count);
            std::vector<std::string> names;
            for (std::size_t i = 0; i < count; ++i) names.emplace_back(found[i]->name);
            return names;
        },
        "Instruction sets that this processor runs, best first.");
    nb::class_<Layer>(m, "Layer")
        .def(
            "__init__",
            [](Layer* self, const std::vector<About>& matrices, const std::string& kind,
               const std::string& act, float alpha, float limit) {
                new (self) Layer(layer(matrices, activation(kind, act, alpha, limit)));
            },
            "matrices"_a, "kind"_a, "act"_a, "alpha"_a, "limit"_a,
            "What all records of a layer have in common; matrices are up, down and perhaps gate.")
        .def("ffn", &run, "variant"_a, "records"_a.noconvert(), "frames"_a.noconvert(),
             "levels"_a.noconvert(), "starts"_a.noconvert(), "tokens"_a.noconvert(),
             "x"_a.noconvert(), "y"_a.noconvert(), "threads"_a,
             "Several experts in one call, as ffn.h says. The interpreter lock is released.")
        .def("product", &one_product, "variant"_a, "name"_a, "record"_a.noconvert(), "level"_a,
             "x"_a.noconvert(), "y"_a.noconvert(), "One matrix alone, for tests.")
        .def("between", &between, "variant"_a, "gate"_a.noconvert(), "up"_a.noconvert(),
             "y"_a.noconvert(), "What comes between the matrices alone, for tests.");
    bind_backbone(m);
    bind_program(m);
}
