"""In how many bits every slot is computed, when all could be: D²MoE's dual routing (a router of
levels beside the router of experts), and the same by prices, without training.

A `LevelRule` picks the level of each slot at a price of a bit; `ByBits` is the chooser that asks it
and keeps each sequence's `BitLedger`, whose price follows the mean that was asked for. Experts and
weights stay as the router said. Levels depend on the sequence alone and not on what is resident: a
slot whose expert has more planes in memory takes no more of them than its level, so that a run
repeats under any budget, and so that ways are compared at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smoe.runtime.choose.prices import KINDS
from smoe.runtime.ledger import BitLedger
from smoe.runtime.routing import Assignment, Available, Routed

BLOCK = 16  # tokens whose routers' weights are gathered at once
CHEAPEST, DEAREST = -40.0, 10.0  # logarithms of nats per bit between which all levels are chosen
LEAST = 1e-6  # mixing weight, whose logarithm routers of levels hear
AROUND = (0.5, 0.75, 1.0, 1.25, 1.5)  # of its usual weight, an expert's weights are taken to be


@dataclass(frozen=True, eq=False)
class Scale:
    """What a level is: `bits` float64 `[full]` of a weight, from level 1. `weight` float64 `[L]` is
    how many weights a layer's experts have, in units of the mean of all slots."""

    bits: np.ndarray
    weight: np.ndarray

    @property
    def levels(self) -> tuple[int, int]:
        """Layers and levels, 0 too: the shape of counts."""
        return len(self.weight), len(self.bits) + 1


class LevelRule(Protocol):
    """Picks levels."""

    def __call__(self, routed: Routed, price: np.ndarray, number: np.ndarray) -> np.ndarray:
        """int64 `[T, k]` from 1, at a `price` of a bit float64 `[T]`, on the rule's own scale;
        `number` int64 `[T]` is that of a token among those that its sequence decoded. What it says
        of no expert does not matter."""
        ...


class ByBits:
    """The chooser of sequences that have a `BitLedger`; those without one are at the full level.

    `nats[l]`, where they are known, say what levels cost by their prices."""

    def __init__(self, rule: LevelRule, scale: Scale, nats: Sequence[LevelNats] | None = None):
        self._rule, self._units, self._nats = rule, scale, nats

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        payers, owners, price, number = _payers(routed)
        if not payers:
            return Assignment(ids=routed.ids, weights=routed.weights)
        levels = self._rule(routed, price, number)
        levels = np.where(owners[:, None] < 0, available.full, levels)
        self._account(routed, levels, payers, owners, len(available.level))
        nats = None
        if self._nats is not None:
            costs = self._nats[routed.layer](routed.ids, routed.weights)
            nats = np.take_along_axis(costs, levels[..., None] - 1, 2)[..., 0].sum(1)
        return Assignment(ids=routed.ids, weights=routed.weights, levels=levels, nats=nats)

    def _account(
        self,
        routed: Routed,
        levels: np.ndarray,
        payers: Sequence[BitLedger],
        owners: np.ndarray,
        experts: int,
    ) -> None:
        """To every sequence its slots."""
        layer, count = routed.layer, self._units.levels[1]
        slots = (routed.ids < experts) & (owners[:, None] >= 0)
        keys = (owners[:, None] * count + levels)[slots]
        counts = np.bincount(keys, minlength=len(payers) * count).reshape(-1, count)
        weights = counts.sum(1) * self._units.weight[layer]
        spent = counts[:, 1:] @ self._units.bits * self._units.weight[layer]
        for each in zip(payers, counts, spent.tolist(), weights.tolist(), strict=True):
            each[0].spend(layer, *each[1:])


def _payers(routed: Routed) -> tuple[list[BitLedger], np.ndarray, np.ndarray, np.ndarray]:
    """The ledgers of sequences that have tokens here, and of every token its ledger's place among
    them (-1: none), the price of a bit and its number."""
    payers: list[BitLedger] = []
    owners: list[int] = []
    prices: list[float] = []
    numbers: list[int] = []
    for ledger, tokens in zip(routed.step.ledgers, routed.counts, strict=True):
        paid = isinstance(ledger, BitLedger) and tokens > 0
        owners += [len(payers) if paid else -1] * tokens
        if isinstance(ledger, BitLedger) and tokens:
            ledger.begin(routed.layer, tokens)
            payers.append(ledger)
            prices += [ledger.price] * tokens
            numbers += range(ledger.tokens - tokens, ledger.tokens)
        else:
            prices += [0.0] * tokens
            numbers += [0] * tokens
    return payers, np.array(owners), np.array(prices), np.array(numbers)


