// The Python face of the packer: checks everything once, lets go of the interpreter lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "dequantise.h"
#include "kept.h"
#include "rounding.h"
#include "slices.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace smoe;

using Codes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NewCodes = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NewScales = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Levels = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NewBytes = nb::ndarray<std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NewRow = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NewHalves = nb::ndarray<std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const std::int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Cubes = nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Factors = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Products = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using HalfProducts = nb::ndarray<std::uint16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Slices = nb::ndarray<std::uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

namespace smoe::calibrated {
void bind(nb::module_& m);  // columns_module.cpp
}

static void require(bool holds, const char* sentence) {
    if (!holds) throw nb::value_error(sentence);
}

static std::vector<Plane> planes_of(std::size_t n_out, std::size_t n_in,
                                    const std::vector<Slices>& planes) {
    std::vector<Plane> checked;
    std::size_t total = 0;
    for (const Slices& plane : planes) {
        require(plane.shape(0) == (n_out + 15) / 16 && plane.shape(1) == (n_in + 31) / 32 &&
                    plane.shape(3) == 64,
                "planes: [tiles of 16 rows, blocks of 32 columns, slices, 64]");
        total += plane.shape(2);
        checked.push_back({plane.data(), plane.shape(2)});
    }
    require(1 <= total && total <= MAX_SLICES, "planes: 1 to 8 slices in all");
    return checked;
}

static void slice(Codes codes, const std::vector<Slices>& planes, std::size_t threads) {
    const std::vector<Plane> to = planes_of(codes.shape(0), codes.shape(1), planes);
    nb::gil_scoped_release unlocked;
    slice_codes(codes.data(), codes.shape(0), codes.shape(1), to.data(), to.size(), threads);
}

static const Rounder& named(const std::string& name) {
    std::size_t count;
    const Rounder* const* found = rounders(&count);
    for (std::size_t i = 0; i < count; ++i)
        if (name.empty() || name == found[i]->name) return *found[i];
    throw nb::value_error("this processor has no such variant; ask variants()");
}

// A grid from the bits that each level reads, what its squared errors weigh, and the scales tried.
// Of codes of up to 4 bits `values` int8 [levels, 2^bits] has what a full code stands for at every
// level; of longer ones nothing, since they are one uniform grid.
static Grid grid_of(const std::vector<std::size_t>& bits, const std::vector<float>& weights,
                    const std::vector<double>& around, Levels values) {
    Grid grid = {};
    grid.levels = bits.size();
    require(1 <= grid.levels && grid.levels <= MAX_LEVELS && weights.size() == grid.levels,
            "1 to 7 levels, a weight for each");
    require(!around.empty() && around.size() <= MAX_CANDIDATES, "1 to 32 scales");
    for (std::size_t n = 0; n < grid.levels; ++n) {
        require(n ? bits[n] == bits[n - 1] + 1 : bits[n] >= 2, "a base of 2 bits, then 1 bit each");
        grid.bits[n] = bits[n], grid.weight[n] = weights[n];
    }
    grid.total = bits.back(), grid.candidates = around.size(), grid.table = grid.total <= 4;
    require(grid.total <= 8, "codes have up to 8 bits");
    std::copy(around.begin(), around.end(), grid.around);
    if (!grid.table) return grid;
    const std::size_t codes = std::size_t(1) << grid.total;
    require(values.shape(0) == grid.levels && values.shape(1) == codes, "values [levels, 2^bits]");
    for (std::size_t n = 0; n < grid.levels; ++n)
        for (std::size_t c = 0; c < codes; ++c) grid.values[n][c] = values(n, c);
    const float* full = grid.values[grid.levels - 1];
    for (std::size_t c = 0; c + 1 < codes; ++c) grid.edges[c] = (full[c + 1] + full[c]) / 2;
    return grid;
}

static void nested(const std::string& variant, Floats w, std::size_t group, const Grid& grid,
                   NewCodes codes, NewScales scale, std::size_t threads) {
    const std::size_t n_out = w.shape(0), n_in = w.shape(1);
    require(group == 32 || group == 64 || group == 128, "groups of 32, 64 or 128");
    require(n_in > 0 && codes.shape(0) == n_out && codes.shape(1) == n_in &&
                scale.shape(0) == n_out && scale.shape(1) == (n_in + group - 1) / group,
            "codes are as w, scales [n_out, groups]");
    const Rounder& how = named(variant);
    nb::gil_scoped_release unlocked;
    round_nested(how, grid, w.data(), n_out, n_in, group, codes.data(), scale.data(), threads);
}

