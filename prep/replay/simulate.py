"""Replays a routing trace over eviction policies and budgets: what a policy would have hit, before a device sees it.

Drives the runtime's own residency and policies, in the order in which the engine calls them; no I/O, no clock. A step
uses each of its experts once: one lookup, however many tokens chose it. Experts of the step in progress are not evicted
where there is room beside them. The bound is Belady's; where records differ in length it is not quite one, since it
looks at when an expert is needed next and not at what it costs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.manifest import Routing
from smoe.prep.errors import PrepError
from smoe.prep.replay.routing_trace import Step, Trace
from smoe.runtime.budget import parse_size
from smoe.runtime.cache.eviction import EVICTIONS, Belady, Eviction, eviction_named
from smoe.runtime.cache.residency import Key, Residency
from smoe.runtime.choose.substitution import Choice, Chosen, Substitution
from smoe.runtime.options import substitution_named
from smoe.runtime.scheduler import uses

BOUND = "belady"
RATES = ("hit_rate", "decode_hit_rate", "after_hit_rate", "substituted_share")
PER_LAYER = "layer-"  # before a policy's name: every layer keeps to its share of the budget


@dataclass(frozen=True)
class Row:
    """One policy at one budget. Lookups and hits are of the experts that the router chose; `after_*` of those that a
    substitution left, which are the same without one. `distinct` experts were ever loaded, `peak` was held at most."""

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
    distinct: int
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
    policies: Sequence[str],
    budgets: Sequence[int],
    substitution: str | None = None,
    warm: bool = False,
    counting: str = "step",
    over: Callable[[list], Iterable] = iter,
) -> list[Row]:
    """Every policy at every budget (bytes, or records where their sizes are not known), in this order.

    Policies are `runtime.policies.eviction.EVICTIONS` with their parameter (`decay:64`), `belady`, and any of these
    after `layer-`. `substitution` is one of `runtime.policies.named.SUBSTITUTIONS`, as for the engine; Belady is
    without it. `warm` starts from the calibration's counts. `counting` is one of `COUNTINGS`. `over` may report progress over the list of runs."""
    if counting not in COUNTINGS:
        raise PrepError(f"There is no counting {counting!r}; there are {', '.join(COUNTINGS)}.")
    if substitution is not None and counting == "slot":
        raise PrepError("Substitution decides for a whole step; it cannot be counted slot by slot.")
    if warm and trace.share is None:
        raise PrepError(f"{trace.name} has no calibration counts to start from; leave out warm.")
    for policy in policies:
        _eviction(policy, trace)  # a wrong name is said before the first run
    substitute = (
        None if substitution is None else functools.partial(_substitution, substitution, trace)
    )
    if substitute:
        substitute()  # a wrong name, again
    rows = []
    for budget, policy in over([(budget, policy) for budget in budgets for policy in policies]):
        eviction = _eviction(policy, trace)
        if warm:
            eviction.warm(trace.share)
        replay, held_in = COUNTINGS[counting]
        shares = policy.startswith(PER_LAYER)
        residency = held_in(
            trace.experts, min(budget, trace.total), eviction, trace.records, shares
        )
        bound = policy.endswith(BOUND)
        rows.append(
            replay(trace, residency, None if bound or not substitute else substitute()).run(
                policy, budget
            )
        )
    return rows


def with_bound(trace: Trace, policies: Sequence[str]) -> list[str]:
    """What to replay: the bound, then what was asked for, or all that this trace allows if nothing was."""
    able = [n for n, kind in EVICTIONS.items() if trace.scored or not kind.needs_scores]
    return [
        BOUND,
        *(policy for policy in policies or [*able, "layer-lru", "layer-lfu"] if policy != BOUND),
    ]


