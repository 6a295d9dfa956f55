// AVX2: eight rows side by side.
#define LANES 8
#include "columns_body.h"

namespace smoe::calibrated {

const Chooser columns_avx2 = {"avx2", choose_all, search_all};

}  // namespace smoe::calibrated
