"""log, softplus, pow, sin and cos in NumPy, bit for bit those of native/reals.h: float64 inside,
float32 outside.

Sums and products of IEEE's in a fixed order, none from the C library. sin and cos reduce their
angle by multiples of pi / 2 in two parts, and are good to half a unit of float32 for angles up to
2^20; beyond 2^30 they are NaN.
"""

from __future__ import annotations

import numpy as np

_LN2 = 0.693147180559945309
_TWO_52 = 6755399441055744.0  # 1.5 * 2^52: a sum's last bits are the nearest integer
_ODD = [1.0 / i for i in range(27, 1, -2)] + [1.0]
_FACTORIALS = [
    1.0 / f
    for f in (6227020800, 479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2)
] + [1.0, 1.0]
_SINE = [
    1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0,
    1.0,
]  # fmt: skip
_COSINE = [
    -1.0 / 87178291200.0, 1.0 / 479001600.0, -1.0 / 3628800.0, 1.0 / 40320.0, -1.0 / 720.0,
    1.0 / 24.0, -0.5, 1.0,
]  # fmt: skip


def log(x: np.ndarray) -> np.ndarray:
    """float32 to float32: -inf at 0, NaN below."""
    return _log(x.astype(np.float64)).astype(np.float32)


def softplus(x: np.ndarray) -> np.ndarray:
    """max(x, 0) + log(1 + e^-|x|), float32 to float32."""
    e = _exp(-np.abs(x).astype(np.float64))
    return (np.where(x < 0, 0.0, x.astype(np.float64)) + _log_ratio(e / (2.0 + e))).astype(
        np.float32
    )


def power(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x^y, float32: whole exponents take a negative base, everything else of one is NaN."""
    wide = y.astype(np.float64)
    usable = np.abs(wide) <= float(np.float32(9e15))
    whole = np.where(usable, wide, 0.0).astype(np.int64)
    is_whole = whole == wide
    m = _exp(wide * _log(np.abs(x).astype(np.float64))).astype(np.float32)
    m = np.where((x < 0) & is_whole & (whole % 2 == 1), -m, m)
    m = np.where((x < 0) & ~is_whole, np.float32(np.nan), m)
    m = np.where((y == 0) | (x == 1), np.float32(1), m)
    return np.where(y == 2, x * x, m)


def sin(x: np.ndarray) -> np.ndarray:
    """float32 to float32."""
    return _sine(x, 0)


def cos(x: np.ndarray) -> np.ndarray:
    """float32 to float32."""
    return _sine(x, 1)


def _horner(x: np.ndarray, coefficients: list[float]) -> np.ndarray:
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def _log_ratio(s: np.ndarray) -> np.ndarray:
    """log((1 + s) / (1 - s)) for |s| <= 1/3: its series to s^27."""
    return 2.0 * (s * _horner(s * s, _ODD))


def _log(x: np.ndarray) -> np.ndarray:
    """Of normal numbers: mantissa in [2/3, 4/3), exponent."""
    bits = x.view(np.uint64)
    exponent = (bits >> np.uint64(52)).astype(np.int64) - 1023
    m = ((bits & np.uint64(0xFFFFFFFFFFFFF)) | np.uint64(0x3FF0000000000000)).view(np.float64)
    large = m >= 1.3333333333333333
    m, exponent = np.where(large, m * 0.5, m), exponent + large
    y = exponent.astype(np.float64) * _LN2 + _log_ratio((m - 1.0) / (m + 1.0))
    y = np.where(x == np.inf, x, y)
    return np.where(x > 0, y, np.where(x == 0, -np.inf, np.nan))


def _exp(x: np.ndarray) -> np.ndarray:
    """x limited to -200 .. 200, which float32 cannot hold either way; NaN stays."""
    x = np.where(x < -200.0, -200.0, np.where(x > 200.0, 200.0, x))
    shifted = x * (1.0 / _LN2) + _TWO_52
    n = shifted - _TWO_52
    power = (shifted.view(np.uint64) - np.uint64(0x4338000000000000 - 1023)) << np.uint64(52)
    return _horner(x - n * _LN2, _FACTORIALS) * power.view(np.float64)


def _sine(angle: np.ndarray, quarter: int) -> np.ndarray:
    """Of angle + quarter * pi / 2."""
    usable = np.abs(angle) <= np.float32(2**30)
    x = np.where(usable, angle, np.float32(0)).astype(np.float64)
    shifted = x * 0.636619772367581343 + _TWO_52
    n = shifted - _TWO_52
    r = (x - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11
    turn = shifted.view(np.int64) + quarter
    z = r * r
    y = np.where(turn & 1, _horner(z, _COSINE), r * _horner(z, _SINE))
    y = np.where(turn & 2, -y, y)
    return np.where(usable, y, np.nan).astype(np.float32)
