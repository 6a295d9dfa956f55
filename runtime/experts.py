"""Somebody who computes a dispatch: the seam at which memory, nodes and accelerators meet.

`Experts` is what the model asks for; `LocalExperts` answers with a cache in this process and the
kernels of its processor. Outputs are kept by slot, so that neither the budget nor the order of
arrival changes a bit of what they add up to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from smoe.runtime.budget import SLOTS
from smoe.runtime.cache.cache import ExpertCache
from smoe.runtime.cache.residency import Key
from smoe.runtime.kernels import LayerKernel, Work
from smoe.runtime.routing import Assignment, Available, Dispatch, Routed
from smoe.runtime.system import trim_heap


class Pending(Protocol):
    """A dispatch on its way."""

    def parts(self, idle: Callable[[], None] | None = None) -> Iterator[None]:
        """Work, a few experts at a time: between two parts another step may run. `idle` is called
        once, when nothing is left but to wait for reads. A read that fails is an `EngineError`."""
        ...

    def wait(self, idle: Callable[[], None] | None = None) -> None:
        """All of it."""
        ...


@dataclass(frozen=True, eq=False)
class Held:
    """Experts in memory, as they come and go: `where[l]` int64 `[E]` says in which of `rows` uint8
    `[frames, bytes]` an expert of layer l lies with all of its `level` planes, -1 where it does
    not. `kernels[l]` computes it."""

    rows: np.ndarray
    where: tuple[np.ndarray, ...]
    kernels: Sequence[LayerKernel]
    level: int


class Experts(Protocol):
    """Who holds and computes the experts of all layers."""

    def available(self, layer: int) -> Available:
        """What a chooser may know."""
        ...

    def observe(self, routed: Routed) -> None:
        """The router's word, before any substitution: what eviction and statistics go by."""
        ...

    def expect(self, guesses: Iterable[Key]) -> None:
        """These will be wanted soon, likeliest first: never blocks, never evicts before it
        reads."""
        ...

    def at_hand(
        self, routed: Routed, assignment: Assignment, available: Available
    ) -> np.ndarray | None:
        """What every slot of `assignment` gives, float32 `[T, k, H]`, if nothing is missing:
        computed, observed and counted. None otherwise, and nothing has happened."""
        ...

    def held(self) -> Held | None:
        """What a loop over layers may use by itself until something else is asked for here, always
        the same object; None where there is nothing of the kind, or not now. Each layer's ids go to
        `used` afterwards."""
        ...

    def used(self, layer: int, ids: np.ndarray) -> None:
        """A step ran the experts `ids` int64 `[T, k]` of what is `held`, as its router chose
        them."""
        ...

    def start(self, layer: int, dispatch: Dispatch, x: np.ndarray, out: np.ndarray) -> Pending:
        """Compute the slots of `dispatch` for `x` float32 `[T, H]` into `out` float32 `[T, k,
        H]`."""
        ...

    def lend(self, borrower: object, nbytes: int) -> bool:
        """Do with so much less memory until `borrower` asks for another amount (0: it needs no
        more); whether that was possible."""
        ...

    def close(self) -> None:
        """Give back what it holds; whoever waits gets an `EngineError`."""
        ...


