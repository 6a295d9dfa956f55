"""Somebody who computes a dispatch: the seam at which memory, nodes and accelerators meet.

`Experts` is what the model asks for; `LocalExperts` answers with a cache in this process and the
kernels of its processor. Outputs are kept by slot, so that neither the budget nor the order of
arrival changes a bit of what they add up to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from smoe.runtime.budget import SLOTS
from smoe.runtime.cache.cache import ExpertCache
from smoe.runtime.cache.residency import Key
from smoe.runtime.kernels import LayerKernel, Work
from smoe.runtime.routing import Available, Dispatch, Routed
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
        self._cache, self._kernel = experts.cache, experts.kernels[layer]
        self._layer, self._dispatch, self._x, self._out = layer, dispatch, x, out
        last = dispatch.highest
        first = last
        if len(last) < len(dispatch.experts):  # some expert has several levels
            first = np.concatenate([[0], last[:-1] + 1])
        self._first, self._last = first, last
        tokens = dispatch.starts[last + 1] - dispatch.starts[first]
        bring = self._cache.bring(layer, dispatch.experts[last], dispatch.levels[last], tokens)
        self._bring, self._ready = bring, next(bring, None)

    def wait(self, idle: Callable[[], None] | None = None) -> None:
        for _ in self.parts(idle):
            pass

    def parts(self, idle: Callable[[], None] | None = None) -> Iterator[None]:
        with contextlib.closing(self._bring):
            ready = self._ready
            while ready is not None:
                if len(ready):
                    groups = ready
                    if self._first is not self._last:
                        groups = _ranges(self._first[ready], self._last[ready] + 1)
                    self._compute(self._dispatch.take(groups))
                    yield
                elif idle is not None:
                    idle()
                ready = next(self._bring, None)

    def _compute(self, part: Dispatch) -> None:
        for batch in part.batches(SLOTS):
            frames = self._cache.frames_of(self._layer, batch.experts)
            work = Work(frames, batch.levels, batch.starts, batch.tokens)
            self._out[batch.tokens, batch.ranks] = self._kernel(self._cache.rows, work, self._x)


def _ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers from each start to before its end, one range after another."""
    if (ends - starts == 1).all():  # the usual case: every expert has one level
        return starts
    return np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
