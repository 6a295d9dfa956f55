// The Python face of the kernels: checks shapes once, lets go of the interpreter lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include <nanobind/stl/optional.h>

#include "linear.h"

namespace nb = nanobind;
using namespace nb::literals;

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Weight = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

static smoe::Weights kind_of(const Weight& w) {
    if (w.dtype() == nb::dtype<float>()) return smoe::Weights::f32;
    if (w.dtype() == nb::dtype<std::uint16_t>()) return smoe::Weights::bf16;
    if (w.dtype() == nb::dtype<std::int8_t>()) return smoe::Weights::i8;
    throw nb::type_error("w must be float32, uint16 (the bits of bfloat16) or int8");
}

static void linear(const std::string& variant, Matrix x, Weight w, std::optional<Vector> scale, Output y) {
    if (x.shape(1) != w.shape(1) || y.shape(0) != x.shape(0) || y.shape(1) != w.shape(0) ||
        (scale && scale->shape(0) != w.shape(0)))
        throw nb::value_error("linear: x [tokens, n_in], w [n_out, n_in], scale [n_out], y [tokens, n_out] disagree");
    const smoe::Weights kind = kind_of(w);
    std::size_t count;
    const smoe::Variant* found = smoe::variants(&count);
    for (std::size_t i = 0; i < count; ++i)
        if (variant == found[i].name) {
            nb::gil_scoped_release unlocked;
            found[i].linear(x.data(), x.shape(0), x.shape(1), w.data(), kind, scale ? scale->data() : nullptr,
                            w.shape(0), y.data());
            return;
        }
    throw nb::value_error("linear: this processor has no such variant; ask variants()");
}

NB_MODULE(_native, m) {
    m.doc() = "Expert kernels. The contract is in linear.h, the specification in reference.py.";
    m.def("variants", [] {
        std::size_t count;
        const smoe::Variant* found = smoe::variants(&count);
        std::vector<std::string> names;
        for (std::size_t i = 0; i < count; ++i) names.emplace_back(found[i].name);
        return names;
    }, "Instruction sets that this processor runs, best first.");
    m.def("linear", &linear, "variant"_a, "x"_a.noconvert(), "w"_a.noconvert(), "scale"_a.noconvert().none(),
          "y"_a.noconvert(),
          "y = (x @ w.T) * scale, in the order of linear.h. The interpreter lock is released.");
}
