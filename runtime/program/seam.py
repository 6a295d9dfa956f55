"""The seam of programs: what the runtime asks of whoever runs one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smoe.runtime.kernels import LayerKernel
from smoe.runtime.program.state import ProgramState

# Of every sequence of a step: its state, tokens before, ids int64 `[t]` of the new ones.
Spans = Sequence[tuple[ProgramState, int, np.ndarray]]


@dataclass(frozen=True, eq=False)
class LayerExperts:
    """The experts of a layer for `Executable.steps`: their `kernel`, the `level` they are computed
    at, `where` int64 `[E]`, the frame of each (-1: not there at that level; a view of what the
    cache knows), the `segment` that routes, and the buffers it wires them by."""

    kernel: LayerKernel
    level: int
    where: np.ndarray
    segment: int
    hidden: str
    ids: str
    weights: str
    output: str


class Rows(Protocol):
    """The rows of a step, sequence after sequence: `tokens` of them, of which `kept` are those
    whose logits are wanted. It holds what passes between segments, as long as there are views of
    it."""

    @property
    def tokens(self) -> int: ...

    @property
    def kept(self) -> int: ...


class Executable(Protocol):
    """A program that can be run. `row_bytes`: what passes between segments, of every row of a step;
    `kept_bytes` of every kept one, logits among them. `scratch_bytes`: what a segment needs beside
    that, at most."""

    row_bytes: int
    kept_bytes: int
    scratch_bytes: int

    def state(self, context: int, kind: str) -> ProgramState:
        """An empty state for up to `context` tokens, keys and values in "f32", "f16" or "int8"."""
        ...

    def begin(self, spans: Spans, keep: np.ndarray) -> Rows:
        """A step. `keep` int64: rows of it whose logits are wanted, rising. Ids that the program
        does not have, more tokens than a state has room or the system memory for, or tokens before
        that a state does not remember, are an `EngineError`."""
        ...

    def run(self, rows: Rows, segment: int) -> None:
        """Run a segment, as often as one likes before the next one. What it leaves in states lies
        behind the tokens before the step, so undoing it is nothing."""
        ...

    def parts(self, rows: Rows, segment: int) -> Iterator[None]:
        """The same, some rows after others: between two parts other steps may run."""
        ...

    def read(self, rows: Rows, name: str) -> np.ndarray:
        """A view `[rows, *shape]` of a buffer that passes between segments (`[kept rows, *shape]`):
        of what was last written to it, until the segment after the next runs (ids: until the end
        of the step)."""
        ...

    def write(self, rows: Rows, name: str, value: np.ndarray) -> None:
        """Give such a buffer its numbers, of any shape that has as many."""
        ...

    def mixture(self, layers: Sequence[LayerExperts], records: np.ndarray) -> object | None:
        """What `steps` takes: the experts of all layers, rising, in frames `records` uint8
        `[frames, bytes]`. None where they cannot be computed without returning."""
        ...

    def steps(self, rows: Rows, mixture: object, first: int) -> int:
        """Go on from layer `first`, whose segment has run, while all experts that routers chose are
        there: their outputs, mixed as `routing.combine` does, and the next segment. The layer at
        which one is missing (whose segment has run), or the number of layers: then all segments
        have. Ids of all layers can be read afterwards. Until it returns nobody may change frames or
        `where`."""
        ...

    def release(self) -> None:
        """Close its files: no step begins afterwards."""
        ...
