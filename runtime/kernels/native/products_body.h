// The tiles of a backbone's matrix: the experts' kernels, and bytes that are codes already.
// Included after body.h; the arithmetic is that of ffn.h.
#pragma once
#include "products.h"

namespace smoe {
namespace {

template <class S>
void int8_tiles(const Weight& w, const Matrix& m, std::size_t tile, std::size_t tiles,
                const Rows& x, float* y, std::size_t stride) {
    const std::size_t blocks = m.blocks(), groups = m.groups(), in_group = m.group / COLUMNS;
    const std::uint8_t* codes = w.data + tile * blocks * BLOCK;
    const auto* scales = reinterpret_cast<const typename S::T*>(w.scales) + tile * groups * ROWS;
    const std::size_t chunk = x.n == 1 ? blocks : CHUNK;  // one row reads on and on
    for (std::size_t b = 0; b < blocks; b += chunk) {
        const std::size_t here = blocks - b < chunk ? blocks - b : chunk;
        const Panel<S> panel = {
            codes + b * BLOCK, blocks * BLOCK, scales, groups, in_group, b, here};
        multiply_panel<true>(panel, tiles, x, y, stride);
    }
}

template <class W>
void dense_tiles(const Operand& w, std::size_t tile, std::size_t tiles, const Rows& x, float* y,
                 std::size_t stride) {
    for (std::size_t i = 0; i < tiles; ++i) dense_tile<W>(w, tile + i, x, y + i * ROWS, stride);
}

void product_tiles(const Weight& w, const Matrix& m, std::size_t tile, std::size_t tiles,
                   const Rows& x, float* y, std::size_t stride) {
    const Operand operand = {&m, w.data, 1};
    switch (w.form) {
        case Form::f32:
            return dense_tiles<F32>(operand, tile, tiles, x, y, stride);
        case Form::bf16:
            return dense_tiles<BF16>(operand, tile, tiles, x, y, stride);
        case Form::int8:
            return (w.wide ? int8_tiles<F32> : int8_tiles<BF16>)(w, m, tile, tiles, x, y, stride);
        case Form::int4:
            return (w.wide ? nested_tiles<4, F32> : nested_tiles<4, BF16>)(operand, tile, tiles, x,
                                                                           y, stride);
    }
}

}  // namespace
}  // namespace smoe
