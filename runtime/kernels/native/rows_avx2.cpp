// The same with AVX2, which CMakeLists.txt allows in this file alone.
#include "rows_body.h"

namespace smoe {
const RowKernels rows_avx2 = SMOE_ROW_KERNELS("avx2");
}
