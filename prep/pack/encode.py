"""Experts to records in native code: byte for byte what `smoe.artifacts` specifies in NumPy, which
does it where smoe was built without native code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from smoe.artifacts import nested
from smoe.artifacts.encodings import (
    encode_expert,
    encoding_named,
    fill_record,
    is_bias_or_norm,
    too_large_for_f16,
)
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.nested import Nested, Split
from smoe.prep.pack.compiled import native
from smoe.runtime.machine import processors

if TYPE_CHECKING:
    from smoe.prep.pack._native import Grid

Views = dict[str, np.ndarray]


def encode_record(
    layout: RecordLayout,
    encoding: str,
    weights: dict[str, np.ndarray],
    variant: str = "",
    threads: int | None = None,
) -> np.ndarray:
    """`encode_expert`: one record, `uint8 [layout.nbytes]`, of an expert's float32 matrices and
    biases, by rounding, on `threads` (None: as many as this process may use). `variant` names an
    instruction set of `native.variants()`, all of which give the same; "" is the best."""
    if native is None:
        return encode_expert(layout, encoding, weights)
    threads = threads or processors().count
    name = encoding_named(encoding).name
    record = np.zeros(layout.nbytes, np.uint8)
    views = layout.views(record)
    for matrix, w in weights.items():
        w = np.ascontiguousarray(w)
        if is_bias_or_norm(matrix) or name == "f32":
            views[matrix][...] = w
        elif name == "int8":
            native.round_int8(variant, w, views[matrix], views[f"{matrix}_scale"], threads)
        elif name in ("bf16", "f16"):
            half = views[matrix].view(np.uint16)
            if not native.round_half(variant, w, name, half, threads):
                raise too_large_for_f16(matrix, w)
        else:
            parsed = nested.parse(name)
            codes, scale = round_matrix(parsed, matrix, w, variant, threads)
            _fill(views, parsed, matrix, codes, scale, threads)
    return record


def codes_record(
    layout: RecordLayout,
    encoding: Nested,
    codes: dict[str, tuple[np.ndarray, np.ndarray]],
    vectors: dict[str, np.ndarray],
) -> np.ndarray:
    """One record, `uint8 [layout.nbytes]`, of an expert whose codes are known: for each matrix
    uint8 `[n_out, n_in]` and scales float32 `[n_out, groups]`, values of bfloat16; and its biases
    and norm."""
    record = fill_record(layout, vectors)
    views = layout.views(record)
    threads = processors().count
    for matrix, (found, scale) in codes.items():
        _fill(views, encoding, matrix, found, scale, threads)
    return record


def round_matrix(
    encoding: Nested, name: str, w: np.ndarray, variant: str = "", threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`nested.round_matrix` of float32 `w` `[n_out, n_in]`: codes uint8 and scales float32
    `[n_out, groups]`. `variant` and `threads` as in `encode_record`."""
    if native is None:
        return nested.round_matrix(encoding, name, w)
    codes = np.empty(w.shape, np.uint8)
    scale = np.empty((w.shape[0], -(-w.shape[1] // encoding.group)), np.float32)
    grid = _grid(encoding.of(name))
    threads = threads or processors().count
    native.round_nested(
        variant, np.ascontiguousarray(w), encoding.group, grid, codes, scale, threads
    )
    return codes, scale


@lru_cache(maxsize=16)
def _grid(split: Split) -> Grid:
    """What native/rounding.h calls a Grid: values at every level of a full code, if they are a
    table."""
    levels = range(1, len(split.planes) + 1)
    codes = np.arange(1 << split.total) if split.total <= 4 else np.zeros(0, int)
    values = [split.values(n)[codes >> (split.total - split.bits(n))] for n in levels]
    weights = [nested.level_weight(split, n) for n in levels]
    around = [k / split.outermost for k in nested.tried_scales(split)]
    return native.Grid([split.bits(n) for n in levels], weights, around, np.stack(values))


def _fill(
    views: Views, encoding: Nested, name: str, codes: np.ndarray, scale: np.ndarray, threads: int
) -> None:
    """A matrix's tensors in a record, as `nested.pack_matrix` has them."""
    if native is None:
        for tensor, values in nested.pack_matrix(encoding, name, codes, scale).items():
            views[tensor][...] = values
        return
    views[f"{name}_scale"][...] = nested.tiled_scale(scale)
    planes = [views[f"{name}_plane{p}"] for p in range(encoding.levels)]
    native.slice_codes(np.ascontiguousarray(codes), planes, threads)
