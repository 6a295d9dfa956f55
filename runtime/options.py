"""What users may ask of a memory that does not hold all experts: policies by name, and what is made
of them.

Names are NAME or NAME:NUMBER, like smoe:0.35, as `Engine.open` and the commands take them.
"""

from __future__ import annotations

import dataclasses
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
    eviction_named,
)
from smoe.runtime.cache.residency import Residency
from smoe.runtime.errors import EngineError
from smoe.runtime.ledger import SAVINGS_TOKENS
from smoe.runtime.routing import Chooser
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
    scheduler may spend on reading less (0: none, lossless); the bundle must have prices. bits: by
    what, and in how many on average, slots are computed in fewer bits while decoding
    (`choosers.BITS`; none: in all), also where every expert is in memory. draft: who guesses tokens
    that a step checks together (`draft.named.DRAFTS`): it changes no token."""

    eviction: str = DEFAULT_EVICTION
    shares: bool = False
    warm: bool = True
    substitution: str | Chooser = "none"
    prefetch: str = "auto"
    order: str = ORDERS[0]
    loss: float = 0.0
    bits: str = "none"
    draft: str = "none"

    @property
    def lossless(self) -> bool:
        """Whether nothing but the level can change the logits."""
        return self.substitution == "none" and not self.loss and self.bits == "none"

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
    about_missing = dataclasses.replace(policies, bits="none", draft="none") != DEFAULT
    if plan.capacity == plan.experts and about_missing and not chooser:
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
    if policies.bits != "none" and (policies.loss or policies.substitution != "none"):
        other = "a loss budget" if policies.loss else f"substitution {policies.substitution}"
        raise EngineError(
            f"Levels by {policies.bits} and {other} exclude each other: what a slot is computed in "
            "is decided by one of them. Leave one out."
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


def policy_lines(policies: Policies, plan: MemoryPlan, level: int, manifest: Manifest) -> list[str]:
    """The mode lines of bits, where slots have fewer, of drafts, where there are some, and of what
    is missing, where something is."""
    lines = []
    if policies.bits != "none":
        lines = [f"bits: {policies.bits}, on average of what is decoded (lossy; prompts are not)"]
    if policies.draft != "none":
        lines = [f"draft: {policies.draft}, as many guesses as pay (no token changes)"]
    refused = [layer.routing_refusal for layer in manifest.layers if layer.routing is None]
    if refused:
        lines.append(f"substitution: not possible with this model: {refused[0]}")
    if plan.capacity == plan.experts:
        return lines
    levels = encoding_named(manifest.experts.encoding).levels
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
        *lines,
        f"policies: eviction {policies.eviction}{shares}, {'warm' if policies.warm else 'cold'} "
        f"start, "
        f"prefetch {GUESSING.get(policies.guesses, policies.guesses)}, {READING[policies.order]}, "
        f"{takes} ({loses})",
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
    if policies.bits != "none":
        total += 32 * bundle.levels * sum(layer.experts for layer in layers)
    if policies.bits.startswith("trained"):
        total += 2 * bundle.levels * sum(layer.hidden * layer.experts for layer in layers)
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
        refuse_without_routing(manifest, f"Eviction {text}")
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


# -- prefetch ------------------------------------------------------------------------------------

PREFETCHES = ("auto", "none", "previous", "transition", "predicted", "smoe")


def make_predictor(text: str, manifest: Manifest, tables: Tables) -> predict.Predictor:
    """The prefetch called `text`; "auto" is none where it is not known how a router chooses."""
    name, colon, number = text.partition(":")
    layers = manifest.layers
    if name not in PREFETCHES:
        raise EngineError(f"There is no prefetch {name!r}; there are {', '.join(PREFETCHES)}.")
    if name == "smoe":
        refuse_without_routing(manifest, "Prefetch by scores")
        return predict.TopScore(number_of(text, number if colon else 0.35, "alpha", 0, 10))
    if name == "predicted":
        distance = number_of(text, number if colon else 1, "distance", 1, len(DISTANCES))
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


# -- names and numbers ---------------------------------------------------------------------------


def refuse_without_routing(manifest: Manifest, what: str) -> None:
    """An `EngineError` where it is not known how ids and weights follow from the router's
    scores."""
    refused = [layer.routing_refusal for layer in manifest.layers if layer.routing is None]
    if refused:
        raise EngineError(
            f"{what} is not possible with this model: {refused[0]}; leave it out, or use another."
        )


def number_of(text: str, given: str | float, what: str, least: float, most: float) -> float:
    """The number that a policy's name was `given` after the colon; an `EngineError` where it is
    none from `least` to `most`."""
    try:
        value = float(given)
    except ValueError as error:
        raise EngineError(
            f"{text!r}: after the colon comes the {what}, a number from {least} to {most}."
        ) from error
    if not least <= value <= most:
        raise EngineError(f"{text!r}: the {what} is {value}; it goes from {least} to {most}.")
    return value