static void int8(const std::string& variant, Floats w, NewBytes codes, NewRow scale,
                 std::size_t threads) {
    require(codes.shape(0) == w.shape(0) && codes.shape(1) == w.shape(1) &&
                scale.shape(0) == w.shape(0),
            "codes are as w, scales [n_out]");
    const Rounder& how = named(variant);
    nb::gil_scoped_release unlocked;
    round_int8(how, w.data(), w.shape(0), w.shape(1), codes.data(), scale.data(), threads);
}

static bool half(const std::string& variant, Floats w, const std::string& kind, NewHalves out,
                 std::size_t threads) {
    require(out.shape(0) == w.shape(0) && out.shape(1) == w.shape(1), "out is as w");
    require(kind == "bf16" || kind == "f16", "kind: bf16 or f16");
    const Rounder& how = named(variant);
    nb::gil_scoped_release unlocked;
    if (kind == "f16") return round_f16(how, w.data(), w.size(), out.data(), threads);
    round_bf16(how, w.data(), w.size(), out.data(), threads);
    return true;
}

// What kept.h calls Kept, of values int8 [codes], rising.
static Kept kept_of(Row values) {
    const std::size_t codes = values.shape(0);
    require(2 <= codes && codes <= 16, "2 to 16 values");
    Kept kept = {};
    std::vector<float> sizes;
    std::int32_t unit = 0;
    for (std::size_t c = 0; c < codes; ++c) {
        require(c == 0 || values(c) >= values(c - 1), "values rise");
        kept.values[c] = values(c);
        unit = std::gcd(unit, std::int32_t(values(c)));
        sizes.push_back(std::fabs(kept.values[c]));
    }
    require(unit > 0 && values(0) <= 0 && values(codes - 1) > 0, "values lie around 0");
    kept.codes = codes, kept.unit = unit;
    kept.first = values(0) / unit, kept.last = values(codes - 1) / unit;
    for (std::int32_t m = kept.first; m <= kept.last; ++m) {
        std::uint8_t code = 0;
        while (code + 1u < codes &&
               (kept.values[code] + kept.values[code + 1]) / 2 < float(m * unit))
            ++code;
        kept.nearest[m - kept.first] = code;
    }
    kept.zero = std::min_element(sizes.begin(), sizes.end()) - sizes.begin();
    const std::size_t next = kept.nearest[-kept.first] + 1;
    kept.two_zeros = next < codes && kept.values[next] == 0;
    std::sort(sizes.rbegin(), sizes.rend());
    for (std::size_t i = 0; i < codes; ++i)
        if (sizes[i] > 0 && (i == 0 || sizes[i] != sizes[i - 1]))
            kept.magnitudes[kept.count++] = sizes[i];
    return kept;
}

static bool keep(Row values, Floats w, std::size_t group, std::size_t at_once, NewCodes codes,
                 NewScales scale, std::size_t threads) {
    const std::size_t n_out = w.shape(0), n_in = w.shape(1);
    require(group > 0 && at_once > 0 && n_in > 0 && codes.shape(0) == n_out &&
                codes.shape(1) == n_in && scale.shape(0) == n_out &&
                scale.shape(1) == (n_in + group - 1) / group,
            "codes are as w, scales [n_out, groups]");
    const Kept kept = kept_of(values);
    nb::gil_scoped_release unlocked;
    return keep_codes(kept, w.data(), n_out, n_in, group, at_once, codes.data(), scale.data(),
                      threads);
}

static void mxfp4(Codes blocks, Bytes scales, NewHalves out, std::size_t threads) {
    const std::size_t n = scales.shape(0);
    require(
        blocks.shape(0) == n && blocks.shape(1) == 16 && out.shape(0) == n && out.shape(1) == 32,
        "blocks [n, 16], scales [n], out [n, 32]");
    nb::gil_scoped_release unlocked;
    dequantise_mxfp4(blocks.data(), scales.data(), n, out.data(), threads);
}

