"""What helps to know a layer's experts early, at distance 1, 2 and 3: four ways, measured on text
that none has seen.

previous: what the token before chose in that layer. transition: what followed this layer's choice
most often. router: the later layer's own router, given this layer's hidden state as it is. linear:
a ridge regression from this layer's hidden state to the later router's scores. The linear one goes
into the tables where it is the best, with the recall of all four.
"""

from __future__ import annotations

import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge

from smoe.artifacts.tables import DISTANCES, PREDICTORS
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry, experts_run_by
from smoe.prep.errors import PrepError
from smoe.prep.statistics.sums import activity
from smoe.prep.sweep.forward import Arrays, AtExperts

RIDGE = 10.0  # on 8192 tokens of the example model 1 to 100 are within .002 of recall, 1000 is not
LEAST = 1e-9  # scores that are probabilities are predicted as logarithms, from here on


class _Layer:
    """Some tokens at one layer: what was chosen `[T, k]`, and what its scores were, or are taken to
    be `[T, E]`; what its experts received, `hidden` float32 `[T, H]`, lies in a file without a name
    in `directory`."""

    def __init__(self, at: AtExperts, tokens: torch.Tensor, directory: Path | None):
        experts = expert_geometry(at.module)[0]
        tokens = tokens.to(at.hidden.device)
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  as long as the layer
        hidden = at.hidden[tokens].float().cpu().numpy()
        self._shape = hidden.shape
        hidden.tofile(self._file)
        self.ids = at.ids[tokens].cpu().numpy()
        self.active = activity(self.ids, experts)
        self.scores = self.active.astype(np.float32)
        if at.scores is not None:
            self.scores = _regressable(at.scores[tokens, :experts].float().cpu().numpy())

    @property
    def hidden(self) -> np.ndarray:
        self._file.seek(0)
        return np.fromfile(self._file, np.float32).reshape(self._shape)


def _regressable(scores: np.ndarray) -> np.ndarray:
    """Scores `[T, E]` for a linear model: logarithms of what is not negative, all finite."""
    finite = np.isfinite(scores)
    if scores[finite].min() >= 0:
        scores = np.log(np.maximum(scores, LEAST))
    return np.where(finite, scores, scores[finite & np.isfinite(scores)].min())


class Predictors:
    """Learns from some tokens of a sweep and is measured on others, for three layers
    at a time. Leaves the `predict_...` tables."""

    name = "predictors"

    def __init__(
        self,
        checkpoint: Checkpoint,
        learned: np.ndarray,
        held_out: np.ndarray,
        starts: np.ndarray,
        directory: Path | None = None,
    ):
        """Tokens of the sweep, int64: `learned` to learn from, `held_out` to measure on, `starts`
        the first ones of its rows. Files lie in `directory`."""
        self._directory = directory
        self._checkpoint, self._learned = checkpoint, len(learned)
        tokens = np.concatenate([learned, held_out])
        self._tokens, self._first = torch.from_numpy(tokens), np.isin(tokens, starts)
        self._tables: list[Arrays] = []
        self._before: deque[_Layer] = deque(maxlen=len(DISTANCES))  # the nearest first

    def visit(self, at: AtExperts) -> Arrays:
        now = _Layer(at, self._tokens, self._directory)
        self._tables.append(self._learn(at.layer, now))
        self._before.appendleft(now)
        return self._tables[-1]

    def resume(self, at: AtExperts, known: Arrays) -> None:
        self._tables.append(known)
        self._before.appendleft(_Layer(at, self._tokens, self._directory))

    def finish(self) -> list[Arrays]:
        return self._tables

    def _learn(self, layer: int, now: _Layer) -> Arrays:
        if not self._before:
            return {}
        recall = np.full((len(PREDICTORS), len(DISTANCES)), np.nan, np.float32)
        bias = np.zeros((len(DISTANCES), now.scores.shape[1]), np.float32)
        tables: Arrays = {}
        for i, before in enumerate(self._before):
            hidden = before.hidden
            weights, bias[i] = _ridge(hidden[: self._learned], now.scores[: self._learned])
            held = hidden[self._learned :]
            recall[:, i] = self._recalls(layer, before, held, now, weights, bias[i])
            if recall[-1, i] >= np.nanmax(recall[:, i]):
                tables[f"predict_{DISTANCES[i]}"] = weights.astype(np.float16)
        return tables | {"predict_bias": bias, "predict_recall": recall}

    def _recalls(
        self,
        layer: int,
        before: _Layer,
        hidden: np.ndarray,
        now: _Layer,
        weights: np.ndarray,
        bias: np.ndarray,
    ) -> list[float]:
        """Of each of `PREDICTORS`, the part of a token's experts that are among as many guesses, on
        the held-out text, whose `hidden` states the layer before had."""
        held, k = slice(self._learned, None), now.ids.shape[1]
        previous = np.roll(now.active, 1, 0) & ~self._first[:, None]
        counts = before.active[: self._learned].T.astype(np.float64) @ now.active[: self._learned]
        chances = counts / np.maximum(before.active[: self._learned].sum(0)[:, None], 1)
        return [
            _recall(previous[held], now.active[held]),
            _recall(_best(before.active[held] @ chances, k), now.active[held]),
            self._by_router(layer, hidden, now.active[held]),
            _recall(_best(hidden @ weights + bias, k), now.active[held]),
        ]

    def _by_router(self, layer: int, hidden: np.ndarray, active: np.ndarray) -> float:
        """By running the module that holds the layer's experts on another layer's hidden state; NaN
        where it is not this module that chooses."""
        name, _ = self._checkpoint.layers[layer]
        holder = self._checkpoint.model.get_submodule(name.rpartition(".")[0])
        caught: list[torch.Tensor] = []

        def catch(layer, module, hidden, ids, weights):
            caught.append(ids)
            return torch.zeros_like(hidden)

        with experts_run_by(self._checkpoint.model, self._checkpoint.layers, catch):
            like = next(self._checkpoint.model.parameters())
            try:
                with torch.no_grad():
                    holder(torch.from_numpy(hidden)[None].to(like))
            except (TypeError, RuntimeError, ValueError, AttributeError):
                return float("nan")
        if len(caught) != 1 or len(caught[0]) != len(active):
            return float("nan")
        return _recall(activity(caught[0].cpu().numpy(), active.shape[1]), active)


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 `[H, E]` and bias `[E]`."""
    if len(x) < 2:
        raise PrepError("Predictors need at least 2 tokens of text; give more.")
    model = Ridge(RIDGE, solver="cholesky").fit(x, y)
    return model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """bool `[T, E]`: the k best of every token."""
    best = np.zeros(scores.shape, bool)
    np.put_along_axis(best, np.argsort(-scores, 1, kind="stable")[:, :k], True, 1)
    return best


def _recall(guessed: np.ndarray, active: np.ndarray) -> float:
    return float((guessed & active).sum() / max(1, active.sum()))
