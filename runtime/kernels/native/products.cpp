#include "products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"
#include "pool.h"

namespace smoe {
namespace {

// Multiplications for which a second thread costs more than it gives.
constexpr std::size_t LITTLE = 1 << 16;
// Rows that go through a matrix together: so many that they are PRODUCT_SCRATCH, within these.
constexpr std::size_t FEW_ROWS = 24, MOST_ROWS = 256;

// The same for the experts' kernels. Scales lie as far from the codes as they happen to.
Matrix matrix_of(const Weight& w) {
    Matrix m = {};
    m.n_out = w.n_out, m.n_in = w.n_in, m.data = 0, m.scale = m.bias = -1;
    m.kind = w.form == Form::f32    ? Weights::f32
             : w.form == Form::bf16 ? Weights::bf16
                                    : Weights::nested;
    if (!w.quantised()) return m;
    m.scale = w.scales - w.data, m.group = w.group;
    if (w.form == Form::int8) return m;
    static const Tables int4 = [] {
        Tables tables = {};
        std::int8_t values[16];
        for (int code = 0; code < 16; ++code) values[code] = std::int8_t(code - 8);
        turn(values, 4, tables.high);
        return tables;
    }();
    m.planes = 1, m.slices[0] = 4, m.tables[0] = int4;
    return m;
}

// Some vectors as the kernels want them.
struct Activations {
    std::vector<std::int8_t> q;
    std::vector<float> steps;
    std::vector<std::int32_t> sums;
    std::vector<const float*> x;
    std::vector<const std::int8_t*> q_of;
    std::vector<const float*> step_of;
    std::vector<const std::int32_t*> sum_of;

    // Rows of q are a line apart from a power of two, since those would share lines of a cache.
    static std::size_t apart(const Matrix& m) { return m.blocks() * COLUMNS + 64; }

    // How many rows go through a matrix together, `heads` vectors of each.
    static std::size_t together(const Weight& w, const Matrix& m, std::size_t heads) {
        const std::size_t row = heads * (w.quantised() ? apart(m) : w.n_in * sizeof(float));
        return std::min(std::max(PRODUCT_SCRATCH / std::max<std::size_t>(row, 1), FEW_ROWS),
                        MOST_ROWS);
    }

    // Vectors `at`(0) .. at(n - 1).
    template <class At>
    Rows fill(const Variant& variant, const Weight& w, const Matrix& m, std::size_t n,
              std::size_t threads, At at) {
        x.resize(n);
        for (std::size_t r = 0; r < n; ++r) x[r] = at(r);
        if (!w.quantised()) return {n, x.data(), nullptr, nullptr, nullptr};
        const std::size_t width = apart(m), groups = m.groups();
        if (q.size() < n * width) q.resize(n * width);
        if (steps.size() < n * groups) steps.resize(n * groups), sums.resize(n * groups);
        q_of.resize(n), step_of.resize(n), sum_of.resize(n);
        for (std::size_t r = 0; r < n; ++r) {
            q_of[r] = q.data() + r * width;
            step_of[r] = steps.data() + r * groups, sum_of[r] = sums.data() + r * groups;
        }
        parallel(n, n * width < LITTLE ? 1 : threads, [&](std::size_t r) {
            variant.quantise(x[r], w.n_in, w.group, q.data() + r * width, steps.data() + r * groups,
                             sums.data() + r * groups);
        });
        return {n, x.data(), q_of.data(), step_of.data(), sum_of.data()};
    }
};

// Vectors first .. first + n of them.
Rows part_of(const Rows& x, std::size_t first, std::size_t n) {
    if (!x.q) return {n, x.x + first, nullptr, nullptr, nullptr};
    return {n, x.x + first, x.q + first, x.step + first, x.sum + first};
}

struct Product {
    const Variant& variant;
    const Weight& w;
    const Matrix& m;
    const float* bias;
    float* y;
    std::size_t stride;

