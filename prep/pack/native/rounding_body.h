// Rounding with whatever vectors the including file has: `Floats` of LANES floats, and for tables
// `Values`, which finds the values of what x rounds to. A vector has eight columns each of two
// groups, or PARTS vectors have eight of one. All of it is the including file's own, since the same
// code compiled for another instruction set must not take its place.
#include <cmath>

#include "bits.h"

namespace smoe {
namespace {

typedef std::int32_t Ints __attribute__((vector_size(LANES * 4)));
constexpr std::size_t PARTS = LANES < 8 ? 8 / LANES : 1;
constexpr std::size_t AT_ONCE = LANES < 8 ? 1 : LANES / 8;
constexpr std::size_t STEPS = MAX_GROUP / 8;

// NumPy's order of a sum: of eight running sums.
inline float sum_of(const float* s) {
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

// The groups' weights, eight columns of each a step.
struct Staged {
    Floats w[STEPS][PARTS];
    std::size_t steps;

    float* at(std::size_t step, std::size_t group) {
        return reinterpret_cast<float*>(w[step]) + group * 8;
    }
};

inline void stage(Staged& staged, std::size_t size, const Group* groups) {
    staged.steps = size / 8;
    for (std::size_t a = 0; a < AT_ONCE; ++a) {
        float padded[MAX_GROUP];
        const float* from = groups[a].from;
        if (groups[a].wide < size) {
            for (std::size_t i = 0; i < size; ++i) padded[i] = i < groups[a].wide ? from[i] : 0.0f;
            from = padded;
        }
        for (std::size_t i = 0; i < staged.steps; ++i)
            __builtin_memcpy(staged.at(i, a), from + i * 8, 8 * sizeof(float));
    }
}

// Of group a: the root of the mean square of its `wide` weights, or the largest magnitude.
inline double spread_of(Staged& staged, std::size_t a, std::size_t wide, bool table) {
    float s[8] = {}, most = 0;
    for (std::size_t i = 0; i < staged.steps; ++i)
        for (std::size_t j = 0; j < 8; ++j) {
            const float w = staged.at(i, a)[j];
            s[j] += w * w;
            const float size = w < 0 ? -w : w;
            most = size > most ? size : most;
        }
    return table ? std::sqrt(double(sum_of(s)) / double(wide)) : double(most);
}

// Codes on a uniform grid of 5 to 8 bits, whose edges are the multiples of its step, or for 8 bits
// the halves between integers; and their values at a level.
struct Uniform {
    float inverse, half;  // of a step; how many values lie on each side of zero
    std::int32_t most;
    std::size_t total;

    explicit Uniform(const Grid& grid)
        : inverse(1 / float(1 << (8 - grid.total))),
          half(float(1 << (grid.total - 1))),
          most((1 << grid.total) - 1),
          total(grid.total) {}

    // How many edges lie below x. Exact: x - floor(x) is, wherever a comparison could go wrong.
    inline Ints code(Floats x) const {
        const Floats low = Floats{} - half - 1, high = Floats{} + half + 1;
        Floats t = x * inverse;
        t = t < low ? low : t;
        t = t > high ? high : t;
        const Ints whole = __builtin_convertvector(t, Ints);
        const Ints below = whole + (__builtin_convertvector(whole, Floats) > t);
        const Floats over = t - __builtin_convertvector(below, Floats);
        const Ints above = total == 8 ? below - (over > 0.5f) : below - 1 - (over > 0.0f);
        const Ints code = above + std::int32_t(half), last = Ints{} + most;
        const Ints first = code < 0 ? Ints{} : code;
        return first > last ? last : first;
    }
    inline Floats value(Ints code, std::size_t bits) const {
        const Ints cell = code >> int(total - bits) << int(8 - bits);
        const std::int32_t middle = (bits < 8 ? 1 << (7 - bits) : 0) - 128;
        return __builtin_convertvector(cell + middle, Floats);
    }
};

struct Costs {
    float of[AT_ONCE];
};

typedef Floats Sums[PARTS];

inline Costs add_up(const Grid& grid, const Sums* sums) {
    Costs costs;
    for (std::size_t a = 0; a < AT_ONCE; ++a) {
        float cost = 0;
        for (std::size_t n = 0; n < grid.levels; ++n) {
            float s[LANES * PARTS];
            __builtin_memcpy(s, sums[n], sizeof s);
            cost += sum_of(s + a * 8) * grid.weight[n];
        }
        costs.of[a] = cost;
    }
    return costs;
}

// What a scale costs: squared errors at all levels. `divisor` is the scale, or 1 where it is 0.
template <std::size_t TOTAL, std::size_t LEVELS>
inline Costs table_cost(const Grid& grid, const Values<TOTAL, LEVELS>& values, const Staged& staged,
                        Floats scale, Floats divisor) {
    Sums sums[LEVELS] = {};
    for (std::size_t i = 0; i < staged.steps; ++i)
        for (std::size_t p = 0; p < PARTS; ++p) {
            Floats found[LEVELS];
            const Floats w = staged.w[i][p];
            values.of(w / divisor, found);
            for (std::size_t n = 0; n < LEVELS; ++n) {
                const Floats error = w - scale * found[n];
                sums[n][p] += error * error;
            }
        }
    return add_up(grid, sums);
}

inline Costs uniform_cost(const Grid& grid, const Uniform& uniform, const Staged& staged,
                          Floats scale, Floats divisor) {
    Sums sums[MAX_LEVELS] = {};
    for (std::size_t i = 0; i < staged.steps; ++i)
        for (std::size_t p = 0; p < PARTS; ++p) {
            const Floats w = staged.w[i][p];
            const Ints code = uniform.code(w / divisor);
            for (std::size_t n = 0; n < grid.levels; ++n) {
                const Floats error = w - scale * uniform.value(code, grid.bits[n]);
                sums[n][p] += error * error;
            }
        }
    return add_up(grid, sums);
}

// Tries every scale, `cost(scale, divisor)` of it, keeps the first of the best, and writes
// `code(x)` for it.
template <class Cost, class Code>
inline void search(const Grid& grid, std::size_t size, const Group* groups, Staged& staged,
                   Cost&& cost, Code&& code) {
    double spread[AT_ONCE];
    float best[AT_ONCE], lowest[AT_ONCE];
    bool found[AT_ONCE] = {};
    for (std::size_t a = 0; a < AT_ONCE; ++a) {
        spread[a] = spread_of(staged, a, groups[a].wide, grid.table);
        best[a] = 0, lowest[a] = HUGE_VALF;
    }
    Floats scale = {}, divisor = {};
    const auto set = [&](std::size_t a, float candidate) {
        for (std::size_t j = a * LANES / AT_ONCE; j < (a + 1) * LANES / AT_ONCE; ++j) {
            scale[j] = candidate;
            divisor[j] = candidate > 0 ? candidate : 1;
        }
    };
    for (std::size_t k = 0; k < grid.candidates; ++k) {
        float candidate[AT_ONCE];
        for (std::size_t a = 0; a < AT_ONCE; ++a)
            set(a, candidate[a] = from_bf16(bf16_of(float(spread[a] * grid.around[k]))));
        const Costs costs = cost(scale, divisor);
        for (std::size_t a = 0; a < AT_ONCE; ++a)
            if (costs.of[a] < lowest[a])
                lowest[a] = costs.of[a], best[a] = candidate[a], found[a] = true;
    }
    for (std::size_t a = 0; a < AT_ONCE; ++a) set(a, best[a]);
    std::uint8_t codes[AT_ONCE][MAX_GROUP];
    for (std::size_t i = 0; i < size / 8; ++i) {
        std::int32_t rounded[AT_ONCE * 8];
        for (std::size_t p = 0; p < PARTS; ++p) {
            const Ints part = code(staged.w[i][p] / divisor);
            __builtin_memcpy(rounded + p * LANES, &part, sizeof part);
        }
        for (std::size_t a = 0; a < AT_ONCE; ++a)
            for (std::size_t j = 0; j < 8; ++j)
                codes[a][i * 8 + j] = found[a] ? std::uint8_t(rounded[a * 8 + j]) : 0;
    }
    for (std::size_t a = 0; a < AT_ONCE && groups[a].from; ++a) {
        __builtin_memcpy(groups[a].codes, codes[a], groups[a].wide);
        *groups[a].scale = best[a];
    }
}

template <std::size_t TOTAL, std::size_t LEVELS>
void with_table(const Grid& grid, std::size_t size, const Group* groups, Staged& staged) {
    const Values<TOTAL, LEVELS> values(grid);
    search(
        grid, size, groups, staged,
        [&](Floats scale, Floats divisor) {
            return table_cost<TOTAL, LEVELS>(grid, values, staged, scale, divisor);
        },
        [&](Floats x) { return values.code(x); });
}

void round_groups(const Grid& grid, std::size_t size, const Group* groups) {
    Staged staged;
    stage(staged, size, groups);
    if (grid.table) {
        switch (grid.total * 4 + grid.levels) {
            case 2 * 4 + 1:
                return with_table<2, 1>(grid, size, groups, staged);
            case 3 * 4 + 1:
                return with_table<3, 1>(grid, size, groups, staged);
            case 3 * 4 + 2:
                return with_table<3, 2>(grid, size, groups, staged);
            case 4 * 4 + 1:
                return with_table<4, 1>(grid, size, groups, staged);
            case 4 * 4 + 2:
                return with_table<4, 2>(grid, size, groups, staged);
            default:
                return with_table<4, 3>(grid, size, groups, staged);
        }
    }
    const Uniform uniform(grid);
    search(
        grid, size, groups, staged,
        [&](Floats scale, Floats divisor) {
            return uniform_cost(grid, uniform, staged, scale, divisor);
        },
        [&](Floats x) { return uniform.code(x); });
}

void to_int8(const float* w, std::size_t n, std::int8_t* codes, float* scale) {
    float most = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const float size = w[i] < 0 ? -w[i] : w[i];
        most = size > most ? size : most;
    }
    *scale = most / 127;
    const float divisor = *scale > 0 ? *scale : 1;
    constexpr float WHOLE = 12582912;  // 1.5 * 2^23: what is added to it is rounded to even
    for (std::size_t i = 0; i < n; ++i) {
        float x = w[i] / divisor;
        x = x < -127 ? -127 : x;
        x = x > 127 ? 127 : x;
        codes[i] = std::int8_t(std::int32_t(x + WHOLE - WHOLE));
    }
}

void to_bf16(const float* w, std::size_t n, std::uint16_t* out) {
    for (std::size_t i = 0; i < n; ++i) out[i] = bf16_of(w[i]);
}

bool to_f16(const float* w, std::size_t n, std::uint16_t* out) {
    std::uint32_t most = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t bits = float_to_bits(w[i]), half = f16_size_of(bits & 0x7FFFFFFF);
        most = half > most ? half : most;
        out[i] = std::uint16_t(bits >> 16 & 0x8000) | std::uint16_t(half);
    }
    return most < 0x7C00;
}

}  // namespace
}  // namespace smoe
