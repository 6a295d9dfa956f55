// Any processor: vectors of four floats, which most have.
#define LANES 4
#include "columns_body.h"

namespace smoe::calibrated {

const Chooser columns_portable = {"portable", choose_all, search_all};

}  // namespace smoe::calibrated
