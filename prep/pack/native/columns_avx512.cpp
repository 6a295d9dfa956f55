// AVX-512: sixteen rows side by side.
#define LANES 16
#include "columns_body.h"

namespace smoe::calibrated {

const Chooser columns_avx512 = {"avx512", choose_all, search_all};

}  // namespace smoe::calibrated
