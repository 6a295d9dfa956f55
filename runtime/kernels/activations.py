"""What comes between an expert's matrices: the specification of native/gate.h in NumPy, bit for
bit.

Every operation is float32 and rounded on its own, and none comes from the C library, whose results
differ between machines. Comparisons are written so that a NaN stays a NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from smoe.artifacts.manifest import ExpertActivation

_F = np.float32


def _polynomial(x: np.ndarray, *coefficients: float) -> np.ndarray:
    """Highest power first, by Horner's rule."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + _F(c)
    return y


def exp(x: np.ndarray) -> np.ndarray:
    """e^x to 1e-7 relative, x limited to -87 .. 87 (so that the result is a normal number)."""
    x = np.where(x < _F(-87), _F(-87), np.where(x > _F(87), _F(87), x))
    shifted = x * _F(1.44269504) + _F(
        12582912
    )  # 1.5 * 2^23: the sum's last bits are the nearest integer
    n = shifted - _F(12582912)
    r = (x - n * _F(0.693359375)) - n * _F(
        -2.12194440e-4
    )  # ln 2 in two parts, the first exact in products
    q = _polynomial(r, 0.00139345, 0.00836378, 0.04166646, 0.16666573, 0.5)
    y = ((q * r) * r + r) + _F(1)
    with np.errstate(over="ignore"):  # of a NaN's bits, which the product below makes a NaN again
        power = ((shifted.view(np.int32) - np.int32(0x4B400000 - 127)) << 23).view(np.float32)
    return y * power


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), from e^-|x|, which does not overflow."""
    e = exp(-np.abs(x))
    return np.where(x >= 0, _F(1), e) / (_F(1) + e)


def tanh(x: np.ndarray) -> np.ndarray:
    """To 2e-7 relative: a polynomial below 0.625, beyond it 1 - 2 / (e^2|x| + 1)."""
    z = x * x
    small = (
        _polynomial(z, -0.00573119, 0.02066472, -0.05374844, 0.13331561, -0.33333287) * z
    ) * x + x
    far = _F(1) - _F(2) / (exp(np.abs(x) * _F(2)) + _F(1))
    return np.where(np.abs(x) < _F(0.625), small, np.where(x < 0, -far, far))


def erf(x: np.ndarray) -> np.ndarray:
    """To 5e-7 absolute: Abramowitz and Stegun, 7.1.26."""
    a = np.abs(x)
    t = _F(1) / (_F(1) + a * _F(0.3275911))
    p = _polynomial(t, 1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592) * t
    y = _F(1) - p * exp(-(a * a))
    return np.where(x < 0, -y, y)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    inside = (x + (x * x) * x * _F(0.044715)) * _F(0.79788456)
    return (x * _F(0.5)) * (_F(1) + tanh(inside))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, _F(0), x)


# float32 [..] -> float32 [..], elementwise. The names are those of the manifest.
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: (x * _F(0.5)) * (_F(1) + erf(x * _F(0.70710678))),
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": lambda x: _relu(x) * _relu(x),
    "sigmoid": sigmoid,
    "tanh": tanh,
    "identity": lambda x: x,
}


def gate(spec: ExpertActivation, gate: np.ndarray | None, up: np.ndarray) -> np.ndarray:
    """What the last matrix of an expert receives: the formulas of
    `artifacts.manifest.ExpertActivation`. Float32 `[n, width]`."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return _gate(spec, gate, up)


def _gate(spec: ExpertActivation, gate: np.ndarray | None, up: np.ndarray) -> np.ndarray:
    if spec.kind == "plain":
        return ACTIVATIONS[spec.activation](up)
    assert gate is not None
    if spec.kind == "gated":
        return ACTIVATIONS[spec.activation](gate) * up
    limit, alpha = _F(spec.limit), _F(spec.alpha)
    if spec.kind == "softcapped":
        return ((limit * tanh(gate / limit)) * sigmoid(gate)) * (alpha * tanh(up / alpha))
    gate = np.where(gate > limit, limit, gate)
    up = np.where(up > limit, limit, np.where(up < -limit, -limit, up))
    if spec.kind == "bounded":
        return ACTIVATIONS[spec.activation](gate) * up
    return ((up + _F(1)) * gate) * sigmoid(alpha * gate)
