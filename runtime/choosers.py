"""Choosers by name: what runs for which slot, as `Policies` ask for it, and the ledgers of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.manifest import Manifest
from smoe.artifacts.tables import Tables
from smoe.runtime.bits import Choice, by_bits
from smoe.runtime.budget import MemoryPlan
from smoe.runtime.cache.eviction import Eviction, NextUse
from smoe.runtime.choose import substitution
from smoe.runtime.choose.priced import PlaneValue, Priced
from smoe.runtime.choose.prices import PRICE_TABLES, Prices, usual_weights
from smoe.runtime.errors import EngineError
from smoe.runtime.ledger import LossLedger
from smoe.runtime.options import Policies, checked_loss, number_of, refuse_without_routing
from smoe.runtime.routing import Chooser, as_routed


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
    own, full = not isinstance(policies.substitution, str), len(sizes[0]) - 1
    if (own or policies.bits != "none") and isinstance(eviction, NextUse) and full > 1:
        eviction.learn_planes(full)
    if policies.bits != "none":
        return by_bits(policies.bits, manifest, tables, full)
    if not isinstance(policies.substitution, str):
        return Choice(policies.substitution)
    if policies.substitution == "none":
        return Choice(as_routed)
    chooser = substitution_named(policies.substitution, tables.column)
    refuse_without_routing(manifest, "Substitution")
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
    return kind.make(number_of(text, given, kind.number, kind.least, kind.most), column)


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