template <class Out>
static void fp8(Cubes codes, Factors factors, std::size_t high, std::size_t wide, Out out,
                std::size_t threads) {
    const Blocks b = {codes.shape(0), codes.shape(1), codes.shape(2), high, wide};
    require(high > 0 && wide > 0 && factors.shape(0) == b.matrices &&
                factors.shape(1) == (b.rows + high - 1) / high &&
                factors.shape(2) == (b.columns + wide - 1) / wide,
            "a factor for each block of each matrix");
    for (std::size_t i = 0; i < 3; ++i) require(out.shape(i) == codes.shape(i), "out is as codes");
    nb::gil_scoped_release unlocked;
    if constexpr (sizeof(typename Out::Scalar) == 4)
        dequantise_fp8(b, codes.data(), factors.data(), out.data(), nullptr, threads);
    else
        dequantise_fp8(b, codes.data(), factors.data(), nullptr, out.data(), threads);
}

NB_MODULE(_native, m) {
    m.doc() = "Packing in native code. The specification is artifacts/nested.py and encodings.py.";
    m.def(
        "variants",
        [] {
            std::size_t count;
            const Rounder* const* found = rounders(&count);
            std::vector<std::string> names;
            for (std::size_t i = 0; i < count; ++i) names.emplace_back(found[i]->name);
            return names;
        },
        "Instruction sets that this processor runs, best first; \"\" takes the best.");
    nb::class_<Grid>(m, "Grid").def(
        "__init__",
        [](Grid* self, const std::vector<std::size_t>& bits, const std::vector<float>& weights,
           const std::vector<double>& around,
           Levels values) { new (self) Grid(grid_of(bits, weights, around, values)); },
        "bits"_a, "weights"_a, "around"_a, "values"_a.noconvert(),
        "What codes stand for at every level, and which scales are tried.");
    m.def("round_nested", &nested, "variant"_a, "w"_a.noconvert(), "group"_a, "grid"_a,
          "codes"_a.noconvert(), "scale"_a.noconvert(), "threads"_a,
          "Fill codes uint8 [n_out, n_in] and scales float32 [n_out, groups] of w float32 [n_out, "
          "n_in], as rounding.h says. The interpreter lock is released, here and below.");
    m.def("round_int8", &int8, "variant"_a, "w"_a.noconvert(), "codes"_a.noconvert(),
          "scale"_a.noconvert(), "threads"_a,
          "Fill codes int8 [n_out, n_in] and scales float32 [n_out] of w float32 [n_out, n_in].");
    m.def("round_half", &half, "variant"_a, "w"_a.noconvert(), "kind"_a, "out"_a.noconvert(),
          "threads"_a,
          "Fill uint16 [n_out, n_in] with w float32 in bf16 or f16; false if a weight was too "
          "large for f16.");
    m.def("slice_codes", &slice, "codes"_a.noconvert(), "planes"_a.noconvert(), "threads"_a,
          "Fill planes uint8 [tiles, blocks, slices, 64] with the bits of codes uint8 [n_out, "
          "n_in], as slices.h says. The interpreter lock is released.");
    m.def("keep_codes", &keep, "values"_a.noconvert(), "w"_a.noconvert(), "group"_a, "at_once"_a,
          "codes"_a.noconvert(), "scale"_a.noconvert(), "threads"_a,
          "Fill codes and factors whose products are w, as kept.h says; false if there are none.");
    m.def("dequantise_mxfp4", &mxfp4, "blocks"_a.noconvert(), "scales"_a.noconvert(),
          "out"_a.noconvert(), "threads"_a,
          "Fill bfloat16 [n, 32] with what blocks uint8 [n, 16] and scales uint8 [n] stand for.");
    constexpr const char* about_fp8 =
        "Fill float32 or bfloat16 [matrices, rows, columns] with float8 e4m3 codes times float32 "
        "factors, one for each block of high rows and wide columns.";
    m.def("dequantise_fp8", &fp8<Products>, "codes"_a.noconvert(), "factors"_a.noconvert(),
          "high"_a, "wide"_a, "out"_a.noconvert(), "threads"_a, about_fp8);
    m.def("dequantise_fp8", &fp8<HalfProducts>, "codes"_a.noconvert(), "factors"_a.noconvert(),
          "high"_a, "wide"_a, "out"_a.noconvert(), "threads"_a, about_fp8);
    calibrated::bind(m);
}
