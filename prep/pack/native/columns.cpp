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

void choose_columns(const Chooser& how, const Grid& grid, const Block& block,
                    std::size_t threads) {
    const std::size_t parts = (block.rows + ROWS - 1) / ROWS;
    parallel(block.matrices * parts, threads, [&](std::size_t item) {
        const std::size_t first = item % parts * ROWS;
        const std::size_t end = first + ROWS < block.rows ? first + ROWS : block.rows;
        how.rows(grid, block, item / parts, first, end);
    });
}

}  // namespace smoe::calibrated
