"""Guesses without a model: what followed the last tokens where they were seen before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smoe.runtime.generation import Continuation
from smoe.runtime.step import Sequence as Tokens

LONGEST, SHORTEST = 8, 2  # of the last tokens, how many are looked for
# How often the next token is right by the length of what was found, from the shortest on, in code,
# documentation and prose together (`python -m bench ngrams`).
ODDS = (0.42, 0.52, 0.61, 0.67, 0.64, 0.67, 0.82)


class NGrams:
    """The tokens of one sequence, which only grows. A copy of the longest end that was there
    before, the last one of these, goes on as that did (prompt lookup: "LLMA", arXiv 2304.04487,
    section 3, without a reference text beside the prompt)."""

    odds: Sequence[float] = ODDS

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST):
        self._longest, self._shortest = longest, shortest
        self._ids, self._count = np.empty(256, np.int32), 0
        self._found: int | None = None

    def push(self, ids: Sequence[int]) -> None:
        """They came next."""
        end = self._count + len(ids)
        if end > len(self._ids):
            grown = np.empty(2 * end, np.int32)
            grown[: self._count] = self._ids[: self._count]
            self._ids = grown
        self._ids[self._count : end] = ids
        self._count = end

    def __len__(self) -> int:
        return self._count

    def find(self) -> int:
        """Tokens of the longest end that was there before, 0 for none."""
        ids, length, self._found = self._ids[: self._count], 0, None
        # Where what is there goes on: `at` are positions after a copy of the last n tokens.
        at = np.flatnonzero(ids[:-1] == ids[-1]) + 1 if len(ids) else np.zeros(0, np.int64)
        for n in range(1, self._longest + 1):
            if not len(at):
                break
            if n >= self._shortest:
                length, self._found = n, int(at[-1])
            at = at[at > n]
            at = at[ids[at - n - 1] == ids[-n - 1]] if n < len(ids) else at[:0]
        return length

    def next(self, count: int) -> list[int]:
        """Up to `count` tokens that came after what was found."""
        found = self._found
        return [] if found is None else self._ids[: self._count][found : found + count].tolist()

    def sure(self, sequence: Tokens, last: int) -> int:
        """For `decoder.Proposer`: how long what was found is."""
        self.push([*sequence.ids[len(self) :], last])
        return max(-1, self.find() - self._shortest)

    def propose(self, sequence: Tokens, made: Continuation, last: int, count: int) -> list[int]:
        """For `decoder.Proposer`."""
        return self.next(count)
