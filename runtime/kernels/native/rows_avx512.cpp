// The same with AVX-512, which CMakeLists.txt allows in this file alone.
#include "rows_body.h"

namespace smoe {
const RowKernels rows_avx512 = SMOE_ROW_KERNELS("avx512");
}
