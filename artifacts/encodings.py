"""How an expert's matrices become bytes and back: the specification of each encoding, in NumPy.

| name | matrix `[n_out, n_in]` is stored as |
|---|---|
| f32  | float32 |
| bf16 | bfloat16, rounded to nearest even |
| f16  | float16, rounded to nearest even; a weight beyond 65504 is refused |
| int8 | int8 times one float32 scale per row, symmetric, scale = max\\|row\\| / 127 |
| nested:… | codes in planes of bits, a scale per group: `nested.py` |

Biases are float32 in every encoding. An encoding of one plane is an entry of `ENCODINGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smoe.artifacts import nested
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.errors import BundleError
from smoe.artifacts.layout import ExpertShape, Field, RecordLayout, lay_out
from smoe.artifacts.safetensors_file import TensorSpec

Encoded = dict[str, np.ndarray]
Dims = tuple[int, int]


@dataclass(frozen=True)
class Encoding:
    """`matrix(name, shape)` plans a matrix's tensors, plane by plane; `encode(name, w)` fills them;
    `decode(name, tensors, shape, level)` undoes it as far as the first `level` of `levels` planes
    allow."""

    name: str
    levels: int
    matrix: Callable[[str, Dims], list[list[TensorSpec]]]
    encode: Callable[[str, np.ndarray], Encoded]
    decode: Callable[[str, Encoded, Dims, int], np.ndarray]

    def planes(self, shape: ExpertShape) -> list[list[TensorSpec]]:
        """The tensors of one expert, by plane. Whatever is not a matrix is in the base plane."""
        planes: list[list[TensorSpec]] = [[] for _ in range(self.levels)]
        for name, dims in shape.matrices().items():
            for plane, tensors in zip(planes, self.matrix(name, dims), strict=True):
                plane += tensors
            if shape.biased:
                planes[0].append(TensorSpec(f"{name}_bias", "F32", (dims[0],)))
        if shape.normed:
            planes[0].append(TensorSpec("norm", "F32", (shape.hidden,)))
        return planes


def _encode_f16(name: str, w: np.ndarray) -> Encoded:
    with np.errstate(over="ignore"):
        half = w.astype(np.float16)
    if np.isinf(half).any():
        raise too_large_for_f16(name, w)
    return {name: half}


def too_large_for_f16(name: str, w: np.ndarray) -> BundleError:
    """What is wrong with a matrix that float16 cannot hold."""
    return BundleError(
        f"{name} holds weights up to {np.abs(w).max():.6g}, and float16 ends at 65504; use bf16 "
        "or f32."
    )


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
            1,
            lambda name, dims: [[TensorSpec(name, "F32", dims)]],
            lambda name, w: {name: w.astype(np.float32)},
            lambda name, t, dims, level: t[name],
        ),
        Encoding(
            "bf16",
            1,
            lambda name, dims: [[TensorSpec(name, "BF16", dims)]],
            lambda name, w: {name: to_bf16(w)},
            lambda name, t, dims, level: from_bf16(t[name]),
        ),
        Encoding(
            "f16",
            1,
            lambda name, dims: [[TensorSpec(name, "F16", dims)]],
            _encode_f16,
            lambda name, t, dims, level: t[name].astype(np.float32),
        ),
        Encoding(
            "int8",
            1,
            lambda name, dims: [
                [TensorSpec(name, "I8", dims), TensorSpec(f"{name}_scale", "F32", dims[:1])]
            ],
            _encode_int8,
            lambda name, t, dims, level: t[name].astype(np.float32) * t[f"{name}_scale"][:, None],
        ),
    )
}


def _nested(name: str) -> Encoding:
    parsed = nested.parse(name)
    return Encoding(
        parsed.name,
        parsed.levels,
        lambda name, dims: nested.matrix_planes(parsed, name, dims),
        lambda name, w: nested.pack_matrix(parsed, name, *nested.round_matrix(parsed, name, w)),
        lambda name, t, dims, level: nested.decode_matrix(parsed, name, t, dims, level),
    )


def encoding_named(name: str) -> Encoding:
    """The encoding called `name`, or a `BundleError` that lists those there are. `.name` is its one
    spelling."""
    if name.startswith("nested"):
        return _nested(name)
    if name not in ENCODINGS:
        raise BundleError(
            f"There is no encoding {name[:80]!r} in this version; it has {', '.join(ENCODINGS)} "
            "and nested:SPLIT, for "
            "example nested:2+1+1."
        )
    return ENCODINGS[name]


def record_layout(shape: ExpertShape, encoding: str, page: int) -> RecordLayout:
    """The layout of every record of a layer: a pure function. An unknown encoding is a
    `BundleError`."""
    return lay_out(encoding_named(encoding).planes(shape), page)


def encode_expert(
    layout: RecordLayout, encoding: str, weights: dict[str, np.ndarray]
) -> np.ndarray:
    """One record, `uint8 [layout.nbytes]`, from float32 matrices and biases named as in
    `ExpertShape`."""
    chosen = encoding_named(encoding)
    tensors: Encoded = {}
    for name, w in weights.items():
        tensors |= {name: w} if is_bias_or_norm(name) else chosen.encode(name, w)
    return fill_record(layout, tensors)


def fill_record(layout: RecordLayout, tensors: Encoded) -> np.ndarray:
    """One record, `uint8 [layout.nbytes]`, of tensors that are encoded already."""
    record = np.zeros(layout.nbytes, np.uint8)
    views = layout.views(record)
    for name, values in tensors.items():
        views[name][...] = values
    return record


def decode_expert(
    shape: ExpertShape,
    layout: RecordLayout,
    encoding: str,
    record: np.ndarray,
    level: int | None = None,
) -> dict[str, np.ndarray]:
    """Float32 matrices and biases of a record `uint8`, of which the bytes of `level` (None: all)
    are there: the inverse of `encode_expert`. A level that the encoding does not have is a
    `BundleError`."""
    chosen = encoding_named(encoding)
    level = checked_level(chosen, level)
    views = layout.views(record)
    out = {name: chosen.decode(name, views, dims, level) for name, dims in shape.matrices().items()}
    return out | {name: view for name, view in views.items() if is_bias_or_norm(name)}


def float_fields(layout: RecordLayout) -> list[Field]:
    """The fields of a record that are floats beside the matrices: scales, biases, the norm. They
    must be finite."""
    return [
        field
        for field in layout.fields
        if is_bias_or_norm(field.name) or field.name.endswith("_scale")
    ]


def is_bias_or_norm(name: str) -> bool:
    """Whether a tensor of a record is neither codes nor scales: a bias or the norm, float32 in
    every encoding."""
    return name.endswith("_bias") or name == "norm"


def checked_level(encoding: Encoding, level: int | None) -> int:
    """`level`, or the highest there is for None; a `BundleError` if the encoding has no such
    level."""
    if level is not None and not 1 <= level <= encoding.levels:
        raise BundleError(
            f"Level {level} was asked for; experts in {encoding.name} have levels 1 to "
            f"{encoding.levels}."
        )
    return encoding.levels if level is None else level
