"""A model put together from its public parts, for tests that choose what the engine would choose itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import Bundle, open_bundle
from smoe.runtime import kernels
from smoe.runtime.backbone import Backbone
from smoe.runtime.budget import plan_memory
from smoe.runtime.cache.cache import ExpertCache, Read
from smoe.runtime.cache.eviction import eviction_named
from smoe.runtime.cache.frames import Frames
from smoe.runtime.cache.predict import Predictor
from smoe.runtime.cache.residency import Residency
from smoe.runtime.cache.storage import Shards
from smoe.runtime.experts import LocalExperts
from smoe.runtime.model import Model
from smoe.runtime.options import level_sizes
from smoe.runtime.routing import Chooser, as_routed
from smoe.runtime.stats import Stats
from smoe.runtime.step import Phase, Sequence, Span, Step

CONTEXT = 300


@dataclass
class Parts:
    """What a model is made of: room for `experts` whole records, reads through `read`; close it."""

    bundle: Bundle
    backbone: Backbone
    shards: Shards
    residency: Residency
    frames: Frames
    cache: ExpertCache
    model: Model
    stats: Stats

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()
        self.shards.close()

    def sequence(self) -> Sequence:
        """One that has consumed nothing."""
        return Sequence(self.backbone.new_state(CONTEXT))

    def resident(self, layer: int) -> np.ndarray:
        """bool `[E]`."""
        return self.residency.levels(layer) > 0


def make_parts(
    path: Path,
    experts: int,
    choose: Chooser = as_routed,
    predict: Predictor | None = None,
    read: Read | None = None,
    eviction: str = "next-use",
    threads: int = 2,
) -> Parts:
    """`read` None: the bundle's shards, at their full level."""
    bundle = open_bundle(path)
    manifest, stats = bundle.manifest, Stats()
    policy = eviction_named(eviction, [layer.experts for layer in manifest.layers])
    sizes = level_sizes(bundle, bundle.levels)
    record = max(int(ends[-1]) for ends in sizes)
    residency = Residency(policy.experts, experts * record, policy, [ends[1:] for ends in sizes])
    frames = Frames(len(residency.frame_bytes), record, experts * record)
    shards = Shards(bundle)
    smallest = plan_memory(bundle, None, CONTEXT).smallest
    cache = ExpertCache(residency, frames, read or shards.read, smallest, stats, threads)
    backbone, chosen = Backbone(bundle), kernels.choose()
    layers = [
        chosen.layer(
            manifest.experts.gate, manifest.expert_shape(i), manifest.experts.encoding, layout
        )
        for i, layout in enumerate(bundle.layouts)
    ]
    model = Model(
        backbone=backbone,
        experts=LocalExperts(cache, layers, bundle.levels),
        choose=choose,
        predict=predict or Predictor(),
        stats=stats,
        layers=len(layers),
    )
    return Parts(
        bundle=bundle,
        backbone=backbone,
        shards=shards,
        residency=residency,
        frames=frames,
        cache=cache,
        model=model,
        stats=stats,
    )


def decoded(sequence: Sequence, token: int) -> Span:
    """The next token of a generation."""
    return Span(sequence, np.array([token]), np.array([0]), Phase.DECODE)


def prompted(sequence: Sequence, ids: np.ndarray, keep: int = 1) -> Span:
    """A prompt of one chunk, with the logits of its last `keep` positions."""
    return Span(sequence, ids, np.arange(len(ids) - keep, len(ids)), Phase.PREFILL)


def step(model: Model, *spans: Span) -> list[np.ndarray]:
    """Each span's logits."""
    return model.step(Step(spans))
