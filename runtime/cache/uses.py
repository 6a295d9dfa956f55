"""What the layers of a step use: counted, and told to what decides who stays.

A layer whose experts were all at hand costs a note; what is known of a step's layers is learned
when it ends, or when something else has to know."""

from __future__ import annotations

import numpy as np

from smoe.runtime.cache.eviction import CHUNK
from smoe.runtime.cache.residency import Residency
from smoe.runtime.stats import Stats


class Uses:
    """`observe` is told at once, `note` in time."""

    def __init__(self, residency: Residency, stats: Stats):
        self._residency, self._eviction, self._stats = residency, residency.eviction, stats
        self._experts = np.array(self._eviction.experts)
        self._first = 0  # the layer of the first of those that are noted
        self._noted: list[np.ndarray] = []  # int64 `[T, k]`, all alike

    def observe(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        """The router of `layer` chose `ids` int64 `[T, k]` (E: no expert), by `scores` `[T, E]`
        where they are known."""
        self.learn()
        levels = self._residency.levels(layer)
        used = np.zeros(len(levels) + 1, bool)
        used[ids] = True
        chosen = used[:-1]
        self._stats.wanted += int(np.count_nonzero(chosen))
        self._stats.wanted_hits += int(np.count_nonzero(levels[chosen]))
        self._eviction.observe(layer, ids, scores)
        self._stats.guesses_used += self._residency.use(layer, chosen)

    def note(self, layer: int, ids: np.ndarray, instead: np.ndarray | None) -> None:
        """The same of a policy that needs no scores, where all were resident and were used, or in
        their place others, `instead`: hits too, and the step has left the layer."""
        if instead is not None or len(ids) > CHUNK:
            self.observe(layer, ids, None)
            used = np.zeros(self._experts[layer] + 1, bool)
            used[ids if instead is None else instead] = True
            self._stats.hits += int(np.count_nonzero(used[:-1]))
            self._residency.end(layer)
            return
        noted = self._noted
        if noted and (layer != self._first + len(noted) or ids.shape != noted[0].shape):
            self.learn()
        if not self._noted:
            self._first = layer
        self._noted.append(ids.copy())
        if layer + 1 == len(self._eviction.experts):
            self.learn()

    def learn(self) -> None:
        """Nothing is noted any more that is not known."""
        if not self._noted:
            return
        first, ids = self._first, np.stack(self._noted)
        self._noted = []
        layers = slice(first, first + len(ids))
        slots = ids.reshape(len(ids), -1)
        flat = slots + self._eviction.first[layers, None]
        used = np.zeros(self._eviction.first[-1], bool)
        used[flat[slots < self._experts[layers, None]]] = True
        count = int(np.count_nonzero(used))
        self._stats.wanted += count
        self._stats.wanted_hits += count
        self._stats.hits += count
        self._eviction.observe_layers(first, ids)
        if self._residency.guessing:
            for layer in range(layers.start, layers.stop):
                low, high = self._eviction.first[layer : layer + 2]
                self._stats.guesses_used += self._residency.use(layer, used[low:high])
                self._residency.end(layer)