class LocalExperts:
    """The experts that `cache` brings, computed by a kernel per layer; `full` is the level that is
    wanted."""

    def __init__(self, cache: ExpertCache, kernels: Sequence[LayerKernel], full: int):
        self.cache, self.kernels, self.full = cache, kernels, full
        self._where = [cache.where(layer) for layer in range(len(kernels))]
        self._held: Held | None = None

    def available(self, layer: int) -> Available:
        """The cache's levels."""
        return Available(level=self.cache.levels(layer), full=self.full)

    def observe(self, routed: Routed) -> None:
        """To the cache, with gate scores where its eviction wants them."""
        scores = routed.gate_scores if self.cache.needs_scores else None
        self.cache.observe(routed.layer, routed.ids, scores)

    def expect(self, guesses: Iterable[Key]) -> None:
        """To the cache."""
        self.cache.expect(guesses)

    def at_hand(
        self, routed: Routed, assignment: Assignment, available: Available
    ) -> np.ndarray | None:
        """In one call of the kernel, unless there are very many slots. Of several tokens that take
        shortcuts nothing is ever at hand."""
        layer, ids = routed.layer, routed.ids
        if not self.cache.still:
            return None
        if assignment.ids is not ids or assignment.levels is not None:
            return self._shortened(routed, assignment) if len(ids) == 1 else None
        frames = self._where[layer].take(ids)
        if frames.min() < 0:
            return None
        if len(ids) == 1:  # each slot is a group of its own
            work = Work(frames[0], *_one_token(ids.shape[1], self.full))
            outputs = self.kernels[layer](self.cache.rows, work, routed.hidden)[None]
        else:
            outputs = np.empty((*ids.shape, routed.hidden.shape[1]), np.float32)
            dispatch = Dispatch.of(assignment, available)
            self.compute(layer, dispatch, routed.hidden, outputs)
        self.cache.used(layer, ids)
        return outputs

    def _shortened(self, routed: Routed, assignment: Assignment) -> np.ndarray | None:
        """The same of one token that takes shortcuts: some slots have another expert, another
        level, or nothing."""
        layer, resident = routed.layer, self.cache.levels(routed.layer)
        ranks = (assignment.ids[0] < len(resident)).nonzero()[0]
        experts = assignment.ids[0, ranks]
        full, starts, tokens = _one_token(len(ranks), self.full)
        levels = full if assignment.levels is None else assignment.levels[0, ranks]
        if (resident[experts] < levels).any():
            return None
        outputs = np.zeros((*assignment.ids.shape, routed.hidden.shape[1]), np.float32)
        work = Work(self.cache.frames_of(layer, experts), levels, starts, tokens)
        outputs[0, ranks] = self.kernels[layer](self.cache.rows, work, routed.hidden)
        self.cache.used(layer, routed.ids, experts, levels)
        return outputs

    def held(self) -> Held | None:
        """While nothing is read."""
        if not self.cache.still:
            return None
        if self._held is None:
            where = tuple(frames[:-1] for frames in self._where)
            self._held = Held(self.cache.rows, where, self.kernels, self.full)
        return self._held

    def used(self, layer: int, ids: np.ndarray) -> None:
        """To the cache."""
        self.cache.used(layer, ids)

    def compute(self, layer: int, dispatch: Dispatch, x: np.ndarray, out: np.ndarray) -> None:
        """Slots whose experts are resident at their levels."""
        for batch in dispatch.batches(SLOTS):
            frames = self.cache.frames_of(layer, batch.experts)
            work = Work(frames, batch.levels, batch.starts, batch.tokens)
            out[batch.tokens, batch.ranks] = self.kernels[layer](self.cache.rows, work, x)

    def start(self, layer: int, dispatch: Dispatch, x: np.ndarray, out: np.ndarray) -> Pending:
        """What is missing is asked for now, so that a guess comes after it; what runs, runs in
        `parts` or `wait`."""
        return _LocalPending(self, layer, dispatch, x, out)

    def lend(self, borrower: object, nbytes: int) -> bool:
        """Of the cache's frames. What comes back comes back to the system first."""
        if not nbytes:
            trim_heap()
        return self.cache.lend(borrower, nbytes)

    def close(self) -> None:
        """The cache's reads end."""
        self.cache.close()


class _LocalPending:
    def __init__(
        self, experts: LocalExperts, layer: int, dispatch: Dispatch, x: np.ndarray, out: np.ndarray
    ):
        self._experts, self._layer = experts, layer
        self._dispatch, self._x, self._out = dispatch, x, out
        self._cut: dict[int, list[Dispatch]] = {}  # what is left of groups with many slots
        bring = experts.cache.bring(layer, dispatch.experts, dispatch.levels, dispatch.counts)
        self._bring, self._ready = bring, next(bring, None)

    def wait(self, idle: Callable[[], None] | None = None) -> None:
        for _ in self.parts(idle):
            pass

    def parts(self, idle: Callable[[], None] | None = None) -> Iterator[None]:
        with contextlib.closing(self._bring):
            ready = self._ready
            while ready is not None:
                whole = None
                if len(ready):
                    whole = self._compute(ready)
                    yield
                elif idle is not None:
                    idle()
                try:
                    ready = self._bring.send(whole)
                except StopIteration:
                    return

    def _compute(self, ready: np.ndarray) -> np.ndarray:
        """Some slots of the groups that are `ready`; which of these are done with."""
        ends = self._dispatch.counts[ready].cumsum()
        some = ready[: max(1, int(ends.searchsorted(SLOTS, "right")))]
        first = int(some[0])
        left = self._cut.pop(first, None)
        if left is None:
            left = list(self._dispatch.take(some).batches(SLOTS))
        self._experts.compute(self._layer, left.pop(0), self._x, self._out)
        if left:
            self._cut[first] = left  # one group alone
        return some[:0] if left else some


@lru_cache
def _one_token(k: int, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels, starts and tokens of a `Work` of k slots, all of one token and for one expert
    each."""
    return np.full(k, level), np.arange(k + 1), np.zeros(k, np.int64)
