#include "slices.h"

#include <cstring>

#include "pool.h"

namespace smoe {
namespace {

constexpr std::size_t ROWS = 16, COLUMNS = 32, QUADS = 8;  // of a block
constexpr std::size_t SLICE = ROWS * 4;                    // bytes

// Bits `shift` of a row's 32 codes, in eight quads of four, as slice t has them: each quad's four
// bits in four bytes, at the quad's place (`_places` of nested.py).
inline std::uint32_t slice_row(const std::uint32_t (&quads)[QUADS], std::size_t shift,
                               std::size_t t) {
    std::uint32_t bits = 0;
    for (std::size_t q = 0; q < QUADS; ++q)
        bits |= ((quads[q] >> shift) & 0x01010101u) << ((q / 2 + t) % 4 + 4 * (q % 2));
    return bits;
}

void block(const std::uint32_t (&rows)[ROWS][QUADS], std::size_t index, std::size_t total,
           const Plane* planes, std::size_t count) {
    for (std::size_t p = 0, t = 0; p < count; ++p) {
        std::uint8_t* to = planes[p].to + index * planes[p].slices * SLICE;
        for (std::size_t s = 0; s < planes[p].slices; ++s, ++t, to += SLICE) {
            std::uint32_t slice[ROWS];
            for (std::size_t r = 0; r < ROWS; ++r) slice[r] = slice_row(rows[r], total - 1 - t, t);
            std::memcpy(to, slice, SLICE);
        }
    }
}

}  // namespace

void slice_codes(const std::uint8_t* codes, std::size_t n_out, std::size_t n_in,
                 const Plane* planes, std::size_t count, std::size_t threads) {
    const std::size_t blocks = (n_in + COLUMNS - 1) / COLUMNS;
    std::size_t total = 0;
    for (std::size_t p = 0; p < count; ++p) total += planes[p].slices;
    parallel((n_out + ROWS - 1) / ROWS, threads, [&](std::size_t tile) {
        for (std::size_t b = 0; b < blocks; ++b) {
            std::uint32_t rows[ROWS][QUADS] = {};
            const std::size_t wide = n_in - b * COLUMNS < COLUMNS ? n_in - b * COLUMNS : COLUMNS;
            for (std::size_t r = 0; r < ROWS && tile * ROWS + r < n_out; ++r)
                std::memcpy(rows[r], codes + (tile * ROWS + r) * n_in + b * COLUMNS, wide);
            block(rows, tile * blocks + b, total, planes, count);
        }
    });
}

}  // namespace smoe
