"""The sums behind the tables of one MoE layer. Sums merge, so that runs can be split and added up;
`tables` divides.

Nothing here knows torch or models: arrays come in, arrays go out. The formulas are those of
`artifacts/tables.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

MAX_RANKS = 32  # stand-ins listed per expert


@dataclass
class LayerSums:
    """Sums over tokens, float64 or int64. E experts here, P in the previous MoE layer (0: there is
    none)."""

    counts: np.ndarray  # [E]
    gate_mass: np.ndarray  # [E]
    weighted_norm: np.ndarray  # [E]
    norm: np.ndarray  # [E]
    together: np.ndarray  # [E, E]
    transition: np.ndarray  # [P, E]
    score: np.ndarray  # [E]
    score_product: np.ndarray  # [E, E]
    scored: int  # tokens in the two above
    # Over sampled tokens; row e counts those routed to e, `any_*` all of them.
    sampled: np.ndarray  # [E]
    cosine: np.ndarray  # [E, E]
    error: np.ndarray  # [E, E]  sum |y_s - y_e|^2
    energy: np.ndarray  # [E]    sum |y_e|^2
    any_sampled: int
    any_cosine: np.ndarray  # [E, E]
    any_error: np.ndarray  # [E, E]
    any_energy: np.ndarray  # [E]

    @classmethod
    def zeros(cls, experts: int, previous: int) -> LayerSums:
        """Nothing added yet, for so many experts, and so many in the previous MoE layer."""
        e, ee = (experts,), (experts, experts)
        return cls(
            counts=np.zeros(e, np.int64),
            gate_mass=np.zeros(e),
            weighted_norm=np.zeros(e),
            norm=np.zeros(e),
            together=np.zeros(ee, np.int64),
            transition=np.zeros((previous, experts), np.int64),
            score=np.zeros(e),
            score_product=np.zeros(ee),
            scored=0,
            sampled=np.zeros(e, np.int64),
            cosine=np.zeros(ee),
            error=np.zeros(ee),
            energy=np.zeros(e),
            any_sampled=0,
            any_cosine=np.zeros(ee),
            any_error=np.zeros(ee),
            any_energy=np.zeros(e),
        )

    def merge(self, other: LayerSums) -> LayerSums:
        """The sums of both runs."""
        names = [field.name for field in dataclasses.fields(self)]
        return LayerSums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def add_routing(
        self, ids: np.ndarray, weights: np.ndarray, norms: np.ndarray, before: np.ndarray | None
    ) -> np.ndarray:
        """Add a batch: ids, mixing weights and output norms `[T, k]`, and `before`, the activity of
        the previous layer. Returns this layer's activity, bool `[T, E]`."""
        active = activity(ids, len(self.counts))
        real = ids < len(self.counts)
        ids, weights, norms = ids[real], weights[real], norms[real]
        counted = active.astype(np.float32)  # exact below 2^24 tokens, and BLAS multiplies it
        self.counts += active.sum(0)
        for total, values in (
            (self.gate_mass, weights),
            (self.weighted_norm, weights * norms),
            (self.norm, norms),
        ):
            total += np.bincount(ids, values, len(total))
        self.together += (counted.T @ counted).astype(np.int64)
        if before is not None:
            self.transition += (before.astype(np.float32).T @ counted).astype(np.int64)
        return active

    def add_scores(self, scores: np.ndarray) -> None:
        """Add selection scores `[T, E]`. A masked score (not finite) counts as the row's lowest
        finite one."""
        s = scores.astype(np.float64)
        finite = np.isfinite(s)
        lowest = np.where(finite, s, np.inf).min(1, keepdims=True)
        s = np.where(finite, s, lowest)
        self.score += s.sum(0)
        self.score_product += s.T @ s
        self.scored += len(s)

    def add_outputs(self, outputs: np.ndarray, active: np.ndarray) -> None:
        """Add sampled tokens: `outputs` float `[n, E, H]` of every expert, `active` bool
        `[n, E]`."""
        # float64: the error of near twins is a difference of large numbers
        outputs = outputs.astype(np.float64, copy=False)
        gram = outputs @ outputs.transpose(0, 2, 1)  # [n, E, E]
        energy = np.einsum("nee->ne", gram).astype(np.float64)
        norms = np.sqrt(energy)
        scale = norms[:, :, None] * norms[:, None, :]
        cosine = np.divide(gram, scale, out=np.zeros_like(scale), where=scale > 0)
        error = np.maximum(energy[:, :, None] + energy[:, None, :] - 2.0 * gram, 0)
        routed = active.astype(np.float64)
        self.sampled += active.sum(0)
        self.energy += (routed * energy).sum(0)
        self.cosine += np.einsum("ne,nes->es", routed, cosine)
        self.error += np.einsum("ne,nes->es", routed, error)
        self.any_sampled += len(outputs)
        self.any_energy += energy.sum(0)
        self.any_cosine += cosine.sum(0)
        self.any_error += error.sum(0)

    def tables(self) -> dict[str, np.ndarray]:
        """The tables of this layer, names and dtypes as in `artifacts.tables.TABLES`.

        An expert that no token reached gets the layer's mean saliency and norm; one that no sampled
        token reached gets similarity and error over all sampled tokens.
        """
        reached, sampled = self.counts > 0, self.sampled > 0
        all_slots = max(1, int(self.counts.sum()))
        per = np.maximum(self.counts, 1)
        rows = np.where(sampled, self.sampled, max(1, self.any_sampled))[:, None]
        energy = np.where(sampled, self.energy, self.any_energy)[:, None]
        summed_error = np.where(sampled[:, None], self.error, self.any_error)
        error = np.divide(
            summed_error, energy, out=np.full_like(summed_error, np.inf), where=energy > 0
        )
        ids, errors = _rank(error)
        tables = {
            "counts": self.counts,
            "gate_mass": self.gate_mass,
            "saliency": np.where(
                reached, self.weighted_norm / per, self.weighted_norm.sum() / all_slots
            ),
            "output_norm": np.where(reached, self.norm / per, self.norm.sum() / all_slots),
            "coactivation": self.together,
            "output_similarity": (
                np.where(sampled[:, None], self.cosine, self.any_cosine) / rows
            ).astype(np.float32),
            "output_error": error.astype(np.float32),
            "sampled": self.sampled,
            "standin_ids": ids,
            "standin_error": errors,
        }
        if len(self.transition):
            tables["transition"] = self.transition
        if self.scored:
            tables["score_similarity"] = _correlation(self.score, self.score_product, self.scored)
        return tables


