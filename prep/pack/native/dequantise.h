// Codes that checkpoints are stored in, as the numbers that `transformers` makes of them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace smoe {

// MXFP4: `blocks` uint8 [n, 16] of two values each, the low four bits first, times 2^(scale - 127):
// bfloat16 [n, 32], rounded to nearest even where it is subnormal.
void dequantise_mxfp4(const std::uint8_t* blocks, const std::uint8_t* scales, std::size_t n,
                      std::uint16_t* out, std::size_t threads);

// Matrices [rows, columns] of float8 e4m3 with a factor for every block of `high` by `wide`, the
// last of a row or a column perhaps shorter.
struct Blocks {
    std::size_t matrices, rows, columns, high, wide;
};

// Products in float32, `factors` float32 [matrices, blocks of rows, blocks of columns]; `out` takes
// them as they are, or `half` rounded to bfloat16. The other one is null.
void dequantise_fp8(const Blocks&, const std::uint8_t* codes, const float* factors, float* out,
                    std::uint16_t* half, std::size_t threads);

}  // namespace smoe
