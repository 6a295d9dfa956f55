"""The priced scheduler: every missing expert's alternatives have a price in nats and a time, and a
budget buys time.

At a step an active expert that is not resident at its full level can be read, wholly or to a lower
level; used at the level at which it is resident; or its slots can do without it, each with the
cheapest of nothing and a resident stand-in at the best weight. The choice is the one of least
`nats + nats_per_byte * bytes read`: a Lagrangian, so that a nat is spent where it saves most
anywhere in the model, and not where it can be spent first. Each sequence's `LossLedger` sets its
own multiplier, and is the hard limit. What is read may stay; `PlaneValue` tells eviction which
planes are worth their frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smoe.runtime.choose.prices import KINDS, LayerPrices, Prices, best_share
from smoe.runtime.ledger import LossLedger
from smoe.runtime.routing import Assignment, Available, Routed

# How much of what a byte is worth counts for keeping it: in time it may come cheaper, or be done
# without.
RETENTION = 0.35


class PlaneValue:
    """What the highest plane of a resident record is good for at one use, in nats per byte: by how
    much a use costs more without it.

    A use of an expert at its usual weight costs the least of `nats + nats_per_byte() * bytes` over
    all levels that it can be read up to, and skipping. `weights[l]` float64 `[E]` are the usual
    ones, `sizes` as in `Priced`.
    """

    def __init__(
        self,
        prices: Prices,
        weights: list[np.ndarray],
        sizes: list[np.ndarray],
        nats_per_byte: Callable[[], float],
    ):
        self._nats_per_byte, self._at = nats_per_byte, 0.0
        self._values = np.zeros((0, 0))
        self._layers = [
            (_usual_nats(layer, w, len(ends) - 1), ends.astype(np.float64))
            for layer, w, ends in zip(prices.layers, weights, sizes, strict=True)
        ]

    def __call__(self, keys: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """float64 for each of `keys`, flat numbers of experts that are resident up to `levels`."""
        worth = RETENTION * self._nats_per_byte()
        if not 0.9 * self._at < worth < 1.1 * self._at:
            self._at = worth
            self._values = np.concatenate([_plane_values(*layer, worth) for layer in self._layers])
        return self._values[keys, levels - 1]


def _usual_nats(prices: LayerPrices, weights: np.ndarray, full: int) -> np.ndarray:
    """Of a use of each expert at each level from 0, `[E, full + 1]`."""
    e = np.arange(len(weights))
    nats = np.full((len(e), full + 1), np.inf)  # where a bundle does not say what a level costs
    nats[:, 0], nats[:, full] = prices.skip(e, weights), 0
    for level in range(1, min(full, prices.level.shape[1] + 1)):
        nats[:, level] = prices.at_level(e, weights, level)
    return nats


def _plane_values(nats: np.ndarray, ends: np.ndarray, worth: float) -> np.ndarray:
    """float64 `[E, levels]`, as `PlaneValue` says."""
    read = np.maximum(ends - ends[:, None], 0)  # [resident, up to]
    cost = np.where(ends >= ends[:, None], nats[:, None] + worth * read, np.inf).min(2)
    return (cost[:, :-1] - cost[:, 1:]) / np.diff(ends)


class Priced:
    """The chooser of sequences that have a ledger; those without one are exact.

    `prices` of the bundle; `sizes[l][j]` bytes of the first j planes of a record of layer l, from
    j = 0. `nats_per_byte` is the mean over the ledgers of the last step, and what they begin with.
    """

    def __init__(self, prices: Prices, sizes: list[np.ndarray], nats_per_byte: float):
        self.nats_per_byte = nats_per_byte
        self._layers = [
            _Layer.of(layer, ends) for layer, ends in zip(prices.layers, sizes, strict=True)
        ]

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        """An expert has one alternative for all sequences that want it: each pays for its slots."""
        level, layer = available.level, self._layers[routed.layer]
        payers = self._payers(routed)
        short = np.zeros(len(level) + 1, bool)  # the last is no expert, and short of nothing
        np.less(level, available.full, out=short[:-1])
        if len(payers) < len(routed.step.spans):  # some are exact: what they use is read whole
            exact = ~np.isin(routed.owner, [payer.owner for payer in payers])
            short[routed.ids[exact]] = False
        at = short[routed.ids.reshape(-1)].nonzero()[0]
        if not len(at):
            return Assignment(ids=routed.ids, weights=routed.weights)
        slots = layer.slots(routed, at, level >= available.full)
        resident = level[slots.missing]
        costs = _costs(routed, slots, payers)
        costs += layer.below.take(resident, axis=0)
        picked = self._cheapest(costs, layer.saved.take(resident, axis=0), payers)
        return _assigned(routed, slots, picked[slots.rows])

    def _payers(self, routed: Routed) -> list[_Payer]:
        """The sequences with a ledger that have tokens here; a token's worth comes in."""
        payers = []
        each = zip(routed.step.ledgers, routed.counts, strict=True)
        for owner, (ledger, tokens) in enumerate(each):
            if isinstance(ledger, LossLedger) and tokens:
                ledger.begin(routed.layer, tokens)
                payers.append(_Payer(owner, ledger))
        if payers:
            rates = [payer.ledger.nats_per_byte for payer in payers]
            self.nats_per_byte = sum(rates) / len(rates)
        return payers

    def _cheapest(
        self, costs: np.ndarray, saved: np.ndarray, payers: Sequence[_Payer]
    ) -> np.ndarray:
        """For every expert the alternative of least cost that the ledgers can pay, int64 `[n]`,
        from `costs` `[payers, n, full + 1]` in nats and `saved` `[n, full + 1]` in bytes.

        A payer's nats count by what a byte is worth to it, so that one of a small budget is not
        outvoted.
        """
        weighted = costs[0]
        if len(payers) > 1:
            rates = np.array([payer.ledger.nats_per_byte for payer in payers])
            weighted = (costs * (self.nats_per_byte / rates)[:, None, None]).sum(0)
        picked = (weighted - self.nats_per_byte * saved).argmin(1)
        rows, reading = np.arange(len(picked)), saved.shape[1] - 1
        paid = costs[:, rows, picked]
        demands = paid.sum(1).tolist()
        for cost, payer, demand in zip(paid, payers, demands, strict=True):
            limit = max(payer.ledger.balance, 0)
            if demand <= limit or cost.sum() <= limit:
                continue
            gain = saved[rows, picked]
            dearest_first = np.argsort(-cost / np.maximum(gain, 1), kind="stable")
            for row in dearest_first:  # what is read costs nobody anything
                picked[row], paid[:, row] = reading, 0.0
                if cost.sum() <= limit:
                    break
        for payer, nats, demand in zip(payers, paid.sum(1).tolist(), demands, strict=True):
            payer.ledger.spend(nats, demand)
        return picked


