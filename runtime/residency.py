"""Which experts are resident: pure bookkeeping, no bytes and no clock, so that a simulator drives the same code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from smoe.runtime.policies.eviction import Eviction

Key = tuple[int, int]  # (layer, expert)


class Residency:
    """A pool of places over all layers. A record of layer l takes `sizes[l]` of `capacity` (1 each unless said: then
    capacity is a number of records); `eviction` says what goes. With `shares` every layer keeps to its part of the pool.

    A miss takes two calls, with the read between them: until `put`, nothing claims that the record is there, so a read
    that fails or is interrupted leaves no trace.

    A record that was read on a guess is the first to go once its layer has run without using it.
    """

    def __init__(
        self,
        experts: Sequence[int],
        capacity: int,
        eviction: Eviction,
        sizes: Sequence[int] | None = None,
        shares: bool = False,
    ):
        self.capacity, self.eviction = capacity, eviction
        self._first = eviction.first.tolist()
        self._sizes = list(sizes if sizes is not None else [1] * len(experts))
        self._share = capacity // len(experts) if shares else None
        places = min(capacity // min(self._sizes), self._first[-1])
        self._free = list(range(places))[::-1]
        self._keys = np.full(places, -1)  # the flat number of what each place holds
        self._layers = np.full(places, -1)
        self._guessed = np.zeros(places, bool)
        self._expired = np.zeros(places, bool)
        self._level = np.zeros(places, np.int64)
        self._place = np.full(self._first[-1], -1)  # of each expert
        self._used = [0] * len(experts)  # by layer, of the capacity
        self._total = 0

    def __contains__(self, key: Key) -> bool:
        return self.find(key) is not None

    def __len__(self) -> int:
        return int((self._keys >= 0).sum())

    @property
    def held(self) -> int:
        """How much of the capacity is taken, reserved places included."""
        return self._total

    def resident(self, layer: int) -> np.ndarray:
        """bool `[experts of the layer]`."""
        return self._place[self._first[layer] : self._first[layer + 1]] >= 0

    def levels(self, layer: int) -> np.ndarray:
        """int64 `[experts of the layer]`: the level at which each expert is here, 0 where it is not."""
        places = self._place[self._first[layer] : self._first[layer + 1]]
        return np.where(places >= 0, self._level[places], 0)

    def find(self, key: Key) -> int | None:
        """The place that holds `key`, if one does."""
        place = int(self._place[self._first[key[0]] + key[1]])
        return place if place >= 0 else None

    def begin(self, layer: int, tokens: int, scores: np.ndarray | None) -> None:
        """A step of so many tokens reaches a layer; `scores` `[tokens, experts]` of its router, where they are known."""
        self.eviction.begin(layer, tokens, scores)

    def use(self, key: Key, tokens: int = 1) -> bool:
        """So many tokens of the step use an expert, resident or not; whether it is the first use of one that was read on
        a guess."""
        flat = self._first[key[0]] + key[1]
        self.eviction.use(flat, tokens)
        place = self._place[flat]
        if place < 0 or not self._guessed[place]:
            return False
        self._guessed[place] = self._expired[place] = False
        return True

    def room(self, layer: int) -> int:
        """How many records of a layer there may be, if there are no others."""
        most = self.capacity if self._share is None else self._share
        return most // self._sizes[layer]

    def end(self, layer: int) -> None:
        """The step leaves a layer: what was guessed for it and not used may go."""
        if self._guessed.any():
            self._expired |= self._guessed & (self._layers == layer)

    def reserve(self, key: Key, shield: Iterable[Key] = ()) -> int | None:
        """A place to fill with `key`, after whatever had to go went; never one of `shield` (the experts that the step is
        about to use: SMoE's protection shield). None if there is no room beside those."""
        layer = key[0]
        while self._full(layer):
            victim = self._victim(layer, shield)
            if victim is None:
                return None
            self._drop(victim)
        self._used[layer] += self._sizes[layer]
        self._total += self._sizes[layer]
        return self._free.pop()

    def put(self, key: Key, place: int, guessed: bool = False, level: int = 1) -> None:
        """The reserved place holds `key` now, or one that held it holds it up to a higher level."""
        flat = self._first[key[0]] + key[1]
        self._level[place] = level
        if self._place[flat] == place:
            return
        self._keys[place], self._layers[place], self._place[flat] = flat, key[0], place
        self._guessed[place], self._expired[place] = guessed, False

    def cancel(self, key: Key, place: int) -> None:
        """The reserved place was not filled."""
        self._release(key[0], place)

    def _full(self, layer: int) -> bool:
        size = self._sizes[layer]
        if self._share is not None and self._used[layer] + size > self._share:
            return True
        return self._total + size > self.capacity or not self._free

    def _victim(self, layer: int, shield: Iterable[Key]) -> int | None:
        """The place whose record is worth least."""
        may_go = self._keys >= 0
        if self._share is not None and self._used[layer] + self._sizes[layer] > self._share:
            may_go &= self._layers == layer
        for shielded in shield:
            place = self.find(shielded)
            if place is not None:
                may_go[place] = False
        places = np.flatnonzero(may_go & self._expired)
        if not len(places):
            places = np.flatnonzero(may_go)
        if not len(places):
            return None
        return int(places[self.eviction.values(self._keys[places]).argmin()])

    def _drop(self, place: int) -> None:
        layer = int(self._layers[place])
        self._place[self._keys[place]] = -1
        self._keys[place] = self._layers[place] = -1
        self._guessed[place] = self._expired[place] = False
        self._release(layer, place)

    def _release(self, layer: int, place: int) -> None:
        self._used[layer] -= self._sizes[layer]
        self._total -= self._sizes[layer]
        self._free.append(place)
