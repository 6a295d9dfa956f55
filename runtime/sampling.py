"""From logits to a token: greedy, or seeded sampling with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smoe.runtime.errors import EngineError

HEAD = 512  # tokens that are sorted first: a peaked distribution ends a draw within them
GROWTH = 32  # so many times more where it does not


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
    """Draws tokens in sequence; the same seed and logits give the same tokens."""

    def __init__(self, how: Sampling):
        self._how = how
        self._random = np.random.default_rng(how.seed)

    def draw(self, logits: np.ndarray) -> int:
        """A token id from float32 logits `[vocabulary]`. Filters apply in the order top-k, top-p
        (nucleus)."""
        how = self._how
        if how.temperature == 0:
            return int(np.argmax(logits))
        uniform = self._random.random()
        order, probabilities = _head(logits, how, how.top_p if how.top_p < 1 else uniform)
        if how.top_p < 1:
            # The smallest set whose mass reaches top_p: the token that crosses the line is still
            # in.
            enough = int(np.searchsorted(np.cumsum(probabilities), how.top_p)) + 1
            probabilities = probabilities[:enough] / probabilities[:enough].sum()
        drawn = int(np.searchsorted(np.cumsum(probabilities), uniform, "right"))
        return int(order[min(drawn, len(probabilities) - 1)])  # rounding may leave the sum short


def _head(logits: np.ndarray, how: Sampling, mass: float) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens, best first, until their probabilities sum to more than `mass`, or all
    that `how.top_k` allows: ids `[n]` and probabilities float64 `[n]`.

    A vocabulary is much longer than what a draw looks at, so it is not sorted as a whole.
    """
    limit = min(how.top_k or len(logits), len(logits))
    best = float(logits.max()) / how.temperature

    def weights(some: np.ndarray) -> np.ndarray:
        return np.exp(some.astype(np.float64) / how.temperature - best)

    if limit == len(logits):
        total, count = weights(logits).sum(), HEAD
        while count < limit:
            order = ranked(logits, count)
            probabilities = weights(logits[order]) / total
            if probabilities.sum() > mass:
                return order, probabilities
            count *= GROWTH
    order = ranked(logits, limit)
    probabilities = weights(logits[order])
    return order, probabilities / probabilities.sum()


def ranked(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest of `values` `[n]`, best first; of equal ones the first comes
    first."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: count - len(above)]
    return np.concatenate([above[np.argsort(-values[above], kind="stable")], equal])
