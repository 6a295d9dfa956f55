// AVX2, which the compiler makes of the same vectors.
#include "rounding.h"

namespace smoe {
namespace {

constexpr std::size_t LANES = 8;
typedef float Floats __attribute__((vector_size(32)));

}  // namespace
}  // namespace smoe

#include "rounding_wide.h"
#include "rounding_body.h"

namespace smoe {
const Rounder rounding_avx2 = {"avx2", AT_ONCE, round_groups, to_int8, to_bf16, to_f16};
}
