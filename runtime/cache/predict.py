"""Which experts to read before they are asked for: guesses, which are read only while nobody waits for a record.

`ahead` returns (layer, expert) pairs, likeliest first. What comes true is known only when the router has spoken; a guess
that has not begun by then is withdrawn, and one that came too early or in vain is the first to be evicted.
"""

from __future__ import annotations

import numpy as np

from smoe.artifacts.manifest import Routing
from smoe.runtime.routing import gate_scores

Guesses = list[tuple[int, int]]


class Prefetch:
    """No guesses, and the base of the others."""

    looks_ahead = (
        False  # wants the next layer's scores, which cost a run of its attention and router
    )

    def ahead(self, layer: int, ids: np.ndarray, hidden: np.ndarray) -> Guesses:
        """After the router of `layer` chose `ids` int64 `[tokens, k]` for `hidden` float32 `[tokens, H]`."""
        return []

    def foresee(self, layer: int, rule: Routing, ids: np.ndarray, scores: np.ndarray) -> Guesses:
        """`layer` would choose `ids` `[tokens, k]` by `scores` `[tokens, experts]`, computed without what is missing."""
        return []


class Previous(Prefetch):
    """What the token before used in the next layer; after the last layer, in the first."""

    def __init__(self, layers: int):
        self._last: list[np.ndarray] = [np.zeros(0, np.int64) for _ in range(layers)]

    def ahead(self, layer: int, ids: np.ndarray, hidden: np.ndarray) -> Guesses:
        self._last[layer] = ids[-1]
        following = (layer + 1) % len(self._last)
        return [(following, int(e)) for e in self._last[following]]


class Transition(Prefetch):
    """What follows the experts of this layer most often in calibration: sum over active p of P(e | p) (the table
    `transition`). As many as the next layer uses; nothing is known of the next token's first layer."""

    def __init__(self, counts: list[np.ndarray | None], top_k: list[int]):
        """`counts[l]` `[experts of layer l - 1, experts of layer l]`, None for the first."""
        self._chance = [
            None if c is None else c / np.maximum(c.sum(1, keepdims=True), 1) for c in counts
        ]
        self._top_k = top_k

    def ahead(self, layer: int, ids: np.ndarray, hidden: np.ndarray) -> Guesses:
        if layer + 1 == len(self._chance):
            return []
        chance = self._chance[layer + 1]
        assert chance is not None
        active = ids[-1][ids[-1] < len(chance)]
        likeliest = np.argsort(-chance[active].sum(0), kind="stable")[: self._top_k[layer + 1]]
        return [(layer + 1, int(e)) for e in likeliest]


class Predicted(Prefetch):
    """By the linear predictor of the tables: what the layer that is `distance` ahead will choose, from this layer's hidden
    state. `linear[l]` are weights `[H, experts]` and bias `[experts]` for layer l, None where there are none."""

    def __init__(
        self, distance: int, linear: list[tuple[np.ndarray, np.ndarray] | None], top_k: list[int]
    ):
        self.distance, self._linear, self._top_k = distance, linear, top_k

    def ahead(self, layer: int, ids: np.ndarray, hidden: np.ndarray) -> Guesses:
        target = layer + self.distance
        if target >= len(self._linear) or (linear := self._linear[target]) is None:
            return []
        weights, bias = linear
        scores = hidden[-1] @ weights + bias
        return [(target, int(e)) for e in np.argsort(-scores, kind="stable")[: self._top_k[target]]]


class TopScore(Prefetch):
    """SMoE (paper III-E): shared experts and those that are here give a hidden state, the next attention and router run
    on it, and only experts whose score is at least (1 + alpha) S_{k+1} are read: the others may be substituted."""

    looks_ahead = True

    def __init__(self, alpha: float = 0.35):
        self.alpha = alpha

    def foresee(self, layer: int, rule: Routing, ids: np.ndarray, scores: np.ndarray) -> Guesses:
        score = gate_scores(rule, scores[-1:])[0]
        best = np.argsort(-score, kind="stable")
        k = ids.shape[1]
        rejected = score[best[k]] if k < len(best) else -np.inf
        return [(layer, int(e)) for e in best[:k] if score[e] >= (1 + self.alpha) * rejected]
