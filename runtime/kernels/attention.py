"""Attention of new rows over what their sequences remember: the specification of native/attention.h
in NumPy, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smoe.runtime.kernels import activations
from smoe.runtime.kernels.reference import LANES, fold

BLOCK_KEYS = 128

_F = np.float32


@dataclass(frozen=True)
class Part:
    """The next rows of a step: `keys` `[kv_heads, capacity, width]` and `values` of their sequence,
    float16 or float32; the first row is token `past` of it."""

    keys: np.ndarray
    values: np.ndarray
    past: int
    rows: int


def attention(
    parts: Sequence[Part],
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Writes k float32 `[rows, kv_heads, d]` and v `[rows, kv_heads, e]` into their sequences, and
    gives what q `[rows, heads, d]` sees of them: float32 `[rows, heads, e]`. A row sees its
    sequence's `window` last keys (0: all), itself the last; `sinks` float32 `[heads]` are a score
    more, whose value is nothing."""
    y = np.empty((*q.shape[:2], v.shape[2]), _F)
    row = 0
    with np.errstate(all="ignore"):
        for part in parts:
            new, now = slice(row, row + part.rows), slice(part.past, part.past + part.rows)
            part.keys[:, now] = k[new].swapaxes(0, 1)
            part.values[:, now] = v[new].swapaxes(0, 1)
            for r in range(part.rows):
                end = part.past + r + 1
                begin = max(0, end - window) if window else 0
                y[row + r] = _row(part, begin, end, q[row + r], scale, softcap, sinks)
            row += part.rows
    return y


def _row(
    part: Part,
    begin: int,
    end: int,
    q: np.ndarray,
    scale: float,
    softcap: float,
    sinks: np.ndarray | None,
) -> np.ndarray:
    """One row, q `[heads, d]`, over its keys `begin` to `end`."""
    blocks = [
        _block(part, max(begin, first), min(end, first + BLOCK_KEYS), q, scale, softcap)
        for first in range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS)
    ]
    if sinks is not None:
        blocks.insert(0, (sinks, np.ones_like(sinks), np.zeros_like(blocks[0][2])))
    most, total, a = blocks[0]
    for m, s, other in blocks[1:]:
        larger = np.where(m > most, m, most)
        old, now = activations.exp(most - larger), activations.exp(m - larger)
        most, total = larger, total * old + s * now
        a = a * old[:, None] + other * now[:, None]
    return a / total[:, None]


def _block(
    part: Part, begin: int, end: int, q: np.ndarray, scale: float, softcap: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest score, the sum of weights and that of weighted values: `[heads]`, `[heads]`,
    `[heads, e]`."""
    shared = len(q) // len(part.keys)
    keys = np.repeat(part.keys[:, begin:end].astype(_F), shared, axis=0)
    values = np.repeat(part.values[:, begin:end].astype(_F), shared, axis=0)
    score = _dot(q[:, None], keys) * _F(scale)
    if softcap:
        score = _F(softcap) * activations.tanh(score / _F(softcap))
    most = np.fmax.reduce(score, axis=1, initial=-np.inf)
    weight = activations.exp(score - most[:, None])
    first, last = begin % LANES, -end % LANES
    lanes = np.zeros((len(q), LANES), _F)
    aligned = np.pad(weight, ((0, 0), (first, last)))
    for place in range(0, aligned.shape[1], LANES):
        lanes += aligned[:, place : place + LANES]
    a = np.zeros((len(q), values.shape[2]), _F)
    for j in range(end - begin):
        a += weight[:, j, None] * values[:, j]
    return most, fold(lanes), a


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over the last axis, as `reference.dense` adds up."""
    width = a.shape[-1]
    end = [(0, 0)] * (a.ndim - 1) + [(0, -width % LANES)]
    a, b = np.pad(a, end), np.pad(b, end)
    lanes = np.zeros((*np.broadcast_shapes(a.shape, b.shape)[:-1], LANES), _F)
    for first in range(0, width, LANES):
        lanes += a[..., first : first + LANES] * b[..., first : first + LANES]
    return fold(lanes)
