"""What the attentions of a program remember of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np

from smoe.artifacts.program import KeyValues
from smoe.runtime.system import aligned

T = TypeVar("T")


class ProgramState:
    """Keys and values of up to `context` tokens: of attention i `keys[i]` float16 (`half`) or
    float32 `[heads, context, key_width]`, `values[i]` likewise. Memory is taken as far as it is
    written to.

    It has no length: what lies behind a sequence's tokens is written before it is read."""

    def __init__(self, about: Sequence[KeyValues], context: int, half: bool):
        self._about, self.context, self.half = tuple(about), context, half
        self.keys = [self._cells(one.heads, one.key_width) for one in about]
        self.values = [self._cells(one.heads, one.value_width) for one in about]
        self._bound: object = None

    def bound(self, bind: Callable[[list[np.ndarray], list[np.ndarray]], T]) -> T:
        """What an executor makes of the arrays: once."""
        if self._bound is None:
            self._bound = bind(self.keys, self.values)
        return cast(T, self._bound)

    @property
    def nbytes(self) -> int:
        """All of it, written or not."""
        return sum(cells.nbytes for cells in (*self.keys, *self.values))

    def fork(self, length: int | None = None) -> ProgramState:
        """A copy that goes its own way: of the first `length` tokens (None: of all there is room
        for)."""
        copy = ProgramState(self._about, self.context, self.half)
        copy.copy_from(self, length)
        return copy

    def copy_from(self, other: ProgramState, length: int | None = None) -> None:
        """Take over the first `length` tokens of a state of the same program, context and kind."""
        for mine, theirs in zip(
            (*self.keys, *self.values), (*other.keys, *other.values), strict=True
        ):
            mine[:, :length] = theirs[:, :length]

    def _cells(self, heads: int, width: int) -> np.ndarray:
        kind = np.dtype(np.float16 if self.half else np.float32)
        memory: np.ndarray = aligned(1, heads * self.context * width * kind.itemsize)[0]
        return memory.view(kind).reshape(heads, self.context, width)
