"""The specification of the row operations of programs in NumPy, bit for bit that of native/rows.h,
which says what they compute.

Arrays are `[.., n]`: operations work along the last axis or on elements. Kinds are float32, int64
and bool; results are float32 (or int64) unless said otherwise, and `converted` to what the output
is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from smoe.runtime.kernels import reals
from smoe.runtime.kernels.activations import ACTIVATIONS, erf, exp
from smoe.runtime.kernels.reference import lane_sum

_F = np.float32


def converted(x: np.ndarray, kind: np.dtype) -> np.ndarray:
    """`x` as another kind: int64 by cutting off (NaN is 0, what is beyond the last number there
    is), bool by "not 0"."""
    if x.dtype == kind:
        return x
    if kind == np.bool_:
        return x != 0
    if kind == np.float32 or x.dtype != np.float32:
        return x.astype(kind)
    limit = _F(2**63)
    inside = np.where(np.abs(x) < limit, x, _F(0)).astype(np.int64)
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    return np.where(x >= limit, most, np.where(x <= -limit, least, inside))


def norm(
    how: str,
    epsilon: float,
    s: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """`rms` or `layer` norm of `s` along its last axis."""
    n = _F(s.shape[-1])
    if how == "layer":
        s = s - lane_sum(s)[..., None] / n
    y = s * (_F(1) / np.sqrt(lane_sum(s * s) / n + _F(epsilon)))[..., None]
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rotary(pairs: str, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Pairs of `x` `[.., d]`, its halves' or its neighbours, turned by angles `[.., d / 2]`."""
    half = x.shape[-1] // 2
    one, two = (
        (slice(0, half), slice(half, None))
        if pairs == "halves"
        else (slice(0, None, 2), slice(1, None, 2))
    )
    y = np.empty_like(x)
    a, b = x[..., one], x[..., two]
    y[..., one] = a * cos - b * sin
    y[..., two] = b * cos + a * sin
    return y


def softmax(x: np.ndarray) -> np.ndarray:
    """e^x over its sum, along the last axis."""
    e = _exp(x - _largest(x)[..., None])
    return e / lane_sum(e)[..., None]


def top_k(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest, falling, and where they are, int64: `[.., k]` each. Equal ones by index, NaNs
    last."""
    ids = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(x, ids, -1), ids


def reduce(how: str, x: np.ndarray) -> np.ndarray:
    """`sum`, `mean`, `max` or `argmax` (int64) along the last axis: `[..]`."""
    if how == "sum":
        return lane_sum(x)
    if how == "mean":
        return lane_sum(x) / _F(x.shape[-1])
    largest = _largest(x)
    return largest if how == "max" else (x == largest[..., None]).argmax(-1)


def _largest(x: np.ndarray) -> np.ndarray:
    """NaNs are passed over."""
    return np.where(np.isnan(x), _F(-np.inf), x).max(-1)


def _exp(x: np.ndarray) -> np.ndarray:
    return np.where(x < _F(-87), _F(0), exp(x))


_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **ACTIVATIONS,
    "neg": np.negative,
    "abs": np.abs,
    "exp": _exp,
    "log": reals.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: _F(1) / np.sqrt(x),
    "reciprocal": lambda x: _F(1) / x,
    "erf": erf,
    "softplus": reals.softplus,
    "sin": reals.sin,
    "cos": reals.cos,
    "not": lambda x: x == 0,
    "floor": np.floor,
    "sign": lambda x: np.where(x > 0, _F(1), np.where(x < 0, _F(-1), x)),
    "copy": lambda x: x,
}
_UNARY_WHOLE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": lambda x: x == 0,
    "sign": np.sign,
    "floor": lambda x: x,
    "copy": lambda x: x,
}


def unary(how: str, x: np.ndarray) -> np.ndarray:
    """Elementwise."""
    if x.dtype != np.float32 and how in _UNARY_WHOLE:
        return _UNARY_WHOLE[how](x.astype(np.int64))
    return _UNARY[how](x.astype(np.float32))


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whole numbers, cut off; by zero: 0."""
    by = np.where((b == 0) | (b == -1), 1, b)
    q = a // by
    q = q + ((q * by != a) & ((a < 0) != (by < 0)))
    return np.where(b == 0, 0, np.where(b == -1, -a, q))


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: a / b if a.dtype == np.float32 else _divided(a, b),
    "max": lambda a, b: np.where((a > b) | (a != a), a, b),
    "min": lambda a, b: np.where((a < b) | (a != a), a, b),
    "pow": reals.power,
    "and": lambda a, b: (a != 0) & (b != 0),
    "or": lambda a, b: (a != 0) | (b != 0),
    "equal": np.equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
}


def binary(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Elementwise: on int64 where neither is float32."""
    floats = how == "pow" or np.float32 in (a.dtype, b.dtype)
    kind = np.float32 if floats else np.int64
    return _BINARY[how](a.astype(kind), b.astype(kind))


def where(condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a` where the condition is not 0, else `b`."""
    kind = np.float32 if np.float32 in (a.dtype, b.dtype) else np.int64
    return np.where(condition != 0, a.astype(kind), b.astype(kind))


def gather(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`x` `[.., n]` at indices `[.., m]`, negative ones from the end; beyond: 0."""
    index, inside = _indices(at, x.shape[-1])
    return np.where(inside, np.take_along_axis(x, index, -1), x.dtype.type(0))


def scatter(y: np.ndarray, at: np.ndarray, values: np.ndarray) -> None:
    """`values` `[.., m]` into `y` `[.., n]`, one after another; nothing beyond."""
    index, inside = _indices(at, y.shape[-1])
    values = converted(values, y.dtype)
    for m in range(at.shape[-1]):
        one = index[..., m, None]
        kept = np.take_along_axis(y, one, -1)[..., 0]
        value = np.where(inside[..., m], values[..., m], kept)
        np.put_along_axis(y, one, value[..., None], -1)


def _indices(at: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.where(at < 0, at + n, at)
    inside = (index >= 0) & (index < n)
    return np.where(inside, index, 0), inside
