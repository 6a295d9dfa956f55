"""A model put together for a plan: the experts' cache, what decides, and what computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smoe.artifacts import Bundle
from smoe.runtime.backbone import Backbone
from smoe.runtime.budget import MemoryPlan
from smoe.runtime.cache.cache import ExpertCache
from smoe.runtime.cache.frames import Frames
from smoe.runtime.cache.storage import Shards
from smoe.runtime.choosers import make_chooser
from smoe.runtime.draft.decoder import Decoder
from smoe.runtime.draft.named import make_decoder
from smoe.runtime.execution import Division
from smoe.runtime.experts import LocalExperts
from smoe.runtime.kernels import Kernels
from smoe.runtime.ledger import Ledger
from smoe.runtime.model import Model
from smoe.runtime.options import (
    Policies,
    level_sizes,
    make_eviction,
    make_predictor,
    make_residency,
)
from smoe.runtime.stats import Stats
from smoe.runtime.trace import PLAIN, Makers


@dataclass(frozen=True)
class Assembly:
    """A `model` with its `experts` in a `cache`, the ledger of a new sequence, as `options.Choice`
    says, and what decodes."""

    model: Model
    experts: LocalExperts
    cache: ExpertCache
    new_ledger: Callable[[float | None], Ledger] | None
    decoder: Decoder


def assemble(
    bundle: Bundle,
    plan: MemoryPlan,
    policies: Policies,
    division: Division,
    backbone: Backbone,
    kernels: Kernels,
    shards: Shards,
    stats: Stats,
    makers: Makers = PLAIN,
) -> Assembly:
    """As the `policies` ask for, of what `makers` make; an `EngineError` where they cannot be
    had."""
    manifest, sizes = bundle.manifest, level_sizes(bundle, shards.level)
    eviction = make_eviction(policies.eviction, manifest)
    choice = make_chooser(policies, manifest, bundle.tables, sizes, plan, eviction)
    predictor = make_predictor(policies.guesses, manifest, bundle.tables)
    residency = make_residency(plan, sizes, eviction, policies)
    most = None if policies.lossless else plan.capacity * plan.record
    frames = Frames(len(residency.frame_bytes), plan.record, most)
    cache = ExpertCache(
        residency, frames, shards.read, plan.smallest, stats,
        order=policies.order, make_reader=makers.reader,
    )  # fmt: skip
    layers = makers.kernels(kernels.layers(manifest, bundle.layouts))
    experts = LocalExperts(cache, layers, shards.level)
    model = makers.model(
        backbone=backbone,
        experts=experts,
        choose=choice.chooser,
        predict=predictor,
        stats=stats,
        layers=len(layers),
        advance=backbone.advance if backbone.advances else None,
    )
    decoder = make_decoder(policies, division, plan, model, experts)
    return Assembly(model, experts, cache, choice.new_ledger, decoder)


def fill(cache: ExpertCache, bundle: Bundle, plan: MemoryPlan, warm: bool, level: int) -> None:
    """Read all experts if there is room, else those that calibration used most, if that is known
    and wanted."""
    if plan.capacity < plan.experts:
        counts = bundle.tables.column("counts") if warm else []
        cache.warm(counts, plan.capacity, level)
    else:
        layers = enumerate(bundle.manifest.layers)
        cache.fill([(layer, e) for layer, spec in layers for e in range(spec.experts)], level)
