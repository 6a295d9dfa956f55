"""The specification of the kernels in NumPy: readable, exact, slow. Every native kernel gives the
bits of its twin here.

`dense` and `nested_product` repeat the arithmetic of `native/ffn.h`, `activations` that of
`native/gate.h`.
"""

from __future__ import annotations

import numpy as np

from smoe.artifacts import nested
from smoe.artifacts.bfloat16 import from_bf16
from smoe.artifacts.encodings import encoding_named
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import ExpertActivation
from smoe.runtime.kernels import activations

LANES = 16
NORM_EPSILON = 1e-6  # the scale takes up what a model has instead


def ffn(
    gate: ExpertActivation,
    shape: ExpertShape,
    encoding: str,
    tensors: dict[str, np.ndarray],
    level: int,
    x: np.ndarray,
) -> np.ndarray:
    """One expert on `x` float32 `[n, hidden]`, before its mixing weight: float32 `[n, hidden]`.

    `tensors` are the views of its record (`RecordLayout.views`) as far as `level` needs them.
    """

    def matrix(name: str, x: np.ndarray) -> np.ndarray:
        if encoding.startswith("nested"):
            y = nested_product(
                nested.parse(encoding), name, tensors, shape.matrices()[name], level, x
            )
        else:
            y = dense(x, tensors[name], tensors.get(f"{name}_scale"))
        return y + tensors[f"{name}_bias"] if f"{name}_bias" in tensors else y

    assert 1 <= level <= encoding_named(encoding).levels
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        up = matrix("up", x)
        inner = activations.gate(gate, matrix("gate", x) if shape.gated else None, up)
        return matrix("down", inner)


def dense(x: np.ndarray, w: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """y[t, m] = scale[m] * sum_k x[t, k] * w[m, k] in float32.

    x float32 `[tokens, n_in]`; w `[n_out, n_in]` float32, uint16 (the bits of bfloat16) or int8; y
    float32 `[tokens, n_out]`.
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
    y = fold(lanes)
    return y if scale is None else y * scale


def quantise(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations float32 `[tokens, n]` as int8 `[tokens, groups, group]`, zeros behind the last,
    and the step of each group, float32 `[tokens, groups]`."""
    tokens, n = x.shape
    groups = -(-n // group)
    padded = np.pad(x, ((0, 0), (0, groups * group - n))).reshape(tokens, groups, group)
    # As integers the bits of magnitudes are ordered, and a NaN is above all.
    largest = (padded.view(np.uint32) & 0x7FFFFFFF).max(-1).view(np.float32)
    usable = np.isfinite(largest) & (largest >= np.float32(1e-30))
    inverse = np.where(usable, np.float32(127) / np.where(usable, largest, 1), 0).astype(np.float32)
    q = np.rint(np.where(usable[..., None], padded, 0) * inverse[..., None]).astype(np.int8)
    step = np.where(
        usable, largest / np.float32(127), np.where(np.isfinite(largest), 0, np.nan)
    ).astype(np.float32)
    return q, step


def nested_product(
    encoding: nested.Nested,
    name: str,
    tensors: dict[str, np.ndarray],
    dims: tuple[int, int],
    level: int,
    x: np.ndarray,
) -> np.ndarray:
    """Float32 `[tokens, n_out]`: matrix `name` of a record in a nested encoding times activations
    that are quantised first."""
    codes, scale = nested.unpack_matrix(encoding, name, tensors, dims, level)
    return grouped_product(encoding.of(name).values(level)[codes], scale, encoding.group, x)


def grouped_product(values: np.ndarray, scale: np.ndarray, group: int, x: np.ndarray) -> np.ndarray:
    """Float32 `[tokens, n_out]`: values int8 `[n_out, n_in]` with scales float32 `[n_out, groups]`,
    times activations float32 `[tokens, n_in]` that are quantised first."""
    (n_out, n_in), groups = values.shape, scale.shape[1]
    wide = np.pad(values, ((0, 0), (0, groups * group - n_in))).reshape(n_out, groups, group)
    wide = wide.astype(np.float64)  # exact: sums stay below 2^53
    q, step = quantise(x, group)
    y = np.zeros((len(x), n_out), np.float32)
    for g in range(groups):
        exact = (q[:, g].astype(np.float64) @ wide[:, g].T).astype(np.float32)
        y += (exact * scale[:, g]) * step[:, g, None]
    return y


def normalise(y: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """An expert's output where the model normalises it: z = scale * y, then z / sqrt(mean(z^2) +
    1e-6) over the last axis. y float32 `[n, hidden]`, scale float32 `[hidden]`. The mean adds up as
    `dense` does."""
    z = y * scale
    mean = lane_sum(z * z)[:, None] / np.float32(z.shape[1])
    return z / np.sqrt(mean + np.float32(NORM_EPSILON))


def lane_sum(x: np.ndarray) -> np.ndarray:
    """The sum over the last axis, float32 `[.., n]` to `[..]`, as `dense` adds up."""
    n = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % LANES)])
    lanes = np.zeros((*x.shape[:-1], LANES), np.float32)
    for first in range(0, n, LANES):
        lanes += padded[..., first : first + LANES]
    return fold(lanes)


def fold(lanes: np.ndarray) -> np.ndarray:
    """Lanes `[.., 16]` to their sum `[..]`: halves onto halves."""
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]