def activity(ids: np.ndarray, experts: int) -> np.ndarray:
    """Which experts each token uses, bool `[T, experts]`, from ids `[T, k]`; the id `experts` is no
    expert."""
    active = np.zeros((len(ids), experts + 1), bool)
    np.put_along_axis(active, ids, True, axis=1)
    return active[:, :experts]


def _correlation(total: np.ndarray, product: np.ndarray, n: int) -> np.ndarray:
    mean = total / n
    covariance = product / n - np.outer(mean, mean)
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
    scale = np.outer(deviation, deviation)
    correlation = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    np.fill_diagonal(correlation, 1)
    return np.clip(correlation, -1, 1).astype(np.float32)


def _rank(error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stand-ins of each expert, best first: ids int16 and errors float32 `[E, R]`. An expert is
    not its own."""
    masked = error.copy()
    np.fill_diagonal(masked, np.nan)
    ranks = min(MAX_RANKS, max(1, len(error) - 1))
    order = np.argsort(masked, axis=1, kind="stable")[:, :ranks]  # NaN sorts last
    picked = np.take_along_axis(masked, order, axis=1)
    alone = np.isnan(picked)
    return np.where(alone, -1, order).astype(np.int16), np.where(alone, np.inf, picked).astype(
        np.float32
    )
