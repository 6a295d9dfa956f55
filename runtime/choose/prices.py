"""What a shortcut at one slot costs, in nats: pure functions of the bundle's price tables and of
live mixing weights.

A change of what a slot adds to its layer's output costs p = E[(g . change)^2] / 2, which the
tables' second moments give for any weights (FORMAT.md, "Prices"). That is not all: it also moves
later routers, and now and then one of them chooses another expert. How often goes with the size of
the change, not with its square; so the expected rise in KL divergence is

    nats = fit[kind, 0] * p + fit[kind, 1] * sqrt(p)

with coefficients that prep measured. Prices of different slots add up. NumPy only, no I/O, no
clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from smoe.runtime.errors import EngineError

KINDS = ("skip", "standin", "level")  # the rows of `price_fit`
PRICE_TABLES = ("price_cross", "price_standin", "price_level", "price_fit")
AS_IT_IS = np.array([[1.0, 0.0]] * len(KINDS), np.float32)  # a fit that leaves p alone


@dataclass(frozen=True)
class LayerPrices:
    """The price tables of one layer, of E experts with J levels (0 where there are no level
    prices).

    All methods broadcast: with experts and weights `[n, 1]` and stand-ins `[E]` they give `[n, E]`.
    Prices are float64, in nats summed over all later positions of the sequence, and never negative.
    """

    pairs: np.ndarray  # [E, E, 2]: price_cross and price_standin
    level: np.ndarray  # [E, J]
    fit: np.ndarray  # [3, 2], all float64

    @property
    def cross(self) -> np.ndarray:
        """`[E, E]`."""
        return self.pairs[..., 0]

    @property
    def standin(self) -> np.ndarray:
        """`[E, E]`."""
        return self.pairs[..., 1]

    def skip(self, e: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Leave out expert `e` where its mixing weight is `w`."""
        return self._nats("skip", w * w * self.standin[e, e])

    def stand_in(
        self, e: np.ndarray, w_e: np.ndarray, s: np.ndarray, w_s: np.ndarray
    ) -> np.ndarray:
        """Compute expert `s` with the weight `w_s` in place of `e` with `w_e`."""
        own, (between, other) = self.standin[e, e], self.pair(e, s)
        return self._nats("standin", w_e * w_e * own - 2 * w_e * w_s * between + w_s * w_s * other)

    def best_weight(self, e: np.ndarray, w_e: np.ndarray, s: np.ndarray) -> np.ndarray:
        """The weight at which `s` stands in for `e` at the lowest price; 0 where none is better
        than skipping."""
        return w_e * best_share(*self.pair(e, s))

    def pair(self, e: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What both tables say of `e` and `s`."""
        pairs = self.pairs.reshape(-1, 2).take(e * len(self.pairs) + s, axis=0)
        return pairs[..., 0], pairs[..., 1]

    def best_stand_in(self, e: np.ndarray, able: np.ndarray) -> np.ndarray | None:
        """Which of the experts that are `able`, bool `[E]`, stands in for each of `e` `[n]` at the
        lowest price, each at its best weight; None where none is able."""
        ranked = self._stand_ins.take(e, axis=0)
        first = able[ranked].argmax(1)
        best = ranked[np.arange(len(e)), first].astype(np.int64)
        return best if able[best[0]] else None

    @cached_property
    def _stand_ins(self) -> np.ndarray:
        """uint16 `[E, E]`: for every expert all of them, the best stand-in first."""
        saved = np.maximum(self.cross, 0)  # in place from here on: one layer's square at a time
        saved *= saved
        np.divide(saved, self.standin, out=saved, where=self.standin > 0)
        saved[self.standin <= 0] = 0
        np.negative(saved, out=saved)
        return np.argsort(saved, axis=1, kind="stable").astype(np.uint16)

    def at_level(self, e: np.ndarray, w: np.ndarray, level: np.ndarray | int) -> np.ndarray:
        """Compute expert `e` from the first `level` (from 1) planes only; the full level costs
        nothing."""
        return self._nats("level", w * w * self.level[e, np.asarray(level) - 1])

    def _nats(self, kind: str, moment: np.ndarray) -> np.ndarray:
        linear, root = self.fit[KINDS.index(kind)]
        p = np.maximum(moment, 0) / 2  # of moments that are estimates: a form may come out < 0
        return linear * p + root * np.sqrt(p)


@dataclass(frozen=True)
class Prices:
    """The prices of every layer."""

    layers: tuple[LayerPrices, ...]

    @classmethod
    def of(cls, tables: Sequence[dict[str, np.ndarray]], fitted: bool = True) -> Prices:
        """Prices from what `artifacts.tables.load_tables` gives; an `EngineError` if there are
        none. Without `fitted` nats are p itself: what the fit is made from."""
        required = ["price_cross", "price_standin", *(["price_fit"] if fitted else [])]
        missing = [name for layer in tables for name in required if name not in layer]
        if missing or not tables:
            raise EngineError(
                f"This bundle has no prices (its tables lack "
                f"{', '.join(sorted(set(missing))) or 'all layers'}); build "
                "it again from --calibration text without --prices 0, or run it without a loss "
                "budget."
            )
        for name, layer in (
            (name, layer) for layer in tables for name in PRICE_TABLES if name in layer
        ):
            if not np.isfinite(layer[name]).all() or (
                name != "price_cross" and (layer[name] < 0).any()
            ):
                raise EngineError(
                    f"This bundle's {name} holds values that are no prices; build it again, or run "
                    f"it without --loss."
                )
        return cls(
            tuple(_layer(layer, layer["price_fit"] if fitted else AS_IT_IS) for layer in tables)
        )


def _layer(tables: dict[str, np.ndarray], fit: np.ndarray) -> LayerPrices:
    pairs = np.stack([tables["price_cross"], tables["price_standin"]], axis=2, dtype=np.float64)
    level = tables.get("price_level", np.zeros((len(pairs), 0))).astype(np.float64)
    return LayerPrices(pairs, level, fit.astype(np.float64))


def best_share(between: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of the weight of a missing expert, what a stand-in gets best, by what the tables say of the
    two."""
    share = np.zeros(np.shape(other))
    return np.divide(np.maximum(between, 0), other, out=share, where=other > 0)


def usual_weights(counts: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """float64 `[E]`: the mean mixing weight of each expert's slots in calibration, from their
    `counts` and `mass`; where an expert had none, that of the whole layer's."""
    reached = counts > 0
    return np.where(reached, mass, mass.sum()) / np.where(reached, counts, max(1, counts.sum()))
