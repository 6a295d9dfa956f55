"""Packing in native code. The contracts are in native/*.h, the specification in
artifacts/nested.py and artifacts/encodings.py."""

import numpy as np

def slice_codes(codes: np.ndarray, planes: list[np.ndarray], threads: int) -> None: ...
