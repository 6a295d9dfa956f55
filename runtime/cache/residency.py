"""Which experts are resident: pure bookkeeping, no bytes and no clock, so that a simulator drives
the same code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from smoe.runtime.cache.eviction import Eviction

Key = tuple[int, int]  # (layer, expert)

FREE, SHIELDED, PINNED = 0, 1, 2  # pins: may go, goes if nothing else may, never goes


class Residency:
    """A pool of frames over all layers.

    A record of layer l that is resident up to level j (from 1) takes `sizes[l][j - 1]` of
    `capacity`; a number in place of a list is a record of one level, and without `sizes` every
    record takes 1. What goes is `eviction`'s word: a whole record, or its highest plane where the
    policy knows what planes are worth. With `shares` every layer keeps to its part of the pool.

    A miss takes two calls with the read between them: until `commit`, nothing claims that the
    planes are there, so a read that fails leaves no trace. A record that was read on a guess is the
    first to go once its layer has run without it."""

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
        self._sizes = [[0, *np.atleast_1d(ends).tolist()] for ends in sizes or [1] * len(experts)]
        self._shares = len(experts) if shares else 0
        smallest = min(ends[1] for ends in self._sizes)
        frames = min(capacity // smallest, self._first[-1])
        self._free = list(range(frames))[::-1]
        self._keys = np.full(frames, -1)  # the flat number of what each frame holds
        self._layers = np.full(frames, -1)
        self._guessed = np.zeros(frames, bool)
        self._expired = np.zeros(frames, bool)
        self._reserved = np.zeros(frames, bool)  # a read into it is on its way
        self.frame_bytes = np.zeros(frames, np.int64)  # of the capacity; of reserved frames too
        self._frame = np.full(self._first[-1], -1)  # of each expert
        self._level = np.zeros(self._first[-1], np.int64)  # of each expert, 0: not resident
        self._where = [np.full(count + 1, -1) for count in experts]
        self._guessing = False  # whether any frame may be `_guessed`
        self.used = [0] * len(experts)  # of the capacity, by layer
        self.total = 0

    def __contains__(self, key: Key) -> bool:
        return self.find(key) is not None

    def __len__(self) -> int:
        return int((self._keys >= 0).sum())

    def flat(self, key: Key) -> int:
        """The number of an expert among those of all layers."""
        return self._first[key[0]] + key[1]

    def levels(self, layer: int) -> np.ndarray:
        """int64 `[E]`: the level at which each expert is resident, 0 where it is not."""
        return self._level[self._first[layer] : self._first[layer + 1]].copy()

    def levels_of(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """The same of some experts of a layer."""
        return self._level[self._first[layer] + experts]

    def level(self, key: Key) -> int:
        """The same of one."""
        return int(self._level[self.flat(key)])

    def find(self, key: Key) -> int | None:
        """The frame that holds `key`, if one does."""
        frame = int(self._frame[self.flat(key)])
        return frame if frame >= 0 else None

    def frames(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """int64: the frames of these experts, -1 where one is not resident."""
        return self._frame[self._first[layer] + experts]

    def where(self, layer: int) -> np.ndarray:
        """int64 `[E + 1]`, which changes as experts come and go: the frame of each expert of a
        layer that is resident whole, -1 where one is not, or is no expert (the last)."""
        return self._where[layer]

    def full_level(self, layer: int) -> int:
        """Planes of a whole record of a layer."""
        return len(self._sizes[layer]) - 1

    @property
    def share(self) -> int | None:
        """Of the capacity, what each layer keeps to; None where all share it."""
        return self.capacity // self._shares if self._shares else None

    def resize(self, capacity: int, pins: np.ndarray | None = None, least: int = 1) -> bool:
        """Another capacity, no more than at the start; what has to go goes now. False if that is
        not possible beside what is pinned, or would leave some layer room for fewer than `least`
        records."""
        self.capacity = capacity
        stays = self._reserved.copy()
        if pins is not None:
            stays |= (self._keys >= 0) & (pins[self._keys] == PINNED)
        layers = range(len(self.used))
        if self.frame_bytes[stays].sum() > capacity or min(map(self.room, layers)) < least:
            return False
        for layer in layers:
            while self.full(layer, 0):
                victim = self.victim(layer, 0, None, pins)
                if victim is None:
                    return False
                self.shrink(victim)
        return True

    def room(self, layer: int) -> int:
        """How many whole records of a layer there may be, if there are no others."""
        most = self.capacity if self.share is None else self.share
        return most // self._sizes[layer][-1]

    @property
    def guessing(self) -> bool:
        """Whether something was read on a guess and is not used yet."""
        self._guessing = self._guessing and bool(self._guessed.any())
        return self._guessing

    def use(self, layer: int, experts: np.ndarray) -> int:
        """A step uses these experts, bool `[E]`, resident or not; how many of them were read on a
        guess and are used for the first time."""
        if not self.guessing:
            return 0
        frames = self._frame[self._first[layer] + np.flatnonzero(experts)]
        frames = frames[frames >= 0]
        used = frames[self._guessed[frames]]
        self._guessed[used] = self._expired[used] = False
        return len(used)

    def end(self, layer: int) -> None:
        """The step leaves a layer: what was guessed for it and not used may go."""
        if self.guessing:
            self._expired |= self._guessed & (self._layers == layer)

    def reserve(self, key: Key, level: int, pins: np.ndarray | None = None) -> int | None:
        """A frame to fill with the planes of `key` up to `level`, the one where it is if it is
        resident, after whatever had to go went. `pins` int8 `[all experts]` are `FREE`, `SHIELDED`
        or `PINNED`; None if there is no room beside what is pinned."""
        layer, frame = key[0], self.find(key)
        size = self._sizes[layer][level]
        more = size - (0 if frame is None else int(self.frame_bytes[frame]))
        while self.full(layer, more):
            victim = self.victim(layer, more, key, pins)
            if victim is None:
                return None
            self.shrink(victim)
        if frame is None:
            frame = self._free.pop()
        self._reserved[frame] = True
        self._hold(frame, layer, size)
        return frame

    def commit(
        self, key: Key, frame: int, level: int, guessed: bool = False, more: bool = False
    ) -> None:
        """The reserved frame holds `key` now up to `level`; it stays reserved where `more` planes
        follow."""
        flat = self.flat(key)
        self._level[flat], self._reserved[frame] = level, more
        if not more:  # what was to follow may have been given up
            self._hold(frame, key[0], self._sizes[key[0]][level])
        if self._frame[flat] != frame:
            self._keys[frame], self._layers[frame], self._frame[flat] = flat, key[0], frame
            self._guessing = self._guessing or guessed
            self._guessed[frame], self._expired[frame] = guessed, False
        if level == self.full_level(key[0]):
            self._where[key[0]][key[1]] = frame

    def abort(self, key: Key, frame: int) -> None:
        """The reserved frame was not filled, or nothing was added to what it holds."""
        self._reserved[frame] = False
        if self._keys[frame] >= 0:
            self._hold(frame, key[0], self._sizes[key[0]][self.level(key)])
        else:
            self._release(key[0], frame)

    def full(self, layer: int, size: int) -> bool:
        """Whether something has to go before a layer takes `size` more."""
        if self.share is not None and self.used[layer] + size > self.share:
            return True
        return self.total + size > self.capacity

    def victim(self, layer: int, size: int, key: Key | None, pins: np.ndarray | None) -> int | None:
        """The frame whose record, or highest plane, is worth least, where `layer` is to take `size`
        more; never that of `key`, nor one that is being read into."""
        may_go = (self._keys >= 0) & ~self._reserved
        if self.share is not None and self.used[layer] + size > self.share:
            may_go &= self._layers == layer
        own = None if key is None else self.find(key)
        if own is not None:
            may_go[own] = False
        if pins is not None:
            pinned = pins.take(self._keys)
            free = may_go & (pinned == FREE)
            may_go = free if free.any() else may_go & (pinned == SHIELDED)
        if self.guessing:
            expired = may_go & self._expired
            may_go = expired if expired.any() else may_go
        frames = may_go.nonzero()[0]
        if not len(frames):
            return None
        keys = self._keys.take(frames)
        return int(frames[self.eviction.planes(keys, self._level.take(keys)).argmin()])

    def shrink(self, frame: int) -> None:
        """Evict the highest plane, where eviction goes by planes and it is not the only one; the
        record otherwise."""
        flat = self._keys[frame]
        if not self.eviction.by_planes or self._level[flat] == 1:
            self.evict(frame)
            return
        layer = int(self._layers[frame])
        self._where[layer][flat - self._first[layer]] = -1
        self._level[flat] -= 1
        self._hold(frame, layer, self._sizes[layer][self._level[flat]])

    def evict(self, frame: int) -> None:
        """What the frame holds is gone."""
        layer = int(self._layers[frame])
        self._where[layer][self._keys[frame] - self._first[layer]] = -1
        self._frame[self._keys[frame]] = -1
        self._level[self._keys[frame]] = 0
        self._keys[frame] = self._layers[frame] = -1
        self._guessed[frame] = self._expired[frame] = False
        self._release(layer, frame)

    def repair(self, reading: Iterable[tuple[Key, int, int]]) -> None:
        """After an interrupt in the middle of a change. Which expert holds which frame is the
        truth; all else follows from it and from what is being read: keys, frames and levels."""
        held = np.flatnonzero(self._frame >= 0)
        self._keys[:] = self._layers[:] = -1
        self._keys[self._frame[held]] = held
        self._layers[self._frame[held]] = self.eviction.layer_of[held]
        self._reserved[:] = False
        self._guessed &= self._keys >= 0
        self._expired &= self._keys >= 0
        self._level[self._frame < 0] = 0
        self._guessing = bool(self._guessed.any())
        for layer, where in enumerate(self._where):
            part = slice(self._first[layer], self._first[layer + 1])
            whole = self._level[part] == self.full_level(layer)
            where[:-1] = np.where(whole, self._frame[part], -1)
        layers, levels = self._layers.copy(), self._level[self._keys]
        for key, frame, level in reading:
            self._reserved[frame], layers[frame], levels[frame] = True, key[0], level
        self.used, self.total = [0] * len(self.used), 0
        self.frame_bytes[:] = 0
        for frame in np.flatnonzero(layers >= 0).tolist():
            self._hold(frame, int(layers[frame]), self._sizes[layers[frame]][levels[frame]])
        self._free = np.flatnonzero((self._keys < 0) & ~self._reserved).tolist()[::-1]

    def _release(self, layer: int, frame: int) -> None:
        self._hold(frame, layer, 0)
        self._free.append(frame)

    def _hold(self, frame: int, layer: int, size: int) -> None:
        more = size - int(self.frame_bytes[frame])
        self.frame_bytes[frame] = size
        self.used[layer] += more
        self.total += more
