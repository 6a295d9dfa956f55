// The columns of a few rows, for one instruction set: the file that includes this says how many go
// side by side in a vector (LANES).
#include "columns.h"

namespace smoe::calibrated {
namespace {

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef std::int32_t Codes __attribute__((vector_size(LANES * 4)));

// How many of the edges lie below x.
inline Codes nearest(const float* edges, int bits, Floats x) {
    Codes found = {};
    for (int e = 0; e < (1 << bits) - 1; ++e) found -= edges[e] < x;
    return found;
}

inline Floats look_up(const float* values, Codes places) {
    Floats found;
    for (int i = 0; i < LANES; ++i) found[i] = values[places[i]];
    return found;
}

inline Floats cost_of(const Grid& grid, const Floats* x, Codes codes) {
    const std::size_t last = grid.levels - 1;
    Floats cost = {};
    for (std::size_t l = 0; l <= last; ++l) {
        const Codes places = codes >> (grid.bits[last] - grid.bits[l]);
        const Floats off = x[l] - look_up(grid.values[l], places);
        cost += off * off * grid.weights[l];
    }
    return cost;
}

// The code with the least cost among the nearest at the full level and those nearest to it that are
// right for a lower one; the first of equals.
inline Codes choose(const Grid& grid, const Floats* x) {
    const std::size_t last = grid.levels - 1;
    const Codes full = nearest(grid.edges[last], grid.bits[last], x[last]);
    Codes best = full;
    Floats least = cost_of(grid, x, full);
    for (std::size_t l = 0; l < last; ++l) {
        const int apart = grid.bits[last] - grid.bits[l];
        const Codes low = nearest(grid.edges[l], grid.bits[l], x[l]) << apart;
        const Codes high = low + ((1 << apart) - 1);
        const Codes raised = full < low ? low : full, tried = raised > high ? high : raised;
        const Floats cost = cost_of(grid, x, tried);
        best = cost < least ? tried : best;
        least = cost < least ? cost : least;
    }
    return best;
}

// LANES rows of all levels from `first`, where fewer than LANES are left the first one again.
struct Rows {
    const Shape& block;
    std::size_t levels, m, first, count;

    std::size_t at(std::size_t level, std::size_t i) const {
        const std::size_t row = first + (i < count ? i : 0);
        return ((level * block.matrices + m) * block.rows + row) * block.columns;
    }
    void load(const float* from, Floats* to) const {
        for (std::size_t l = 0; l < levels; ++l)
            for (std::size_t i = 0; i < LANES; ++i)
                for (std::size_t c = 0; c < block.columns; ++c)
                    to[c * levels + l][i] = from[at(l, i) + c];
    }
    void store(const Floats* from, float* to) const {
        for (std::size_t l = 0; l < levels; ++l)
            for (std::size_t i = 0; i < count; ++i)
                for (std::size_t c = 0; c < block.columns; ++c)
                    to[at(l, i) + c] = from[c * levels + l][i];
    }
};

void choose_rows(const Grid& grid, const Block& block, const Rows& rows) {
    Floats rest[MAX_COLUMNS * MAX_LEVELS], before[MAX_COLUMNS * MAX_LEVELS];  // [columns, levels]
    const std::size_t levels = grid.levels, columns = block.columns;
    rows.load(block.target, rest);
    if (block.before) rows.load(block.before, before);
    Floats scale, inverse;
    for (std::size_t i = 0; i < LANES; ++i) {
        scale[i] = block.scale[rows.m * block.rows + rows.first + (i < rows.count ? i : 0)];
        inverse[i] = scale[i] > 0 ? 1 / scale[i] : 0;
    }
    for (std::size_t c = 0; c < columns; ++c) {
        Floats *here = rest + c * levels, x[MAX_LEVELS];
        for (std::size_t l = 0; l < levels; ++l) x[l] = here[l] * inverse;
        const Codes code = choose(grid, x);
        for (std::size_t i = 0; i < rows.count; ++i)
            block.codes[rows.at(0, i) + c] = std::uint8_t(code[i]);
        for (std::size_t l = 0; l < levels; ++l) {
            const float* along =
                block.along + l * block.along_level + (rows.m * columns + c) * columns;
            const Codes places = code >> (grid.bits[levels - 1] - grid.bits[l]);
            const Floats value = look_up(grid.values[l], places) * scale;
            const Floats moved = (block.before ? before[c * levels + l] : here[l]) - value;
            here[l] = moved;
            for (std::size_t later = c + 1; later < columns; ++later)
                rest[later * levels + l] += moved * along[later];
        }
    }
    rows.store(rest, block.target);
}

void choose_all(const Grid& grid, const Block& block, std::size_t m, std::size_t first,
                std::size_t end) {
    for (; first < end; first += LANES) {
        const std::size_t count = end - first < LANES ? end - first : LANES;
        choose_rows(grid, block, {block, grid.levels, m, first, count});
    }
}

// What rounding costs with a scale, columns one after another.
Floats cost_of_scale(const Grid& grid, const Search& search, const Rows& rows, const Floats* target,
                     Floats scale) {
    const std::size_t last = grid.levels - 1;
    const Floats least = Floats{} + 1e-38f, divisor = scale < least ? least : scale;
    Floats cost = {};
    for (std::size_t c = 0; c < search.columns; ++c) {
        const Floats* here = target + c * grid.levels;
        const Codes code = nearest(grid.edges[last], grid.bits[last], here[last] / divisor);
        for (std::size_t l = 0; l <= last; ++l) {
            const float* importance = search.importance + l * search.importance_level;
            const Codes places = code >> (grid.bits[last] - grid.bits[l]);
            const Floats off = here[l] - look_up(grid.values[l], places) * scale;
            cost += off * off * (grid.weights[l] * importance[rows.m * search.columns + c]);
        }
    }
    return cost;
}

void search_all(const Grid& grid, const Search& search, std::size_t m, std::size_t first,
                std::size_t end) {
    for (; first < end; first += LANES) {
        const std::size_t count = end - first < LANES ? end - first : LANES;
        const Rows rows = {search, grid.levels, m, first, count};
        Floats target[MAX_COLUMNS * MAX_LEVELS], best = {};
        Floats least = Floats{} + __builtin_inff();
        rows.load(search.target, target);
        for (std::size_t t = 0; t < search.candidates; ++t) {
            const float* tried = search.tried + (t * search.matrices + m) * search.rows;
            Floats scale;
            for (std::size_t i = 0; i < LANES; ++i)
                scale[i] = tried[first + (i < rows.count ? i : 0)];
            const Floats cost = cost_of_scale(grid, search, rows, target, scale);
            best = cost < least ? scale : best;
            least = cost < least ? cost : least;
        }
        for (std::size_t i = 0; i < rows.count; ++i)
            search.scale[m * search.rows + first + i] = best[i];
    }
}

}  // namespace
}  // namespace smoe::calibrated
