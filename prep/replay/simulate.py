"""Replays a routing trace over eviction policies and budgets: what a policy would have hit, before
a device sees it.

Drives the runtime's own cache, with reads that are done at once; no I/O, no clock. A step uses each
of its experts once: one lookup, however many tokens chose it. Experts of the step in progress are
not evicted where there is room beside them. The bound is Belady's; where records differ in length
it is not quite one, since it looks at when an expert is needed next and not at what it costs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.manifest import Routing
from smoe.prep.errors import PrepError
from smoe.prep.replay.routing_trace import Trace, TraceStep
from smoe.runtime.cache.cache import ExpertCache
from smoe.runtime.cache.eviction import EVICTIONS, PLANES, Belady, Eviction, eviction_named
from smoe.runtime.cache.residency import PINNED, Residency
from smoe.runtime.choosers import substitution_named
from smoe.runtime.ledger import Ledger
from smoe.runtime.routing import (
    Assignment,
    Available,
    Chooser,
    Dispatch,
    Routed,
    as_routed,
    assign,
)
from smoe.runtime.sizes import show_size
from smoe.runtime.stats import Stats
from smoe.runtime.step import Kinds, Phase, Sequence, Span, Step

BOUND = "belady"
REPLAYED = {name: kind for name, kind in EVICTIONS.items() if name != PLANES}  # of whole records
RATES = ("hit_rate", "decode_hit_rate", "after_hit_rate", "substituted_share")
PER_LAYER = "layer-"  # before a policy's name: every layer keeps to its share of the budget


@dataclass(frozen=True)
class Row:
    """One policy at one budget. Lookups and hits are of the experts that the router chose;
    `after_*` of those that a substitution left, which are the same without one. `peak` was held at
    most, after a step."""

    policy: str
    budget: int
    lookups: int
    hits: int
    decode_lookups: int
    decode_hits: int
    after_lookups: int
    after_hits: int
    slots: int
    substituted: int
    loads: int
    bytes_read: int
    peak: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.lookups)

    @property
    def decode_hit_rate(self) -> float:
        return self.decode_hits / max(1, self.decode_lookups)

    @property
    def after_hit_rate(self) -> float:
        return self.after_hits / max(1, self.after_lookups)

    @property
    def substituted_share(self) -> float:
        return self.substituted / max(1, self.slots)


def simulate(
    trace: Trace,
    policies: SequenceOf[str],
    budgets: SequenceOf[int],
    substitution: str | None = None,
    warm: bool = False,
    counting: str = "step",
    progress: Callable[[list], Iterable] = iter,
) -> list[Row]:
    """Every policy at every budget (bytes, or records where their sizes are not known), in this
    order.

    Policies are those of `REPLAYED` with their parameter (`decay:64`), `belady`, and any of these
    after `layer-`. `substitution` is one of `runtime.choosers.SUBSTITUTIONS`, as for
    the engine; Belady is without it. `warm` starts from the calibration's counts. `counting` is one
    of `COUNTINGS`. `progress` may report progress over the list of runs."""
    if counting not in COUNTINGS:
        raise PrepError(f"There is no counting {counting!r}; there are {', '.join(COUNTINGS)}.")
    if substitution is not None and counting == "slot":
        raise PrepError("Substitution decides for a whole step; it cannot be counted slot by slot.")
    if warm and trace.share is None:
        raise PrepError(f"{trace.name} has no calibration counts to start from; leave out warm.")
    for policy in policies:
        _eviction(policy, trace)  # a wrong name is said before the first run
        if policy.startswith(PER_LAYER) and counting != "whole":
            _refuse_small_shares(policy, trace, min(*budgets, trace.total))
    substitute = (
        None if substitution is None else functools.partial(_substitution, substitution, trace)
    )
    if substitute:
        substitute()  # a wrong name, again
    rows = []
    for budget, policy in progress([(budget, policy) for budget in budgets for policy in policies]):
        eviction = _eviction(policy, trace)
        if warm and trace.share is not None:
            eviction.warm(trace.share)
        replay, held_in = COUNTINGS[counting]
        shares = policy.startswith(PER_LAYER)
        residency = held_in(
            trace.experts, min(budget, trace.total), eviction, trace.records, shares
        )
        chooser = as_routed
        if substitute is not None and not policy.endswith(BOUND):
            chooser = substitute()
        rows.append(replay(trace, residency, chooser).run(policy, budget))
    return rows


def least_for_shares(trace: Trace) -> int:
    """The least budget of which every layer's share holds a record."""
    return max(trace.records) * len(trace.experts)