class _Payer(NamedTuple):
    owner: int  # the span
    ledger: LossLedger


class _Slots(NamedTuple):
    """The slots of experts that are not resident at their full level: `at` are their numbers among
    all T * k. `missing` are the experts, rising, each once, and `rows` which of them each slot
    wants. `nats` float64 `[n, full + 1]` are what alternatives cost, where alternative j is level j
    and 0 does without: what takes the place then (the number of experts: nothing) has the weight
    beside it."""

    at: np.ndarray
    missing: np.ndarray
    rows: np.ndarray
    nats: np.ndarray
    stand_ins: np.ndarray
    stand_in_weights: np.ndarray


@dataclass(frozen=True, eq=False)
class _Layer:
    """What the choices of a layer have in common.

    By the level that is resident and the alternative, float64 `[full + 1, full + 1]`: `below` is
    infinite where less than what is there would be used, and `saved` are the bytes of what is
    missing that need not be read. `moments` float64 `[E, full + 1]` are what alternatives cost at a
    mixing weight of 1, before `linear` and `root`, float64 `[full + 1]`, make nats of it; stand-ins
    have the last column, since the full level costs nothing. From level `unpriced` on the bundle
    does not say what they cost."""

    prices: LayerPrices
    below: np.ndarray
    saved: np.ndarray
    moments: np.ndarray
    linear: np.ndarray
    root: np.ndarray
    unpriced: int

    @classmethod
    def of(cls, prices: LayerPrices, ends: np.ndarray) -> _Layer:
        """Of records whose first j planes end at `ends[j]`."""
        levels, full = np.arange(len(ends)), len(ends) - 1
        read = np.maximum(ends[1:] - ends[:, None], 0)
        unpriced = min(full, prices.level.shape[1] + 1)
        moments = np.zeros((len(prices.level), full + 1))
        moments[:, [0, full]] = prices.standin.diagonal()[:, None]
        moments[:, 1:unpriced] = prices.level[:, : unpriced - 1]
        skip, standin, level = (prices.fit[KINDS.index(kind)] for kind in KINDS)
        linear, root = np.stack([skip, *[level] * (full - 1), standin], 1)
        return cls(
            prices=prices,
            below=np.where((levels > 0) & (levels < levels[:, None]), np.inf, 0.0),
            saved=np.concatenate([read[:, -1:], read[:, -1:] - read], 1).astype(np.float64),
            moments=moments,
            linear=linear,
            root=root,
            unpriced=unpriced,
        )

    def slots(self, routed: Routed, at: np.ndarray, able: np.ndarray) -> _Slots:
        """Those at `at`, each with the cheaper of nothing and a stand-in among the experts that are
        `able`, bool `[E]`."""
        e = routed.ids.reshape(-1)[at]
        w = routed.weights.reshape(-1)[at].astype(np.float64)
        used = np.zeros(len(able), bool)
        used[e] = True
        missing = used.nonzero()[0]
        rows = missing.searchsorted(e)
        moments = self.moments.take(e, axis=0)
        moments *= (w * w)[:, None]
        best = self.prices.best_stand_in(missing, able)
        if best is None:
            nats, stand_ins, weights = self._nats(moments), np.full(len(e), len(able)), w * 0
        else:
            candidates = best[rows]
            between, other = self.prices.pair(e, candidates)
            weights = w * best_share(between, other)
            stand_in = moments[:, -1]
            stand_in -= 2 * w * weights * between
            stand_in += weights * weights * other
            nats = self._nats(moments)
            alone, stand_in = nats[:, 0], nats[:, -1]
            better = stand_in < alone
            np.minimum(alone, stand_in, out=alone)
            stand_ins = np.where(better, candidates, len(able))
            weights *= better
        nats[:, -1] = 0
        return _Slots(at, missing, rows, nats, stand_ins, weights.astype(np.float32))

    def _nats(self, moments: np.ndarray) -> np.ndarray:
        p = np.maximum(moments, 0, out=moments)  # of moments that are estimates
        p /= 2
        nats = self.linear * p
        nats += self.root * np.sqrt(p)
        nats[:, self.unpriced : -1] = np.inf
        return nats


