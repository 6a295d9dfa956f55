"""The sums behind the price tables of one MoE layer: second moments of what a change of an expert's
output costs.

As in `statistics.sums` nothing here knows torch or models, sums merge, `tables` divides. The
formulas are those of `artifacts/tables.py`; g is the gradient of `sweep.gradients`, y_e the output
of expert e.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

PRIOR = 8.0  # tokens of the layer at large in every expert's moments: the sample may miss some


@dataclass
class PriceSums:
    """Sums over sampled tokens and their draws, float64 or int64. E experts, J levels (0 where
    nothing is packed)."""

    sampled: np.ndarray  # [E]     tokens routed to e
    slots: int  # their sum
    tokens: int
    cross: np.ndarray  # [E, E]    over tokens routed to e (row): (g y_e) (g y_s), mean over draws
    square: np.ndarray  # [E, E]   over tokens routed to e: (g y_s)^2
    any_cross: np.ndarray  # [E, E]   the same over all sampled tokens
    any_square: np.ndarray  # [E]
    level: np.ndarray  # [E, J]    over tokens routed to e: (g (y_e at level j - y_e at the full))^2
    packed: np.ndarray  # [E]      (g (y_e at the full level - y_e))^2

    @classmethod
    def zeros(cls, experts: int, levels: int) -> PriceSums:
        """Nothing added yet, for so many experts and levels."""
        e, ee = (experts,), (experts, experts)
        return cls(
            sampled=np.zeros(e, np.int64),
            slots=0,
            tokens=0,
            cross=np.zeros(ee),
            square=np.zeros(ee),
            any_cross=np.zeros(ee),
            any_square=np.zeros(e),
            level=np.zeros((experts, levels)),
            packed=np.zeros(e),
        )

    def merge(self, other: PriceSums) -> PriceSums:
        """The sums of both samples."""
        names = [field.name for field in dataclasses.fields(self)]
        return PriceSums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def add(self, products: np.ndarray, active: np.ndarray) -> None:
        """Add tokens: `products` float `[draws, T, E]` of g with every expert's output, `active`
        bool `[T, E]`."""
        draws, tokens, experts = products.shape
        self.tokens += tokens
        self.sampled += active.sum(0)
        self.slots += int(active.sum())
        flat = products.reshape(-1, experts).astype(np.float64)
        self.any_cross += flat.T @ flat / draws
        self.any_square += np.square(flat).sum(0) / draws
        for e in range(experts):
            routed = products[:, active[:, e]].reshape(-1, experts).astype(np.float64)
            self.cross[e] += routed[:, e] @ routed / draws
            self.square[e] += np.square(routed).sum(0) / draws

    def add_levels(self, expert: int, errors: np.ndarray, packed: np.ndarray) -> None:
        """Add the tokens routed to one expert: g times the errors of its levels `[draws, n, J]`,
        and times that of the full level against the checkpoint's weights `[draws, n]`."""
        self.level[expert] += np.square(errors.astype(np.float64)).sum((0, 1)) / len(errors)
        self.packed[expert] += np.square(packed.astype(np.float64)).sum() / len(packed)

    def tables(self) -> dict[str, np.ndarray]:
        """The price tables of this layer, names and dtypes as in `artifacts.tables.TABLES`.

        An expert's moments hold `PRIOR` tokens of the layer besides its own: of its own output
        those of all slots, of the others' outputs those of all tokens, times how much larger own
        moments are than those. What its own output does to tokens that were not sent to it says
        little: an expert for another kind of text is nearly silent there.
        """
        n = self.sampled[:, None] + PRIOR
        slots, tokens = max(1, self.slots), max(1, self.tokens)
        own = np.diag(self.square).sum()
        larger = own / max(1e-300, (self.any_square * self.sampled).sum() / tokens)
        cross = PRIOR * larger / tokens * self.any_cross
        square = PRIOR * larger / tokens * np.tile(self.any_square, (len(n), 1))
        np.fill_diagonal(cross, PRIOR * own / slots)
        np.fill_diagonal(square, PRIOR * own / slots)
        tables = {
            "price_sampled": self.sampled,
            "price_cross": ((self.cross + cross) / n).astype(np.float32),
            "price_standin": ((self.square + square) / n).astype(np.float32),
        }
        if self.level.shape[1]:
            tables["price_level"] = ((self.level + PRIOR * self.level.sum(0) / slots) / n).astype(
                np.float32
            )
            tables["price_packed"] = (
                (self.packed + PRIOR * self.packed.sum() / slots) / n[:, 0]
            ).astype(np.float32)
        return tables