def _refuse_small_shares(policy: str, trace: Trace, budget: int) -> None:
    least = least_for_shares(trace)
    if budget < least:
        enough = show_size(least, up=True) if trace.sized else trace.show(least)
        raise PrepError(
            f"A budget of {trace.show(budget)} has no record for each layer, which {policy} needs; "
            f"give {enough} or more, or leave out {policy}."
        )


def report(trace: Trace, rows: SequenceOf[Row]) -> dict:
    """What `--json` prints: the trace, and every row with its rates and how many points of hit rate
    it lies below Belady's at the same budget, where that was replayed."""
    bounds = {row.budget: row for row in rows if row.policy == BOUND}
    return {
        "trace": {
            "name": trace.name,
            "layers": len(trace.experts),
            "experts": trace.experts,
            "records": trace.records if trace.sized else None,
            "token_cycle": trace.token_cycle,
            "exact_bound": len(set(trace.records)) == 1,
        },
        "rows": [
            dataclasses.asdict(row)
            | {name: getattr(row, name) for name in RATES}
            | {
                "to_bound": bounds[row.budget].hit_rate - row.hit_rate
                if row.budget in bounds
                else None
            }
            for row in rows
        ],
    }


def _eviction(policy: str, trace: Trace) -> Eviction:
    name = policy.removeprefix(PER_LAYER)
    if name == BOUND:
        return Belady(trace.experts, [(step.layer, step.ids) for step in trace.steps])
    if name == PLANES:
        raise PrepError(
            f"{name} lets go of planes, and a trace is of whole records; it can replay "
            f"{', '.join(REPLAYED)}."
        )
    eviction = eviction_named(name, trace.experts)
    if eviction.needs_scores and not trace.scored:
        able = ", ".join(n for n, kind in REPLAYED.items() if not kind.needs_scores)
        raise PrepError(
            f"{name} needs the router's scores, which {trace.name} lacks; it can replay {able}."
        )
    return eviction


def _substitution(name: str, trace: Trace) -> Chooser:
    """Afresh for every run: some of them remember."""
    made = substitution_named(name, lambda table: trace.tables.get(table, []))
    if not trace.scored or any(not isinstance(rule, Routing) for rule in trace.rules or [None]):
        raise PrepError(
            f"{trace.name} does not say scores and routing rules; substitution needs a bundle that "
            f"has both."
        )
    return made


class Replay:
    """One run as the engine does it: `cache` holds `trace`'s experts, `chooser` decides for the
    steps that decode, on behalf of one sequence with `ledger`. `full` is the level of a whole
    record; `sizes[l][j]` are the bytes of the first j planes, from j = 0 (None: records are what
    the trace says)."""

    def __init__(
        self,
        trace: Trace,
        residency: Residency,
        chooser: Chooser = as_routed,
        ledger: Ledger | None = None,
        full: int = 1,
        sizes: SequenceOf[np.ndarray] | None = None,
    ):
        self.trace, self.residency, self.chooser, self.full = trace, residency, chooser, full
        self._sizes = sizes or [np.array([0, record]) for record in trace.records]
        self._sequence = Sequence(_NoState(), ledger)
        self.stats = Stats()
        self.cache = ExpertCache(
            residency, None, self._read, uses=1, stats=self.stats, threads=0, streams=False
        )

    def run(self, policy: str, budget: int) -> Row:
        """Every step of the trace."""
        decode_lookups = decode_hits = peak = 0
        for step in self.trace.steps:
            before = self.stats.wanted, self.stats.wanted_hits
            self.step(step)
            if step.decode:
                decode_lookups += self.stats.wanted - before[0]
                decode_hits += self.stats.wanted_hits - before[1]
            peak = max(peak, self.residency.total)
        stats = self.stats
        return Row(
            policy=policy,
            budget=budget,
            lookups=stats.wanted,
            hits=stats.wanted_hits,
            decode_lookups=decode_lookups,
            decode_hits=decode_hits,
            after_lookups=stats.hits + stats.misses,
            after_hits=stats.hits,
            slots=stats.slots,
            substituted=stats.substituted,
            loads=stats.loads,
            bytes_read=stats.bytes_read,
            peak=peak,
        )

    def step(self, step: TraceStep) -> None:
        """One layer's part of a step, through the cache."""
        routed = self._routed(step)
        available = Available(level=self.cache.levels(step.layer), full=self.full)
        assignment = assign(self.chooser, routed, available)
        self.stats.slots += step.ids.size
        self.stats.substituted += int((assignment.ids != step.ids).sum())
        self.assigned(routed, assignment)
        self.cache.observe(step.layer, step.ids, step.scores)
        self.bring(step.layer, assignment, available)

    def assigned(self, routed: Routed, assignment: Assignment) -> None:
        """What the chooser said; for those who count more."""

    def bring(self, layer: int, assignment: Assignment, available: Available) -> None:
        """What the assignment needs, however many tokens need it."""
        dispatch = Dispatch.of(assignment, available)
        ones = np.ones_like(dispatch.experts)
        for _ in self.cache.bring(layer, dispatch.experts, dispatch.levels, ones):
            pass

    def _routed(self, step: TraceStep) -> Routed:
        phase = Phase.DECODE if step.decode else Phase.PREFILL
        tokens = len(step.ids)
        span = Span(self._sequence, np.zeros(tokens, np.int64), np.zeros(0, np.int64), phase)
        weights = np.zeros(step.ids.shape, np.float32) if step.weights is None else step.weights
        return Routed(
            layer=step.layer,
            step=Step((span,)),
            hidden=np.zeros((tokens, 0), np.float32),
            ids=step.ids,
            weights=weights,
            scores=step.scores,
            # The raw weights are not in a trace. They change what a stand-in counts for, never
            # which one it is.
            raw=step.scores,
            rule=self.trace.rules[step.layer] if self.trace.rules else None,
        )

    def _read(self, layer: int, expert: int, into: np.ndarray, since: int, level: int) -> int:
        return int(self._sizes[layer][level] - self._sizes[layer][since])


