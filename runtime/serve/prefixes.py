"""What others have read already: sequences whose beginnings new ones share, and go on from without
a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from smoe.runtime.step import Sequence, shared_start

SHARED = 32  # tokens that are worth sharing: a block of what a sequence remembers
KEPT = 64  # sequences: every one that is kept is compared with what comes


@dataclass(eq=False)
class Past:
    """A `sequence` that others may begin like, for its first `exact` tokens: those whose state does
    not come of shortcuts, nor of an arithmetic that depends on how tokens were grouped."""

    sequence: Sequence
    exact: int


class Prefixes:
    """Sequences that nobody goes on with, the last used last, as far as there is room for what they
    remember: `nbytes(n)` of n tokens. A beginning is a whole number of `grain` tokens."""

    def __init__(self, nbytes: Callable[[int], int], grain: int):
        self._nbytes, self._grain = nbytes, grain
        self._kept: list[Past] = []

    def shared(self, ids: np.ndarray, running: Iterable[Past]) -> int:
        """How many of the first tokens of `ids` were read by those, or by one that is kept."""
        return max((self._shared(ids, past) for past in (*running, *self._kept)), default=0)

    def common(self, ids: np.ndarray, others: Iterable[np.ndarray]) -> int:
        """The longest beginning of `ids`, less than all of it, that one of `others` has too."""
        starts = (shared_start(ids.tolist(), other) for other in others)
        return self._whole(max(starts, default=0), ids)

    def begin(self, ids: np.ndarray, running: Iterable[Past]) -> Sequence | None:
        """A fork of the one that shares most with `ids`, with that and nothing else in it. None
        where it is not worth it, or where there is no way back to that."""
        past = max((*running, *self._kept), key=lambda p: self._shared(ids, p), default=None)
        count = 0 if past is None else self._shared(ids, past)
        if past is None or count < SHARED:
            return None
        if past in self._kept:
            self._kept.remove(past)
            self._kept.append(past)
        fork = past.sequence.fork()
        fork.rewind(count)
        return fork if fork.length == self._whole(fork.length, ids) >= SHARED else None

    def keep(self, past: Past) -> None:
        """Nobody goes on with it, for now. It takes the place of those that it begins like."""
        sequence, count = past.sequence, past.exact
        if count < SHARED:
            return
        sequence.rewind(count)
        if sequence.length != count:
            return
        ids = np.array(sequence.ids)
        self._kept = [p for p in self._kept if shared_start(p.sequence.ids, ids) < p.exact]
        self._kept = [*self._kept, past][-KEPT:]

    def shrink(self, room: int) -> None:
        """Keep no more than `room` bytes: what was not used for longest goes."""
        sizes = [self._nbytes(past.exact) for past in self._kept]
        while sizes and sum(sizes) > room:
            del self._kept[0], sizes[0]

    def _shared(self, ids: np.ndarray, past: Past) -> int:
        return self._whole(min(shared_start(past.sequence.ids, ids), past.exact), ids)

    def _whole(self, count: int, ids: np.ndarray) -> int:
        count = min(count, len(ids) - 1)
        return count - count % self._grain
