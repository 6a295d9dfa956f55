"""What others have read already: sequences whose beginnings new ones share, and go on from without
a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from smoe.runtime.step import Sequence

SHARED = 32  # tokens that are worth sharing: a block of what a sequence remembers
KEPT = 64  # sequences: every one that is kept is compared with what comes


@dataclass(frozen=True, eq=False)
class Past:
    """A `sequence` that others may begin like, for `ids`, its first tokens: those whose state does
    not come of shortcuts, nor of an arithmetic that depends on how tokens were grouped."""

    sequence: Sequence
    ids: np.ndarray

    @classmethod
    def of(cls, sequence: Sequence, count: int) -> Past:
        """For so many of its first tokens."""
        return cls(sequence, np.array(sequence.ids[:count], np.int64))


class Prefixes:
    """Sequences that nobody goes on with, the last used last, as far as there is room for what they
    remember: `nbytes(n)` of n tokens. A beginning is a whole number of `grain` tokens; unless
    sequences can be `rewound`, it is all of another one."""

    def __init__(self, nbytes: Callable[[int], int], grain: int, rewound: bool):
        self._nbytes, self._grain, self.rewound = nbytes, grain, rewound
        self._kept: list[Past] = []

    @property
    def kept(self) -> list[Past]:
        """The last used last."""
        return list(self._kept)

    def shared(self, ids: np.ndarray, running: Iterable[Past]) -> int:
        """How many of the first tokens of `ids` were read by those, or by one that is kept."""
        return max((self._shared(ids, past) for past in (*running, *self._kept)), default=0)

    def common(self, ids: np.ndarray, others: Iterable[np.ndarray]) -> int:
        """The longest beginning of `ids`, less than all of it, that one of `others` has too."""
        return self._whole(max((alike(ids, other) for other in others), default=0), ids)

    def begin(self, ids: np.ndarray, running: Iterable[Past]) -> Sequence | None:
        """A fork of the one that shares most with `ids`, with that and nothing else in it. None
        where it is not worth it."""
        pasts = [*self._kept, *running]
        counts = [self._shared(ids, past) for past in pasts]
        if max(counts, default=0) < SHARED:
            return None
        best = int(np.argmax(counts))
        if best < len(self._kept):
            self._kept.append(self._kept.pop(best))
        fork = pasts[best].sequence.fork()
        fork.rewind(counts[best])
        return fork if fork.length == counts[best] else None

    def keep(self, past: Past) -> None:
        """Nobody goes on with it, for now. It takes the place of those that it begins like, if
        there is a way back to them."""
        sequence, ids = past.sequence, past.ids
        if len(ids) < SHARED:
            return
        sequence.rewind(len(ids))
        if sequence.length != len(ids):
            return
        if self.rewound:
            self._kept = [p for p in self._kept if alike(ids, p.ids) < len(p.ids)]
        self._kept = [*self._kept, past][-KEPT:]

    def shrink(self, room: int) -> None:
        """Keep no more than `room` bytes: what was not used for longest goes."""
        sizes = [self._nbytes(len(past.ids)) for past in self._kept]
        while sizes and sum(sizes) > room:
            del self._kept[0], sizes[0]

    def _shared(self, ids: np.ndarray, past: Past) -> int:
        count = self._whole(alike(ids, past.ids), ids)
        return count if self.rewound or count == past.sequence.length else 0

    def _whole(self, count: int, ids: np.ndarray) -> int:
        count = min(count, len(ids) - 1)
        return count - count % self._grain


def alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two runs of ids share at their start."""
    count = min(len(a), len(b))
    differ = (a[:count] != b[:count]).nonzero()[0]
    return int(differ[0]) if len(differ) else count
