"""Policies by name, as `Engine.open` and the commands take them: NAME or NAME:NUMBER, like smoe:0.35."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.bundle import Bundle
from smoe.artifacts.manifest import Layer, Manifest
from smoe.artifacts.tables import DISTANCES, Tables
from smoe.runtime.budget import MemoryPlan, chunk_tokens
from smoe.runtime.cache import predict
from smoe.runtime.cache.eviction import DEFAULT_EVICTION, Eviction, NextUse, eviction_named
from smoe.runtime.cache.residency import Residency
from smoe.runtime.choose import substitution
from smoe.runtime.choose.priced import LossBudget, PlaneWorth, Priced
from smoe.runtime.choose.prices import PRICE_TABLES, Prices
from smoe.runtime.errors import EngineError


@dataclass(frozen=True)
class Policies:
    """What the engine does with a budget that does not hold all experts.

    eviction: which resident expert goes (`EVICTIONS`). shares: every layer has an equal part of the pool for itself.
    warm: start with the experts that calibration used most, rather than with none. substitution: what stands in for a
    missing expert (`SUBSTITUTIONS`, or a function of one's own; none is lossless). prefetch: what is read on a guess (`PREFETCHES`). loss: nats per
    token that the priced scheduler may spend on reading less (0: none, lossless); the bundle must have prices.
    """

    eviction: str = DEFAULT_EVICTION
    shares: bool = False
    warm: bool = True
    substitution: str | substitution.Substitution = "none"
    prefetch: str = "none"
    loss: float = 0.0

    @property
    def lossless(self) -> bool:
        return self.substitution == "none" and not self.loss


def tables_bytes(policies: Policies, bundle: Bundle) -> int:
    """What the tables take that the policies keep in memory: part of the engine's budget."""
    manifest, levels = bundle.manifest, bundle.levels
    layers = manifest.layers
    square = 8 * sum(layer.experts**2 for layer in layers)
    total = 0
    if policies.loss:
        total += 2 * square + 8 * (3 * levels + 1) * sum(layer.experts for layer in layers)
        total += 8 * max(
            2 * layer.experts**2 + 24 * chunk_tokens(manifest) * layer.top_k for layer in layers
        )  # while it chooses
    if isinstance(policies.substitution, str) and policies.substitution.startswith(
        ("buddy", "similar")
    ):
        total += 2 * square
    if policies.prefetch == "transition":
        total += 2 * square
    if policies.prefetch.startswith("predicted"):
        total += 4 * sum((layer.hidden + len(DISTANCES)) * layer.experts for layer in layers)
    return total


# NAME: (what the number is, its default or None where one must be given, smallest, largest, how it is made of the number
# and of tables by name)
_Maker = Callable[[float, Callable[[str], list[np.ndarray]]], substitution.Substitution]
SUBSTITUTIONS: dict[str, tuple[str, float | None, float, float, _Maker]] = {
    "smoe": ("alpha", 0.35, 0, 10, lambda n, of: substitution.Smoe(n)),
    "cache-prior": ("lambda", 0.2, 0, 10, lambda n, of: substitution.CachePrior(n)),
    "buddy": (
        "entropy that is needed",
        0.95,
        0,
        1,
        lambda n, of: substitution.Buddy(of("coactivation"), n),
    ),
    "live": ("weight below", 0.1, 0, 100, lambda n, of: substitution.Below("live", n)),
    "zero": ("weight below", 0.1, 0, 100, lambda n, of: substitution.Below("zero", n)),
    "random": ("weight below", 0.1, 0, 100, lambda n, of: substitution.Below("random", n)),
    "similar": (
        "weight below",
        0.1,
        0,
        100,
        lambda n, of: substitution.Below("similar", n, of("output_error")),
    ),
}
PREFETCHES = ("none", "previous", "transition", "predicted", "smoe")


def make_eviction(text: str, manifest: Manifest) -> Eviction:
    """The eviction called `text`."""
    made = eviction_named(text, [layer.experts for layer in manifest.layers])
    if made.needs_scores:
        _needs_routing(manifest, f"Eviction {text}")
    return made


def make_substitution(
    text: str | substitution.Substitution, manifest: Manifest, tables: Tables
) -> substitution.Substitution | None:
    """The substitution called `text`, None for "none"; an `EngineError` where this model allows none."""
    if not isinstance(text, str):
        return text
    if text == "none":
        return None
    made = substitution_named(text, tables.column)
    _needs_routing(manifest, "Substitution")
    return made


def substitution_named(
    text: str, of: Callable[[str], list[np.ndarray]]
) -> substitution.Substitution:
    """The substitution called `text`; `of(name)` gives one table of every layer."""
    name, colon, number = text.partition(":")
    if name not in SUBSTITUTIONS:
        raise EngineError(
            f"There is no substitution {name[:40]!r}; there are none, {', '.join(SUBSTITUTIONS)}."
        )
    what, default, least, most, make = SUBSTITUTIONS[name]
    return make(_number(text, number if colon else default, what, least, most), of)


def make_priced(
    loss: float,
    manifest: Manifest,
    tables: Tables,
    sizes: list[np.ndarray],
    plan: MemoryPlan,
    eviction: Eviction,
) -> tuple[Priced, LossBudget]:
    """The priced scheduler and its account; an `EngineError` where the bundle has no prices. `sizes` as in `Priced`.
    `eviction` hears what planes are worth, where it can make use of that."""
    prices = Prices.of(tables.layers(*PRICE_TABLES))
    layers = len(manifest.layers)
    missing = plan.token_cycle * max(1 - plan.capacity / plan.experts, 0.02)
    worth = (
        4 * loss / missing / plan.record
    )  # as if half of the loads could be bought off, at half of it on average
    account = LossBudget(loss, layers, worth)
    if isinstance(eviction, NextUse):
        weights = [
            _usual_weights(of["counts"], of["gate_mass"])
            for of in tables.layers("counts", "gate_mass")
        ]
        eviction.worth = PlaneWorth(prices, weights, sizes, account)
    return Priced(prices, sizes, account), account


def _usual_weights(counts: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Of each expert's slots in calibration; where it had none, of the whole layer's."""
    return np.where(counts > 0, mass, mass.sum()) / np.where(
        counts > 0, counts, max(1, counts.sum())
    )


def residency_for(
    plan: MemoryPlan, sizes: list[np.ndarray], eviction: Eviction, policies: Policies
) -> Residency:
    """The places of `plan`: as many as there are records where nothing is lost; otherwise counted in bytes, so that more of
    them fit where records are here in fewer planes. `sizes` as in `Priced`."""
    experts, levels = np.diff(eviction.first).tolist(), [of[1:] for of in sizes]
    if policies.lossless:
        return Residency(
            experts, plan.capacity, eviction, [np.ones_like(of) for of in levels], policies.shares
        )
    return Residency(experts, plan.capacity * plan.record, eviction, levels, policies.shares)


def make_prefetch(text: str, manifest: Manifest, tables: Tables) -> predict.Prefetch:
    """The prefetch called `text`."""
    name, colon, number = text.partition(":")
    layers = manifest.layers
    if name not in PREFETCHES:
        raise EngineError(f"There is no prefetch {name!r}; there are {', '.join(PREFETCHES)}.")
    if name == "smoe":
        _needs_routing(manifest, "Prefetch by scores")
        return predict.TopScore(_number(text, number if colon else 0.35, "alpha", 0, 10))
    if name == "predicted":
        return _predicted(
            text,
            int(_number(text, number if colon else 1, "distance", 1, len(DISTANCES))),
            layers,
            tables,
        )
    if colon:
        raise EngineError(f"Prefetch {name} takes no number; write {name} instead of {text}.")
    if name == "previous":
        return predict.Previous(len(layers))
    if name == "transition":
        return predict.Transition(
            [None, *tables.column("transition")], [layer.top_k for layer in layers]
        )
    return predict.Prefetch()


def _predicted(
    text: str, distance: int, layers: tuple[Layer, ...], tables: Tables
) -> predict.Predicted:
    found = tables.layers(f"predict_{distance}", "predict_bias")
    if not any(f"predict_{distance}" in of for of in found):
        raise EngineError(
            f"Prefetch {text} is not possible: this bundle has no linear predictor at distance {distance}, because it was "
            "built without --prices or because another predictor was better; use previous or transition."
        )
    made = [
        (of[f"predict_{distance}"].astype(np.float32), of["predict_bias"][distance - 1])
        if len(of) == 2
        else None
        for of in found
    ]
    return predict.Predicted(distance, made, [layer.top_k for layer in layers])


def _needs_routing(manifest: Manifest, what: str) -> None:
    refused = [layer.routing_refusal for layer in manifest.layers if layer.routing is None]
    if refused:
        raise EngineError(
            f"{what} is not possible with this model: {refused[0]}; leave it out, or use another."
        )


def _number(text: str, given: str | float | None, what: str, least: float, most: float) -> float:
    try:
        value = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise EngineError(
            f"{text!r}: after the colon comes the {what}, a number from {least} to {most}."
        ) from error
    if not least <= value <= most:
        raise EngineError(f"{text!r}: the {what} is {value}; it goes from {least} to {most}.")
    return value
