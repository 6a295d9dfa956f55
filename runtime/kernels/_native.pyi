"""Expert kernels. The contract is in native/ffn.h, the specification in reference.py."""

import numpy as np

def variants() -> list[str]: ...
def product(
    variant: str,
    weight: tuple[object, ...],
    x: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    threads: int,
) -> None: ...
def embedding(weight: tuple[object, ...], ids: np.ndarray, scale: float, y: np.ndarray) -> None: ...
def attention(
    variant: str,
    sequences: list[tuple[str, np.ndarray, int, int]],
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray | None,
    y: np.ndarray,
    scale: float,
    softcap: float,
    window: int,
    sinks: np.ndarray | None,
    threads: int,
) -> None: ...

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

class State:
    def __init__(
        self,
        tables: np.ndarray,
        layouts: list[tuple[str, int, int, int, bool]],
        context: int,
        recurrent: np.ndarray,
        sizes: list[int],
    ) -> None: ...

class Rows:
    tokens: int
    def array(self, buffer: int) -> np.ndarray: ...

class Program:
    block: int
    scans: int
    kernel_scratch: int
    def __init__(
        self,
        weights: np.ndarray,
        buffers: list[tuple[object, ...]],
        constants: list[tuple[object, ...]],
        states: list[tuple[int, int, int, bool]],
        recurrent: list[int],
        segments: list[list[tuple[object, ...]]],
        variant: str,
        threads: int,
    ) -> None: ...
    def begin(self, spans: list[tuple[State, int, np.ndarray]], keep: np.ndarray) -> Rows: ...
    def run(self, rows: Rows, segment: int, first: int, end: int) -> None: ...
    def steps(self, rows: Rows, mixture: object, first: int) -> int: ...

class Mixture:
    def __init__(
        self, program: Program, layers: list[tuple[object, ...]], records: np.ndarray
    ) -> None: ...
