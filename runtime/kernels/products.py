"""Products with a backbone's matrices and the rows of its embeddings: the specification of
native/products.h in NumPy, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from smoe.artifacts import tiles
from smoe.artifacts.bfloat16 import from_bf16
from smoe.artifacts.program import Constant
from smoe.runtime.kernels import reference


@dataclass(frozen=True)
class Weight:
    """A matrix `[n_out, n_in]` of a program: uint8 `data` (codes, or rows of float32 or bfloat16)
    and `scales`, as `artifacts.tiles` packs them; a float matrix has no scales."""

    form: str
    n_out: int
    n_in: int
    group: int
    wide: bool
    data: np.ndarray
    scales: np.ndarray

    @property
    def about(self) -> tuple[object, ...]:
        """What the native module wants to know."""
        return (
            self.form, self.n_out, self.n_in, self.group, self.wide, self.data, self.scales,
        )  # fmt: skip

    @cached_property
    def dense(self) -> np.ndarray:
        """The rows of a float matrix: float32, or the bits of bfloat16 as uint16."""
        kind = "<f4" if self.form == "f32" else "<u2"
        return self.data.view(kind).reshape(self.n_out, self.n_in)

    @cached_property
    def codes(self) -> np.ndarray:
        """The codes of the others, int8 `[n_out, n_in]`."""
        if self.form == "int8":
            return tiles.unpack_int8(self.data, self.n_out, self.n_in)
        return tiles.unpack_int4(self.data, self.n_out, self.n_in).view(np.int8) - np.int8(8)

    @cached_property
    def scale(self) -> np.ndarray:
        """Float32 `[n_out, groups]`."""
        groups = -(-self.n_in // self.group)
        return tiles.unpack_scales(self.scales, self.n_out, groups, self.wide)


def weight(constant: Constant, file: np.ndarray) -> Weight:
    """A matrix in the weights of a program, uint8 `[bytes]`; views of them."""
    n_out, n_in = constant.shape
    data = file[constant.offset : constant.offset + constant.nbytes]
    codes = constant.nbytes
    if constant.form in tiles.BITS:
        codes = tiles.code_bytes(constant.form, n_out, n_in)
    return Weight(
        constant.form, n_out, n_in, constant.group, constant.wide, data[:codes], data[codes:]
    )


def product(w: Weight, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x float32 `[rows, n_in]` times the matrix, plus `bias` float32 `[n_out]`: float32 `[rows,
    n_out]`. Matrices in few bits take x quantised to int8 by group."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if w.form in tiles.BITS:
            y = reference.grouped_product(w.codes, w.scale, w.group, x)
        else:
            y = reference.dense(x, w.dense)
        return y if bias is None else y + bias


def head_product(w: Weight, x: np.ndarray, n_out: int) -> np.ndarray:
    """x float32 `[rows, heads, n_in]`, each head times a matrix of its own, which begins on a tile
    of `w` (`tiles.head_rows`): float32 `[rows, heads, n_out]`."""
    y = np.empty((*x.shape[:2], n_out), np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for head in range(x.shape[1]):
            first = head * tiles.head_rows(n_out)
            own = slice(first, first + n_out)
            if w.form in tiles.BITS:
                given = np.ascontiguousarray(x[:, head])
                y[:, head] = reference.grouped_product(w.codes[own], w.scale[own], w.group, given)
            else:
                y[:, head] = reference.dense(x[:, head], w.dense[own])
    return y


def embedding(w: Weight, ids: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Rows `ids` int64 `[n]` of the matrix, times `scale`: float32 `[n, n_in]`."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if w.form in tiles.BITS:
            scales = np.repeat(w.scale[ids], w.group, axis=1)[:, : w.n_in]
            rows = w.codes[ids].astype(np.float32) * scales
        else:
            rows = from_bf16(w.dense[ids]) if w.form == "bf16" else w.dense[ids]
        return rows * np.float32(scale)
