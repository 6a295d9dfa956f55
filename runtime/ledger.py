"""What a sequence may lose, and has lost: nats that come in with every token and are spent on
shortcuts."""

from __future__ import annotations

import copy

import numpy as np

SAVINGS_TOKENS = 16.0  # tokens' worth of nats that may be saved up
# Per token: how fast the multiplier follows what was spent, and what is saved up.
SPEND_GAIN, SAVINGS_GAIN = 0.1, 0.02
# How far the multiplier may go from where it began: beyond, all is bought or nothing, and the way
# back is long.
MULTIPLIER_RANGE = 1e4


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
