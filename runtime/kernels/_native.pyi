"""Expert kernels. The contract is in native/ffn.h, the specification in reference.py."""

import numpy as np

def variants() -> list[str]: ...

class Layer:
    def __init__(
        self, matrices: list[tuple[object, ...]], kind: str, act: str, alpha: float, limit: float
    ) -> None: ...
    def ffn(
        self,
        variant: str,
        records: np.ndarray,
        frames: np.ndarray,
        levels: np.ndarray,
        starts: np.ndarray,
        tokens: np.ndarray,
        x: np.ndarray,
        y: np.ndarray,
        threads: int,
    ) -> None: ...
    def product(
        self, variant: str, name: str, record: np.ndarray, level: int, x: np.ndarray, y: np.ndarray
    ) -> None: ...
    def between(self, variant: str, gate: np.ndarray, up: np.ndarray, y: np.ndarray) -> None: ...
