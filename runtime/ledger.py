"""What a sequence may lose, and has lost: nats that come in with every token and are spent on
shortcuts; or the mean of the bits that its slots are computed in."""

from __future__ import annotations

import copy
from typing import Protocol

import numpy as np

SAVINGS_TOKENS = 16.0  # tokens' worth of nats that may be saved up
# Per token: how fast the multiplier follows what was spent, and what is saved up.
SPEND_GAIN, SAVINGS_GAIN = 0.1, 0.02
# How far the multiplier may go from where it began: beyond, all is bought or nothing, and the way
# back is long.
MULTIPLIER_RANGE = 1e4
# Per token: how fast the price of a bit follows the bits that its slots had too many, and those
# that all had so far; for how many tokens at once, at most; how far it may go from its start.
BITS_GAIN, BITS_OVER_GAIN, BITS_AT_ONCE, BITS_RANGE = 0.1, 0.001, 10, 12.0


class Ledger(Protocol):
    """One sequence's running account."""

    def fork(self) -> Ledger:
        """One that goes on from here by itself."""
        ...


class LossLedger:
    """One sequence's running account of nats.

    `rate` comes in with every token that is decoded, up to `SAVINGS_TOKENS` tokens' worth, and what
    is spent is never more than is there. `nats_per_byte` is what a byte that need not be read may
    cost: a Lagrange multiplier that follows the spending, by `SPEND_GAIN` towards spending what
    comes in, by `SAVINGS_GAIN` towards half of the savings.
    """

    def __init__(self, rate: float, layers: int, nats_per_byte: float):
        self.rate, self.nats_per_byte = rate, nats_per_byte
        self.balance = rate * SAVINGS_TOKENS / 2
        self.spent = 0.0  # since the start
        self._layers = layers
        self._range = nats_per_byte / MULTIPLIER_RANGE, nats_per_byte * MULTIPLIER_RANGE
        self._wanted, self._tokens = 0.0, 0  # of the step in progress

    def fork(self) -> LossLedger:
        """One that goes on from here by itself."""
        return copy.copy(self)

    def begin(self, layer: int, tokens: int) -> None:
        """A step reaches a layer with so many decoded tokens of the sequence."""
        if layer == 0:
            self._follow()
            self._wanted, self._tokens = 0.0, tokens
        self.balance += self.rate * tokens / self._layers
        self.balance = min(self.rate * SAVINGS_TOKENS, self.balance)

    def spend(self, nats: float, demand: float) -> None:
        """Of `demand`, which is what the multiplier would have bought, `nats` could be paid."""
        self.balance -= nats
        self.spent += nats
        self._wanted += demand

    def _follow(self) -> None:
        if not self._tokens:
            return
        under = float(np.clip(1 - self._wanted / (self.rate * self._tokens), -1, 1))
        saved = self.balance / (self.rate * SAVINGS_TOKENS) * 2 - 1
        growth = (SPEND_GAIN * under + SAVINGS_GAIN * saved) * self._tokens
        self.nats_per_byte = float(np.clip(self.nats_per_byte * np.exp(growth), *self._range))


class BitLedger:
    """One sequence's running account of the bits of its slots' weights, whose mean is to be
    `average` (None: whatever comes out).

    `price` is what a chooser takes a bit to cost, on a scale of its own: it begins at `start` and
    rises with the bits that were too many, so that it settles where the mean is as asked. The whole
    sequence shares it: a token that needs more has more, and later ones pay. `levels` int64 `[L,
    full + 1]` counts the slots by layer and level.
    """

    def __init__(self, average: float | None, start: float, levels: tuple[int, int]):
        self.average, self.price = average, start
        self.levels = np.zeros(levels, np.int64)
        self.tokens = 0  # that began
        self._start, self._over = start, 0.0
        self._spent = np.zeros(2)  # bits and weights, since the start
        self._bits = self._weights = 0.0  # of the step in progress, of so many tokens
        self._last = 0

    def fork(self) -> BitLedger:
        """One that goes on from here by itself."""
        other = copy.copy(self)
        other.levels, other._spent = self.levels.copy(), self._spent.copy()
        return other

    @property
    def mean(self) -> float | None:
        """Bits of a weight so far; None before the first slot."""
        return float(self._spent[0] / self._spent[1]) if self._spent[1] else None

    def begin(self, layer: int, tokens: int) -> None:
        """A step reaches a layer with so many decoded tokens of the sequence."""
        if layer:
            return
        self._follow()
        self._bits = self._weights = 0.0
        self._last = tokens
        self.tokens += tokens

    def spend(self, layer: int, levels: np.ndarray, bits: float, weights: float) -> None:
        """So many slots of a layer by level, int64 `[full + 1]`: the `bits` of all their
        `weights`, in units of a usual slot's."""
        self.levels[layer] += levels
        self._bits += bits
        self._weights += weights
        self._spent += bits, weights

    def _follow(self) -> None:
        if self.average is None or not self._weights:
            return
        too_many = self._bits / self._weights - self.average  # a token, of the mean of its slots
        self._over += too_many * self._last
        at_once = min(self._last, BITS_AT_ONCE)
        over = self._over * at_once / self._last
        price = self.price + at_once * (BITS_GAIN * too_many + BITS_OVER_GAIN * over)
        self.price = float(np.clip(price, self._start - BITS_RANGE, self._start + BITS_RANGE))
