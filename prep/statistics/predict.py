"""What helps to know a layer's experts early, at distance 1, 2 and 3: four ways, measured on text that none has seen.

previous: what the token before chose in that layer. transition: what followed this layer's choice most often. router: the
later layer's own router, given this layer's hidden state as it is. linear: a ridge regression from this layer's hidden
state to the later router's scores. The linear one goes into the tables where it is the best, with the recall of all
four. All text runs in lockstep, so each layer's experts are read once, and three layers' hidden states are in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge

from smoe.artifacts import safetensors_file
from smoe.artifacts.tables import DISTANCES, PREDICTORS, load_tables, save_tables
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry, experts_run_by
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress
from smoe.prep.statistics.profile import Scores, batches, run
from smoe.prep.statistics.sums import activity
from smoe.prep.sweep.forward import Arrived, lockstep, outputs

RIDGE = (
    10.0  # on 8192 tokens of the example model 1 to 100 are within .002 of recall, 1000 loses .01
)
LEAST = 1e-9  # scores that are probabilities are predicted as logarithms, from here on


def add_predictors(
    checkpoint: Checkpoint,
    directory: Path,
    rows: list[np.ndarray],
    held_out: list[np.ndarray],
    progress: Progress,
) -> None:
    """Learn from `rows`, measure on `held_out`, and put the `predict_…` tables beside the others in `directory`, once."""
    file = directory / "tables.safetensors"
    tables = load_tables(file, [expert_geometry(module)[0] for _, module in checkpoint.layers])
    if all("predict_recall" in of for of in tables[1:]):
        progress.say("predict: kept from an earlier run")
        return
    together = [*batches(rows), *batches(held_out)]
    learner = _Learner(checkpoint, together, sum(len(row) for row in rows), progress)
    with learner.scores:
        passes = [partial(run, checkpoint.model, batch) for batch in together]
        for _ in lockstep(checkpoint, passes, learner.visit, learner.scores.take):
            pass
    merged = [of | found for of, found in zip(tables, learner.tables, strict=True)]
    save_tables(file, merged, safetensors_file.read_header(file).metadata)


class _Layer:
    """One layer's tokens: what its experts received `[T, H]`, what was chosen `[T, k]`, and what its scores were, or are
    taken to be `[T, E]`."""

    def __init__(self, arrived: list[Arrived], experts: int):
        self.hidden = torch.cat([slots.tokens for slots in arrived]).float().numpy()
        self.ids = torch.cat([slots.ids for slots in arrived]).numpy()
        self.active = activity(self.ids, experts)
        noted = [slots.noted for slots in arrived]
        self.scores = self.active.astype(np.float32)
        if all(isinstance(scores, torch.Tensor) for scores in noted):
            self.scores = torch.cat(noted).float().numpy()[:, :experts]
            finite = np.isfinite(self.scores)
            if self.scores[finite].min() >= 0:
                self.scores = np.log(np.maximum(self.scores, LEAST))
            self.scores = np.where(
                finite, self.scores, self.scores[finite & np.isfinite(self.scores)].min()
            )


class _Learner:
    def __init__(
        self, checkpoint: Checkpoint, together: list[np.ndarray], learned: int, progress: Progress
    ):
        self._checkpoint, self._learned = checkpoint, learned
        self.scores = Scores()
        self.tables: list[dict[str, np.ndarray]] = []
        self._before: deque[_Layer] = deque(maxlen=len(DISTANCES))  # the nearest first
        self._first = np.concatenate(
            [np.arange(batch.size) % batch.shape[1] == 0 for batch in together]
        )
        self._count = progress.counter("predict", "layers", len(checkpoint.layers))

    def visit(self, layer: int, arrived: list[Arrived]) -> Iterator[torch.Tensor]:
        now = _Layer(arrived, expert_geometry(self._checkpoint.layers[layer][1])[0])
        self.tables.append(self._learn(layer, now))
        self._before.appendleft(now)
        with self._checkpoint.experts(layer) as module:
            yield from outputs(module, arrived)
        self._count.done(layer + 1)

    def _learn(self, layer: int, now: _Layer) -> dict[str, np.ndarray]:
        if not self._before:
            return {}
        recall = np.full((len(PREDICTORS), len(DISTANCES)), np.nan, np.float32)
        bias = np.zeros((len(DISTANCES), now.scores.shape[1]), np.float32)
        found: dict[str, np.ndarray] = {}
        for i, before in enumerate(self._before):
            weights, bias[i] = _ridge(before.hidden[: self._learned], now.scores[: self._learned])
            recall[:, i] = self._recalls(layer, before, now, weights, bias[i])
            if recall[-1, i] >= np.nanmax(recall[:, i]):
                found[f"predict_{DISTANCES[i]}"] = weights.astype(np.float16)
        return found | {"predict_bias": bias, "predict_recall": recall}

    def _recalls(
        self, layer: int, before: _Layer, now: _Layer, weights: np.ndarray, bias: np.ndarray
    ) -> list[float]:
        """Of each of `PREDICTORS`, the part of a token's experts that are among as many guesses, on the held-out text."""
        held, k = slice(self._learned, None), now.ids.shape[1]
        previous = np.roll(now.active, 1, 0) & ~self._first[:, None]
        counts = before.active[: self._learned].T.astype(np.float64) @ now.active[: self._learned]
        chances = counts / np.maximum(before.active[: self._learned].sum(0)[:, None], 1)
        return [
            _recall(previous[held], now.active[held]),
            _recall(_best(before.active[held] @ chances, k), now.active[held]),
            self._by_router(layer, before.hidden[held], now.active[held]),
            _recall(_best(before.hidden[held] @ weights + bias, k), now.active[held]),
        ]

    def _by_router(self, layer: int, hidden: np.ndarray, active: np.ndarray) -> float:
        """By running the module that holds the layer's experts on another layer's hidden state; NaN where it is not
        this module that chooses."""
        name, _ = self._checkpoint.layers[layer]
        holder = self._checkpoint.model.get_submodule(name.rpartition(".")[0])
        caught: list[torch.Tensor] = []

        def catch(layer, module, hidden, ids, weights):
            caught.append(ids)
            return torch.zeros_like(hidden)

        with experts_run_by(self._checkpoint.model, self._checkpoint.layers, catch):
            try:
                holder(
                    torch.from_numpy(hidden)[None].to(
                        next(self._checkpoint.model.parameters()).dtype
                    )
                )
            except (TypeError, RuntimeError, ValueError, AttributeError):
                return float("nan")
        if len(caught) != 1 or len(caught[0]) != len(active):
            return float("nan")
        return _recall(activity(caught[0].numpy(), active.shape[1]), active)


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 `[H, E]` and bias `[E]`."""
    if len(x) < 2:
        raise PrepError("Predictors need at least 2 tokens of text; give more.")
    model = Ridge(RIDGE, solver="cholesky").fit(x, y)
    return model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """bool `[T, E]`: the k best of every token."""
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, np.argsort(-scores, 1, kind="stable")[:, :k], True, 1)
    return found


def _recall(guessed: np.ndarray, active: np.ndarray) -> float:
    return float((guessed & active).sum() / max(1, active.sum()))
