// The backbone's kernels one by one, for tests and for who looks at a part.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "module.h"
#include "products.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace smoe {
namespace {

using Data = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Inputs = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Outputs = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;

// form, n_out, n_in, group, wide, data, scales
using About = std::tuple<std::string, std::size_t, std::size_t, std::size_t, bool, Data, Data>;

Weight weight(const About& about) {
    const auto& [form, n_out, n_in, group, wide, data, scales] = about;
    require(form == "f32" || form == "bf16" || form == "int8" || form == "int4",
            "form: f32, bf16, int8 or int4");
    const Form f = form == "f32"    ? Form::f32
                   : form == "bf16" ? Form::bf16
                   : form == "int8" ? Form::int8
                                    : Form::int4;
    const Weight w = {f, n_out, n_in, group, data.data(), scales.data(), wide};
    constexpr std::size_t MOST = std::size_t(1) << 31;
    require(n_out > 0 && n_in > 0 && n_out < MOST && n_in < MOST, "a weight has rows and columns");
    require(!w.quantised() || group == 32 || group == 64 || group == 128,
            "groups of 32, 64 or 128");
    require(data.size() == w.bytes() && scales.size() == w.scale_bytes(),
            "data and scales are as long as the weight says");
    require((std::uintptr_t(data.data()) | std::uintptr_t(scales.data())) % 4 == 0,
            "data or scales lie askew");
    return w;
}

// Whether rows lie one behind the other, perhaps with room between them.
template <class A>
bool in_rows(const A& x) {
    return x.shape(0) == 0 || ((x.shape(1) < 2 || x.stride(1) == 1) && x.stride(0) >= 0);
}

void one_product(const std::string& variant, const About& about, Inputs x,
                 std::optional<Vector> bias, Outputs y, std::size_t threads) {
    const Weight w = weight(about);
    require(x.shape(1) == w.n_in && y.shape(1) == w.n_out && x.shape(0) == y.shape(0) &&
                (!bias || bias->shape(0) == w.n_out),
            "x [n, n_in], bias [n_out], y [n, n_out]");
    require(in_rows(x) && in_rows(y), "rows of x and y lie one behind the other");
    const Variant& v = named(variant);
    nb::gil_scoped_release unlocked;
    product(v, w, x.data(), x.stride(0), x.shape(0), bias ? bias->data() : nullptr, y.data(),
            y.stride(0), threads);
}

void one_embedding(const About& about, Ids ids, float scale, Outputs y) {
    const Weight w = weight(about);
    require(y.shape(0) == ids.shape(0) && y.shape(1) == w.n_in && in_rows(y),
            "ids [n], y [n, n_in]");
    for (std::size_t i = 0; i < ids.shape(0); ++i)
        require(0 <= ids(i) && ids(i) < std::int64_t(w.n_out), "there is no such row");
    embedding(w, ids.data(), ids.shape(0), scale, y.data(), y.stride(0));
}

using Table = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;  // of int64
using Numbers = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// kind, addresses of blocks, past, rows
using Sequence = std::tuple<std::string, Table, std::size_t, std::size_t>;

template <class A>
Heads heads(const A& x) {
    return {const_cast<float*>(x.data()), x.shape(1) * x.shape(2), x.shape(2)};
}

// The addresses of a sequence's blocks; all are there that its rows see.
const std::int64_t* blocks_of(const Sequence& sequence, std::size_t window) {
    const auto& [kind, table, past, rows] = sequence;
    const std::size_t context = table.shape(0) * BLOCK_TOKENS;
    require(table.dtype() == nb::dtype<std::int64_t>(), "addresses are int64");  // not converted
    require(past <= context && rows <= context - past,
            "more tokens than a state has room for");
    const auto* blocks = static_cast<const std::int64_t*>(table.data());
    const std::size_t first = window && past >= window ? past + 1 - window : 0;
    for (std::size_t i = first / BLOCK_TOKENS; i * BLOCK_TOKENS < past + rows; ++i)
        require(blocks[i] > 0 && blocks[i] % 64 == 0, "a block is not there, or lies askew");
    return blocks;
}

void one_attention(const std::string& variant, const std::vector<Sequence>& sequences, Numbers q,
                   Numbers k, std::optional<Numbers> v, Output y, float scale, float softcap,
                   std::size_t window, std::optional<Vector> sinks, std::size_t threads) {
    require(!sequences.empty(), "attention has sequences");
    std::vector<KeyValues> states;
    std::vector<Part> parts;
    std::size_t rows = 0;
    for (const Sequence& sequence : sequences) {
        const auto& [kind, table, past, count] = sequence;
        states.push_back(key_values(blocks_of(sequence, window), state_kind(kind),
                                    table.shape(0) * BLOCK_TOKENS, k.shape(1), k.shape(2),
                                    y.shape(2), !v));
    }
    for (std::size_t i = 0; i < states.size(); ++i) {
        parts.push_back({&states[i], std::get<2>(sequences[i]), std::get<3>(sequences[i])});
        rows += parts.back().rows;
    }
    require(q.shape(0) == rows && k.shape(0) == rows && y.shape(0) == rows,
            "q, k, v and y have the rows of all sequences");
    require(k.shape(1) > 0 && q.shape(1) > 0 && q.shape(1) % k.shape(1) == 0 && k.shape(2) > 0 &&
                q.shape(2) == k.shape(2) && y.shape(1) == q.shape(1) && y.shape(2) > 0 &&
                (!sinks || sinks->shape(0) == q.shape(1)),
            "q [n, heads, d], k [n, kv_heads, d], y [n, heads, e], sinks [heads]");
    require(v ? v->shape(0) == rows && v->shape(1) == k.shape(1) && v->shape(2) == y.shape(2)
              : y.shape(2) <= k.shape(2),
            "v [n, kv_heads, e], or none where values are the first numbers of keys");
    const Attention a = {q.shape(1), scale, softcap, window, sinks ? sinks->data() : nullptr};
    const Variant& chosen = named(variant);
    nb::gil_scoped_release unlocked;
    attention(chosen, a, parts.data(), parts.size(), heads(q), heads(k), v ? heads(*v) : Heads{},
              heads(y), threads);
}

}  // namespace

void bind_backbone(nb::module_& m) {
    m.def("product", &one_product, "variant"_a, "weight"_a, "x"_a.noconvert(),
          "bias"_a.noconvert().none(), "y"_a.noconvert(), "threads"_a,
          "y = weight . x + bias for every row. A weight is (form, n_out, n_in, group, wide, data, "
          "scales), as products.h says.");
    m.def("embedding", &one_embedding, "weight"_a, "ids"_a.noconvert(), "scale"_a,
          "y"_a.noconvert(), "Rows of a weight times scale.");
    m.def("attention", &one_attention, "variant"_a, "sequences"_a, "q"_a.noconvert(),
          "k"_a.noconvert(), "v"_a.noconvert().none(), "y"_a.noconvert(), "scale"_a, "softcap"_a,
          "window"_a, "sinks"_a.noconvert().none(), "threads"_a,
          "What new rows see of their sequences, as attention.h says; a sequence is (kind, "
          "addresses of its blocks, past, rows). v is None where keys hold the values.");
}

}  // namespace smoe
