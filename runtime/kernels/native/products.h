// Products of a backbone's matrices with the rows of a step, and the rows of its embeddings.
//
// A matrix in few bits has the tiles of the experts (ffn.h): 16 rows by blocks of 32 columns. int4
// is nested's plane of 4 bits, whose values are code - 8. int8 has its codes + 128, a byte each, as
// AVX-512 multiplies them: for each block, quads of 4 columns, in each quad the 16 rows, in each
// row its 4 columns (artifacts/tiles.py). Scales lie as nested's do, [tile][group][16 rows],
// bfloat16 or float32, and must be aligned to their size. The arithmetic is that of ffn.h:
// activations to int8 by group, an exact integer sum, then
//     y += (float(sum) * scale[g]) * step[g]   over groups in rising order.
// then the bias, rounded once more. Float matrices are dense rows (ffn.h). So a row's bits depend
// on that row alone. Nothing is checked here, and nothing kept but scratch memory per calling
// thread, of at most PRODUCT_SCRATCH bytes or that of a few rows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ffn.h"

namespace smoe {

struct Heads;  // attention.h

constexpr std::size_t PRODUCT_SCRATCH = 1 << 19;

enum class Form { f32, bf16, int8, int4 };

// [n_out, n_in]. Codes (or float rows) at `data`; scales of int8 and int4.
struct Weight {
    Form form;
    std::size_t n_out, n_in, group;
    const std::uint8_t* data;
    const std::uint8_t* scales;
    bool wide;  // scales are float32

    bool quantised() const { return form == Form::int8 || form == Form::int4; }
    std::size_t bytes() const;        // of codes or float rows
    std::size_t scale_bytes() const;  // of scales
    // Rows first .. first + n; `first` is a multiple of 16.
    Weight rows(std::size_t first, std::size_t n) const;
};

// x row r begins at x + r * x_stride; y likewise, and y [rows, n_out] receives the products and
// `bias` [n_out] (null: none). Many rows are multiplied in blocks that stay in the nearest caches.
void product(const Variant& variant, const Weight& w, const float* x, std::size_t x_stride,
             std::size_t rows, const float* bias, float* y, std::size_t y_stride,
             std::size_t threads);

// The same for every head of a row, each times a matrix [n_out, n_in] of its own: that of head i
// are rows of w from i * apart on, apart being n_out rounded up to whole tiles.
void head_product(const Variant& variant, const Weight& w, std::size_t heads, std::size_t n_out,
                  const Heads& x, std::size_t rows, const Heads& y, std::size_t threads);

// Rows ids[r] of w, times `scale` (of int8 and int4 (code * scale of its group) * scale): y + r *
// y_stride, n_in numbers. Ids were checked.
void embedding(const Weight& w, const std::int64_t* ids, std::size_t rows, float scale, float* y,
               std::size_t y_stride);

}  // namespace smoe
