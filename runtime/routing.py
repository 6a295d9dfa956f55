"""The router's own rules (FORMAT.md, "Routing"): ids from scores, weights of any choice of ids, and gate scores."""

from __future__ import annotations

import numpy as np

from smoe.artifacts.manifest import Routing


def route(
    rule: Routing, scores: np.ndarray, raw: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[T, k]` int64, best first, and mixing weights `[T, k]` float32, from scores and raw weights `[T, E]`."""
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    return ids, weigh(rule, raw, ids)


def weigh(rule: Routing, raw: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Mixing weights of any choice of ids `[T, k]`, from the raw weights `[T, E]`: float32 `[T, k]`."""
    w = np.take_along_axis(raw, ids, axis=-1).astype(np.float32)
    if rule.normaliser == "softmax":
        w = np.exp(w - w.max(-1, keepdims=True))
        w = w / w.sum(-1, keepdims=True)
    elif rule.normaliser == "sum":
        w = w / (w.sum(-1, keepdims=True) + np.float32(rule.epsilon))
    return w * np.float32(rule.scale)


def gate_scores(rule: Routing, scores: np.ndarray) -> np.ndarray:
    """What SMoE compares: a softmax or sigmoid over all experts, float32 `[T, E]`. Routers whose weights are a softmax
    over the selected select by logits, which are brought to a softmax over all here; others' scores are taken as they
    are (a masked one stays -inf)."""
    if rule.normaliser != "softmax":
        return scores
    z = np.exp(scores - scores.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)
