"""Experts on a processor: the native kernels where there are some, their NumPy twin where it is
asked for.

`SMOE_KERNELS` names a variant (`avx512vnni`, `avx2`, `neondot`, `neon`, `portable`, `reference`);
unset takes the best that the processor runs. All variants give the same bits. A build without the
native module (`SMOE_NO_NATIVE=1`) has the reference only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smoe.artifacts import nested
from smoe.artifacts.layout import ExpertShape, RecordLayout
from smoe.artifacts.manifest import ExpertActivation, Manifest
from smoe.runtime.errors import EngineError
from smoe.runtime.kernels import products, reference
from smoe.runtime.kernels.blocks import BlockLayout
from smoe.runtime.machine import processors

try:
    import smoe.runtime.kernels._native as _native
except ModuleNotFoundError:
    _native = None  # type: ignore[assignment]
    # A build with SMOE_NO_NATIVE=1 makes this marker (pyproject.toml), and no source tree has it:
    # without it a missing module is an error, not slowness.
    try:
        import smoe.runtime.kernels._without_native  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError(
            "This smoe lacks its native kernels. Install it (pip install .) where there is a C++ "
            "compiler, or with "
            "SMOE_NO_NATIVE=1 for the slow reference kernels."
        ) from None


@dataclass(frozen=True)
class Work:
    """Experts to compute in one call. Expert i lies in frame `frames[i]`, of which `levels[i]`
    planes are there, and takes the slots `starts[i]` to `starts[i+1]`; slot s is row `tokens[s]` of
    the activations. All int64."""

    frames: np.ndarray
    levels: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray


class LayerKernel(Protocol):
    """The experts of one layer."""

    def __call__(self, records: np.ndarray, work: Work, x: np.ndarray) -> np.ndarray:
        """`records` uint8 `[frames, bytes]`, `x` float32 `[tokens, hidden]`: the experts' outputs
        before their mixing weights, float32 `[slots, hidden]`."""
        ...


@dataclass(frozen=True)
class Kernels:
    """A choice with its reasons, which are for the mode line; `threads` work on a call."""

    name: str
    reason: str
    threads: int
    threads_reason: str

    def line(self) -> str:
        """For people."""
        threads = f"up to {self.threads} threads ({self.threads_reason})"
        return f"kernels: {self.name} ({self.reason}), {threads}"

    def layer(
        self, gate: ExpertActivation, shape: ExpertShape, encoding: str, layout: RecordLayout
    ) -> LayerKernel:
        """The kernel for a layer whose records are laid out so."""
        if self.name == "reference":
            return _Reference(gate, shape, encoding, layout)
        return _Native(self, native_layer(gate, shape, encoding, layout), layout, shape.normed)

    def layers(self, manifest: Manifest, layouts: Sequence[RecordLayout]) -> list[LayerKernel]:
        """Those of a bundle, by its manifest."""
        experts = manifest.experts
        return [
            self.layer(experts.gate, manifest.expert_shape(n), experts.encoding, layout)
            for n, layout in enumerate(layouts)
        ]


def available() -> list[str]:
    """The variants that this machine runs, best first; `reference` is always the last."""
    return [*(_native.variants() if _native else []), "reference"]


def choose(name: str | None = None, threads: int | None = None) -> Kernels:
    """The kernels called `name`, or by `SMOE_KERNELS`, or the best there are, on `threads` (None:
    as many as this process may use). An unknown name is an `EngineError`."""
    requested = name or os.environ.get("SMOE_KERNELS")
    names = available()
    if requested and requested not in names:
        raise EngineError(
            f"There are no kernels {requested!r} on this machine; it has {', '.join(names)}."
        )
    reason = (
        "asked for"
        if requested
        else "best of " + ", ".join(names)
        if _native
        else "built with SMOE_NO_NATIVE=1"
    )
    there = processors()
    count, why = (threads, "asked for") if threads else (there.count, there.reason)
    return Kernels(requested or names[0], reason, count, why)


@dataclass(frozen=True)
class _Reference:
    gate: ExpertActivation
    shape: ExpertShape
    encoding: str
    layout: RecordLayout

    def __call__(self, records: np.ndarray, work: Work, x: np.ndarray) -> np.ndarray:
        y = np.empty((len(work.tokens), self.shape.hidden), np.float32)
        for i, (frame, level) in enumerate(zip(work.frames, work.levels, strict=True)):
            slots = slice(work.starts[i], work.starts[i + 1])
            tensors = self.layout.views(records[frame])
            y[slots] = reference.ffn(
                self.gate, self.shape, self.encoding, tensors, int(level), x[work.tokens[slots]]
            )
        return _normalised(self.layout, records, work, y) if self.shape.normed else y


@dataclass(frozen=True)
class _Native:
    kernels: Kernels
    layer: _native.Layer
    layout: RecordLayout
    normed: bool

    def __call__(self, records: np.ndarray, work: Work, x: np.ndarray) -> np.ndarray:
        y = np.empty((len(work.tokens), x.shape[1]), np.float32)
        where = (work.frames, work.levels, work.starts, work.tokens)
        try:
            self.layer.ffn(self.kernels.name, records, *where, x, y, self.kernels.threads)
        except RuntimeError as error:  # no thread from the system
            raise EngineError(str(error)) from error
        return _normalised(self.layout, records, work, y) if self.normed else y


def _normalised(layout: RecordLayout, records: np.ndarray, work: Work, y: np.ndarray) -> np.ndarray:
    for i, frame in enumerate(work.frames):
        slots = slice(work.starts[i], work.starts[i + 1])
        y[slots] = reference.normalise(y[slots], layout.views(records[frame])["norm"])
    return y


def native_layer(
    gate: ExpertActivation, shape: ExpertShape, encoding: str, layout: RecordLayout
) -> _native.Layer:
    """What native/ffn.h calls a Layer: where the matrices' tensors lie in a record, and what lies
    between them."""
    offsets = {field.name: field.offset for field in layout.fields}
    names = ["up", "down", *(["gate"] if shape.gated else [])]
    matrices = [_about(name, shape, encoding, offsets) for name in names]
    return _native.Layer(matrices, gate.kind, gate.activation, gate.alpha, gate.limit)


def native_part(kernel: LayerKernel) -> _native.Layer | None:
    """What a native step computes a layer's experts with; None where the kernel is not native, or
    does more than that (a norm)."""
    return kernel.layer if isinstance(kernel, _Native) and not kernel.normed else None


def native_mixture(
    program: _native.Program, layers: list[tuple[object, ...]], records: np.ndarray
) -> _native.Mixture:
    """What native/mixture.h calls a Mixture: of every layer the native part of its kernel, level,
    frames of experts, segment, and the numbers of its buffers."""
    return _native.Mixture(program, layers, records)


def native_program(
    weights: np.ndarray,
    buffers: list[tuple[object, ...]],
    constants: list[tuple[object, ...]],
    states: list[tuple[int, int, int, bool]],
    recurrent: list[int],
    segments: list[list[tuple[object, ...]]],
    variant: str,
    threads: int,
) -> _native.Program:
    """What native/program.h calls a Program, of what `program.flatten` makes of a table. A
    ValueError says what it does not take."""
    table = (buffers, constants, states, recurrent, segments)
    return _native.Program(weights, *table, variant, threads)


def embedding(weight: products.Weight, ids: np.ndarray, scale: float, y: np.ndarray) -> None:
    """Rows `ids` int64 `[n]` of a matrix, times `scale`, into `y` float32 `[n, n_in]`, whose rows
    lie one behind the other."""
    if _native is None:
        y[...] = products.embedding(weight, ids, scale)
    else:
        _native.embedding(weight.about, ids, scale, y)


def native_state(
    tables: np.ndarray,
    layouts: Sequence[BlockLayout],
    context: int,
    recurrent: np.ndarray,
    sizes: Sequence[int],
) -> _native.State:
    """What a program remembers of a sequence of up to `context` tokens. `tables` int64
    `[attentions, blocks of the context]` has the addresses of the blocks of each attention, laid
    out as `layouts` say; `recurrent` int64 `[n, 2]` those of what a step finds and of what it
    leaves, `sizes` numbers of float32 each. Both may change from step to step."""
    about = [(o.kind, o.heads, o.key_width, o.value_width, o.latent) for o in layouts]
    return _native.State(tables, about, context, recurrent, list(sizes))


def _about(
    name: str, shape: ExpertShape, encoding: str, offsets: dict[str, int]
) -> tuple[object, ...]:
    """One matrix, as the native module wants it."""
    n_out, n_in = shape.matrices()[name]
    scale, bias = offsets.get(f"{name}_scale", -1), offsets.get(f"{name}_bias", -1)
    if not encoding.startswith("nested"):
        return (
            encoding,
            n_out,
            n_in,
            offsets[name],
            scale,
            bias,
            0,
            [],
            np.zeros((0, 2, 16), np.int8),
        )
    parsed = nested.parse(encoding)
    split = parsed.of(name)
    planes = [(offsets[f"{name}_plane{p}"], bits) for p, bits in enumerate(split.planes)]
    tables = np.stack([_tables(split.values(level)) for level in range(1, parsed.levels + 1)])
    return "nested", n_out, n_in, -1, scale, bias, parsed.group, planes, tables


def _tables(values: np.ndarray) -> np.ndarray:
    """int8 `[2, 16]`: the value of a code by its first 4 bits, and what the rest of its bits add (a
    uniform grid)."""
    rest = len(values) // 16 or 1
    tables = np.zeros((2, 16), np.int8)
    tables[0, : len(values) // rest] = values[::rest]
    tables[1, :rest] = values[:rest].astype(int) - values[0]
    return tables
