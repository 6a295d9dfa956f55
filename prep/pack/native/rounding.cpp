#include "rounding.h"

#include <atomic>

#include "pool.h"

namespace smoe {

constexpr std::size_t RUN = 1 << 14;  // weights that a thread takes at once
constexpr std::size_t MOST_AT_ONCE = 2;

const Rounder* const* rounders(std::size_t* count) {
    static const Rounder* found[3];
    static const std::size_t number = [] {
        std::size_t n = 0;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            found[n++] = &rounding_avx512;
        if (__builtin_cpu_supports("avx2")) found[n++] = &rounding_avx2;
#endif
        found[n++] = &rounding_portable;
        return n;
    }();
    *count = number;
    return found;
}

void round_nested(const Rounder& how, const Grid& grid, const float* w, std::size_t n_out,
                  std::size_t n_in, std::size_t group, std::uint8_t* codes, float* scale,
                  std::size_t threads) {
    const std::size_t groups = (n_in + group - 1) / group;
    const std::size_t rows = n_in < RUN ? RUN / n_in : 1;  // of a run
    parallel((n_out + rows - 1) / rows, threads, [&](std::size_t run) {
        const std::size_t end = (run + 1) * rows < n_out ? (run + 1) * rows : n_out;
        Group waiting[MOST_AT_ONCE] = {};
        std::size_t count = 0;
        for (std::size_t row = run * rows; row < end; ++row)
            for (std::size_t g = 0; g < groups; ++g) {
                const std::size_t first = row * n_in + g * group, left = n_in - g * group;
                waiting[count++] = {w + first, left < group ? left : group, codes + first,
                                    scale + row * groups + g};
                if (count < how.at_once) continue;
                how.groups(grid, group, waiting);
                count = 0;
            }
        if (!count) return;
        for (; count < how.at_once; ++count) waiting[count] = {};
        how.groups(grid, group, waiting);
    });
}

void round_int8(const Rounder& how, const float* w, std::size_t n_out, std::size_t n_in,
                std::int8_t* codes, float* scale, std::size_t threads) {
    parallel(n_out, threads, [&](std::size_t row) {
        how.int8(w + row * n_in, n_in, codes + row * n_in, scale + row);
    });
}

// In runs of a length that vectors divide.
template <class F>
static void in_runs(std::size_t n, std::size_t threads, F&& f) {
    parallel((n + RUN - 1) / RUN, threads, [&](std::size_t run) {
        const std::size_t first = run * RUN;
        f(first, n - first < RUN ? n - first : RUN);
    });
}

void round_bf16(const Rounder& how, const float* w, std::size_t n, std::uint16_t* out,
                std::size_t threads) {
    in_runs(n, threads,
            [&](std::size_t first, std::size_t count) { how.bf16(w + first, count, out + first); });
}

bool round_f16(const Rounder& how, const float* w, std::size_t n, std::uint16_t* out,
               std::size_t threads) {
    std::atomic<bool> fits{true};
    in_runs(n, threads, [&](std::size_t first, std::size_t count) {
        if (!how.f16(w + first, count, out + first)) fits.store(false, std::memory_order_relaxed);
    });
    return fits.load();
}

}  // namespace smoe
