"""Packing in native code. The contracts are in native/*.h, the specification in
artifacts/nested.py and artifacts/encodings.py."""

import numpy as np

def variants() -> list[str]: ...
def slice_codes(codes: np.ndarray, planes: list[np.ndarray], threads: int) -> None: ...

class Grid:
    def __init__(
        self, bits: list[int], weights: list[float], around: list[float], values: np.ndarray
    ) -> None: ...

def round_nested(
    variant: str,
    w: np.ndarray,
    group: int,
    grid: Grid,
    codes: np.ndarray,
    scale: np.ndarray,
    threads: int,
) -> None: ...
def round_int8(
    variant: str, w: np.ndarray, codes: np.ndarray, scale: np.ndarray, threads: int
) -> None: ...
def round_half(variant: str, w: np.ndarray, kind: str, out: np.ndarray, threads: int) -> bool: ...
def keep_codes(
    values: np.ndarray,
    w: np.ndarray,
    group: int,
    at_once: int,
    codes: np.ndarray,
    scale: np.ndarray,
    threads: int,
) -> bool: ...
def dequantise_mxfp4(
    blocks: np.ndarray, scales: np.ndarray, out: np.ndarray, threads: int
) -> None: ...
def dequantise_fp8(
    codes: np.ndarray, factors: np.ndarray, high: int, wide: int, out: np.ndarray, threads: int
) -> None: ...
def best_scales(
    variant: str,
    values: list[np.ndarray],
    edges: list[np.ndarray],
    weights: list[float],
    target: np.ndarray,
    importance: np.ndarray,
    tried: np.ndarray,
    scale: np.ndarray,
    threads: int,
) -> None: ...
def choose_columns(
    variant: str,
    values: list[np.ndarray],
    edges: list[np.ndarray],
    weights: list[float],
    target: np.ndarray,
    before: np.ndarray | None,
    along: np.ndarray,
    scale: np.ndarray,
    codes: np.ndarray,
    threads: int,
) -> None: ...
