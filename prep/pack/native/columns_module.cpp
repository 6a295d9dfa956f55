// The Python face of `choose_columns` and `best_scales`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "columns.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace smoe::calibrated {

template <class T, std::size_t dims>
using Array = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
using Values = std::vector<Array<const float, 1>>;

static void require(bool holds, const char* sentence) {
    if (!holds) throw nb::value_error(sentence);
}

static const Chooser& named(const std::string& name) {
    std::size_t count;
    const Chooser* const* found = choosers(&count);
    for (std::size_t i = 0; i < count; ++i)
        if (name.empty() || name == found[i]->name) return *found[i];
    throw nb::value_error("this processor has no such variant; ask variants()");
}

static Grid grid_of(const Values& values, const Values& edges, const std::vector<float>& weights) {
    Grid grid = {};
    grid.levels = values.size();
    require(1 <= grid.levels && grid.levels <= MAX_LEVELS && edges.size() == grid.levels &&
                weights.size() == grid.levels,
            "1 to 7 levels, with values, edges and a weight each");
    for (std::size_t l = 0; l < grid.levels; ++l) {
        int bits = 1;
        while (std::size_t(1) << bits < values[l].shape(0) && bits < 8) ++bits;
        require(values[l].shape(0) == std::size_t(1) << bits &&
                    edges[l].shape(0) == values[l].shape(0) - 1 &&
                    (!l || bits > grid.bits[l - 1]),
                "2^bits values, at most 256 and more than the level before, and an edge fewer");
        grid.bits[l] = bits, grid.weights[l] = weights[l];
        grid.values[l] = values[l].data(), grid.edges[l] = edges[l].data();
    }
    return grid;
}

static void choose(const std::string& variant, const Values& values, const Values& edges,
                   const std::vector<float>& weights, Array<float, 4> target,
                   std::optional<Array<const float, 4>> before, Array<const float, 4> along,
                   Array<const float, 2> scale, Array<std::uint8_t, 3> codes,
                   std::size_t threads) {
    const Grid grid = grid_of(values, edges, weights);
    const std::size_t k = target.shape(3);
    const Block block = {{target.shape(1), target.shape(2), k},
                         target.data(),
                         before ? before->data() : nullptr,
                         along.data(),
                         along.shape(0) == 1 ? 0 : target.shape(1) * k * k,
                         scale.data(),
                         codes.data()};
    require(target.shape(0) == grid.levels && 1 <= block.columns && block.columns <= MAX_COLUMNS,
            "target: [levels, matrices, rows, columns], 1 to 128 columns");
    for (std::size_t i = 0; before && i < 4; ++i)
        require(before->shape(i) == target.shape(i), "before: as target");
    for (std::size_t i = 0; i < 3; ++i)
        require(codes.shape(i) == target.shape(i + 1), "codes: [matrices, rows, columns]");
    require((along.shape(0) == 1 || along.shape(0) == grid.levels) &&
                along.shape(1) == block.matrices && along.shape(2) == k && along.shape(3) == k &&
                scale.shape(0) == block.matrices && scale.shape(1) == block.rows,
            "along: [1 or levels, matrices, columns, columns], scale: [matrices, rows]");
    const Chooser& how = named(variant);
    nb::gil_scoped_release unlocked;
    choose_columns(how, grid, block, threads);
}

static void search(const std::string& variant, const Values& values, const Values& edges,
                   const std::vector<float>& weights, Array<const float, 4> target,
                   Array<const float, 3> importance, Array<const float, 3> tried,
                   Array<float, 2> scale, std::size_t threads) {
    const Grid grid = grid_of(values, edges, weights);
    const Search search = {{target.shape(1), target.shape(2), target.shape(3)},
                           target.data(),
                           importance.data(),
                           importance.shape(0) == 1 ? 0 : target.shape(1) * target.shape(3),
                           tried.shape(0),
                           tried.data(),
                           scale.data()};
    require(target.shape(0) == grid.levels && 1 <= search.columns && search.columns <= MAX_COLUMNS,
            "target: [levels, matrices, rows, columns], 1 to 128 columns");
    require((importance.shape(0) == 1 || importance.shape(0) == grid.levels) &&
                importance.shape(1) == search.matrices && importance.shape(2) == search.columns,
            "importance: [1 or levels, matrices, columns]");
    require(tried.shape(1) == search.matrices && tried.shape(2) == search.rows &&
                scale.shape(0) == search.matrices && scale.shape(1) == search.rows,
            "tried: [candidates, matrices, rows], scale: [matrices, rows]");
    const Chooser& how = named(variant);
    nb::gil_scoped_release unlocked;
    best_scales(how, grid, search, threads);
}

void bind(nb::module_& m) {
    m.def("best_scales", &search, "variant"_a, "values"_a, "edges"_a, "weights"_a,
          "target"_a.noconvert(), "importance"_a.noconvert(), "tried"_a.noconvert(),
          "scale"_a.noconvert(), "threads"_a,
          "The scales to round with, as columns.h says. The interpreter lock is released.");
    m.def("choose_columns", &choose, "variant"_a, "values"_a, "edges"_a, "weights"_a,
          "target"_a.noconvert(), "before"_a.none(), "along"_a.noconvert(), "scale"_a.noconvert(),
          "codes"_a.noconvert(), "threads"_a,
          "Codes for a block of columns, as columns.h says. The interpreter lock is released.");
}

}  // namespace smoe::calibrated
