"""From logits to a token: greedy, or seeded sampling with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from smoe.runtime.errors import EngineError

# Tokens are put in bins by how far they are from the best, in nats.
BINS, NARROWEST, WIDEST = 4096, 1e-6, 64.0
STRIDE = 64  # one of so many logits tells where the best ones begin


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-4 <= self.temperature < float("inf")):
            raise EngineError(
                f"temperature is {self.temperature}; it must be 0 (greedy), or 0.0001 and more."
            )
        if self.seed is not None and self.seed < 0:
            raise EngineError(f"seed is {self.seed}; it must be 0 or more.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise EngineError(
                f"top_k is {self.top_k} and top_p {self.top_p}; wanted are 0 or more, and above 0 "
                "up to 1."
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.seed is not None):
            raise EngineError(
                "top_k, top_p and seed have no effect at temperature 0; give a temperature or "
                "leave them out."
            )


class Sampler:
    """Draws tokens in sequence; the same seed and logits give the same tokens. Samplers that take
    turns may share `bins`."""

    def __init__(self, how: Sampling, bins: Bins | None = None):
        self._how = how
        self._random = np.random.default_rng(how.seed)
        self._bins = bins or Bins()

    def fork(self) -> Sampler:
        """One that draws what this one would, and goes its own way."""
        other = Sampler(self._how, self._bins)
        other._random.bit_generator.state = self._random.bit_generator.state
        return other

    def draw(self, logits: np.ndarray) -> int:
        """A token id from float32 logits `[vocabulary]`. Filters apply in the order top-k, top-p
        (nucleus)."""
        how = self._how
        if how.temperature == 0:
            return int(np.argmax(logits))
        uniform = self._random.random()
        if how.top_k and how.top_k < len(logits):
            return _draw_among(ranked(logits, how.top_k), logits, how, uniform)
        if not self._bins.fill(logits, how.temperature):
            return int(np.argmax(logits))
        nucleus = 1.0
        if how.top_p < 1:
            # The smallest set whose mass reaches top_p: the token that crosses the line is still
            # in.
            _, nucleus = self._bins.token_at(how.top_p, "left")
        token, _ = self._bins.token_at(uniform * nucleus, "right")
        return token


def _draw_among(order: np.ndarray, logits: np.ndarray, how: Sampling, uniform: float) -> int:
    """One of the tokens in `order`, best first."""
    scaled = logits[order].astype(np.float64) / how.temperature
    ends = np.exp(scaled - scaled[0]).cumsum()
    enough = len(ends)
    if how.top_p < 1:
        enough = int(ends.searchsorted(how.top_p * ends[-1])) + 1
    drawn = int(ends.searchsorted(uniform * ends[enough - 1], "right"))
    return int(order[min(drawn, enough - 1)])  # rounding may leave the sum short


class Bins:
    """The tokens of a vocabulary, likeliest first, without sorting them all: in bins of like
    logits, of which only those are sorted that a draw ends in. Its arrays are filled again for
    every draw: to get that much memory from the system takes longer than all else."""

    def __init__(self) -> None:
        self._reserve(0)

    def _reserve(self, size: int) -> None:
        self._behind = np.empty(size, np.float32)
        self._weights = np.empty(size)
        self._bin = np.empty(size, np.intp)
        self._mine = np.empty(size, bool)

    def fill(self, logits: np.ndarray, temperature: float) -> bool:
        """With the tokens of float32 `logits` `[vocabulary]`; whether all of them are numbers."""
        if len(logits) != len(self._mine):
            self._reserve(len(logits))
        self._logits = logits
        behind = np.subtract(logits.max(), logits, out=self._behind)
        behind /= np.float32(temperature)
        most = float(behind.max())
        if np.isnan(most):
            return False
        widest = min(WIDEST, max(most, NARROWEST))
        np.exp(np.negative(behind, out=behind), out=self._weights)
        behind *= np.float32((1 - BINS) / widest)
        self._bin[:] = np.minimum(behind, BINS - 1, out=behind)
        self._ends = np.bincount(self._bin, self._weights).cumsum()
        self._total = float(self._ends[-1])
        self._ends /= self._total
        return True

    def token_at(self, mass: float, side: Literal["left", "right"]) -> tuple[int, float]:
        """The first token up to which there is so much of the probability ("left"), or more
        ("right"), and how much there is up to its end."""
        bin = min(int(self._ends.searchsorted(mass, side)), len(self._ends) - 1)
        tokens = np.equal(self._bin, bin, out=self._mine).nonzero()[0]
        tokens = tokens[np.argsort(-self._logits[tokens], kind="stable")]
        ends = (self._weights[tokens] / self._total).cumsum()
        if bin:
            ends += self._ends[bin - 1]
        at = min(int(ends.searchsorted(mass, side)), len(tokens) - 1)  # sums may be rounded
        return int(tokens[at]), float(ends[at])


def ranked(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest of `values` `[n]`, best first; of equal ones the first comes
    first."""
    some = values[::STRIDE]
    rank = 2 * count // STRIDE + 8  # among these, about which twice as many are found as are wanted
    if rank >= len(some):
        return np.argsort(-values, kind="stable")[:count]
    least = np.partition(some, -rank)[-rank]
    best = np.flatnonzero(values >= least)
    if len(best) < count:
        best = np.arange(len(values))
    return best[np.argsort(-values[best], kind="stable")[:count]]
