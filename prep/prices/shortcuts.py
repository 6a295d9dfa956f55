"""Shortcuts taken on purpose, at chosen slots, to measure what they cost beside what their prices
say.

The bundle runs in the runtime's own engine, with a substitution that does as it is told. A row of
text runs exactly once, which shows what every slot was; then once for every `Perturbation`, whose
slots take their shortcut. Slots of a plan are places (layer, token, rank), so that two plans
perturb as many although routers decide otherwise after a shortcut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smoe.artifacts import Bundle, open_bundle
from smoe.runtime import Engine, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.choose.prices import KINDS, Prices
from smoe.runtime.execution import AUTO, Execution
from smoe.runtime.routing import Assignment, Available, Routed, as_routed

LENGTH = 256  # tokens of a row
AT_ONCE = 32  # tokens whose logits are compared at a time
ABLE = 0.5  # of a layer's experts may stand in, drawn anew for every row and layer


@dataclass
class Seen:
    """One row's slots as the exact run had them: per layer ids int64, weights float32 `[T, k]`."""

    ids: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)


# Which kind of shortcut every slot takes: per layer int `[T, k]`, an index into KINDS or -1.
Kinds = list[np.ndarray]
Perturbation = Callable[[Seen, np.random.Generator], Kinds]


@dataclass
class Outcome:
    """One perturbation's sums over all rows. `moments` and `roots` float64 `[KINDS]` are of p and
    sqrt(p) (`runtime.prices`), `kl` is the measured divergence in nats, `square` the sum of the
    slots' squared mixing weights."""

    tokens: int = 0
    kl: float = 0.0
    slots: int = 0
    square: float = 0.0
    moments: np.ndarray = field(default_factory=lambda: np.zeros(len(KINDS)))
    roots: np.ndarray = field(default_factory=lambda: np.zeros(len(KINDS)))

    def predicted(self, fit: np.ndarray) -> float:
        """Nats per token by the prices with this `fit` `[KINDS, 2]`."""
        return float(
            (fit[:, 0] * self.moments + fit[:, 1] * self.roots).sum() / max(1, self.tokens)
        )

    @property
    def measured(self) -> float:
        """Nats per token."""
        return self.kl / max(1, self.tokens)


