"""Levels by name: in how many bits slots are computed on average, and by what that is decided, as
`Policies.bits` asks for it.

Names are NAME:MEAN, like priced:3.1, in bits of a weight, scales not counted; trained without a
mean is what the routers of levels were trained for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smoe.artifacts import nested
from smoe.artifacts.manifest import Manifest
from smoe.artifacts.tables import BITS as BITS_TABLES
from smoe.artifacts.tables import Tables
from smoe.runtime.choose.bits import (
    ByBits,
    LevelNats,
    LevelRule,
    PricedLevels,
    RandomLevels,
    Scale,
    TrainedLevels,
)
from smoe.runtime.choose.prices import usual_weights
from smoe.runtime.errors import EngineError
from smoe.runtime.ledger import BitLedger, Ledger
from smoe.runtime.options import number_of
from smoe.runtime.routing import Chooser

Uses = list[tuple[np.ndarray, np.ndarray]]  # of every layer: counts and usual weights `[E]`


@dataclass(frozen=True)
class Choice:
    """What runs for which slot, and the ledger of a new sequence (None: it spends nothing), which
    may spend so many nats per token (None: what the policies say)."""

    chooser: Chooser
    new_ledger: Callable[[float | None], Ledger] | None = None


def by_bits(text: str, manifest: Manifest, tables: Tables, full: int) -> Choice:
    """The chooser of levels called `text`, of up to `full` planes. An `EngineError` where there is
    none, or the bundle lacks what it needs."""
    asked = _asked(text, manifest, tables, full)
    rule, start = BITS[text.partition(":")[0]](asked)
    chooser = ByBits(rule, asked.scale, asked.nats)
    return Choice(chooser, lambda _: BitLedger(asked.average, start, asked.scale.levels))


@dataclass(frozen=True)
class _Asked:
    """A name, taken apart, and what its rule may be made of: `nats` of every layer where the bundle
    has prices."""

    text: str
    average: float | None
    scale: Scale
    tables: Tables
    nats: list[LevelNats] | None

    @property
    def mean(self) -> float:
        """The average, which all names but one must have."""
        if self.average is None:
            raise EngineError(
                f"Bits {self.text} want a mean after a colon, like {self.text}:"
                f"{self.scale.bits.mean():.1f}."
            )
        return self.average

    @property
    def uses(self) -> Uses:
        """How often calibration used each expert, and at which weight."""
        used = self.tables.layers("counts", "gate_mass")
        return [(layer["counts"], usual_weights(*layer.values())) for layer in used]

    def needed_nats(self) -> list[LevelNats]:
        """`nats`, or an `EngineError`."""
        if self.nats is None:
            raise EngineError(
                f"Bits {self.text} are not possible: this bundle does not say what levels cost; "
                "build it from --calibration text without --prices 0."
            )
        return self.nats


def _asked(text: str, manifest: Manifest, tables: Tables, full: int) -> _Asked:
    name, colon, number = text.partition(":")
    if name not in BITS:
        raise EngineError(f"There are no bits {name[:40]!r}; there are none, {', '.join(BITS)}.")
    if full < 2:
        raise EngineError(
            f"Bits {text} are not possible: experts in {manifest.experts.encoding} are read in one "
            "plane; leave it out, read more levels, or build the bundle in a nested encoding."
        )
    scale = scale_of(manifest, full)
    least, most = scale.bits[[0, -1]].tolist()
    average = number_of(text, number, "mean bits of a weight", least, most) if colon else None
    return _Asked(text, average, scale, tables, _level_nats(tables, full))


def scale_of(manifest: Manifest, full: int) -> Scale:
    """What the first `full` levels of a bundle in a nested encoding are."""
    encoding = nested.parse(manifest.experts.encoding)
    matrices = [manifest.expert_shape(layer).matrices() for layer in range(len(manifest.layers))]
    sizes = [sum(rows * columns for rows, columns in layer.values()) for layer in matrices]
    slots = [layer.top_k for layer in manifest.layers]
    usual = np.dot(sizes, slots) / sum(slots)
    bits = [encoding.bits(level, matrices[0]) for level in range(1, full + 1)]
    return Scale(np.array(bits), np.array(sizes) / usual)


def _level_nats(tables: Tables, full: int) -> list[LevelNats] | None:
    """What levels cost in every layer; None where the bundle has no prices of them."""
    layers = tables.layers("price_level", "price_fit")
    if not all(len(layer) == 2 for layer in layers):
        return None
    for layer in layers:
        for name, values in layer.items():
            if not np.isfinite(values).all() or (values < 0).any():
                raise EngineError(
                    f"This bundle's {name} holds values that are no prices; build it again, or run "
                    "it without --bits."
                )
    return [LevelNats(layer["price_level"], layer["price_fit"], full) for layer in layers]


# -- rules, each with the price of a bit that it begins with ----------------------------------


def _trained(asked: _Asked) -> tuple[LevelRule, float]:
    layers = asked.tables.layers(*BITS_TABLES)
    if not all(len(layer) == len(BITS_TABLES) for layer in layers):
        raise EngineError(
            f"Bits {asked.text} are not possible: this bundle has no routers of levels; train them "
            "with smoe-prep train-bits, or use priced."
        )
    for layer in layers:
        for name, values in layer.items():
            if not np.isfinite(values).all():
                raise EngineError(
                    f"This bundle's {name} holds values that are not finite; train its routers of "
                    "levels again, or run it without --bits."
                )
    rule = TrainedLevels(
        [
            (layer["bits_weight"], layer["bits_bias"], float(layer["bits_mixing"][0]))
            for layer in layers
        ],
        asked.scale,
    )
    prices, means = layers[0]["bits_curve"].T.astype(np.float64)
    start = 0.0 if asked.average is None else np.interp(-asked.average, -means, prices)
    return rule, float(start)


def _priced(asked: _Asked) -> tuple[LevelRule, float]:
    rule = PricedLevels(asked.needed_nats(), asked.scale)
    return rule, rule.price_of(asked.mean, asked.uses)


def _uniform(asked: _Asked) -> tuple[LevelRule, float]:
    below, share = _between(asked)
    return RandomLevels(below, np.full(len(asked.scale.weight), share)), 0.0


def _by_layer(asked: _Asked) -> tuple[LevelRule, float]:
    """The layers above are those that gain most by their prices, as many as the mean allows, and
    one of them in part."""
    below, share = _between(asked)
    worth = []
    for nats, (counts, usual) in zip(asked.needed_nats(), asked.uses, strict=True):
        saved = nats(np.arange(len(usual)), usual)
        worth.append(counts @ (saved[:, below - 1] - saved[:, below]) / max(1, counts.sum()))
    weight = asked.scale.weight
    shares, left = np.zeros(len(weight)), share * weight.sum()
    for layer in np.argsort(-np.array(worth) / weight, kind="stable"):
        shares[layer] = min(1.0, left / weight[layer])
        left -= shares[layer] * weight[layer]
    return RandomLevels(below, shares), 0.0


def _between(asked: _Asked) -> tuple[int, float]:
    """The level below the mean, and which share of slots is to be at the one above it."""
    bits = asked.scale.bits
    below = int(np.clip(np.searchsorted(bits, asked.mean, side="right"), 1, len(bits) - 1))
    share = (asked.mean - bits[below - 1]) / (bits[below] - bits[below - 1])
    return below, float(share)


BITS: dict[str, Callable[[_Asked], tuple[LevelRule, float]]] = {
    "trained": _trained,
    "priced": _priced,
    "uniform": _uniform,
    "by-layer": _by_layer,
}