# -- prices ----------------------------------------------------------------------------------------


class LevelNats:
    """What one layer's slots cost at each level, from `price_level` float `[E, J]` and `price_fit`
    (`runtime.choose.prices`): at the level `full` and above nothing."""

    def __init__(self, moments: np.ndarray, fit: np.ndarray, full: int):
        linear, root = fit[KINDS.index("level")].astype(np.float64)
        p = np.zeros((len(moments) + 1, full))  # the last is no expert
        p[:-1, : full - 1] = np.maximum(moments[:, : full - 1], 0) / 2
        self._square, self._plain = linear * p, root * np.sqrt(p)

    def __call__(self, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float64 `[.., full]` in nats, of experts `ids` (E: no expert) at their mixing weights
        `[..]`."""
        w = weights[..., None].astype(np.float64)
        return (self._square[ids] * w + self._plain[ids]) * w


class PricedLevels:
    """The level of least nats + price * bits: a slot that matters little, by its expert's prices
    and its live mixing weight, is computed in few bits. The price is the logarithm of nats per bit
    of a usual slot's weights."""

    def __init__(self, nats: Sequence[LevelNats], scale: Scale):
        self._nats, self._units = nats, scale
        self._bits = scale.weight[:, None] * scale.bits

    def __call__(self, routed: Routed, price: np.ndarray, number: np.ndarray) -> np.ndarray:
        nats = self._nats[routed.layer](routed.ids, routed.weights)
        dear = np.exp(price)[:, None] * self._bits[routed.layer]
        return (nats + dear[:, None]).argmin(2) + 1

    def price_of(self, average: float, used: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
        """The price at which levels have so many bits on `average`, if every expert is used as
        often as `used[l]` says, int64 `[E]`, at its usual weight there, float64 `[E]`."""
        low, high = CHEAPEST, DEAREST
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean(middle, used) > average else (low, middle)
        return (low + high) / 2

    def _mean(self, price: float, used: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
        spent = weights = 0.0
        for layer, (counts, usual) in enumerate(used):
            e = np.tile(np.arange(len(usual)), len(AROUND))
            nats = self._nats[layer](e, np.outer(AROUND, usual).reshape(-1))
            levels = (nats + np.exp(price) * self._bits[layer]).argmin(1)
            slots = np.tile(counts, len(AROUND)) * self._units.weight[layer]
            spent += slots @ self._units.bits[levels]
            weights += slots.sum()
        return float(spent / max(weights, 1e-9))


# -- learnt ----------------------------------------------------------------------------------------


class TrainedLevels:
    """D²MoE's bit-width routers (Wang et al., MobiCom 2025, section 4.1): the level of largest
    logit - price * bits, the logits of a slot of expert e with mixing weight w being weight[e] .
    hidden + bias[e] + mixing * ln(w) * bits. The last is ours: without it they lose several times
    as much.

    `routers[l]` are weight float `[E, J, H]`, bias float32 `[E, J]` and mixing."""

    def __init__(self, routers: Sequence[tuple[np.ndarray, np.ndarray, float]], scale: Scale):
        full = len(scale.bits)
        self._routers = [(w[:, :full], b[:, :full].astype(np.float64), m) for w, b, m in routers]
        self._bits = scale.bits

    def __call__(self, routed: Routed, price: np.ndarray, number: np.ndarray) -> np.ndarray:
        weight, bias, mixing = self._routers[routed.layer]
        ids = np.minimum(routed.ids, len(bias) - 1)  # no expert, like any
        mixed = mixing * np.log(np.maximum(routed.weights, LEAST).astype(np.float64))
        logits = bias[ids] + (mixed - price[:, None])[..., None] * self._bits
        for start in range(0, len(ids), BLOCK):
            rows = slice(start, start + BLOCK)
            gathered = weight[ids[rows]].astype(np.float32)
            logits[rows] += np.einsum("tkjh,th->tkj", gathered, routed.hidden[rows])
        return logits.argmax(2) + 1


# -- controls --------------------------------------------------------------------------------------


class RandomLevels:
    """A control: every slot at one of the two levels around the mean, at random. `share[l]` of
    layer l's slots get the one above `below`."""

    def __init__(self, below: int, share: np.ndarray):
        self._below, self._share = below, share

    def __call__(self, routed: Routed, price: np.ndarray, number: np.ndarray) -> np.ndarray:
        drawn = np.stack(
            [
                np.random.default_rng([routed.layer, token]).random(routed.ids.shape[1])
                for token in number.tolist()
            ]
        )
        return self._below + (drawn < self._share[routed.layer])
