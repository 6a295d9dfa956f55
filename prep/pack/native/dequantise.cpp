#include "dequantise.h"

#include <cmath>
#include <vector>

#include "bits.h"
#include "pool.h"

namespace smoe {
namespace {

constexpr std::size_t RUN = 1 << 9;  // blocks of MXFP4 that a thread takes at once
constexpr float FP4[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// By scale and code.
std::vector<std::uint16_t> fp4_products() {
    std::vector<std::uint16_t> products(256 * 16);
    for (int scale = 0; scale < 256; ++scale)
        for (std::size_t code = 0; code < 16; ++code)
            products[scale * 16 + code] = bf16_of(FP4[code] * std::ldexp(1.0f, scale - 127));
    return products;
}

std::vector<float> e4m3_values() {
    std::vector<float> values(256);
    for (int code = 0; code < 256; ++code) {
        const int exponent = code >> 3 & 15, mantissa = code & 7;
        const float size =
            exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
        values[code] = (code & 127) == 127 ? NAN : code & 128 ? -size : size;
    }
    return values;
}

}  // namespace

void dequantise_mxfp4(const std::uint8_t* blocks, const std::uint8_t* scales, std::size_t n,
                      std::uint16_t* out, std::size_t threads) {
    static const std::vector<std::uint16_t> products = fp4_products();
    parallel((n + RUN - 1) / RUN, threads, [&](std::size_t run) {
        const std::size_t end = (run + 1) * RUN < n ? (run + 1) * RUN : n;
        for (std::size_t b = run * RUN; b < end; ++b) {
            const std::uint16_t* of = &products[scales[b] * 16];
            for (std::size_t i = 0; i < 16; ++i) {
                out[b * 32 + 2 * i] = of[blocks[b * 16 + i] & 15];
                out[b * 32 + 2 * i + 1] = of[blocks[b * 16 + i] >> 4];
            }
        }
    });
}

void dequantise_fp8(const Blocks& b, const std::uint8_t* codes, const float* factors, float* out,
                    std::uint16_t* half, std::size_t threads) {
    static const std::vector<float> values = e4m3_values();
    const std::size_t down = (b.rows + b.high - 1) / b.high;
    const std::size_t across = (b.columns + b.wide - 1) / b.wide;
    parallel(b.matrices * b.rows, threads, [&](std::size_t row) {
        const std::size_t matrix = row / b.rows, block = row % b.rows / b.high;
        const float* factor = factors + (matrix * down + block) * across;
        for (std::size_t a = 0; a < across; ++a) {
            const std::size_t last = (a + 1) * b.wide < b.columns ? (a + 1) * b.wide : b.columns;
            const std::size_t end = row * b.columns + last;
            for (std::size_t i = row * b.columns + a * b.wide; i < end; ++i) {
                const float product = values[codes[i]] * factor[a];
                if (out)
                    out[i] = product;
                else
                    half[i] = bf16_of(product);
            }
        }
    });
}

}  // namespace smoe