class ScriptedShortcuts:
    """A chooser that does as it is told. Between `begin`s every layer sees the tokens of one row in
    order."""

    def __init__(self, prices: Prices):
        self._prices = prices
        self.begin(None, None, np.random.default_rng(0))

    def begin(
        self, kinds: Kinds | None, outcome: Outcome | None, random: np.random.Generator
    ) -> None:
        """A row starts: its slots take shortcuts of these `kinds`, which are added to `outcome`;
        None: they are exact, and `seen` tells what they were."""
        layers = self._prices.layers
        self._kinds, self._outcome, self._random = kinds, outcome, random
        self._able = [
            random.permutation(len(layer.cross))[: max(1, int(ABLE * len(layer.cross)))]
            for layer in layers
        ]
        self._at = [0] * len(layers)
        self.seen = Seen(
            ids=[np.zeros((0, 0), np.int64)] * len(layers),
            weights=[np.zeros((0, 0), np.float32)] * len(layers),
        )

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        layer, start = routed.layer, self._at[routed.layer]
        self._at[layer] += routed.tokens
        if self._kinds is None:
            self._remember(routed, start)
            return as_routed(routed, available)
        experts, full = len(available.level), available.full
        kinds = np.where(routed.ids < experts, self._kinds[layer][start : self._at[layer]], -1)
        ids, weights = routed.ids.copy(), routed.weights.copy()
        levels = np.full(ids.shape, full)
        prices = self._prices.layers[layer]
        for kind, name in enumerate(KINDS):
            at = np.nonzero(kinds == kind)
            e, w = routed.ids[at], routed.weights[at].astype(np.float64)
            if not len(e):
                continue
            if name == "skip":
                ids[at], weights[at] = experts, 0
                p = prices.skip(e, w)
            elif name == "standin":
                ids[at], weights[at], p = self._stand_ins(layer, e, w)
            else:
                levels[at] = self._random.integers(1, max(2, full), len(e))
                p = prices.at_level(e, w, levels[at])
            self._count(kind, w, p)
        return Assignment(ids=ids, weights=weights, levels=levels)

    def _remember(self, routed: Routed, start: int) -> None:
        for layers, new in ((self.seen.ids, routed.ids), (self.seen.weights, routed.weights)):
            before = layers[routed.layer]
            layers[routed.layer] = np.concatenate([before, new]) if start else new.copy()

    def _count(self, kind: int, w: np.ndarray, p: np.ndarray) -> None:
        assert self._outcome is not None
        self._outcome.slots += len(w)
        self._outcome.square += float((w * w).sum())
        self._outcome.moments[kind] += p.sum()
        self._outcome.roots[kind] += np.sqrt(p).sum()

    def _stand_ins(
        self, layer: int, e: np.ndarray, w: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The cheapest of those that may, as the scheduler would choose it."""
        able, prices = self._able[layer], self._prices.layers[layer]
        best = prices.best_weight(e[:, None], w[:, None], able)
        costs = prices.stand_in(e[:, None], w[:, None], able, best)
        costs = np.where(e[:, None] == able, np.inf, costs)
        rows, least = np.arange(len(e)), costs.argmin(1)
        return able[least], best[rows, least].astype(np.float32), costs[rows, least]


@dataclass(frozen=True)
class Exact:
    """A row's logits float32 `[T, V]` as they are without shortcuts, and what all runs need of
    them: probabilities float32, and the logarithms of their sums float64 `[T]`. Where the
    vocabulary is large this is a good part of all work, so that nothing is done twice, and little
    is float64."""

    logits: np.ndarray
    probabilities: np.ndarray
    log_sums: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray) -> Exact:
        exponentials, log_sums = _exponentials(logits)
        return cls(logits, exponentials / exponentials.sum(-1, keepdims=True), log_sums)

    def divergence(self, logits: np.ndarray) -> float:
        """The sum over tokens of the KL divergence from these to other logits, in nats."""
        total = 0.0
        for start in range(0, len(logits), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            _, log_sums = _exponentials(logits[rows])
            apart = self.logits[rows].astype(np.float64) - logits[rows]
            total += float(np.einsum("tv,tv->", self.probabilities[rows], apart))
            total += float((log_sums - self.log_sums[rows]).sum())
        return total


def _exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[T, V]`, of what lies below each row's largest, and the logarithms of the sums of
    the exponentials themselves, float64 `[T]`."""
    largest = logits.max(-1, keepdims=True)
    exponentials = np.exp(logits - largest)
    return exponentials, largest[:, 0] + np.log(exponentials.sum(-1, dtype=np.float64))


def outcomes(
    bundle: Path,
    prices: Prices,
    rows: Sequence[np.ndarray],
    perturbations: Sequence[Perturbation],
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Outcome]:  # fmt: skip
    """What each of `perturbations` costs over `rows` of token ids, `prices` being those without a
    fit."""
    told, results = ScriptedShortcuts(prices), [Outcome() for _ in perturbations]
    opened = open_bundle(bundle)
    longest = max(len(row) for row in rows)
    with Engine.open(
        bundle,
        beside=few_experts(opened, longest),
        context=longest,
        policies=Policies(substitution=told),
        io="buffered",
    ) as engine:
        for number in progress(range(len(rows))):
            row = rows[number]
            told.begin(None, None, np.random.default_rng(seed))
            exact, seen = Exact.of(engine.logits(row)), told.seen
            for perturb, outcome in zip(perturbations, results, strict=True):
                random = np.random.default_rng([seed, number])
                told.begin(perturb(seen, random), outcome, random)
                outcome.kl += exact.divergence(engine.logits(row))
                outcome.tokens += len(row)
    return results


def few_experts(bundle: Bundle, context: int, execution: Execution = AUTO) -> int | None:
    """What to state beside this process where a text passes every layer once: few experts where
    there are many, since none of them is wanted again before all others were."""
    layers = bundle.manifest.layers
    widest = max(layer.experts for layer in layers)
    if 2 * widest >= sum(layer.experts for layer in layers):
        return None
    few = max(2 * max(layer.top_k for layer in layers), widest // 4)
    return memory_for(bundle, few, context, execution=execution)


# -- perturbations ---------------------------------------------------------------------------------


def cheapest(kind: str, prices: Prices, nats: float) -> Perturbation:
    """What a scheduler would do with one kind alone: of a random `ABLE` of all slots those of the
    lowest price, up to `nats` per token."""

    def perturbation(seen: Seen, random: np.random.Generator) -> Kinds:
        slots = zip(seen.ids, seen.weights, strict=True)
        p = [_price(kind, prices, layer, ids, w) for layer, (ids, w) in enumerate(slots)]
        missing = [random.random(layer_prices.shape) < ABLE for layer_prices in p]
        sorted_prices = np.sort(
            np.concatenate([layer_prices[m] for layer_prices, m in zip(p, missing, strict=True)])
        )
        within = int(np.searchsorted(np.cumsum(sorted_prices), nats * len(seen.ids[0])))
        limit = sorted_prices[min(within, len(sorted_prices) - 1)]
        return [
            np.where(m & (layer_prices < limit), KINDS.index(kind), -1)
            for layer_prices, m in zip(p, missing, strict=True)
        ]

    return perturbation


def _price(kind: str, prices: Prices, layer: int, ids: np.ndarray, w: np.ndarray) -> np.ndarray:
    """p of every slot; for a stand-in that of nothing in its place, which bounds it; infinite for
    no expert."""
    layer_prices = prices.layers[layer]
    e = np.minimum(ids, len(layer_prices.cross) - 1)
    p = layer_prices.at_level(e, w, 1) if kind == "level" else layer_prices.skip(e, w)
    return np.where(ids < len(layer_prices.cross), p, np.inf)


def at_random(
    kinds: Sequence[str], share: float, tilt: float, layers: float, prefer: str, seed: int
) -> Perturbation:
    """`share` of all slots, in a random part `layers` of the layers, each with one of `kinds`:
    slots of small (`tilt` < 0) or large mixing weight, or of unlikely or likely `prefer` "experts",
    come first. The count is exact."""

    def perturbation(seen: Seen, random: np.random.Generator) -> Kinds:
        fixed = np.random.default_rng(seed)  # the same layers and experts in every row
        total, count = sum(layer_ids.size for layer_ids in seen.ids), len(seen.ids)
        used = fixed.permutation(count)[: max(1, round(layers * count))]
        keys = []
        for layer in range(count):
            ids, w = seen.ids[layer], seen.weights[layer]
            liked = fixed.standard_normal(int(ids.max()) + 2)
            z = liked[ids] if prefer == "experts" else (w - w.mean()) / max(float(w.std()), 1e-9)
            keys.append(
                np.where(np.isin(layer, used), tilt * z + random.gumbel(size=ids.shape), -np.inf)
            )
        flat = np.concatenate([layer_keys.reshape(-1) for layer_keys in keys])
        able = int(np.isfinite(flat).sum())
        take = np.argsort(-flat, kind="stable")[: min(able, round(share * total))]
        marked = np.full(total, -1)
        marked[take] = random.choice([KINDS.index(kind) for kind in kinds], len(take))
        ends = np.cumsum([layer_keys.size for layer_keys in keys])
        return [
            part.reshape(layer_keys.shape)
            for part, layer_keys in zip(np.split(marked, ends[:-1]), keys, strict=True)
        ]

    return perturbation