    // Tiles of y for all of x, at most MOST_ROWS: by way of a block of memory of its own, since
    // rows of y may end within a tile, and lie where they drive one another out of a cache.
    void tiles(std::size_t tile, std::size_t count, const Rows& x) const {
        alignas(64) float block[MOST_ROWS * SPAN * ROWS];
        const std::size_t first = tile * ROWS, width = count * ROWS;
        const std::size_t rows = std::min(width, w.n_out - first);
        variant.product(w, m, tile, count, x, block, width);
        for (std::size_t t = 0; t < x.n; ++t) {
            float* to = y + t * stride + first;
            const float* from = block + t * width;
            if (bias)
                for (std::size_t r = 0; r < rows; ++r) to[r] = from[r] + bias[first + r];
            else
                std::memcpy(to, from, rows * sizeof(float));
        }
    }
};

}  // namespace

std::size_t Weight::bytes() const {
    if (!quantised()) return n_out * n_in * (form == Form::f32 ? 4 : 2);
    const std::size_t codes =
        (n_out + ROWS - 1) / ROWS * ROWS * ((n_in + COLUMNS - 1) / COLUMNS * COLUMNS);
    return form == Form::int8 ? codes : codes / 2;
}

std::size_t Weight::scale_bytes() const {
    if (!quantised()) return 0;
    return (n_out + ROWS - 1) / ROWS * ROWS * ((n_in + group - 1) / group) * (wide ? 4 : 2);
}

Weight Weight::rows(std::size_t first, std::size_t n) const {
    Weight before = *this, part = *this;
    before.n_out = first, part.n_out = n;
    part.data += before.bytes(), part.scales += before.scale_bytes();
    return part;
}

void product(const Variant& variant, const Weight& w, const float* x, std::size_t x_stride,
             std::size_t rows, const float* bias, float* y, std::size_t y_stride,
             std::size_t threads) {
    static thread_local Activations scratch;
    Activations& activations = scratch;  // thread_local: the workers must see this thread's
    const Matrix m = matrix_of(w);
    const std::size_t together = Activations::together(w, m, 1);
    for (std::size_t first = 0; first < rows; first += together) {
        const std::size_t n = std::min(rows - first, together), span = n == 1 ? 1 : SPAN;
        const std::size_t many = n * w.n_out * w.n_in < LITTLE ? 1 : threads;
        const Rows some = activations.fill(variant, w, m, n, threads, [&](std::size_t r) {
            return x + (first + r) * x_stride;
        });
        const Product here = {variant, w, m, bias, y + first * y_stride, y_stride};
        parallel((m.tiles() + span - 1) / span, many, [&](std::size_t item) {
            here.tiles(item * span, std::min(span, m.tiles() - item * span), some);
        });
    }
}

void head_product(const Variant& variant, const Weight& w, std::size_t heads, std::size_t n_out,
                  const Heads& x, std::size_t rows, const Heads& y, std::size_t threads) {
    static thread_local Activations scratch;
    Activations& activations = scratch;
    const std::size_t apart = (n_out + ROWS - 1) / ROWS * ROWS;
    const Matrix any = matrix_of(w.rows(0, n_out));
    const std::size_t together = Activations::together(w, any, heads);
    for (std::size_t first = 0; first < rows; first += together) {
        const std::size_t n = std::min(rows - first, together), span = n == 1 ? 1 : SPAN;
        const std::size_t many = n * w.n_out * w.n_in < LITTLE ? 1 : threads;
        const Rows all =  // head after head, of each the rows
            activations.fill(variant, w, any, heads * n, threads, [&](std::size_t i) {
                return x.data + (first + i % n) * x.row + i / n * x.head;
            });
        parallel(heads, many, [&](std::size_t i) {
            const Weight own = w.rows(i * apart, n_out);
            const Matrix m = matrix_of(own);
            const Product here = {variant, own,     m,
                                  nullptr, y.data + first * y.row + i * y.head, y.row};
            const Rows some = part_of(all, i * n, n);
            for (std::size_t tile = 0; tile < m.tiles(); tile += span)
                here.tiles(tile, std::min(span, m.tiles() - tile), some);
        });
    }
}

// ---- embeddings

namespace {

float from_bf16(const std::uint8_t* p) {
    std::uint16_t narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    const std::uint32_t wide = std::uint32_t(narrow) << 16;
    float f;
    std::memcpy(&f, &wide, sizeof f);
    return f;
}

float from_f32(const std::uint8_t* p) {
    float f;
    std::memcpy(&f, p, sizeof f);
    return f;
}

// The code in row r of a tile and column c of the block at `p`.
int int8_code(const std::uint8_t* p, std::size_t r, std::size_t c) {
    return int(p[(c / 4 * ROWS + r) * 4 + c % 4]) - 128;
}

int int4_code(const std::uint8_t* p, std::size_t r, std::size_t c) {
    int code = 0;
    for (std::size_t t = 0; t < 4; ++t)
        code = code << 1 | (p[t * SLICE + 4 * r + c % 4] >> ((c / 8 + t) % 4 + c / 4 % 2 * 4) & 1);
    return code - 8;
}

void coded_row(const Weight& w, std::size_t row, float scale, float* y) {
    const std::size_t blocks = (w.n_in + COLUMNS - 1) / COLUMNS;
    const std::size_t groups = (w.n_in + w.group - 1) / w.group, tile = row / ROWS, r = row % ROWS;
    const std::size_t size = w.wide ? 4 : 2,
                      block = ROWS * COLUMNS / (w.form == Form::int8 ? 1 : 2);
    for (std::size_t g = 0; g < groups; ++g) {
        const std::uint8_t* at = w.scales + ((tile * groups + g) * ROWS + r) * size;
        const float s = w.wide ? from_f32(at) : from_bf16(at);
        const std::size_t end = std::min(w.n_in, (g + 1) * w.group);
        for (std::size_t c = g * w.group; c < end; ++c) {
            const std::uint8_t* p = w.data + (tile * blocks + c / COLUMNS) * block;
            const int code = (w.form == Form::int8 ? int8_code : int4_code)(p, r, c % COLUMNS);
            y[c] = (float(code) * s) * scale;
        }
    }
}

}  // namespace

void embedding(const Weight& w, const std::int64_t* ids, std::size_t rows, float scale, float* y,
               std::size_t y_stride) {
    for (std::size_t i = 0; i < rows; ++i) {
        const std::size_t row = std::size_t(ids[i]);
        float* out = y + i * y_stride;
        if (w.quantised()) {
            coded_row(w, row, scale, out);
            continue;
        }
        for (std::size_t c = 0; c < w.n_in; ++c)
            out[c] = (w.form == Form::f32 ? from_f32(w.data + (row * w.n_in + c) * 4)
                                          : from_bf16(w.data + (row * w.n_in + c) * 2)) *
                     scale;
    }
}

}  // namespace smoe
