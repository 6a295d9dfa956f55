"""A model put together from its public parts, for tests that choose what the engine would choose
itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import Bundle, open_bundle
from smoe.artifacts.manifest import Routing
from smoe.runtime import kernels
from smoe.runtime.backbone import Backbone
from smoe.runtime.budget import plan_memory
from smoe.runtime.cache.cache import ExpertCache, Read
from smoe.runtime.cache.eviction import eviction_named
from smoe.runtime.cache.frames import Frames
from smoe.runtime.cache.predict import Predictor
from smoe.runtime.cache.residency import Residency
from smoe.runtime.cache.storage import Shards
from smoe.runtime.execution import AUTO, Execution, divide
from smoe.runtime.experts import LocalExperts
from smoe.runtime.model import Model, Prefill, Prompt
from smoe.runtime.options import level_sizes
from smoe.runtime.routing import Chooser, Routed, as_routed
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
    sizes: list[np.ndarray]  # int64 [levels + 1] of every layer

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
    shares: bool = False,
    level: int | None = None,
    threads: int = 2,
    order: str = "hottest",
) -> Parts:
    """`read` None: from the bundle's shards. `level` None: the full one."""
    bundle = open_bundle(path)
    manifest, stats = bundle.manifest, Stats()
    policy = eviction_named(eviction, [layer.experts for layer in manifest.layers])
    full = bundle.levels if level is None else level
    sizes = level_sizes(bundle, full)
    record = max(int(ends[-1]) for ends in sizes)
    residency = Residency(
        policy.experts, experts * record, policy, [ends[1:] for ends in sizes], shares
    )
    frames = Frames(len(residency.frame_bytes), record, experts * record)
    shards = Shards(bundle, full)
    smallest = plan_memory(bundle, None, CONTEXT).smallest
    cache = ExpertCache(
        residency, frames, read or shards.read, smallest, stats, threads, order=order
    )
    backbone = make_backbone(bundle)
    layers = kernels.choose().layers(manifest, bundle.layouts)
    model = Model(
        backbone=backbone,
        experts=LocalExperts(cache, layers, full),
        choose=choose,
        predict=predict or Predictor(),
        stats=stats,
        layers=len(layers),
        advance=backbone.advance if backbone.advances else None,
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
        sizes=sizes,
    )


def make_backbone(bundle: Bundle, execution: Execution = AUTO) -> Backbone:
    """Its program, where it has one, and ONNX Runtime."""
    division = divide(bundle.manifest, bundle.program, execution)
    return Backbone(bundle.path, bundle.manifest, division=division)


def decoded(sequence: Sequence, token: int) -> Span:
    """The next token of a generation."""
    return Span(sequence, np.array([token]), np.array([0]), Phase.DECODE)


def prompted(sequence: Sequence, ids: np.ndarray, keep: int = 1) -> Span:
    """A prompt of one chunk, with the logits of its last `keep` positions."""
    return Span(sequence, ids, np.arange(len(ids) - keep, len(ids)), Phase.PREFILL)


def step(model: Model, *spans: Span) -> list[np.ndarray]:
    """Each span's logits."""
    return model.step(Step(spans))


def routed_step(
    ids: np.ndarray,
    weights: np.ndarray,
    scores: np.ndarray | None = None,
    rule: Routing | None = None,
    layer: int = 0,
    hidden: np.ndarray | None = None,
    spans: tuple[Span, ...] = (),
) -> Routed:
    """What a router said: by default of one sequence's decoded tokens, with `scores` for raw
    weights too."""
    if not spans:
        tokens = np.zeros(len(ids), np.int64)
        spans = (Span(Sequence(StateOfNothing()), tokens, tokens[:0], Phase.DECODE),)
    if hidden is None:
        hidden = np.ones((len(ids), 2), np.float32)
    return Routed(
        layer=layer,
        step=Step(spans),
        hidden=hidden,
        ids=ids,
        weights=weights,
        scores=scores,
        raw=scores,
        rule=rule,
    )


class StateOfNothing:
    """Of a sequence whose state does not matter."""

    def rewind(self, length: int) -> int:
        return length

    def fork(self, length: int) -> StateOfNothing:
        return self

    def snapshot(self, length: int) -> None:
        return None

    def restore(self, snapshot: object) -> None:
        pass


def prefilled(
    model: Model, sequence: Sequence, ids: np.ndarray, group: int, keep: int = 1,
    phase: Phase = Phase.PREFILL, memory: int = 0, chunk: int | None = None,
) -> Prefill:  # fmt: skip
    """A prefill of one prompt."""
    return Prefill(model, [Prompt(sequence, ids, keep, phase)], group, memory, chunk)


def greedy(
    parts: Parts, prompt: np.ndarray, count: int, sequence: Sequence | None = None
) -> list[int]:
    """So many tokens after `prompt`, by a prefill of one chunk at a time."""
    sequence = parts.sequence() if sequence is None else sequence
    logits = prefilled(parts.model, sequence, prompt, parts.backbone.chunk).finish()
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        (logits,) = step(parts.model, decoded(sequence, tokens[-1]))
        tokens.append(int(logits[-1].argmax()))
    return tokens


def placed(residency: Residency) -> bool:
    """Whether what `where` says is what follows from levels and frames."""
    for layer, count in enumerate(residency.eviction.experts):
        experts = np.arange(count)
        whole = residency.levels(layer) == residency.full_level(layer)
        where = np.where(whole, residency.frames(layer, experts), -1)
        if residency.where(layer).tolist() != [*where.tolist(), -1]:
            return False
    return True


def accounted(residency: Residency, sizes: list[np.ndarray]) -> bool:
    """Whether all that is held is held by an expert that is resident, once nothing is on its way:
    no frame is lost. `sizes[l][j]` bytes of the first j planes."""
    held = sum(int(sizes[layer][residency.levels(layer)].sum()) for layer in range(len(sizes)))
    return held == residency.total == int(residency.frame_bytes.sum())
