"""Codes that a checkpoint was stored in, found again in its decoded weights, so that a bundle's
full level is the checkpoint's own weights to the bit.

How a scheme packs and orders its codes does not matter here: a group of weights is looked at as
values times one factor, and what was found is multiplied out and compared before it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from smoe.artifacts import nested
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.encodings import is_bias_or_norm
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.nested import Split
from smoe.prep.errors import PrepError
from smoe.prep.pack.compiled import native
from smoe.prep.pack.encode import codes_record
from smoe.runtime.machine import processors

AT_ONCE = 1 << 16  # weights

Codes = tuple[np.ndarray, np.ndarray]
Rounding = Callable[[np.ndarray], np.ndarray]


def kept_record(
    layout: RecordLayout, encoding: str, weights: dict[str, np.ndarray], where: str
) -> np.ndarray:
    """One record, `uint8 [layout.nbytes]`, of an expert's float32 matrices and biases, in their own
    codes. Weights that are no codes of `encoding` are a `PrepError` that says `where`."""
    parsed = nested.parse(encoding)
    vectors = {name: vector for name, vector in weights.items() if is_bias_or_norm(name)}
    codes = {}
    for name, w in weights.items():
        if is_bias_or_norm(name):
            continue
        kept = kept_codes(parsed.of(name), parsed.group, w)
        if kept is None:
            raise PrepError(
                f"{where}: {name} is not made of codes of {encoding}, so that they cannot be kept; "
                "give another --encoding, like nested:2+1+1, or --quantiser calibrated."
            )
        codes[name] = kept
    return codes_record(layout, parsed, codes, vectors)


def kept_codes(split: Split, group: int, w: np.ndarray, threads: int | None = None) -> Codes | None:
    """Codes uint8 `[n_out, n_in]` and factors float32 `[n_out, groups]`, values of bfloat16, whose
    products are `w` float32 `[n_out, n_in]` to the bit, rounded as `w` is; None if there are none.
    `specified_codes`, in native code where there is some, on `threads` (None: as many as this
    process may use)."""
    if native is None:
        return specified_codes(split, group, w)
    codes = np.empty(w.shape, np.uint8)
    scale = np.empty((w.shape[0], -(-w.shape[1] // group)), np.float32)
    values, w = split.values(len(split.planes)), np.ascontiguousarray(w)
    threads = threads or processors().count
    kept = native.keep_codes(values, w, group, AT_ONCE // group, codes, scale, threads)
    return (codes, scale) if kept else None


def specified_codes(split: Split, group: int, w: np.ndarray) -> Codes | None:
    """The specification of `kept_codes`, in NumPy."""
    (n_out, n_in), groups = w.shape, -(-w.shape[1] // group)
    short = groups * group - n_in
    padded = (np.pad(w, ((0, 0), (0, short))) if short else w).reshape(-1, group)
    codes = np.zeros(padded.shape, np.uint8)
    scale = np.zeros(len(padded), np.float32)
    for start in range(0, len(padded), AT_ONCE // group):
        part = slice(start, start + AT_ONCE // group)
        if not _keep(split, padded[part], codes[part], scale[part]):
            return None
    return codes.reshape(n_out, -1)[:, :n_in], scale.reshape(n_out, groups)


def _keep(split: Split, w: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> bool:
    """Fill codes and factors of groups `[n, group]`; whether all of them have some."""
    values = split.values(len(split.planes)).astype(np.float32)
    largest, rounding = np.abs(w).max(1), _rounding(w)
    left = np.flatnonzero(largest)
    codes[largest == 0] = np.abs(values).argmin()
    for magnitude, exact, candidate in _candidates(largest, values):
        multiplied = (lambda x: x) if exact else rounding
        fits = multiplied(candidate[left] * magnitude) == largest[left]  # worth a look
        tried = left[fits & (candidate[left] > 0)]
        factor = candidate[tried][:, None]
        found = _codes(values, w[tried], factor)
        same = (multiplied(values[found] * factor) == w[tried]).all(1)
        codes[tried[same]], scale[tried[same]] = found[same], factor[same, 0]
        left = np.setdiff1d(left, tried[same], assume_unique=True)
    return not len(left)


def _candidates(
    largest: np.ndarray, values: np.ndarray
) -> Iterator[tuple[np.float32, bool, np.ndarray]]:
    """Factors that a group's largest weight allows, which is the magnitude of one of the values
    times the factor: first as exact products, then as rounded ones."""
    magnitudes = sorted(set(np.abs(values).tolist()) - {0.0}, reverse=True)
    nearest = [(np.float32(m), to_bf16((largest / m).astype(np.float32))) for m in magnitudes]
    for exact, step in ((True, 0), (False, 0), (False, 1), (False, -1)):
        for magnitude, bits in nearest:
            factor = from_bf16((bits.astype(np.int32) + step).clip(0).astype(np.uint16))
            yield magnitude, exact, factor


def _codes(values: np.ndarray, w: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """The nearest codes, looked up in steps of what all values are multiples of. Of two that mean
    zero that of the weight's own sign: its fewer bits are nearer."""
    unit = np.gcd.reduce(np.abs(values).astype(int))
    first, last = int(values[0]) // unit, int(values[-1]) // unit
    codes = nested.nearest_of(values, np.arange(first, last + 1) * unit)
    step = np.rint(w * (1 / (factor * unit))).clip(first, last).astype(np.int32) - first
    zero = codes[-first]
    if values[zero + 1] != 0:
        return codes[step]
    return codes[step] + ((step == -first) & ~np.signbit(w))


def _rounding(w: np.ndarray) -> Rounding:
    """How the products that `w` holds were rounded: to the narrowest type that holds all of it."""
    if not np.any(w.view(np.uint32) & 0xFFFF):
        return lambda x: from_bf16(to_bf16(x))
    with np.errstate(over="ignore"):
        half = w.astype(np.float16).astype(np.float32)
    if np.array_equal(half, w):
        return lambda x: x.astype(np.float16).astype(np.float32)
    return lambda x: x
