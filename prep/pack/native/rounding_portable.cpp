// Any processor, with vectors of the compiler's own.
#include "rounding.h"

namespace smoe {
namespace {

constexpr std::size_t LANES = 4;
typedef float Floats __attribute__((vector_size(16)));

}  // namespace
}  // namespace smoe

#include "rounding_wide.h"
#include "rounding_body.h"

namespace smoe {
const Rounder rounding_portable = {"portable", AT_ONCE, round_groups, to_int8, to_bf16, to_f16};
}