def _costs(routed: Routed, slots: _Slots, payers: Sequence[_Payer]) -> np.ndarray:
    """float64 `[payers, missing, full + 1]`: the nats of all slots that a payer has of an
    expert."""
    count, alternatives = len(slots.missing), slots.nats.shape[1]
    costs = np.zeros((len(payers) * count, alternatives))
    rows = slots.rows
    if len(payers) > 1:
        owners = routed.owner[slots.at // routed.ids.shape[1]]
        rows = rows + count * np.searchsorted([payer.owner for payer in payers], owners)
    if len(rows) == count:
        costs[rows] = slots.nats  # every expert once
    else:
        np.add.at(costs, rows, slots.nats)
    return costs.reshape(len(payers), count, alternatives)


def _assigned(routed: Routed, slots: _Slots, chosen: np.ndarray) -> Assignment:
    """What the alternatives `chosen`, int64, make of the slots."""
    ids, weights = routed.ids.copy(), routed.weights.copy()
    full = slots.nats.shape[1] - 1
    levels = np.full(ids.shape, full)
    levels.reshape(-1)[slots.at] = chosen
    gone = (chosen == 0).nonzero()[0]
    if len(gone):
        at = slots.at[gone]
        ids.reshape(-1)[at] = slots.stand_ins[gone]
        weights.reshape(-1)[at] = slots.stand_in_weights[gone]
        levels.reshape(-1)[at] = full
    cost = slots.nats[np.arange(len(chosen)), chosen]
    nats = np.bincount(slots.at // ids.shape[1], weights=cost, minlength=routed.tokens)
    return Assignment(ids=ids, weights=weights, levels=levels, nats=nats)
