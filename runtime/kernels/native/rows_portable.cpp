// Row operations on any processor.
#include "rows_body.h"

namespace smoe {

const RowKernels rows_portable = SMOE_ROW_KERNELS("portable");

const RowKernels& row_kernels(const Variant& variant) {
#if defined(__x86_64__)
    if (&variant == &avx512vnni) return rows_avx512;
    if (&variant == &avx2) return rows_avx2;
#endif
    (void)variant;
    return rows_portable;
}

}  // namespace smoe
