"""The experts of one layer in one step: decide, read what is missing, compute what is there meanwhile, combine.

`Experts.run` is the page to read. Which experts run is `policies.substitution`'s word, which of them stay is
`residency`'s, reads are `reader`'s and `store`'s, arithmetic is `kernels`'. Outputs are kept by slot and added up by rank, so that
neither the budget nor the order of arrival changes a bit of the result.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.manifest import Layer, Manifest
from smoe.artifacts.tables import Tables
from smoe.runtime import kernels, scheduler
from smoe.runtime.budget import SLOTS, MemoryPlan
from smoe.runtime.cache.predict import Guesses
from smoe.runtime.cache.reader import Reader, Request
from smoe.runtime.cache.residency import Key
from smoe.runtime.cache.storage import Shards
from smoe.runtime.choose.priced import LossBudget
from smoe.runtime.choose.substitution import Choice, Chosen, Substitution
from smoe.runtime.errors import EngineError
from smoe.runtime.options import (
    Policies,
    make_eviction,
    make_prefetch,
    make_priced,
    make_substitution,
    residency_for,
)
from smoe.runtime.routing import gate_scores
from smoe.runtime.scheduler import Task
from smoe.runtime.stats import Stats
from smoe.runtime.system import Places

READERS = 2  # threads that read (bench/reads.py)
GUESSES = 2  # on the way at once


@dataclass(frozen=True)
class Routed:
    """What a segment says of one layer's tokens: hidden float32 `[T, hidden]`, ids int64 and weights float32 `[T, k]`,
    and float32 `[T, experts]` selection scores and raw weights, None where no rule for them is known."""

    hidden: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    scores: np.ndarray | None
    raw: np.ndarray | None


# What the next layer would choose if this layer's output were so: `[T, hidden]` -> Routed.
Foresight = Callable[[np.ndarray], Routed]


@dataclass(frozen=True)
class _Flight:
    """A record on its way into a place, or more planes of one into where it is."""

    place: int
    request: Request
    task: Task | None = None  # None: nobody waits for it yet


class Experts:
    """All experts of a bundle, of which `plan.capacity` may be resident. Not thread-safe."""

    def __init__(
        self,
        manifest: Manifest,
        plan: MemoryPlan,
        shards: Shards,
        chosen: kernels.Kernels,
        policies: Policies,
        tables: Tables,
        stats: Stats,
    ):
        self.layers, self.stats, self._shards, self._plan, self._tables = (
            manifest.layers,
            stats,
            shards,
            plan,
            tables,
        )
        eviction = make_eviction(policies.eviction, manifest)
        self.account: LossBudget | None = None
        self._substitution: Substitution | None = make_substitution(
            policies.substitution, manifest, tables
        )
        sizes = [np.array([0, *layout.levels[: shards.level]]) for layout in shards.layouts]
        if policies.loss:
            self._substitution, self.account = make_priced(
                policies.loss, manifest, tables, sizes, plan, eviction
            )
        self._residency = residency_for(plan, sizes, eviction, policies)
        most = None if policies.lossless else plan.capacity * plan.record
        self.places = Places(len(self._residency.held), plan.record, most)
        self._prefetch = make_prefetch(policies.prefetch, manifest, tables)
        self._kernels = [
            chosen.layer(
                manifest.experts.gate, manifest.expert_shape(i), manifest.experts.encoding, layout
            )
            for i, layout in enumerate(shards.layouts)
        ]
        self._reader = Reader(shards.read, READERS)
        self._guesses: dict[Key, _Flight] = {}

    def close(self) -> None:
        self._reader.close()

    def run(self, index: int, routed: Routed, foresight: Foresight) -> np.ndarray:
        """The experts' part of layer `index`'s output, float32 `[T, hidden]`."""
        layer = self.layers[index]
        self._settle_guesses()  # once, so that all below see the same experts here
        ids, weights, levels = self._substituted(index, layer, routed)
        here = self._residency.levels(index)
        tasks = scheduler.decide(ids, levels, here)
        ready, missing, flights = self._begin(index, tasks, ids, here, routed)
        todo = {(index, task.expert) for task in tasks}
        outputs = np.zeros((*ids.shape, layer.hidden), np.float32)
        decoding = len(ids) == 1
        try:
            self._demand(index, missing, tasks, todo, flights)
            if decoding:
                self._guess(self._prefetch.ahead(index, routed.ids, routed.hidden), todo)
            while ready or flights or missing:
                self._compute(index, ready, todo, routed.hidden, outputs)
                if missing:  # what was computed may go now
                    self._demand(index, missing, tasks, todo, flights)
                if (
                    flights
                    and decoding
                    and self._prefetch.looks_ahead
                    and index + 1 < len(self.layers)
                ):
                    self._foresee(index + 1, foresight(combine(outputs, weights)), todo)
                    decoding = False  # once
                if (
                    missing and not flights and not self._guesses
                ):  # never, or the loop would not end
                    raise EngineError(
                        f"There is no room for {len(missing)} experts of layer {index}; open the bundle again."
                    )
                ready = self._arrivals(flights)
        except (
            BaseException
        ):  # an interrupt too: what is on its way must land before its place is used again
            self._land(flights)
            raise
        self._residency.end(index)
        return combine(outputs, weights)

    def fill(self, warm: bool) -> None:
        """Before the first step: read all experts if there is room, else, if `warm`, those that calibration used most."""
        plan, first = self._plan, self._residency.eviction.first
        keys = [
            (layer, expert)
            for layer, spec in enumerate(self.layers)
            for expert in range(spec.experts)
        ]
        if plan.capacity < plan.experts:
            if not warm:
                return
            share = np.concatenate(
                [counts / max(1, counts.sum()) for counts in self._tables.column("counts")]
            )
            self._residency.eviction.warm(share)
            keys.sort(key=lambda key: -share[first[key[0]] + key[1]])
        flights = []
        for key in sorted(self._room_for(keys)):  # in the order of the files
            place = self._reserve(key, [], self._shards.level)
            assert place is not None
            flights.append(
                _Flight(
                    place, self._reader.demand(self._request(key, place, 0, self._shards.level))
                )
            )
        failed = self._land(flights)
        if failed is not None:
            raise failed

    def _room_for(self, keys: list[Key]) -> list[Key]:
        """The first of `keys` that fit: of every layer no more than its share."""
        kept: list[Key] = []
        room = [self._residency.room(layer) for layer in range(len(self.layers))]
        for key in keys:
            if room[key[0]] and len(kept) < self._plan.capacity:
                room[key[0]] -= 1
                kept.append(key)
        return kept

    # -- deciding --------------------------------------------------------------------------------------------------

    def _substituted(
        self, index: int, layer: Layer, routed: Routed
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, weights and levels `[T, k]` of the slots as they run."""
        self.stats.slots += routed.ids.size
        full = np.full(routed.ids.shape, self._shards.level)
        if self._substitution is None:
            return routed.ids, routed.weights, full
        here, levels = self._residency.resident(index), self._residency.levels(index)
        chosen = Chosen(*self._substitution(
            Choice(index, layer.routing, routed.ids, routed.weights, routed.scores, routed.raw, here, levels, self._shards.level)
        ))  # fmt: skip
        self.stats.substituted += int((chosen.ids != routed.ids).sum())
        if self.account is not None:
            self.stats.nats_spent += self.account.collect()
        return chosen.ids, chosen.weights, full if chosen.levels is None else chosen.levels

    def _begin(
        self, index: int, tasks: list[Task], ids: np.ndarray, here: np.ndarray, routed: Routed
    ) -> tuple[list[Task], deque[Task], list[_Flight]]:
        """Tell the residency what the step wants and count it: tasks that are ready, that are missing, and that are on
        their way as guesses. `here` int `[E]` are the levels of who is here."""
        experts = self.layers[index].experts
        wanted = scheduler.uses(routed.ids, experts)
        self.stats.wanted += len(wanted)
        self.stats.wanted_hits += int((here[wanted] > 0).sum())
        self._residency.begin(index, len(routed.ids), self._gate_scores(index, routed))
        ready, missing, flights = [], deque[Task](), []
        tokens = np.bincount(routed.ids.reshape(-1), minlength=experts).tolist()
        for expert in wanted:
            self.stats.guesses_used += self._residency.use((index, expert), tokens[expert])
        for task in tasks:
            key = (index, task.expert)
            if here[task.expert] >= task.level:
                ready.append(task)
            elif key in self._guesses:
                flights.append(dataclasses.replace(self._guesses.pop(key), task=task))
                self.stats.guesses_used += 1
            else:
                missing.append(task)
        self.stats.hits += len(ready)
        self.stats.misses += len(missing) + len(flights)
        return ready, missing, flights

    def _gate_scores(self, index: int, routed: Routed) -> np.ndarray | None:
        rule = self.layers[index].routing
        if not self._residency.eviction.needs_scores or rule is None or routed.scores is None:
            return None
        return gate_scores(rule, routed.scores)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _demand(
        self,
        index: int,
        missing: deque[Task],
        tasks: list[Task],
        todo: set[Key],
        flights: list[_Flight],
    ) -> None:
        """Ask for as many of `missing` as there is room for, without evicting what the step still needs, and if that is
        possible nothing of this layer at all. They are added to `flights`."""
        layer = [(index, task.expert) for task in tasks]
        while missing:
            key = (index, missing[0].expert)
            since, level = int(self._residency.levels(index)[key[1]]), missing[0].level
            place = self._reserve(key, layer, level)
            if place is None:
                place = self._reserve(key, todo, level)
            if place is None:
                return
            task = missing.popleft()
            flights.append(
                _Flight(
                    place, self._reader.demand(self._request(key, place, since, task.level)), task
                )
            )

    def _reserve(self, key: Key, shield: Iterable[Key], level: int) -> int | None:
        """A place for `key` up to `level`; what had to go for it is out of memory."""
        place = self._residency.reserve(key, shield, level)
        self.places.keep(self._residency.held)
        return place

    def _request(self, key: Key, place: int, since: int, level: int) -> Request:
        return Request(*key, self.places.rows[place], since, level)

    def _arrivals(self, flights: list[_Flight]) -> list[Task]:
        """Wait until a flight has landed, or a guess whose place is needed; the tasks that are ready now."""
        waited = flights or list(self._guesses.values())
        if not waited:
            return []
        started = time.perf_counter()
        self._reader.wait([flight.request for flight in waited])
        self.stats.stall_seconds += time.perf_counter() - started
        self._settle_guesses()
        landed = [flight for flight in flights if flight.request.arrived]
        failed = self._land(landed)
        flights[:] = [flight for flight in flights if not flight.request.landed]
        if failed is not None:
            raise failed
        return [flight.task for flight in landed if flight.task is not None]

    def _land(self, flights: list[_Flight], guessed: bool = False) -> EngineError | None:
        """Wait for all of `flights`. What failed leaves no trace; the last failure is returned. Each lands once, also
        where an interrupt makes this begin again."""
        failed = None
        for flight in flights:
            request = flight.request
            if request.landed:
                continue
            self._reader.wait([request])
            key = (request.layer, request.expert)
            if request.nbytes:
                self._residency.put(key, flight.place, guessed, request.level)
                self.stats.bytes_read += request.nbytes
            else:
                self._residency.cancel(key, flight.place)  # what was there before still is
                self.places.keep(self._residency.held)
                failed = request.error or EngineError(
                    f"Reading expert {key[1]} of layer {key[0]} failed."
                )
            request.landed = True
        return failed

    # -- guessing --------------------------------------------------------------------------------------------------

    def _guess(self, guesses: Guesses, todo: set[Key]) -> None:
        """Ask for the likeliest of `guesses` that are neither here nor on their way."""
        for key in guesses:
            if len(self._guesses) >= GUESSES:
                return
            if (
                key[1] >= self.layers[key[0]].experts
                or key in self._residency
                or key in self._guesses
            ):
                continue
            place = self._reserve(key, [*todo, *guesses], self._shards.level)
            if place is None:
                return
            request = self._request(key, place, 0, self._shards.level)
            self._guesses[key] = _Flight(place, self._reader.guess(request))

    def _foresee(self, index: int, routed: Routed, todo: set[Key]) -> None:
        """Guess by what layer `index` would choose now."""
        rule = self.layers[index].routing
        assert rule is not None and routed.scores is not None
        self._guess(self._prefetch.foresee(index, rule, routed.ids, routed.scores), todo)

    def _settle_guesses(self) -> None:
        """Withdraw what has not begun, land what has arrived."""
        if not self._guesses:
            return
        for request in self._reader.withdraw():
            flight = self._guesses.pop((request.layer, request.expert))
            self._residency.cancel((request.layer, request.expert), flight.place)
        arrived = [key for key, flight in self._guesses.items() if flight.request.arrived]
        self.stats.guesses_read += len(arrived)
        self._land([self._guesses.pop(key) for key in arrived], guessed=True)

    # -- computing -------------------------------------------------------------------------------------------------

    def _compute(
        self, index: int, tasks: list[Task], todo: set[Key], x: np.ndarray, outputs: np.ndarray
    ) -> None:
        """Fill the slots of `tasks`, whose experts are here, in `outputs` `[T, k, hidden]`."""
        for batch in scheduler.batches(tasks, SLOTS):
            tokens, ranks = (
                np.concatenate([getattr(task, name) for task in batch])
                for name in ("tokens", "ranks")
            )
            runs = scheduler.runs(batch)
            work = kernels.Work(
                np.array([self._residency.find((index, task.expert)) for task, _, _ in runs]),
                np.array([level for _, level, _ in runs]),
                np.cumsum([0, *(count for _, _, count in runs)]),
                tokens,
            )
            outputs[tokens, ranks] = self._kernels[index](self.places.rows, work, x)
        todo.difference_update((index, task.expert) for task in tasks)


def combine(outputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum over ranks of outputs `[T, k, hidden]` times weights `[T, k]`, rank after rank."""
    combined = outputs[:, 0] * weights[:, :1]
    for rank in range(1, weights.shape[1]):
        combined += outputs[:, rank] * weights[:, rank, None]
    return combined