def report(trace: Trace, rows: Sequence[Row]) -> dict:
    """What `--json` prints: the trace, and every row with its rates and how many points of hit rate it lies below
    Belady's at the same budget, where that was replayed."""
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
        future = [(step.layer, uses(step.ids, trace.experts[step.layer])) for step in trace.steps]
        return Belady(trace.experts, future)
    eviction = eviction_named(name, trace.experts)
    if eviction.needs_scores and not trace.scored:
        able = ", ".join(n for n, kind in EVICTIONS.items() if not kind.needs_scores)
        raise PrepError(
            f"{name} needs the router's scores, which {trace.name} lacks; it can replay {able}."
        )
    return eviction


def _substitution(name: str, trace: Trace) -> Substitution:
    """Afresh for every run: some of them remember."""
    made = substitution_named(name, lambda table: trace.tables.get(table, []))
    if not trace.scored or any(not isinstance(rule, Routing) for rule in trace.rules or [None]):
        raise PrepError(
            f"{trace.name} does not say scores and routing rules; substitution needs a bundle that has both."
        )
    return made


class Replay:
    """One run as the engine does it: each step's experts once, room made before each load, and what the step uses is
    shielded while there is room beside it. `full` is the level of a whole record."""

    full = 1

    def __init__(
        self, trace: Trace, residency: Residency, substitution: Substitution | None = None
    ):
        self._trace, self.residency, self._substitution = trace, residency, substitution
        self._loaded = [np.zeros(n, bool) for n in trace.experts]
        self._counts = dict.fromkeys(
            ("lookups", "hits", "decode_lookups", "decode_hits", "after_lookups", "after_hits", "slots", "substituted",
             "loads", "bytes_read", "peak"), 0,
        )  # fmt: skip

    def run(self, policy: str, budget: int) -> Row:
        for step in self._trace.steps:
            self.residency.begin(step.layer, len(step.ids), step.scores)
            self.step(step)
            self.residency.end(step.layer)
        return Row(
            policy,
            budget,
            distinct=int(sum(loaded.sum() for loaded in self._loaded)),
            **self._counts,
        )

    def step(self, step: Step) -> None:
        layer, experts = step.layer, self._trace.experts[step.layer]
        resident, here = self.residency.resident(layer), self.residency.levels(layer)
        wanted = uses(step.ids, experts)
        self.count(step.decode, len(wanted), int(resident[wanted].sum()))
        self._add(slots=step.ids.size)
        chosen = self.chosen(step, resident, here)
        self._add(substituted=int((chosen.ids != step.ids).sum()))
        needed = self.needed(chosen, experts)
        computed = uses(chosen.ids, experts)
        missing = [e for e in computed if here[e] < needed[e]]
        self._add(after_lookups=len(computed), after_hits=len(computed) - len(missing))
        tokens = np.bincount(step.ids.reshape(-1), minlength=experts).tolist()
        for e in wanted:
            self.residency.use((layer, e), tokens[e])
        for e in missing:
            self.load((layer, e), [(layer, e) for e in computed], int(needed[e]))

    def needed(self, chosen: Chosen, experts: int) -> np.ndarray:
        """The highest level of any slot of each expert, int `[E]`."""
        needed = np.zeros(experts + 1, np.int64)
        np.maximum.at(needed, chosen.ids, self.full if chosen.levels is None else chosen.levels)
        return needed[:experts]

    def load(self, key: Key, shield: Iterable[Key] = (), level: int = 1) -> None:
        since = int(self.residency.levels(key[0])[key[1]])
        place = self.residency.reserve(key, shield, level)
        if place is None:  # the step does not fit at once: of what was computed something goes
            place = self.residency.reserve(key, (), level)
        if place is None:
            raise PrepError(
                f"A record of {self._trace.show(self._trace.records[key[0]])} does not fit the budget, or a layer's share "
                "of it; give more, or a policy without shares."
            )
        self.residency.put(key, place, level=level)
        self._loaded[key[0]][key[1]] = True
        self._add(loads=1, bytes_read=self.bytes_between(key[0], since, level))
        self._counts["peak"] = max(self._counts["peak"], self.residency.total)

    def bytes_between(self, layer: int, since: int, level: int) -> int:
        """What the planes after the first `since` take, up to `level`."""
        return self._trace.records[layer]

    def count(self, decode: bool, lookups: int, hits: int) -> None:
        self._add(lookups=lookups, hits=hits)
        if decode:
            self._add(decode_lookups=lookups, decode_hits=hits)

    def _add(self, **counts: int) -> None:
        for name, more in counts.items():
            self._counts[name] += more

    def chosen(self, step: Step, resident: np.ndarray, here: np.ndarray) -> Chosen:
        """What runs."""
        if self._substitution is None:
            return Chosen(step.ids, step.weights)
        rule = self._trace.rules[step.layer]
        # The raw weights are not in a trace. They change what a stand-in counts for, never which one it is.
        return Chosen(*self._substitution(
            Choice(step.layer, rule, step.ids, step.weights, step.scores, step.scores, resident, here, self.full)
        ))  # fmt: skip


