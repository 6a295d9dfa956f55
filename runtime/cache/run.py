"""One step's way through a layer's experts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from smoe.runtime.cache.reader import Load
from smoe.runtime.cache.residency import PINNED, SHIELDED


@dataclass(eq=False)
class Run:
    """Of groups, `experts` at their `levels`, rising, of so many `tokens` each: which of them
    `remaining` were not taken yet, bool `[n]`, and the `loads` of the others by index.

    Experts have `ranks`, int64 `[n]` by group: first what was there to begin with, then one after
    another as they are asked for, up to `at_once` from the first on that was not taken. In
    `ordered` runs they are taken one at a time. What was taken keeps its frame until all of lower
    ranks were taken, unless the run `yields`: so what goes does not depend on when reads arrive,
    and a lossy run repeats."""

    layer: int
    experts: np.ndarray
    levels: np.ndarray
    tokens: np.ndarray
    hottest: bool
    loads: dict[int, Load] = field(default_factory=dict)
    adopted: set[Load] = field(default_factory=set)  # others asked for these first
    waiting: list[Load] = field(default_factory=list)
    arrived: bool = False  # while it was looked at
    first: bool = True
    ordered: bool = False
    yields: bool = False
    at_once: int = 0
    low: int = 0  # all experts of lower ranks were taken
    behind: bool = False  # so were others
    used: int = SHIELDED  # the pin of what was taken
    needed: np.ndarray = field(init=False)  # tokens that wait for each group's planes
    ranks: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.experts)
        self.needed, self.ranks = self.tokens, np.zeros(self.left, np.int64)
        self.remaining = np.ones(self.left, bool)
        self.ready = np.zeros(self.left, bool)
        changes = np.ones(self.left, bool)
        np.not_equal(self.experts[1:], self.experts[:-1], out=changes[1:])
        self._starts = changes.nonzero()[0]  # of each expert the first group
        self.count = len(self._starts)
        self.mixed = self.count < self.left  # some expert is wanted at several levels
        self.distinct = self.experts[self._starts] if self.mixed else self.experts

    def line_up(self, missing: np.ndarray) -> int:
        """Give experts their ranks: those with `missing` groups by the first turn of these; how
        many they are."""
        if not len(missing):
            return 0
        heads = missing
        if self.mixed:
            counts = np.diff(self._starts, append=self.left)
            rows = np.repeat(np.arange(self.count), counts)
            above = np.append(self.tokens[::-1].cumsum()[::-1], 0)  # of a group and all after it
            self.needed = above[:-1] - above[(self._starts + counts)[rows]]
            heads = missing[np.diff(rows[missing], prepend=-1) > 0]
        if self.hottest and len(heads) > 1:
            heads = heads[np.lexsort((self.levels[heads], -self.needed[heads]))]
        self.ranks[heads] = np.arange(1, len(heads) + 1)
        if self.mixed:
            self.ranks = np.maximum.reduceat(self.ranks, self._starts)[rows]
        return len(heads)

    def due(self, missing: np.ndarray) -> Iterator[list[int]]:
        """Those of `missing` whose experts may be on their way now, one expert's after another's:
        `at_once` ranks from the lowest on."""
        last = max(1, self.low) + self.at_once
        missing = missing[self.ranks[missing] < last]
        ordered = missing[self.ranks[missing].argsort(kind="stable")].tolist()
        for _, groups in itertools.groupby(ordered, lambda i: int(self.experts[i])):
            yield list(groups)

    def turn(self, group: int) -> tuple[int, ...]:
        """When the planes of a group are read: those that most tokens wait for, and of equals the
        lower ones (D²MoE's hottest-expert-bit-first: the least of all experts' next turns is the
        head of its queues that most tokens need); or expert after expert."""
        expert, level = int(self.experts[group]), int(self.levels[group])
        return (-int(self.needed[group]), level, expert) if self.hottest else (expert, level)

    def chain(self, groups: list[int]) -> dict[int, Load]:
        """The loads of one expert's `groups`, each followed by the next."""
        loads: dict[int, Load] = {}
        then: Load | None = None
        for i in reversed(groups):
            key = self.layer, int(self.experts[i])
            then = loads[i] = Load(key, int(self.levels[i]), self.turn(i), then=then)
        return loads

    def next_of(self, groups: np.ndarray) -> np.ndarray:
        """Those of the expert of the lowest rank."""
        first = groups[self.ranks[groups].argmin()]
        return groups[self.experts[groups] == self.experts[first]]

    def pins(self, resident: np.ndarray) -> np.ndarray:
        """int8 of each expert, where groups are `resident`, bool `[n]`. One rank more may be passed
        each time, so that it does not matter whether several were taken in between."""
        lowest = int(self.ranks[self.remaining].min())
        self.low = min(self.low + 1, lowest)
        self.behind = self.low < lowest
        passed = ~self.remaining if self.yields else self.ranks < self.low
        pins = np.where(passed, self.used, np.where(resident, PINNED, SHIELDED))
        return np.maximum.reduceat(pins, self._starts) if self.mixed else pins

    def waits(self) -> bool:
        """Whether there is something left, and nothing of it to compute: none was here at the last
        look that was not taken, and none has arrived since."""
        if (self.ready & self.remaining).any():
            return False
        return bool(self.waiting) and all(load.on_its_way for load in self.waiting)

    def took(self, given: np.ndarray) -> None:
        """These were computed."""
        self.remaining[given] = False
        self.left -= len(given)
        if self.loads:
            for i in given.tolist():
                self.loads.pop(i, None)