class _NoState:
    """Of a sequence that is only replayed."""

    def rewind(self, length: int) -> int:
        return length

    def fork(self, length: int) -> _NoState:
        return self

    def snapshot(self, length: int) -> None:
        return None

    def restore(self, snapshot: object) -> None:
        pass

    def arrays(self, length: int) -> Iterator[tuple[str, np.ndarray]]:
        return iter(())

    def check(self, kinds: Kinds, length: int) -> None:
        pass

    def load(self, arrays: Mapping[str, np.ndarray], length: int) -> None:
        pass


class SlotReplay(Replay):
    """Every slot is a lookup by itself, and nothing is shielded."""

    def step(self, step: TraceStep) -> None:
        """Slot after slot."""
        for expert in step.ids.reshape(-1).tolist():
            slot = dataclasses.replace(step, ids=np.array([[expert]]), weights=None, scores=None)
            super().step(slot)


class WholeStepReplay(Replay):
    """BigMoeOnEdge's: room is made when a step has ended, so that more than the budget may be held
    until then."""

    residency: WholeSteps

    def step(self, step: TraceStep) -> None:
        """The same, then down to the budget."""
        super().step(step)
        self.residency.trim(step.layer, step.ids)


class WholeSteps(Residency):
    """Holds whatever comes until it is trimmed."""

    def __init__(
        self,
        experts: SequenceOf[int],
        capacity: int,
        eviction: Eviction,
        sizes: SequenceOf[int],
        shares: bool = False,
    ):
        total = sum(n * size for n, size in zip(experts, sizes, strict=True))
        super().__init__(experts, total, eviction, sizes, shares)
        self._limit = capacity

    @property
    def share(self) -> int | None:
        """Of the budget that it is trimmed to."""
        return self._limit // self._shares if self._shares else None

    def full(self, layer: int, size: int) -> bool:
        """Never, before `trim`."""
        return False

    def trim(self, layer: int, ids: np.ndarray) -> None:
        """Evict down to the budget, or the layer's share of it, but none of `ids` `[T, k]`, which
        the step used."""
        pins = np.zeros(self.eviction.first[-1], np.int8)
        pins[self.eviction.first[layer] + ids[ids < self.eviction.experts[layer]]] = PINNED
        while self._over(layer):
            victim = self.victim(layer, 0, None, pins)
            if victim is None:
                return
            self.evict(victim)

    def _over(self, layer: int) -> bool:
        if self.share is None:
            return self.total > self._limit
        return self.used[layer] > self.share


# How a replay may count, by name.
COUNTINGS: dict[str, tuple[type[Replay], type[Residency]]] = {
    "step": (Replay, Residency),
    "whole": (WholeStepReplay, WholeSteps),
    "slot": (SlotReplay, Residency),
}