class SlotReplay(Replay):
    """Every slot is a lookup by itself, and nothing is shielded."""

    def step(self, step: Step) -> None:
        self._add(slots=step.ids.size)
        for expert in step.ids.reshape(-1).tolist():
            if expert < self._trace.experts[step.layer]:
                key = step.layer, expert
                hit = key in self.residency
                self.count(step.decode, 1, hit)
                self._add(after_lookups=1, after_hits=hit)
                self.residency.use(key)
                if not hit:
                    self.load(key)


class WholeStepReplay(Replay):
    """BigMoeOnEdge's: room is made when a step has ended, so that more than the budget may be held until then."""

    residency: WholeSteps

    def step(self, step: Step) -> None:
        super().step(step)
        self.residency.trim(
            step.layer, [(step.layer, e) for e in uses(step.ids, self._trace.experts[step.layer])]
        )


class WholeSteps(Residency):
    """Holds whatever comes until it is trimmed."""

    def __init__(
        self,
        experts: Sequence[int],
        capacity: int,
        eviction: Eviction,
        sizes: Sequence[int],
        shares: bool = False,
    ):
        total = sum(n * size for n, size in zip(experts, sizes, strict=True))
        super().__init__(experts, total, eviction, sizes)
        self._limit, self._share = capacity, capacity // len(experts) if shares else None

    def _full(self, layer: int, size: int) -> bool:
        return False

    def trim(self, layer: int, shield: Iterable[Key]) -> None:
        """Evict down to the budget, or the layer's share of it, but nothing in `shield`."""
        shield = list(shield)
        while self.total > self._limit if self._share is None else self._used[layer] > self._share:
            victim = self._victim(layer, 0, shield)
            if victim is None:
                return
            self._drop(victim)


# How a replay may count, by name.
COUNTINGS: dict[str, tuple[type[Replay], type[Residency]]] = {
    "step": (Replay, Residency),
    "whole": (WholeStepReplay, WholeSteps),
    "slot": (SlotReplay, Residency),
}


# -- budgets ---------------------------------------------------------------------------------------------------------------

SWEEP = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)  # of all experts, where nothing is asked for


def budgets_of(trace: Trace, memory: Sequence[str], residency: Sequence[float]) -> list[int]:
    """Bytes for resident experts (records, where their sizes are not known) of what was asked for: sizes, or parts of all
    experts; `SWEEP` if neither was."""
    if memory and residency:
        raise PrepError("Budgets are given either as memory or as residency, not as both.")
    wrong = [part for part in residency if not 0 < part <= 1]
    if wrong:
        raise PrepError(
            f"A residency of {wrong[0]} was asked for; it is a part of all experts, above 0 and up to 1."
        )
    if memory and not trace.sized and not all(text.strip().isdigit() for text in memory):
        raise PrepError(
            f"{trace.name} does not say how large records are; give --memory as a number of records."
        )
    asked = [parse_size(text) for text in memory] or [
        int(part * trace.total) for part in residency or SWEEP
    ]
    least = max(trace.records)
    for budget in asked:
        if budget < least:
            raise PrepError(
                f"A budget of {trace.show(budget)} holds no record of {trace.show(least)}; give more."
            )
    return asked
