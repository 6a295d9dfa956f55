"""Segments that the bundle's program runs: all rows of a step at once, whoever's they are, since a
token's bits depend on its own past alone."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path

import numpy as np

from smoe.runtime.errors import EngineError
from smoe.runtime.execution import Division
from smoe.runtime.experts import Held
from smoe.runtime.kernels import Kernels
from smoe.runtime.program import Executable, LayerExperts, ProgramState, open_program
from smoe.runtime.program import Rows as StepRows
from smoe.runtime.step import Parts, SequenceState, Step, finished


class ProgramSegments:
    """The segments of the bundle at `path` that `division` gives to its program
    (`executor.Executor`)."""

    def __init__(self, path: Path, division: Division, kernels: Kernels):
        """Reads the weights; an `EngineError` where that fails."""
        assert division.program is not None
        self._kind, self._manifest = division.kind, division.manifest
        self._looped: tuple[Held, object | None] | None = None
        self._executable = open_program(
            path, division.program, kernels, kernels.threads, division.wires()
        )

    def new_state(self, context: int) -> ProgramState:
        """Which takes memory as tokens come."""
        return self._executable.state(context, self._kind)

    def begin(self, step: Step, states: SequenceOf[SequenceState]) -> ProgramRows:
        """All tokens of the step as one run of rows."""
        spans, keep, low = [], [], 0
        for span, state in zip(step.spans, states, strict=True):
            assert isinstance(state, ProgramState)
            spans.append((state, span.sequence.length, span.ids))
            keep.append(low + span.keep)
            low += len(span.ids)
        kept = np.concatenate(keep).astype(np.int64, copy=False)
        return ProgramRows(self._executable, self._executable.begin(spans, kept))

    def loop(self, held: Held) -> object | None:
        """What `ProgramRows.advance` takes, made once of what is `held`; None where experts are not
        computed by the native kernels alone."""
        if self._looped is None or self._looped[0] is not held:
            prelude = int(self._manifest.backbone.prelude)
            layers = [
                LayerExperts(
                    kernel=held.kernels[n],
                    level=held.level,
                    where=held.where[n],
                    segment=n + prelude,
                    hidden=layer.wires.hidden,
                    ids=layer.wires.ids,
                    weights=layer.wires.weights,
                    output=layer.wires.output,
                )
                for n, layer in enumerate(self._manifest.layers)
            ]
            self._looped = held, self._executable.mixture(layers, held.rows)
        return self._looped[1]

    def kept_bytes(self, tokens: int, length: int) -> int:
        """A row for each."""
        return tokens * self._executable.row_bytes

    def release(self) -> None:
        """The weights go with the last rows."""
        self._looped = None
        self._executable.release()
        del self._executable


class ProgramRows:
    """A step on its way through the program's segments (`executor.Rows`)."""

    def __init__(self, executable: Executable, rows: StepRows):
        self._executable, self._rows = executable, rows

    def parts(self, segment: int, names: SequenceOf[str] = ()) -> Parts[list[np.ndarray]]:
        """Values are views: they hold until the segment runs again."""
        yield from self._executable.parts(self._rows, segment)
        return [self.read(name) for name in names]

    def read(self, name: str) -> np.ndarray:
        return self._executable.read(self._rows, name)

    def write(self, name: str, value: np.ndarray) -> None:
        there = self._executable.read(self._rows, name)
        if value.size != there.size or value.dtype != there.dtype:
            raise EngineError(
                f"The program takes {name[:40]!r} as {there.dtype} {there.shape}, and gets "
                f"{value.dtype} {value.shape}; copy the bundle again, or build it again."
            )
        self._executable.write(self._rows, name, value.reshape(there.shape))

    def advance(self, loop: object, layer: int) -> int:
        """From `layer`, whose segment has run, as far as all experts are there: the first layer
        whose are not, or the number of layers. The segment before that has run."""
        return self._executable.steps(self._rows, loop, layer)

    def logits(self, segment: int) -> np.ndarray:
        """A copy: the next step may use the same memory."""
        (logits,) = finished(self.parts(segment, ["logits"]))
        return np.array(logits)

    def ahead(self) -> ProgramRows:
        """These: a segment that runs again overwrites what a guess left, state too."""
        return self

    def finish(self) -> None:
        """State is written where it stays."""
