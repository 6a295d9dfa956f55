"""The priced scheduler: every missing expert's alternatives have a price in nats and a time, and a budget buys time.

At a step an active expert that is not here at its full level can be read, wholly or to a lower level; used at the level
at which it is here; or its slots can do without it, each with the cheapest of nothing and a resident stand-in at the
best weight. The choice is the one of least `nats + worth * bytes read`: a Lagrangian, so that a nat is spent where it
saves most anywhere in the model, and not where it can be spent first. `LossBudget` sets `worth`, and is the hard limit.
What it reads may stay; `PlaneWorth` tells eviction which planes are worth their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smoe.runtime.choose.prices import LayerPrices, Prices
from smoe.runtime.choose.substitution import Choice, Chosen

CAP = 16.0  # tokens' worth of nats that may be saved up
GAIN, PULL = 0.1, 0.02  # per token: how fast `worth` follows what was spent, and what is saved up
SPAN = 1e4  # how far `worth` may go from where it began: beyond, all is bought or nothing, and the way back is long
KEEP = 0.35  # how much of what a byte is worth counts for keeping it: in time it may come cheaper, or be done without


class LossBudget:
    """A running account of nats: `rate` comes in with every token, up to `CAP` tokens' worth, and what is spent is never
    more than is there. `worth` is what a byte that need not be read may cost, in nats; it follows the spending."""

    def __init__(self, rate: float, layers: int, worth: float):
        self.rate, self.worth, self.balance = rate, worth, rate * CAP / 2
        self._layers, self._token, self._spent = layers, 0.0, 0.0
        self._range = worth / SPAN, worth * SPAN

    def begin(self, layer: int, tokens: int) -> None:
        """A step of so many tokens reaches a layer."""
        if layer == 0 and tokens == 1:
            self._follow()
        if layer == 0:
            self._token = 0.0
        self.balance = min(self.rate * CAP, self.balance + self.rate * tokens / self._layers)

    def spend(self, nats: float, wanted: float) -> None:
        """Of `wanted`, which is what `worth` would have bought, `nats` could be paid."""
        self.balance -= nats
        self._spent += nats
        self._token += wanted

    def collect(self) -> float:
        """What was spent since the last call."""
        spent, self._spent = self._spent, 0.0
        return spent

    def _follow(self) -> None:
        under = float(np.clip(1 - self._token / self.rate, -1, 1))
        saved = self.balance / (self.rate * CAP) * 2 - 1
        self.worth = float(np.clip(self.worth * np.exp(GAIN * under + PULL * saved), *self._range))


class PlaneWorth:
    """What the highest plane of a record that is here is good for at one use, in nats per byte: by how much a use costs
    more without it. A use of an expert at its usual weight costs the least of `nats + worth * bytes` over all levels that
    it can be read up to, and skipping. `weights[l]` float64 `[E]` are the usual ones, `sizes` as in `Priced`."""

    def __init__(
        self, prices: Prices, weights: list[np.ndarray], sizes: list[np.ndarray], budget: LossBudget
    ):
        self._budget, self._at = budget, 0.0
        self._layers = [
            (_usual_nats(of, w, len(ends) - 1), ends.astype(np.float64))
            for of, w, ends in zip(prices.layers, weights, sizes, strict=True)
        ]

    def __call__(self, keys: np.ndarray, levels: np.ndarray) -> np.ndarray:
        worth = KEEP * self._budget.worth
        if not 0.9 * self._at < worth < 1.1 * self._at:
            self._at, self._worth = (
                worth,
                np.concatenate([_plane_worth(*layer, worth) for layer in self._layers]),
            )
        return self._worth[keys, levels - 1]


def _usual_nats(prices: LayerPrices, weights: np.ndarray, full: int) -> np.ndarray:
    """Of a use of each expert at each level from 0, `[E, full + 1]`."""
    e = np.arange(len(weights))
    nats = np.full((len(e), full + 1), np.inf)  # where a bundle does not say what a level costs
    nats[:, 0], nats[:, full] = prices.skip(e, weights), 0
    for level in range(1, min(full, prices.level.shape[1] + 1)):
        nats[:, level] = prices.at_level(e, weights, level)
    return nats


def _plane_worth(nats: np.ndarray, ends: np.ndarray, worth: float) -> np.ndarray:
    """float64 `[E, levels]`, as `PlaneWorth` says."""
    read = np.maximum(ends - ends[:, None], 0)  # [here, up to]
    cost = np.where(ends >= ends[:, None], nats[:, None] + worth * read, np.inf).min(2)
    return (cost[:, :-1] - cost[:, 1:]) / np.diff(ends)


@dataclass(frozen=True)
class _Slots:
    """The slots of experts that are not here at their full level: token, rank, expert, mixing weight, and what takes
    the place (the number of experts: nothing), with which weight, for how many nats."""

    tokens: np.ndarray
    ranks: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    stand_ins: np.ndarray
    stand_in_weights: np.ndarray
    nats: np.ndarray


class Priced:
    """`prices` of the bundle; `sizes[l][j]` bytes of the first j planes of a record of layer l, from j = 0."""

    def __init__(self, prices: Prices, sizes: list[np.ndarray], budget: LossBudget):
        self.prices, self.budget, self._sizes = prices, budget, sizes

    def __call__(self, choice: Choice) -> Chosen:
        experts, here, full = len(choice.resident), choice.here, choice.full
        prices, sizes = self.prices.layers[choice.layer], self._sizes[choice.layer]
        self.budget.begin(choice.layer, len(choice.ids))
        levels = np.full(choice.ids.shape, full)
        missing = np.zeros(experts + 1, bool)
        missing[choice.ids] = True
        missing &= np.append(here < full, False)
        short = np.flatnonzero(missing)
        if not len(short):
            return Chosen(choice.ids, choice.weights, levels)
        slots = _slots(choice, prices, missing)
        nats, saved = _alternatives(slots, prices, sizes, short, here[short], full)
        picked = np.full(experts, full)
        picked[short] = self._pick(nats, saved)
        ids, weights = choice.ids.copy(), choice.weights.copy()
        gone = picked[slots.experts] == 0
        at = slots.tokens[gone], slots.ranks[gone]
        ids[at], weights[at] = slots.stand_ins[gone], slots.stand_in_weights[gone]
        kept = slots.tokens[~gone], slots.ranks[~gone]
        levels[kept] = picked[slots.experts[~gone]]
        return Chosen(ids, weights, levels)

    def _pick(self, nats: np.ndarray, saved: np.ndarray) -> np.ndarray:
        """For every expert (row) the alternative of least cost that the account can pay."""
        rows = np.arange(len(nats))
        picked = (nats - self.budget.worth * saved).argmin(1)
        cost, gain = nats[rows, picked], saved[rows, picked]
        wanted = float(cost.sum())
        limit = max(self.budget.balance, 0)
        if wanted > limit:
            for row in np.argsort(
                -cost / np.maximum(gain, 1), kind="stable"
            ):  # dearest for what it saves first
                picked[row], cost[row] = nats.shape[1] - 1, 0.0
                if cost.sum() <= limit:
                    break
        self.budget.spend(float(cost.sum()), wanted)
        return picked


def _slots(choice: Choice, prices: LayerPrices, missing: np.ndarray) -> _Slots:
    """The slots of `missing` experts, each with the cheapest of skipping and a stand-in that is here at its full level."""
    experts = len(choice.resident)
    tokens, ranks = np.nonzero(missing[choice.ids])
    e, w = choice.ids[tokens, ranks], choice.weights[tokens, ranks].astype(np.float64)
    nats, stand_ins, weights = (
        prices.skip(e, w),
        np.full(len(e), experts),
        np.zeros(len(e), np.float32),
    )
    able = np.flatnonzero(choice.here >= choice.full)
    if len(able):
        others = np.full(experts, experts)
        others[missing[:experts]] = prices.best_stand_in(np.flatnonzero(missing), able)
        others = others[e]
        best = prices.best_weight(e, w, others)
        costs = prices.stand_in(e, w, others, best)
        better = costs < nats
        nats = np.where(better, costs, nats)
        stand_ins = np.where(better, others, stand_ins)
        weights = np.where(better, best, weights).astype(np.float32)
    return _Slots(tokens, ranks, e, w, stand_ins, weights, nats)


def _alternatives(
    slots: _Slots,
    prices: LayerPrices,
    sizes: np.ndarray,
    short: np.ndarray,
    here: np.ndarray,
    full: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats, and bytes saved against reading all that is missing, `[experts, 1 + levels]`: column 0 does without, column j
    computes at level j. What cannot be, or would be silly, costs infinitely much."""
    each = np.zeros((len(slots.experts), full + 1))
    each[:, 0] = slots.nats
    each[:, 1:-1] = np.inf  # where a bundle does not say what a level costs
    levels = np.arange(1, min(full, prices.level.shape[1] + 1))
    each[:, levels] = prices.at_level(slots.experts[:, None], slots.weights[:, None], levels)
    nats = np.zeros((len(short), full + 1))
    np.add.at(nats, np.searchsorted(short, slots.experts), each)
    nats[:, 1:][np.arange(1, full + 1) < here[:, None]] = np.inf
    read = np.maximum(sizes[1 : full + 1] - sizes[here][:, None], 0)
    return nats, np.concatenate([read[:, -1:], read[:, -1:] - read], 1)
