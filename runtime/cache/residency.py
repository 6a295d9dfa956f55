"""Which experts are resident: pure bookkeeping, no bytes and no clock, so that a simulator drives the same code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from smoe.runtime.cache.eviction import Eviction

Key = tuple[int, int]  # (layer, expert)


class Residency:
    """A pool of places over all layers. A record of layer l that is here up to level j (from 1) takes `sizes[l][j - 1]` of
    `capacity`; a number in place of a list is a record of one level, and without `sizes` every record takes 1. What goes
    is `eviction`'s word: a whole record, or its highest plane where the policy knows what planes are worth. With
    `shares` every layer keeps to its part of the pool.

    A miss takes two calls, with the read between them: until `put`, nothing claims that the planes are there, so a read
    that fails or is interrupted leaves no trace.

    A record that was read on a guess is the first to go once its layer has run without using it.
    """

    def __init__(
        self,
        experts: Sequence[int],
        capacity: int,
        eviction: Eviction,
        sizes: Sequence[int | np.ndarray] | None = None,
        shares: bool = False,
    ):
        self.capacity, self.eviction = capacity, eviction
        self._first = eviction.first.tolist()
        self._sizes = [[0, *np.atleast_1d(of).tolist()] for of in sizes or [1] * len(experts)]
        self._share = capacity // len(experts) if shares else None
        places = min(capacity // min(of[1] for of in self._sizes), self._first[-1])
        self._free = list(range(places))[::-1]
        self._keys = np.full(places, -1)  # the flat number of what each place holds
        self._layers = np.full(places, -1)
        self._guessed = np.zeros(places, bool)
        self._expired = np.zeros(places, bool)
        self._level = np.zeros(places, np.int64)
        self.held = np.zeros(places, np.int64)  # of the capacity, by each place; reserved ones too
        self._place = np.full(self._first[-1], -1)  # of each expert
        self._used = [0] * len(experts)  # by layer, of the capacity
        self.total = 0  # the sum of `held`

    def __contains__(self, key: Key) -> bool:
        return self.find(key) is not None

    def __len__(self) -> int:
        return int((self._keys >= 0).sum())

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
        """How many whole records of a layer there may be, if there are no others."""
        most = self.capacity if self._share is None else self._share
        return most // self._sizes[layer][-1]

    def end(self, layer: int) -> None:
        """The step leaves a layer: what was guessed for it and not used may go."""
        if self._guessed.any():
            self._expired |= self._guessed & (self._layers == layer)

    def reserve(self, key: Key, shield: Iterable[Key] = (), level: int = -1) -> int | None:
        """A place to fill with the planes of `key` up to `level` (-1: all), the one where it is if it is here, after
        whatever had to go went; never one of `shield` (the experts that the step is about to use: SMoE's protection
        shield). None if there is no room beside those."""
        layer, place = key[0], self.find(key)
        size = self._sizes[layer][level]
        if not self._make_room(
            layer, size - (0 if place is None else int(self.held[place])), [*shield, key]
        ):
            return None
        if place is None:
            place = self._free.pop()
        self._hold(place, layer, size)
        return place

    def put(self, key: Key, place: int, guessed: bool = False, level: int = 1) -> None:
        """The reserved place holds `key` now, or one that held it holds it up to a higher level."""
        flat = self._first[key[0]] + key[1]
        self._level[place] = level
        if self._place[flat] == place:
            return
        self._keys[place], self._layers[place], self._place[flat] = flat, key[0], place
        self._guessed[place], self._expired[place] = guessed, False

    def cancel(self, key: Key, place: int) -> None:
        """The reserved place was not filled, or nothing was added to what it holds."""
        if self._keys[place] >= 0:
            self._hold(place, key[0], self._sizes[key[0]][self._level[place]])
        else:
            self._release(key[0], place)

    def _make_room(self, layer: int, size: int, shield: Iterable[Key]) -> bool:
        while self._full(layer, size):
            victim = self._victim(layer, size, shield)
            if victim is None:
                return False
            self._let_go(victim)
        return True

    def _full(self, layer: int, size: int) -> bool:
        if self._share is not None and self._used[layer] + size > self._share:
            return True
        return self.total + size > self.capacity

    def _victim(self, layer: int, size: int, shield: Iterable[Key]) -> int | None:
        """The place whose record, or highest plane, is worth least."""
        may_go = self._keys >= 0
        if self._share is not None and self._used[layer] + size > self._share:
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
        return int(places[self.eviction.planes(self._keys[places], self._level[places]).argmin()])

    def _let_go(self, place: int) -> None:
        """Of the highest plane, where eviction goes by planes and it is not the only one; of the record otherwise."""
        if not self.eviction.by_planes or self._level[place] == 1:
            self._drop(place)
            return
        layer = int(self._layers[place])
        self._level[place] -= 1
        self._hold(place, layer, self._sizes[layer][self._level[place]])

    def _drop(self, place: int) -> None:
        layer = int(self._layers[place])
        self._place[self._keys[place]] = -1
        self._keys[place] = self._layers[place] = -1
        self._guessed[place] = self._expired[place] = False
        self._release(layer, place)

    def _release(self, layer: int, place: int) -> None:
        self._hold(place, layer, 0)
        self._free.append(place)

    def _hold(self, place: int, layer: int, size: int) -> None:
        more = size - int(self.held[place])
        self.held[place] = size
        self._used[layer] += more
        self.total += more
