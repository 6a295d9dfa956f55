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
    """One expert to compute at a `level`: `tokens` and `ranks` int64 say which slots (token, place among its k) are its."""

    expert: int
    level: int
    tokens: np.ndarray
    ranks: np.ndarray


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
    """The tasks of one layer of E experts for ids `[T, k]` (E itself is no expert), each at its of `levels` int `[E]`: experts
    that are `here` (bool `[E]`) first, so that a load never evicts what is still needed; each group by expert number.
    The result of a step does not depend on this order (`Engine` combines by rank), only the number of loads does."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    experts, starts = np.unique(flat[order], return_index=True)
    groups = np.split(order, starts[1:])
    tasks = [
        Task(int(expert), int(levels[expert]), slots // ids.shape[1], slots % ids.shape[1])
        for expert, slots in zip(experts, groups, strict=True)
        if expert < len(levels)
    ]
    return sorted(tasks, key=lambda task: (not here[task.expert], task.expert))


def uses(ids: np.ndarray, count: int) -> list[int]:
    """The experts of ids `[T, k]` (`count` itself is no expert), each once, that of the last slot last: the order in
    which eviction hears of them. Token after token, so that what a prompt ends with is the most recent."""
    flat = ids.reshape(-1)[::-1]
    experts, last = np.unique(flat, return_index=True)
    return [e for e in experts[np.argsort(-last)].tolist() if e < count]
