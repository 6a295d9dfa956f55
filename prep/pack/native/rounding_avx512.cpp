// AVX-512: two groups side by side, and a table in a register, so that a value is found by halving
// and looked up.
#include "rounding.h"

namespace smoe {
namespace {

constexpr std::size_t LANES = 16;
typedef float Floats __attribute__((vector_size(64)));

template <std::size_t TOTAL, std::size_t LEVELS>
struct Values {
    typedef std::int32_t Codes __attribute__((vector_size(64)));
    Floats edges[TOTAL] = {};  // by the code so far: the edge in the middle of its cell, bit by bit
    Floats values[LEVELS];

    explicit Values(const Grid& grid) {
        for (std::size_t bit = 0; bit < TOTAL; ++bit) {
            const std::size_t middle = (1 << bit) - 1;
            for (std::size_t code = 0; code + middle < (1 << TOTAL) - 1; ++code)
                edges[bit][code] = grid.edges[code + middle];
        }
        for (std::size_t n = 0; n < LEVELS; ++n)
            __builtin_memcpy(&values[n], grid.values[n], sizeof values[n]);
    }
    inline Codes code(Floats x) const {
        Codes code = {};
        for (std::size_t bit = TOTAL; bit-- > 0;) {
            const Floats edge = __builtin_shuffle(edges[bit], code);
            code = x > edge ? code + (1 << bit) : code;
        }
        return code;
    }
    inline void of(Floats x, Floats (&found)[LEVELS]) const {
        const Codes found_code = code(x);
        for (std::size_t n = 0; n < LEVELS; ++n)
            found[n] = __builtin_shuffle(values[n], found_code);
    }
};

}  // namespace
}  // namespace smoe

#include "rounding_body.h"

namespace smoe {
const Rounder rounding_avx512 = {"avx512", AT_ONCE, round_groups, to_int8, to_bf16, to_f16};
}
