"""Attention of new rows over what their sequences remember: the specification of native/attention.h
in NumPy, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from smoe.runtime.kernels import activations
from smoe.runtime.kernels.blocks import GROUP, TOKENS, BlockLayout
from smoe.runtime.kernels.reference import LANES, fold, quantise

BLOCK_KEYS = 128  # positions whose weights are relative to their own largest score

_F = np.float32


@dataclass(frozen=True)
class Part:
    """The next rows of a step, of one sequence: `block(i)` is the memory of its tokens `i * TOKENS`
    on, uint8 `[layout.nbytes]`; the first row is token `past` of it."""

    layout: BlockLayout
    block: Callable[[int], np.ndarray]
    past: int
    rows: int


@dataclass(frozen=True)
class _Seen:
    """Some tokens: keys `[kv_heads, n, d]` and values float32 `[kv_heads, n, e]`. Keys are float32,
    or int8 with scales float32 `[kv_heads, n, groups]`."""

    keys: np.ndarray
    scales: np.ndarray | None
    values: np.ndarray


def attention(
    parts: Sequence[Part],
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray | None,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Writes k float32 `[rows, kv_heads, d]` and v `[rows, kv_heads, e]` (None where keys hold the
    values) into their sequences, row by row, and gives what q `[rows, heads, d]` sees of them:
    float32 `[rows, heads, e]`. A row sees its sequence's `window` last keys (0: all), itself the
    last; `sinks` float32 `[heads]` are a score more, whose value is nothing."""
    y = np.empty((*q.shape[:2], parts[0].layout.value_width), _F)
    row = 0
    with np.errstate(all="ignore"):
        for part in parts:
            for position in range(part.past, part.past + part.rows):
                _remember(part, position, k[row], None if v is None else v[row])
                begin = max(0, position + 1 - window) if window else 0
                y[row] = _row(part, begin, position + 1, q[row], scale, softcap, sinks)
                row += 1
    return y


def _remember(part: Part, position: int, k: np.ndarray, v: np.ndarray | None) -> None:
    """Token `position` of a sequence, k `[kv_heads, d]` and v `[kv_heads, e]`."""
    views, at = part.layout.views(part.block(position // TOKENS)), position % TOKENS
    for name, x in (("key", k), ("value", v)):
        if x is None:
            continue
        if part.layout.kind == "int8":
            codes, step = quantise(x, GROUP)
            views[f"{name}_scales"][:, at] = step
            x = codes.reshape(len(x), -1)[:, : x.shape[1]]
        views[f"{name}s"][:, at] = x


def _seen(part: Part, begin: int, end: int) -> _Seen:
    """Tokens `begin` to `end`."""
    pieces = []
    for index in range(begin // TOKENS, -(-end // TOKENS)):
        first = index * TOKENS
        tokens = slice(max(begin, first) - first, min(end, first + TOKENS) - first)
        views = part.layout.views(part.block(index))
        pieces.append({name: view[:, tokens] for name, view in views.items()})
    whole = {name: np.concatenate([piece[name] for piece in pieces], 1) for name in pieces[0]}
    of_values = "key" if part.layout.latent else "value"
    values = whole[f"{of_values}s"][..., : part.layout.value_width].astype(_F)
    if part.layout.kind != "int8":
        return _Seen(whole["keys"].astype(_F), None, values)
    scales = np.repeat(whole[f"{of_values}_scales"], GROUP, axis=2)
    return _Seen(whole["keys"], whole["key_scales"], values * scales[..., : values.shape[2]])


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
    seen = _seen(part, begin, end)
    shared = len(q) // part.layout.heads
    score = _scores(seen, q, shared) * _F(scale)
    values = np.repeat(seen.values, shared, axis=0)
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


def _scores(seen: _Seen, q: np.ndarray, shared: int) -> np.ndarray:
    """q `[heads, d]` times keys, of which `shared` heads read the same: `[heads, n]`."""
    keys = np.repeat(seen.keys, shared, axis=0)
    if seen.scales is None:
        return _dot(q[:, None], keys)
    scales = np.repeat(seen.scales, shared, axis=0)
    codes, step = quantise(q, GROUP)
    y = np.zeros(keys.shape[:2], _F)
    for g in range(step.shape[1]):
        some = keys[..., g * GROUP : (g + 1) * GROUP].astype(np.int32)
        exact = (some * codes[:, None, g, : some.shape[2]]).sum(-1, dtype=np.int32)
        y += (exact.astype(_F) * scales[..., g]) * step[:, g, None]
    return y


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over the last axis, as `reference.dense` adds up."""
    width = a.shape[-1]
    end = [(0, 0)] * (a.ndim - 1) + [(0, -width % LANES)]
    a, b = np.pad(a, end), np.pad(b, end)
    lanes = np.zeros((*np.broadcast_shapes(a.shape, b.shape)[:-1], LANES), _F)
    for first in range(0, width, LANES):
        lanes += a[..., first : first + LANES] * b[..., first : first + LANES]
    return fold(lanes)
