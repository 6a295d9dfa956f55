#include "columns.h"

#include "pool.h"

namespace smoe::calibrated {
namespace {

constexpr std::size_t ROWS = 64;  // of an item: a few tens of microseconds

}  // namespace

const Chooser* const* choosers(std::size_t* count) {
    static const Chooser* found[3];
    static const std::size_t n = [] {
        std::size_t i = 0;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found[i++] = &columns_avx512;
        if (__builtin_cpu_supports("avx2")) found[i++] = &columns_avx2;
#endif
        found[i++] = &columns_portable;
        return i;
    }();
    *count = n;
    return found;
}

// run(m, first, end) for a few rows of a matrix after others.
template <class F>
static void over_rows(const Shape& shape, std::size_t threads, F&& run) {
    const std::size_t parts = (shape.rows + ROWS - 1) / ROWS;
    parallel(shape.matrices * parts, threads, [&](std::size_t item) {
        const std::size_t first = item % parts * ROWS;
        run(item / parts, first, first + ROWS < shape.rows ? first + ROWS : shape.rows);
    });
}

void choose_columns(const Chooser& how, const Grid& grid, const Block& block,
                    std::size_t threads) {
    over_rows(block, threads, [&](std::size_t m, std::size_t first, std::size_t end) {
        how.rows(grid, block, m, first, end);
    });
}

void best_scales(const Chooser& how, const Grid& grid, const Search& search, std::size_t threads) {
    over_rows(search, threads, [&](std::size_t m, std::size_t first, std::size_t end) {
        how.scales(grid, search, m, first, end);
    });
}

}  // namespace smoe::calibrated
