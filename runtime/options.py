"""What users may ask of a memory that does not hold all experts: policies by name, and what is made
of them.

Names are NAME or NAME:NUMBER, like smoe:0.35, as `Engine.open` and the commands take them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.bundle import Bundle
from smoe.artifacts.encodings import encoding_named
from smoe.artifacts.manifest import Manifest
from smoe.artifacts.tables import DISTANCES, Tables
from smoe.runtime.budget import MemoryPlan, chunk_tokens
from smoe.runtime.cache import predict
from smoe.runtime.cache.cache import ORDERS
from smoe.runtime.cache.eviction import (
    DEFAULT_EVICTION,
    PLANES,
    Eviction,
    NextUse,
    eviction_named,
)
from smoe.runtime.cache.residency import Residency
from smoe.runtime.choose import substitution
from smoe.runtime.choose.priced import PlaneValue, Priced
from smoe.runtime.choose.prices import PRICE_TABLES, Prices
from smoe.runtime.errors import EngineError
from smoe.runtime.ledger import SAVINGS_TOKENS, LossLedger
from smoe.runtime.routing import Chooser, as_routed
from smoe.runtime.sizes import show_size

MOST_LOSS = 1.0  # nats per token: far beyond what leaves a text readable


@dataclass(frozen=True)
class Policies:
    """What the engine does with a budget that does not hold all experts.

    eviction: which resident expert goes (`EVICTIONS`). shares: every layer has an equal part of the
    pool for itself. warm: start with the experts that calibration used most, rather than with none.
    substitution: what stands in for a missing expert while decoding (`SUBSTITUTIONS`, or a chooser
    of one's own; none is lossless). prefetch: what is read on a guess (`PREFETCHES`; "auto" is
    SMoE's look-ahead while it pays, and none where something may be lost). order: which of the
    planes that a step waits for are read first (`ORDERS`): those that most tokens wait for
    ("hottest"), or expert after expert ("expert"). loss: nats per decoded token that the priced
    scheduler may spend on reading less (0: none, lossless); the bundle must have prices."""

    eviction: str = DEFAULT_EVICTION
    shares: bool = False
    warm: bool = True
    substitution: str | Chooser = "none"
    prefetch: str = "auto"
    order: str = ORDERS[0]
    loss: float = 0.0

    @property
    def lossless(self) -> bool:
        """Whether nothing but the level can change the logits."""
        return self.substitution == "none" and not self.loss

    @property
    def guesses(self) -> str:
        """`prefetch` as it is done: a run that may lose something has to repeat, and what a guess
        has brought is a matter of time."""
        return "none" if self.prefetch == "auto" and not self.lossless else self.prefetch


DEFAULT = Policies()
GUESSING = {"auto": "auto (looks a layer ahead while waits outlast that)"}
READING = {"hottest": "hottest planes first", "expert": "one expert after another"}


def check_policies(policies: Policies, plan: MemoryPlan, manifest: Manifest) -> None:
    """Refuse what would have no effect or cannot work: an `EngineError`."""
    if policies.order not in ORDERS:
        raise EngineError(
            f"There is no order {policies.order[:40]!r}; there are {' and '.join(ORDERS)}."
        )
    chooser = not isinstance(policies.substitution, str)
    if plan.capacity == plan.experts and policies != DEFAULT and not chooser:
        raise EngineError(
            f"All {plan.experts} experts fit into memory, so that policies for missing ones have "
            f"no effect; leave them "
            f"out, or state less memory than {show_size(plan.as_stated(plan.total))}."
        )
    levels = encoding_named(manifest.experts.encoding).levels
    if policies.eviction == PLANES and (policies.lossless or levels == 1):
        raise EngineError(
            f"Eviction {PLANES} lets go of high planes alone, and here every expert is used with "
            "all of its planes; use another, or let slots run at lower levels."
        )
    checked_loss(policies.loss)
    if policies.loss and policies.substitution != "none":
        raise EngineError(
            f"Substitution {policies.substitution} and a loss budget exclude each other: what "
            f"stands in for a missing "
            "expert is decided by one of them. Leave one out."
        )
    most = max(layer.top_k for layer in manifest.layers)
    share = plan.capacity // len(manifest.layers)
    if policies.shares and share < most:
        missing = most * len(manifest.layers) - plan.capacity
        enough = plan.as_stated(plan.total + missing * plan.record)
        raise EngineError(
            f"Shares by layer cannot work with {plan.capacity} resident experts: {share} for each "
            f"of "
            f"{len(manifest.layers)} layers, and a token uses {most}; leave them out, or state at "
            f"least "
            f"{show_size(enough, up=True)}."
        )


def checked_loss(loss: float) -> float:
    """Nats per token that may be spent; an `EngineError` for what is no such number."""
    if not 0 <= loss <= MOST_LOSS:
        raise EngineError(
            f"A loss of {loss} nats per token was asked for; it goes from 0 to {MOST_LOSS}."
        )
    return loss


def policy_lines(policies: Policies, plan: MemoryPlan, level: int, levels: int) -> list[str]:
    """The mode line of what is missing, where something is."""
    if plan.capacity == plan.experts:
        return []
    shares = " in shares by layer" if policies.shares else ""
    takes = f"substitution {policies.substitution}"
    if policies.loss:
        than = f" than level {level}" if level < levels else ""
        takes = (
            f"at most {policies.loss} nats per token for reading less{than}, "
            f"{SAVINGS_TOKENS:.0f} tokens' worth saved up"
        )
    loses = "lossless" if policies.lossless else "lossy; prompts are not"
    loses = loses if level == levels else "lossy"
    return [
        f"policies: eviction {policies.eviction}{shares}, {'warm' if policies.warm else 'cold'} "
        f"start, "
        f"prefetch {GUESSING.get(policies.guesses, policies.guesses)}, {READING[policies.order]}, "
        f"{takes} ({loses})"
    ]


def tables_bytes(policies: Policies, bundle: Bundle) -> int:
    """What the tables take that the policies keep in memory: part of the engine's budget."""
    layers = bundle.manifest.layers
    square = 8 * sum(layer.experts**2 for layer in layers)
    total = 0
    if policies.loss:
        total += 2 * square + square // 4  # prices, and the order of stand-ins
        total += 8 * (4 * bundle.levels + 2) * sum(layer.experts for layer in layers)
        chunk = chunk_tokens(bundle.manifest, bundle.program is None)
        slots = [24 * chunk * layer.top_k for layer in layers]
        total += 8 * max(2 * a.experts**2 + n for a, n in zip(layers, slots, strict=True))
    named = policies.substitution if isinstance(policies.substitution, str) else ""
    if named.startswith(("buddy", "similar")):
        total += 2 * square
    if policies.prefetch == "transition":
        total += 2 * square
    if policies.prefetch.startswith("predicted"):
        total += 4 * sum((layer.hidden + len(DISTANCES)) * layer.experts for layer in layers)
    return total


# -- eviction ------------------------------------------------------------------------------------


def make_eviction(text: str, manifest: Manifest) -> Eviction:
    """The eviction called `text`; an `EngineError` where the model does not give what it needs."""
    eviction = eviction_named(text, [layer.experts for layer in manifest.layers])
    if eviction.needs_scores:
        _needs_routing(manifest, f"Eviction {text}")
    return eviction


def make_residency(
    plan: MemoryPlan, sizes: list[np.ndarray], eviction: Eviction, policies: Policies
) -> Residency:
    """The frames of `plan`, in bytes: of a whole record each where nothing is lost; otherwise more
    of them fit where records are resident in fewer planes. `sizes[l][j]` bytes of the first j
    planes, from j = 0."""
    experts, ends = eviction.experts, [layer[1:] for layer in sizes]
    if policies.lossless:
        ends = [np.full_like(layer, plan.record) for layer in ends]
    return Residency(experts, plan.capacity * plan.record, eviction, ends, policies.shares)


def level_sizes(bundle: Bundle, level: int) -> list[np.ndarray]:
    """int64 `[level + 1]` of every layer: bytes of the first j planes of a record, from j = 0."""
    return [np.array([0, *layout.levels[:level]]) for layout in bundle.layouts]


# -- choosers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What runs for which slot, and the ledger of a new sequence (None: it spends nothing), which
    may spend so much per token (None: what the policies say)."""

    chooser: Chooser
    new_ledger: Callable[[float | None], LossLedger] | None = None


def make_chooser(
    policies: Policies,
    manifest: Manifest,
    tables: Tables,
    sizes: list[np.ndarray],
    plan: MemoryPlan,
    eviction: Eviction,
) -> Choice:
    """The chooser that `policies` ask for. An `EngineError` where the bundle lacks prices, or the
    model its router's rule. With a loss budget `eviction` hears what planes are worth, where it can
    make use of that."""
    if policies.loss:
        return _priced(policies.loss, manifest, tables, sizes, plan, eviction)
    if not isinstance(policies.substitution, str):
        if isinstance(eviction, NextUse) and len(sizes[0]) > 2:
            eviction.learn_planes(len(sizes[0]) - 1)
        return Choice(policies.substitution)
    if policies.substitution == "none":
        return Choice(as_routed)
    chooser = substitution_named(policies.substitution, tables.column)
    _needs_routing(manifest, "Substitution")
    return Choice(chooser)


def substitution_named(text: str, column: Callable[[str], list[np.ndarray]]) -> Chooser:
    """The substitution called `text`; `column(name)` gives one table of every layer."""
    name, colon, number = text.partition(":")
    if name not in SUBSTITUTIONS:
        raise EngineError(
            f"There is no substitution {name[:40]!r}; there are none, {', '.join(SUBSTITUTIONS)}."
        )
    kind = SUBSTITUTIONS[name]
    given = number if colon else kind.default
    return kind.make(_number(text, given, kind.number, kind.least, kind.most), column)


@dataclass(frozen=True)
class Substitution:
    """A chooser by name: what its number is, the default and the range of that, and how it is made
    of the number and of tables by name."""

    number: str
    default: float
    least: float
    most: float
    make: Callable[[float, Callable[[str], list[np.ndarray]]], Chooser]


def _control(pick: str, table: str | None = None) -> Substitution:
    def make(number: float, column: Callable[[str], list[np.ndarray]]) -> Chooser:
        return substitution.ThresholdControls(pick, number, column(table) if table else None)

    return Substitution(number="weight below", default=0.1, least=0, most=100, make=make)


SUBSTITUTIONS = {
    "smoe": Substitution(
        number="alpha", default=0.35, least=0, most=10, make=lambda n, column: substitution.Smoe(n)
    ),
    "cache-prior": Substitution(
        number="lambda", default=0.2, least=0, most=10,
        make=lambda n, column: substitution.CachePrior(n),
    ),
    "buddy": Substitution(
        number="entropy that is needed", default=0.95, least=0, most=1,
        make=lambda n, column: substitution.Buddy(column("coactivation"), n),
    ),
    "live": _control("live"),
    "zero": _control("zero"),
    "random": _control("random"),
    "similar": _control("similar", "output_error"),
}  # fmt: skip


def _priced(
    loss: float,
    manifest: Manifest,
    tables: Tables,
    sizes: list[np.ndarray],
    plan: MemoryPlan,
    eviction: Eviction,
) -> Choice:
    prices = Prices.of(tables.layers(*PRICE_TABLES))
    missing = plan.token_cycle * max(1 - plan.capacity / plan.experts, 0.02)

    def new_ledger(rate: float | None) -> LossLedger:
        rate = loss if rate is None else checked_loss(rate)
        # As if half of the loads could be bought off, at half of it on average.
        return LossLedger(rate, len(manifest.layers), 4 * rate / missing / plan.record)

    chooser = Priced(prices, sizes, new_ledger(loss).nats_per_byte)
    if isinstance(eviction, NextUse):
        used = tables.layers("counts", "gate_mass")
        weights = [usual_weights(layer["counts"], layer["gate_mass"]) for layer in used]
        eviction.plane_value = PlaneValue(prices, weights, sizes, lambda: chooser.nats_per_byte)
    return Choice(chooser, new_ledger)


def usual_weights(counts: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """float64 `[E]`: the mean mixing weight of each expert's slots in calibration, from their
    `counts` and `mass`; where an expert had none, that of the whole layer's."""
    reached = counts > 0
    return np.where(reached, mass, mass.sum()) / np.where(reached, counts, max(1, counts.sum()))


# -- prefetch ------------------------------------------------------------------------------------

PREFETCHES = ("auto", "none", "previous", "transition", "predicted", "smoe")


def make_predictor(text: str, manifest: Manifest, tables: Tables) -> predict.Predictor:
    """The prefetch called `text`; "auto" is none where it is not known how a router chooses."""
    name, colon, number = text.partition(":")
    layers = manifest.layers
    if name not in PREFETCHES:
        raise EngineError(f"There is no prefetch {name!r}; there are {', '.join(PREFETCHES)}.")
    if name == "smoe":
        _needs_routing(manifest, "Prefetch by scores")
        return predict.TopScore(_number(text, number if colon else 0.35, "alpha", 0, 10))
    if name == "predicted":
        distance = _number(text, number if colon else 1, "distance", 1, len(DISTANCES))
        return _predicted(text, int(distance), manifest, tables)
    if colon:
        raise EngineError(f"Prefetch {name} takes no number; write {name} instead of {text}.")
    if name == "auto" and all(layer.routing is not None for layer in layers):
        return predict.WhileItPays()
    if name == "previous":
        return predict.Previous(len(layers))
    if name == "transition":
        return predict.Transition(
            [None, *tables.column("transition")], [layer.top_k for layer in layers]
        )
    return predict.Predictor()


def _predicted(text: str, distance: int, manifest: Manifest, tables: Tables) -> predict.Predicted:
    learned = tables.layers(f"predict_{distance}", "predict_bias")
    if not any(f"predict_{distance}" in layer for layer in learned):
        raise EngineError(
            f"Prefetch {text} is not possible: this bundle has no linear predictor at distance "
            f"{distance}, because it was "
            "built with --prices 0 or because another predictor was better; use previous or "
            "transition."
        )
    linear = [
        (
            layer[f"predict_{distance}"].astype(np.float32),
            layer["predict_bias"][distance - 1],
        )
        if len(layer) == 2
        else None
        for layer in learned
    ]
    return predict.Predicted(distance, linear, [layer.top_k for layer in manifest.layers])


def _needs_routing(manifest: Manifest, what: str) -> None:
    refused = [layer.routing_refusal for layer in manifest.layers if layer.routing is None]
    if refused:
        raise EngineError(
            f"{what} is not possible with this model: {refused[0]}; leave it out, or use another."
        )


def _number(text: str, given: str | float, what: str, least: float, most: float) -> float:
    try:
        value = float(given)
    except ValueError as error:
        raise EngineError(
            f"{text!r}: after the colon comes the {what}, a number from {least} to {most}."
        ) from error
    if not least <= value <= most:
        raise EngineError(f"{text!r}: the {what} is {value}; it goes from {least} to {most}.")
    return value
