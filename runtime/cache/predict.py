"""Which experts to read before they are asked for: guesses, which are read only while nobody waits
for a record.

A predictor gives (layer, expert) pairs, likeliest first. What comes true is known only when the
router has spoken; a guess that has not begun by then is forgotten, and one that came too early or
in vain is the first to be evicted. Predictors see the tokens of a step that are decoded: a prompt
needs most experts of a layer, and there is nothing to guess."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from smoe.runtime.cache.residency import Key
from smoe.runtime.routing import Routed

Guesses = list[Key]

# Looking ahead pays where a wait lasts so many times as long; over how many waits that is judged;
# and one in how many is tried in any case.
MARGIN, WAITS, TRIED = 2.0, 16, 64


class Predictor:
    """No guesses, and the base of the others."""

    silent = True  # never guesses
    looks_ahead = (
        False  # wants the next layer's scores, which cost a run of its attention and router
    )

    @property
    def listens(self) -> bool:
        """Whether it guesses by what a router says, and not only ahead of it."""
        return not self.silent and not self.looks_ahead

    def __call__(self, routed: Routed) -> Guesses:
        """After a layer's router spoke."""
        return []

    def pays(self, stalled: float, looked: float) -> bool:
        """Whether to look ahead in a wait that begins now, where the run has waited for `stalled`
        seconds so far, beside `looked` in which it looked ahead."""
        return True

    def foresee(self, routed: Routed) -> Guesses:
        """A later layer would say this of the step, computed without what is missing."""
        return []


class Previous(Predictor):
    """What the step before used in the next layer; after the last layer, in the first."""

    silent = False

    def __init__(self, layers: int):
        self._last = [np.zeros((0, 1), np.int64) for _ in range(layers)]

    def __call__(self, routed: Routed) -> Guesses:
        self._last[routed.layer] = routed.ids
        following = (routed.layer + 1) % len(self._last)
        return _guesses(following, self._last[following])


class Transition(Predictor):
    """What follows the experts of this layer most often in calibration: sum over active p of P(e |
    p) (the table `transition`). As many as the next layer uses; nothing is known of the next
    token's first layer."""

    silent = False

    def __init__(self, counts: list[np.ndarray | None], top_k: list[int]):
        """`counts[l]` `[experts of layer l - 1, experts of layer l]`, None for the first."""
        self._chance = [
            None if c is None else c / np.maximum(c.sum(1, keepdims=True), 1) for c in counts
        ]
        self._top_k = top_k

    def __call__(self, routed: Routed) -> Guesses:
        following = routed.layer + 1
        if following == len(self._chance):
            return []
        chance = self._chance[following]
        assert chance is not None
        padded = np.concatenate([chance, np.zeros((1, chance.shape[1]))])  # no expert leads nowhere
        return _guesses(following, _best(padded[routed.ids].sum(1), self._top_k[following]))


class Predicted(Predictor):
    """By the linear predictor of the tables: what the layer that is `distance` ahead will choose,
    from this layer's hidden state. `linear[l]` are weights `[H, experts]` and bias `[experts]` for
    layer l, None where there are none."""

    silent = False

    def __init__(
        self, distance: int, linear: list[tuple[np.ndarray, np.ndarray] | None], top_k: list[int]
    ):
        self.distance, self._linear, self._top_k = distance, linear, top_k

    def __call__(self, routed: Routed) -> Guesses:
        target = routed.layer + self.distance
        if target >= len(self._linear) or (linear := self._linear[target]) is None:
            return []
        weights, bias = linear
        return _guesses(target, _best(routed.hidden @ weights + bias, self._top_k[target]))


class TopScore(Predictor):
    """SMoE (paper III-E): shared experts and those that are resident give a hidden state, the next
    attention and router run on it, and only experts whose score is at least (1 + alpha) S_{k+1} are
    read: the others may be substituted."""

    silent = False
    looks_ahead = True

    def __init__(self, alpha: float = 0.35):
        self.alpha = alpha

    def foresee(self, routed: Routed) -> Guesses:
        scores, k = routed.gate_scores, routed.ids.shape[1]
        assert scores is not None
        experts = scores.shape[1]
        best = _best(scores, min(k + 1, experts))
        if k == experts:
            return _guesses(routed.layer, best)
        rejected = np.take_along_axis(scores, best[:, k:], axis=1)
        able = np.take_along_axis(scores, best[:, :k], axis=1) >= (1 + self.alpha) * rejected
        return _guesses(routed.layer, np.where(able, best[:, :k], -1))


class WhileItPays(TopScore):
    """The same, in waits that are expected to last `MARGIN` times as long as looking ahead, which
    costs nothing then. Both are means over some waits; now and then it is tried all the same."""

    def __init__(self, alpha: float = 0.35):
        super().__init__(alpha)
        self._before = 0.0, 0.0
        self._wait = self._look = 0.0  # seconds, means
        self._waits = 0

    def pays(self, stalled: float, looked: float) -> bool:
        wait, look = (
            max(0.0, now - before)
            for now, before in zip((stalled, looked), self._before, strict=True)
        )
        self._before = stalled, looked
        if self._look:  # a prompt may have waited meanwhile
            wait = min(wait, WAITS * max(self._wait, self._look))
        self._wait += (wait + look - self._wait) / WAITS
        if look:
            self._look += (look - self._look) / WAITS if self._look else look
        self._waits += 1
        return self._wait > MARGIN * self._look or self._waits % TRIED == 0


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """int64 `[T, k]`: each token's experts of highest score, best first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _guesses(layer: int, ids: np.ndarray) -> Guesses:
    """Every token's first choice (a column of `ids` `[T, k]`), then every token's second, each
    expert once; -1 is none."""
    experts: Iterable[int] = dict.fromkeys(ids.T.reshape(-1).tolist())
    return [(layer, expert) for expert in experts if expert >= 0]
