"""What the planes of experts are used for, where a chooser says at which level each slot runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Uses of an expert after which one counts half as much, and for how many its layer's stand in.
HALF_LIFE, PRIOR = 32, 2.0


class PlaneUses:
    """How often a use of an expert needs each of its planes: bytes that a resident one saves at a
    use, of those it has.

    A use is a step's, and needs the planes up to the highest level of any of its slots. What is
    known of an expert is drawn towards its layer's mean; before the first use all planes count
    alike."""

    def __init__(self, experts: Sequence[int], levels: int):
        """`experts[l]`: how many experts layer l has, of so many `levels`."""
        self._first = np.concatenate([[0], np.cumsum(experts)])
        self._layer_of = np.repeat(np.arange(len(experts)), experts)
        # [.., j]: uses that needed plane j, decayed.
        self._uses = np.zeros((self._first[-1], levels))
        self._layers = np.ones((len(experts), levels))
        self._fade = 2 ** (-1 / HALF_LIFE)

    def need(self, layer: int, experts: np.ndarray, levels: np.ndarray) -> None:
        """A step runs `experts` of `layer`, each once or more, at `levels`, int64 `[n]` both."""
        highest = np.zeros(self._first[layer + 1] - self._first[layer], np.int64)
        np.maximum.at(highest, experts, levels)
        used = highest.nonzero()[0]
        needed = np.arange(self._uses.shape[1]) < highest[used, None]
        rows = self._first[layer] + used
        self._uses[rows] = self._uses[rows] * self._fade + needed
        self._layers[layer] = self._layers[layer] * self._fade ** len(used) + needed.sum(0)

    def __call__(self, keys: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """float64 for each of `keys`, flat numbers of experts that are resident up to `levels`: of
        the highest plane."""
        layers = self._layers.take(self._layer_of.take(keys), axis=0)
        usual = layers[np.arange(len(keys)), levels - 1] / layers[:, 0]
        return (self._uses[keys, levels - 1] + PRIOR * usual) / (self._uses[keys, 0] + PRIOR)
