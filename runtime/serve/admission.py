"""Who waits, and who may begin: so many requests at once, in so much memory, in the order in which
they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from smoe.runtime.serve.prefixes import SHARED, Past, Prefixes, alike
from smoe.runtime.serve.request import ENDED, Busy, Generation
from smoe.runtime.sizes import show_size

LOOK = 32  # requests that are looked at, in turn, when something has changed
MOST_OF_IT = 2  # another's prompt over what of it is worth waiting for


@dataclass(frozen=True)
class Beginning:
    """Tokens that several requests begin with, and `nbytes` of state for them."""

    ids: np.ndarray
    nbytes: int


@dataclass(frozen=True)
class Now:
    """What is on its way: how many more requests may begin, in how much `room`; the `pasts` of
    those that generate, all ids of `prompts` and `beginnings` that are being read, and how many of
    so many tokens go through the model `together`."""

    places: int
    room: int
    pasts: Sequence[Past]
    prompts: Sequence[np.ndarray]
    beginnings: Sequence[np.ndarray]
    together: Callable[[int], int]


class Admission:
    """Up to `most` requests that wait. `nbytes(n)` is what n tokens leave. `news` says whether
    something may have changed since `next` found nobody."""

    def __init__(self, prefixes: Prefixes, nbytes: Callable[[int], int], most: int):
        self._prefixes, self._nbytes, self._most = prefixes, nbytes, most
        self.changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._closed = self.news = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, generation: Generation) -> None:
        """The last in turn; `Busy` where that is too many, or where nobody will be answered."""
        with self.changed:
            if self._closed:
                raise Busy(ENDED)
            if len(self._waiting) >= self._most:
                raise Busy(
                    f"{len(self._waiting)} requests wait already, and no more may; try again later."
                )
            self._waiting.append(generation)
            self.news = True
            self.changed.notify_all()

    def back(self, generations: Sequence[Generation]) -> None:
        """The first in turn again."""
        with self.changed:
            self._waiting.extendleft(reversed(generations))
            self.news = True
        for generation in generations:
            generation.sequence = None

    def close(self) -> list[Generation]:
        """Nobody comes any more; those that wait wait no longer."""
        with self.changed:
            self._closed = True
        return self.leave(lambda one: False)

    def leave(self, wanted: Callable[[Generation], bool]) -> list[Generation]:
        """Those that are not `wanted` any more: they wait no longer."""
        with self.changed:
            gone = [one for one in self._waiting if not wanted(one)]
            for generation in gone:
                self._waiting.remove(generation)
        return gone

    def waiting_for(self, beginning: np.ndarray) -> list[Generation]:
        """Those that it is a beginning of."""
        with self.changed:
            waiting = list(self._waiting)
        return [g for g in waiting if not g.alone and alike(g.ids, beginning) == len(beginning)]

    def next(self, now: Now) -> list[Generation] | Beginning:
        """Who begins now, to be read together; or a beginning that should be read before."""
        self.news = False
        with self.changed:
            waiting = list(islice(self._waiting, LOOK))
        batch: list[Generation] = []
        tokens, room = 0, now.room
        for generation in waiting:
            generation.waits = self._obstacle(generation, now, len(batch), room)
            if generation.waits:
                break
            beginning = self._beginning(generation, waiting, now, room)
            if isinstance(beginning, str):
                generation.waits = beginning
                continue
            if beginning is not None and not batch:
                return beginning
            tokens += len(generation.ids)
            apart = generation.alone or (batch and batch[0].alone) or tokens > now.together(tokens)
            if beginning is not None or (batch and apart):
                break
            room -= generation.nbytes
            batch.append(generation)
        self.leave(lambda one: one not in batch)
        return batch

    def _obstacle(self, generation: Generation, now: Now, more: int, room: int) -> str:
        """Why it cannot begin, nor any after it."""
        if more >= now.places:
            return "another request to end"
        if generation.nbytes > room:
            return f"room for its state, of which {show_size(generation.nbytes)} are needed"
        return ""

    def _beginning(
        self, generation: Generation, waiting: Sequence[Generation], now: Now, room: int
    ) -> Beginning | str | None:
        """What it has in common with those that are being read (then it waits) or that wait like
        it, if that is much more than what was read before."""
        if generation.alone:
            return None
        ids, prefixes = generation.ids, self._prefixes
        worth = prefixes.shared(ids, now.pasts) + SHARED
        if max(prefixes.common(ids, now.beginnings), self._of_prompts(ids, now)) >= worth:
            return "its beginning, which is being read for another one"
        others = [one.ids for one in waiting if one is not generation and not one.alone]
        count = prefixes.common(ids, others)
        nbytes = self._nbytes(count)
        if count < worth or generation.nbytes + nbytes > room:
            return None
        return Beginning(ids[:count], nbytes)

    def _of_prompts(self, ids: np.ndarray, now: Now) -> int:
        """What of others' prompts is worth waiting for: a short one need not wait for a long one
        that shares little."""
        if not self._prefixes.rewound:
            return 0
        counts = [(self._prefixes.common(ids, [prompt]), len(prompt)) for prompt in now.prompts]
        return max((count for count, whole in counts if count * MOST_OF_IT >= whole), default=0)
