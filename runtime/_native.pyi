"""Expert kernels. The contract is in native/linear.h, the specification in reference.py."""

import numpy as np
from numpy.typing import NDArray

def variants() -> list[str]: ...
def linear(
    variant: str,
    x: NDArray[np.float32],
    w: NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int8],
    scale: NDArray[np.float32] | None,
    y: NDArray[np.float32],
) -> None: ...
