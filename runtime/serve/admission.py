"""Who waits, and who may begin: so many requests at once, in so much memory, in the order in which
they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from smoe.runtime.errors import EngineError
from smoe.runtime.serve.prefixes import SHARED, Past, Prefixes
from smoe.runtime.serve.request import Generation
from smoe.runtime.sizes import show_size

LOOK = 32  # requests that are looked at, in turn, when something has changed


@dataclass(frozen=True)
class Beginning:
    """Tokens that several requests begin with, and `nbytes` of state for them."""

    ids: np.ndarray
    nbytes: int


@dataclass(frozen=True)
class Now:
    """What is on its way: how many more requests may begin, in how much `room`; the `pasts` of
    those that generate, all ids of those that are `reading`, and how many of so many tokens go
    through the model `together`."""

    places: int
    room: int
    pasts: Sequence[Past]
    reading: Sequence[np.ndarray]
    together: Callable[[int], int]


class Admission:
    """Up to `most` requests that wait. `nbytes(n)` is what n tokens leave. `news` says whether
    something may have changed since `next` found nobody."""

    def __init__(self, prefixes: Prefixes, nbytes: Callable[[int], int], most: int):
        self._prefixes, self._nbytes, self._most = prefixes, nbytes, most
        self.changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self.news = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, generation: Generation) -> None:
        """The last in turn; an `EngineError` where that is too many."""
        with self.changed:
            if len(self._waiting) >= self._most:
                raise EngineError(
                    f"{len(self._waiting)} requests wait already, and no more may; try again later."
                )
            self._waiting.append(generation)
            self.news = True
            self.changed.notify_all()

    def back(self, generations: Sequence[Generation]) -> None:
        """The first in turn, each by itself: something failed that they shared."""
        with self.changed:
            self._waiting.extendleft(reversed(generations))
            for generation in generations:
                generation.alone, generation.sequence = True, None

    def alone(self, beginning: np.ndarray) -> None:
        """A beginning could not be read: those that it is of do without."""
        with self.changed:
            waiting = list(self._waiting)
        for generation in waiting:
            if np.array_equal(generation.ids[: len(beginning)], beginning):
                generation.alone = True

    def leave(self, wanted: Callable[[Generation], bool]) -> list[Generation]:
        """Those that are not `wanted` any more: they wait no longer."""
        with self.changed:
            gone = [one for one in self._waiting if not wanted(one)]
            for generation in gone:
                self._waiting.remove(generation)
        return gone

    def next(self, now: Now) -> list[Generation] | Beginning:
        """Who begins now, to be read together; or a beginning that should be read before."""
        self.news = False
        batch: list[Generation] = []
        tokens, room = 0, now.room
        for generation in self._all():
            generation.waits = self._obstacle(generation, now, len(batch), room)
            if generation.waits:
                break
            beginning = None if generation.alone else self._beginning(generation, now, room)
            if isinstance(beginning, str):
                generation.waits = beginning
                continue
            if beginning is not None and not batch:
                return beginning
            if beginning is not None:
                break
            tokens += len(generation.ids)
            together = not (batch and (generation.alone or batch[0].alone))
            if batch and not (together and tokens <= now.together(tokens)):
                break
            room -= generation.nbytes
            batch.append(generation)
        self.leave(lambda one: one not in batch)
        return batch

    def _all(self) -> list[Generation]:
        with self.changed:
            return list(islice(self._waiting, LOOK))

    def _obstacle(self, generation: Generation, now: Now, more: int, room: int) -> str:
        """Why it cannot begin, nor any after it."""
        if more >= now.places:
            return "another request to end"
        if generation.nbytes > room:
            return f"room for its state, of which {show_size(generation.nbytes)} are needed"
        return ""

    def _beginning(self, generation: Generation, now: Now, room: int) -> Beginning | str | None:
        """What it has in common with those that are being read (then it waits) or that wait like
        it, if that is much more than what was read before."""
        ids, prefixes = generation.ids, self._prefixes
        worth = prefixes.shared(ids, now.pasts) + SHARED
        if prefixes.common(ids, now.reading) >= worth:
            return "its beginning, which is being read for another one"
        others = [one.ids for one in self._all() if one is not generation and not one.alone]
        count = prefixes.common(ids, others)
        nbytes = self._nbytes(count)
        if count < worth or generation.nbytes + nbytes > room:
            return None
        return Beginning(ids[:count], nbytes)
