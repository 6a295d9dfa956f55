"""The specification of the kernels in NumPy: readable, exact, slow. Every native kernel equals its twin here.

`linear` repeats the order of accumulation of `native/linear.h` bit for bit; `gate` is what both kernels use for the
part between the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from smoe.artifacts.encodings import from_bf16
from smoe.artifacts.manifest import Gate

LANES = 16
NORM_EPSILON = 1e-6  # the scale takes up what a model has instead


def linear(x: np.ndarray, w: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """y[t, m] = scale[m] * sum_k x[t, k] * w[m, k] in float32, in the order of native/linear.h.

    x float32 `[tokens, n_in]`; w `[n_out, n_in]` float32, uint16 (the bits of bfloat16) or int8; y float32
    `[tokens, n_out]`.
    """
    w = from_bf16(w) if w.dtype == np.uint16 else w.astype(np.float32, copy=False)
    (tokens, n_in), n_out = x.shape, w.shape[0]
    steps = -(-n_in // LANES)
    padding = ((0, 0), (0, steps * LANES - n_in))
    a = np.pad(x, padding).reshape(tokens, 1, steps, LANES)
    b = np.pad(w, padding).reshape(1, n_out, steps, LANES)
    lanes = np.zeros((tokens, n_out, LANES), np.float32)
    for step in range(steps):
        lanes += a[:, :, step] * b[:, :, step]
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0] if scale is None else lanes[..., 0] * scale


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # exp of a number that is never positive: no overflow on either side.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


_erf = np.vectorize(math.erf, otypes=[np.float64])

# float32 [..] -> float32 [..], elementwise. The names are those of the manifest.
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: (x * 0.5 * (1 + _erf(x / math.sqrt(2)))).astype(np.float32),
    "gelu_tanh": lambda x: (
        x * np.float32(0.5) * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)))
    ),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "identity": lambda x: x,
}


def gate(spec: Gate, gate: np.ndarray | None, up: np.ndarray) -> np.ndarray:
    """What the last matrix of an expert receives: the formulas of `artifacts.manifest.Gate`. Float32 `[n, width]`."""
    if spec.kind == "plain":
        return ACTIVATIONS[spec.activation](up)
    assert gate is not None
    if spec.kind == "gated":
        return ACTIVATIONS[spec.activation](gate) * up
    limit, alpha = np.float32(spec.limit), np.float32(spec.alpha)
    if spec.kind == "softcapped":
        return limit * np.tanh(gate / limit) * _sigmoid(gate) * alpha * np.tanh(up / alpha)
    bounded = np.minimum(gate, limit)
    if spec.kind == "bounded":
        return ACTIVATIONS[spec.activation](bounded) * np.clip(up, -limit, limit)
    return (np.clip(up, -limit, limit) + 1) * bounded * _sigmoid(alpha * bounded)


def normalise(y: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """An expert's output where the model normalises it: z = scale * y, then z / sqrt(mean(z^2) + 1e-6) over the last
    axis. y float32 `[n, hidden]`, scale float32 `[hidden]`."""
    z = y * scale
    return z / np.sqrt(np.mean(np.square(z), axis=-1, keepdims=True) + np.float32(NORM_EPSILON))
