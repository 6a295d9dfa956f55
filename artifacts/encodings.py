"""How an expert's matrices become bytes and back: the specification of each encoding, in NumPy.

| name | matrix `[n_out, n_in]` is stored as |
|---|---|
| f32  | float32 |
| bf16 | bfloat16, rounded to nearest even |
| int8 | int8 times one float32 scale per row, symmetric, scale = max\\|row\\| / 127 |

Biases are float32 in every encoding. Adding an encoding is adding an entry to `ENCODINGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.errors import BundleError
from smoe.artifacts.layout import ExpertShape, RecordLayout, lay_out
from smoe.artifacts.safetensors_file import Planned

Encoded = dict[str, np.ndarray]


@dataclass(frozen=True)
class Encoding:
    """`matrix(name, shape)` plans a matrix's tensors; `encode(name, w)` fills them; `decode(name, tensors)` undoes it."""

    name: str
    matrix: Callable[[str, tuple[int, int]], list[Planned]]
    encode: Callable[[str, np.ndarray], Encoded]
    decode: Callable[[str, Encoded], np.ndarray]

    def planes(self, shape: ExpertShape) -> list[list[Planned]]:
        """The tensors of one expert, by plane. One plane for the encodings of this version."""
        plane = []
        for name, dims in shape.matrices().items():
            plane += self.matrix(name, dims)
            if shape.biased:
                plane.append(Planned(f"{name}_bias", "F32", (dims[0],)))
        if shape.normed:
            plane.append(Planned("norm", "F32", (shape.hidden,)))
        return [plane]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Float32 to the bits of bfloat16 (uint16), nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encode_int8(name: str, w: np.ndarray) -> Encoded:
    scale = (np.abs(w).max(axis=1) / 127).astype(np.float32)
    safe = np.where(scale > 0, scale, 1)[:, None]
    codes = np.clip(np.rint(w / safe), -127, 127).astype(np.int8)
    return {name: codes, f"{name}_scale": scale}


ENCODINGS: dict[str, Encoding] = {
    e.name: e
    for e in (
        Encoding(
            "f32",
            lambda name, dims: [Planned(name, "F32", dims)],
            lambda name, w: {name: w.astype(np.float32)},
            lambda name, t: t[name],
        ),
        Encoding(
            "bf16",
            lambda name, dims: [Planned(name, "BF16", dims)],
            lambda name, w: {name: to_bf16(w)},
            lambda name, t: from_bf16(t[name]),
        ),
        Encoding(
            "int8",
            lambda name, dims: [Planned(name, "I8", dims), Planned(f"{name}_scale", "F32", dims[:1])],
            _encode_int8,
            lambda name, t: t[name].astype(np.float32) * t[f"{name}_scale"][:, None],
        ),
    )
}


def encoding_named(name: str) -> Encoding:
    """The encoding called `name`, or a `BundleError` that lists those there are."""
    if name not in ENCODINGS:
        raise BundleError(f"There is no encoding {name!r} in this version; it has {', '.join(ENCODINGS)}.")
    return ENCODINGS[name]


def record_layout(shape: ExpertShape, encoding: str, page: int) -> RecordLayout:
    """The layout of every record of a layer: a pure function. An unknown encoding is a `BundleError`."""
    return lay_out(encoding_named(encoding).planes(shape), page)


def encode_expert(layout: RecordLayout, encoding: str, weights: dict[str, np.ndarray]) -> np.ndarray:
    """One record, `uint8 [layout.nbytes]`, from float32 matrices and biases named as in `ExpertShape`."""
    record = np.zeros(layout.nbytes, np.uint8)
    views = layout.views(record)
    for name, w in weights.items():
        encoded = {name: w} if _is_vector(name) else encoding_named(encoding).encode(name, w)
        for tensor, values in encoded.items():
            views[tensor][...] = values
    return record


def decode_expert(layout: RecordLayout, encoding: str, record: np.ndarray) -> dict[str, np.ndarray]:
    """Float32 matrices and biases of a record `uint8 [layout.nbytes]`: the inverse of `encode_expert`."""
    views = layout.views(record)
    decode = encoding_named(encoding).decode
    return {
        name: view if _is_vector(name) else decode(name, views)
        for name, view in views.items()
        if not name.endswith("_scale")
    }


def _is_vector(name: str) -> bool:
    return name.endswith("_bias") or name == "norm"
