"""Who runs segments: the seam between a backbone and its two executors, ONNX Runtime
(`onnx_segments`) and the bundle's program (`program_segments`)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np

from smoe.runtime.step import Parts, SequenceState, Step


class Rows(Protocol):
    """The tokens of a step, T in all, on their way through the segments of one executor. Values
    that pass between segments have a name; row t of one is what it says of token t."""

    def parts(self, segment: int, names: SequenceOf[str] = ()) -> Parts[list[np.ndarray]]:
        """Run a segment, some tokens after others: what it says under `names`, T rows of whatever
        further shape each, valid until it runs again. It may, with other values than before. A
        failure is an `EngineError`."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A value of a segment that has run, as in `parts`, for a segment that is yet to run
        elsewhere."""
        ...

    def write(self, name: str, value: np.ndarray) -> None:
        """Give the value `[T, ..]` to the segments that take it; an `EngineError` where they take
        another shape."""
        ...

    def logits(self, segment: int) -> np.ndarray:
        """Run the last segment: float32 `[n, vocabulary]` for the step's kept tokens, its own from
        then on."""
        ...

    def ahead(self) -> Rows:
        """Rows with the same values, to run segments on a guess: nothing remembers what they
        do."""
        ...

    def finish(self) -> None:
        """The step is over: sequences remember its tokens from now on."""
        ...


class Executor(Protocol):
    """Runs some of the segments of a backbone."""

    def new_state(self, context: int) -> SequenceState:
        """What its segments remember of a sequence of up to `context` tokens, which has consumed
        none."""
        ...

    def begin(self, step: Step, states: SequenceOf[SequenceState]) -> Rows:
        """The tokens of `step`, whose spans' sequences left `states`."""
        ...

    def kept_bytes(self, tokens: int, length: int) -> int:
        """What is kept, at most, of `tokens` that end at `length` of their sequence while others
        run."""
        ...

    def release(self) -> None:
        """Give back what it holds; it cannot be used afterwards."""
        ...
