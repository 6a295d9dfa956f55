// The Python face of the packer: checks everything once, lets go of the interpreter lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "slices.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace smoe;

using Codes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Slices = nb::ndarray<std::uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

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

NB_MODULE(_native, m) {
    m.doc() = "Packing in native code. The specification is artifacts/nested.py and encodings.py.";
    m.def("slice_codes", &slice, "codes"_a.noconvert(), "planes"_a.noconvert(), "threads"_a,
          "Fill planes uint8 [tiles, blocks, slices, 64] with the bits of codes uint8 [n_out, "
          "n_in], as slices.h says. The interpreter lock is released.");
}
