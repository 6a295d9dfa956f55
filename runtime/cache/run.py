"""One step's way through a layer's experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from smoe.runtime.cache.reader import Load
from smoe.runtime.cache.residency import SHIELDED


@dataclass(eq=False)
class Run:
    """Of `experts` at their `levels`, wanted by so many `tokens` each: which of them `remaining`
    were not taken yet, bool `[n]`, the `loads` of the others by index, and whether they are taken
    in order."""

    layer: int
    experts: np.ndarray
    levels: np.ndarray
    tokens: np.ndarray
    loads: dict[int, Load] = field(default_factory=dict)
    adopted: set[Load] = field(default_factory=set)  # others asked for these first
    waiting: list[Load] = field(default_factory=list)
    arrived: bool = False  # while it was looked at
    first: bool = True
    ordered: bool = False
    used: int = SHIELDED  # the pin of what was taken

    def __post_init__(self) -> None:
        self.remaining = np.ones(len(self.experts), bool)
        self.ready = np.zeros(len(self.experts), bool)
        self.left = len(self.experts)

    def waits(self) -> bool:
        """Whether there is something left, and none of it has arrived since the last look."""
        return bool(self.waiting) and all(load.on_its_way for load in self.waiting)

    def took(self, given: np.ndarray) -> None:
        """These were computed."""
        self.remaining[given] = False
        self.left -= len(given)
        if self.loads:
            for i in given.tolist():
                self.loads.pop(i, None)
