"""Experts to shards: one layer at a time, one record at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts.encodings import encode_expert, encoding_named, record_layout
from smoe.artifacts.layout import ExpertShape, RecordLayout
from smoe.artifacts.manifest import Experts, Gate, Manifest
from smoe.artifacts.shard import write_shard
from smoe.prep.checkpoint import Checkpoint
from smoe.prep.errors import PrepError
from smoe.prep.experts import expert_geometry, expert_weights, probe_gate
from smoe.prep.progress import Progress

PAGE = 16384  # bytes: some aarch64 kernels use pages of this size


def pack(checkpoint: Checkpoint, directory: Path, encoding: str, progress: Progress) -> Experts:
    """Write every layer's experts to `directory`/experts in `encoding`; returns what all shards have in common.

    A shard that an interrupted run left there is whole, and kept.
    """
    experts = unpacked(checkpoint, encoding)
    (directory / "experts").mkdir(parents=True, exist_ok=True)
    count = progress.counter("pack", "layers", len(checkpoint.layers))
    for layer in range(len(checkpoint.layers)):
        file = directory / Manifest.shard(layer)
        finished = file.exists()  # whole: shards are written beside and renamed
        if not finished:
            _pack_layer(checkpoint, layer, experts, file)
        count.done(layer + 1, worked=not finished)
    return experts


def unpacked(checkpoint: Checkpoint, encoding: str) -> Experts:
    """What all shards in `encoding` will have in common; a `PrepError` if the layers' experts differ in kind."""
    return Experts(encoding_named(encoding).name, PAGE, *common_kind(checkpoint))


def _pack_layer(checkpoint: Checkpoint, layer: int, experts: Experts, file: Path) -> None:
    count, hidden, width = expert_geometry(checkpoint.layers[layer][1])
    shape = ExpertShape(hidden, width, experts.gate.kind != "plain", experts.biased, experts.normed)
    layout = record_layout(shape, experts.encoding, PAGE)
    with checkpoint.experts(layer) as module:
        write_shard(file, layout, PAGE, _records(module, layout, experts.encoding, count), count)


def common_kind(checkpoint: Checkpoint) -> tuple[Gate, bool, bool]:
    """The gate of all experts, whether their matrices have biases, and whether their outputs are normalised; a
    `PrepError` if layers differ."""
    kinds = {(probe_gate(m), bool(m.has_bias), bool(m.has_post_expert_norm)) for _, m in checkpoint.layers}
    if len(kinds) > 1:
        raise PrepError(f"The layers' experts differ in kind ({kinds}); this version packs one kind per model.")
    return kinds.pop()


def _records(module: torch.nn.Module, layout: RecordLayout, encoding: str, count: int) -> Iterator[np.ndarray]:
    for expert in range(count):
        yield encode_expert(layout, encoding, expert_weights(module, expert))
