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

import numpy as np

from smoe.runtime.choose.prices import LayerPrices, Prices
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
        self.prices, self.nats_per_byte, self._sizes = prices, nats_per_byte, sizes

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        """An expert has one alternative for all sequences that want it: each pays for its slots."""
        full, level = available.full, available.level
        prices, sizes = self.prices.layers[routed.layer], self._sizes[routed.layer]
        payers = self._payers(routed)
        short = _used(routed.ids, len(level)) & (level < full)
        if len(payers) < len(routed.step.spans):  # some are exact: what they use is read whole
            exact = ~np.isin(routed.owner, [payer.owner for payer in payers])
            short &= ~_used(routed.ids[exact], len(level))
        missing = np.flatnonzero(short)
        if not len(missing):
            return Assignment(ids=routed.ids, weights=routed.weights)
        slots = _slots(routed, available, prices, short)
        each = _nats_by_level(slots, prices, full)
        saved = _bytes_saved(sizes, level[missing], full)
        costs = np.zeros((len(payers), len(missing), full + 1))
        paying = np.searchsorted([payer.owner for payer in payers], slots.owners)
        np.add.at(costs, (paying, np.searchsorted(missing, slots.experts)), each)
        costs[:, :, 1:][:, np.arange(1, full + 1) < level[missing][:, None]] = np.inf
        alternatives = np.full(len(level), full)
        alternatives[missing] = self._cheapest(costs, saved, payers)
        return _assigned(routed, slots, each, alternatives, full)

    def _payers(self, routed: Routed) -> list[_Payer]:
        """The sequences with a ledger that have tokens here; a token's worth comes in."""
        payers = []
        each = zip(routed.step.ledgers, routed.counts, strict=True)
        for owner, (ledger, tokens) in enumerate(each):
            if ledger is not None and tokens:
                ledger.begin(routed.layer, tokens)
                payers.append(_Payer(owner=owner, ledger=ledger))
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
        rates = np.array([payer.ledger.nats_per_byte for payer in payers])
        weighted = (costs * (self.nats_per_byte / rates)[:, None, None]).sum(0)
        picked = (weighted - self.nats_per_byte * saved).argmin(1)
        rows, reading = np.arange(len(picked)), saved.shape[1] - 1
        paid = costs[:, rows, picked]
        demands = paid.sum(1).tolist()
        for cost, payer in zip(paid, payers, strict=True):
            limit = max(payer.ledger.balance, 0)
            if cost.sum() <= limit:
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


@dataclass(frozen=True, eq=False)
class _Payer:
    owner: int  # the span
    ledger: LossLedger


@dataclass(frozen=True, eq=False)
class _Slots:
    """The slots of experts that are not resident at their full level: token, rank, owner, expert,
    mixing weight, and what takes the place (the number of experts: nothing), with which weight, for
    how many nats."""

    tokens: np.ndarray
    ranks: np.ndarray
    owners: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    stand_ins: np.ndarray
    stand_in_weights: np.ndarray
    nats: np.ndarray


def _used(ids: np.ndarray, experts: int) -> np.ndarray:
    """bool `[E]`: those that some slot of `ids` wants."""
    used = np.zeros(experts + 1, bool)
    used[ids] = True
    return used[:experts]


def _slots(routed: Routed, available: Available, prices: LayerPrices, short: np.ndarray) -> _Slots:
    """The slots of `short` experts (bool `[E]`), each with the cheapest of skipping and a stand-in
    that is resident at its full level."""
    experts = len(short)
    tokens, ranks = np.nonzero(np.append(short, False)[routed.ids])
    e = routed.ids[tokens, ranks]
    w = routed.weights[tokens, ranks].astype(np.float64)
    nats, stand_ins = prices.skip(e, w), np.full(len(e), experts)
    weights = np.zeros(len(e), np.float32)
    able = np.flatnonzero(available.level >= available.full)
    if len(able):
        candidates = np.full(experts, experts)
        candidates[short] = prices.best_stand_in(np.flatnonzero(short), able)
        candidates = candidates[e]
        best = prices.best_weight(e, w, candidates)
        costs = prices.stand_in(e, w, candidates, best)
        better = costs < nats
        nats = np.where(better, costs, nats)
        stand_ins = np.where(better, candidates, stand_ins)
        weights = np.where(better, best, weights).astype(np.float32)
    return _Slots(
        tokens=tokens,
        ranks=ranks,
        owners=routed.owner[tokens],
        experts=e,
        weights=w,
        stand_ins=stand_ins,
        stand_in_weights=weights,
        nats=nats,
    )


def _nats_by_level(slots: _Slots, prices: LayerPrices, full: int) -> np.ndarray:
    """float64 `[slots, full + 1]`: column 0 does without, column j computes at level j."""
    each = np.zeros((len(slots.experts), full + 1))
    each[:, 0] = slots.nats
    each[:, 1:-1] = np.inf  # where a bundle does not say what a level costs
    levels = np.arange(1, min(full, prices.level.shape[1] + 1))
    each[:, levels] = prices.at_level(slots.experts[:, None], slots.weights[:, None], levels)
    return each


def _bytes_saved(sizes: np.ndarray, level: np.ndarray, full: int) -> np.ndarray:
    """float64 `[experts, full + 1]`: against reading all that is missing of experts at `level`."""
    read = np.maximum(sizes[1 : full + 1] - sizes[level][:, None], 0)
    return np.concatenate([read[:, -1:], read[:, -1:] - read], 1)


def _assigned(
    routed: Routed, slots: _Slots, nats: np.ndarray, alternatives: np.ndarray, full: int
) -> Assignment:
    """What the `alternatives` of experts, int64 `[E]`, make of their slots."""
    chosen = alternatives[slots.experts]
    ids, weights = routed.ids.copy(), routed.weights.copy()
    levels = np.full(ids.shape, full)
    gone = chosen == 0
    at = slots.tokens[gone], slots.ranks[gone]
    ids[at], weights[at] = slots.stand_ins[gone], slots.stand_in_weights[gone]
    levels[slots.tokens[~gone], slots.ranks[~gone]] = chosen[~gone]
    cost = nats[np.arange(len(chosen)), chosen]
    per_token = np.bincount(slots.tokens, weights=cost, minlength=routed.tokens)
    return Assignment(ids=ids, weights=weights, levels=levels, nats=per_token)
