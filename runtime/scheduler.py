"""What runs where: pure decisions over scores and residency. No I/O, no clock: a simulator drives the same code.

A decision is the list of slots of each expert and the order in which to take them, residents first. Which experts those
are is the router's word, or a substitution's (`policies.substitution`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    """One expert to compute: `tokens` and `ranks` int64 say which slots (token, place among its k) are its, `levels` at
    which level each, lowest first."""

    expert: int
    tokens: np.ndarray
    ranks: np.ndarray
    levels: np.ndarray

    @property
    def level(self) -> int:
        """What has to be here."""
        return int(self.levels[-1])


def batches(tasks: list[Task], slots: int) -> Iterator[list[Task]]:
    """Tasks that are computed in one call: no more after `slots` slots."""
    batch: list[Task] = []
    for task in tasks:
        if sum(len(t.tokens) for t in batch) >= slots:
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def decide(ids: np.ndarray, levels: np.ndarray, here: np.ndarray) -> list[Task]:
    """The tasks of one layer of E experts for ids `[T, k]` (E itself is no expert), each slot at its of `levels` int
    `[T, k]`: experts that are `here` (int `[E]`, a level) as far as is wanted first, so that a load never evicts what
    is still needed; each group by expert number. The result of a step does not depend on this order (`Engine` combines
    by rank), only the number of loads does."""
    flat, level = ids.reshape(-1), levels.reshape(-1)
    order = np.lexsort((level, flat))
    experts, starts = np.unique(flat[order], return_index=True)
    groups = np.split(order, starts[1:])
    tasks = [
        Task(int(expert), slots // ids.shape[1], slots % ids.shape[1], level[slots])
        for expert, slots in zip(experts, groups, strict=True)
        if expert < len(here)
    ]
    return sorted(tasks, key=lambda task: (here[task.expert] < task.level, task.expert))


def runs(tasks: list[Task]) -> list[tuple[Task, int, int]]:
    """(task, its level, number of slots) wherever the expert or the level changes."""
    found = []
    for task in tasks:
        if task.levels[0] == task.level:
            found.append((task, task.level, len(task.levels)))
            continue
        levels, counts = np.unique(task.levels, return_counts=True)
        found += [
            (task, int(level), int(count)) for level, count in zip(levels, counts, strict=True)
        ]
    return found


def uses(ids: np.ndarray, count: int) -> list[int]:
    """The experts of ids `[T, k]` (`count` itself is no expert), each once, that of the last slot last: the order in
    which eviction hears of them. Token after token, so that what a prompt ends with is the most recent."""
    last_first = dict.fromkeys(ids.reshape(-1)[::-1].tolist())
    return [e for e in reversed(last_first) if e < count]
