"""The priced scheduler: every missing expert's alternatives have a price in nats and a time, and a budget buys time.

At a step an active expert that is not here at its full level can be read, wholly or to a lower level; used at the level
at which it is here; or its slots can do without it, each with the cheapest of nothing and a resident stand-in at the
best weight. The choice is the one of least `nats + worth * bytes read`: a Lagrangian, so that a nat is spent where it
saves most anywhere in the model, and not where it can be spent first. `LossBudget` sets `worth`, and is the hard limit.
What is read is also there next time, if nothing took its place until then: `Reuse` says how likely that is, and so much
of what would be due again is taken off its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smoe.runtime.policies.substitution import Choice, Chosen
from smoe.runtime.prices import LayerPrices, Prices

CAP = 16.0  # tokens' worth of nats that may be saved up
GAIN, PULL = 0.1, 0.02  # per token: how fast `worth` follows what was spent, and what is saved up
CERTAIN = 0.5  # how much of what is due again counts: it may come cheaper than today
HALF = 64.0  # tokens in which what `Reuse` remembers loses half of its weight


class LossBudget:
    """A running account of nats: `rate` comes in with every token, up to `CAP` tokens' worth, and what is spent is never
    more than is there. `worth` is what a byte that need not be read may cost, in nats; it follows the spending."""

    def __init__(self, rate: float, layers: int, worth: float):
        self.rate, self.worth, self.balance = rate, worth, rate * CAP / 2
        self._layers, self._token, self._spent = layers, 0.0, 0.0

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
        self.worth *= float(np.exp(GAIN * under + PULL * saved))


class Reuse:
    """How likely an expert that is read now is still here when it is wanted again: its layer's `experts` are wanted at
    rates that are remembered, and `capacity` places stay for as many tokens as it takes to read so many."""

    def __init__(self, experts: Sequence[int], capacity: int):
        self._rates = [np.zeros(count) for count in experts]  # of each expert, per token
        self._capacity, self._reads, self._read = capacity, float(len(experts)), 0

    def begin(self, layer: int, ids: np.ndarray) -> None:
        """A step of ids `[T, k]` reaches a layer."""
        tokens, rates = len(ids), self._rates[layer]
        kept = 0.5 ** (tokens / HALF)
        if layer == 0:
            self._reads, self._read = kept * self._reads + (1 - kept) * self._read / tokens, 0
        rates *= kept
        rates += (1 - kept) / tokens * np.bincount(ids.reshape(-1), minlength=len(rates) + 1)[:-1]

    def read(self, count: int) -> None:
        """So many experts take a place."""
        self._read += count

    def chance(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """float64, of each of `experts`."""
        return 1 - np.exp(-self._rates[layer][experts] * self._capacity / max(self._reads, 0.01))


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
    """`prices` of the bundle; `sizes[l][j]` bytes of the first j planes of a record of layer l, from j = 0. Without
    `reuse` nothing is expected to stay."""

    def __init__(self, prices: Prices, sizes: list[np.ndarray], budget: LossBudget, reuse: Reuse | None = None):
        self.prices, self.budget, self._sizes, self._reuse = prices, budget, sizes, reuse

    def __call__(self, choice: Choice) -> Chosen:
        experts, here, full = len(choice.resident), choice.here, choice.full
        prices, sizes = self.prices.layers[choice.layer], self._sizes[choice.layer]
        self.budget.begin(choice.layer, len(choice.ids))
        if self._reuse is not None:
            self._reuse.begin(choice.layer, choice.ids)
        levels = np.full(choice.ids.shape, full)
        active = np.unique(choice.ids)
        short = active[active < experts]
        short = short[here[short] < full]
        if not len(short):
            return Chosen(choice.ids, choice.weights, levels)
        slots = _slots(choice, prices, short)
        nats, saved = _alternatives(slots, prices, sizes, short, here[short], full)
        if self._reuse is not None:  # the next time it would cost its nats or its bytes, whatever is less
            due = np.minimum(1, nats[:, 0] / np.maximum(self.budget.worth * saved[:, 0], 1e-300))
            saved = saved * (1 - CERTAIN * self._reuse.chance(choice.layer, short) * due)[:, None]
        picked = np.full(experts, full)
        picked[short] = self._pick(nats, saved)
        if self._reuse is not None:
            self._reuse.read(int(((picked > 0) & (here == 0))[short].sum()))
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
        order = np.argsort(-cost / np.maximum(gain, 1), kind="stable")  # dearest for what it saves first
        for row in order:
            if cost.sum() <= max(self.budget.balance, 0):
                break
            picked[row], cost[row] = nats.shape[1] - 1, 0.0
        self.budget.spend(float(cost.sum()), wanted)
        return picked


def _slots(choice: Choice, prices: LayerPrices, short: np.ndarray) -> _Slots:
    """The slots of `short`, each with the cheapest of skipping and a stand-in that is here at its full level."""
    experts = len(choice.resident)
    wanted = np.zeros(experts + 1, bool)
    wanted[short] = True
    tokens, ranks = np.nonzero(wanted[choice.ids])
    e, w = choice.ids[tokens, ranks], choice.weights[tokens, ranks].astype(np.float64)
    nats, stand_ins, weights = prices.skip(e, w), np.full(len(e), experts), np.zeros(len(e), np.float32)
    able = np.flatnonzero(choice.here >= choice.full)
    if len(able):
        others = prices.best_stand_in(e, able)
        best = prices.best_weight(e, w, others)
        costs = prices.stand_in(e, w, others, best)
        better = costs < nats
        nats = np.where(better, costs, nats)
        stand_ins = np.where(better, others, stand_ins)
        weights = np.where(better, best, weights).astype(np.float32)
    return _Slots(tokens, ranks, e, w, stand_ins, weights, nats)


def _alternatives(
    slots: _Slots, prices: LayerPrices, sizes: np.ndarray, short: np.ndarray, here: np.ndarray, full: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nats, and bytes saved against reading all that is missing, `[experts, 1 + levels]`: column 0 does without, column j
    computes at level j. What cannot be, or would be silly, costs infinitely much."""
    row = np.searchsorted(short, slots.experts)
    levels = np.arange(1, full + 1)
    nats = np.zeros((len(short), full + 1))
    nats[:, 0] = np.bincount(row, slots.nats, len(short))
    nats[:, 1:-1] = np.inf  # where a bundle does not say what a level costs
    for level in levels[:-1][: prices.level.shape[1]]:
        nats[:, level] = np.bincount(row, prices.at_level(slots.experts, slots.weights, level), len(short))
    nats[:, 1:][levels < here[:, None]] = np.inf
    read = np.maximum(sizes[1 : full + 1] - sizes[here][:, None], 0)
    return nats, np.concatenate([read[:, -1:], read[:, -1:] - read], 1)
