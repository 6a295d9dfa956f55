"""Experts to shards: one layer at a time, one record at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts.encodings import encode_expert, record_layout
from smoe.artifacts.layout import ExpertShape, RecordLayout
from smoe.artifacts.manifest import Experts, Gate, Manifest
from smoe.artifacts.shard import write_shard
from smoe.prep.checkpoint import Checkpoint
from smoe.prep.errors import PrepError
from smoe.prep.experts import expert_geometry, expert_weights, experts_modules, probe_gate
from smoe.prep.progress import Progress

PAGE = 16384  # bytes: some aarch64 kernels use pages of this size


def pack(checkpoint: Checkpoint, directory: Path, encoding: str, progress: Progress) -> Experts:
    """Write every layer's experts to `directory`/experts in `encoding`; returns what all shards have in common."""
    modules = [module for _, module in experts_modules(checkpoint.model)]
    experts = Experts(encoding, PAGE, *common_gate(checkpoint))
    (directory / "experts").mkdir(parents=True, exist_ok=True)
    for layer, module in enumerate(progress.over(modules, "pack", "layers")):
        count, hidden, width = expert_geometry(module)
        shape = ExpertShape(hidden, width, experts.gate.kind != "plain", experts.biased)
        layout = record_layout(shape, encoding, PAGE)
        records = _records(module, layout, encoding, count)
        write_shard(directory / Manifest.shard(layer), layout, PAGE, records, count)
    return experts


def common_gate(checkpoint: Checkpoint) -> tuple[Gate, bool]:
    """The gate of all experts, and whether their matrices have biases; a `PrepError` if layers differ."""
    modules = [module for _, module in experts_modules(checkpoint.model)]
    kinds = {(probe_gate(module), bool(module.has_bias)) for module in modules}
    if len(kinds) > 1:
        raise PrepError(f"The layers' experts differ in kind ({kinds}); this version packs one kind per model.")
    return kinds.pop()


def _records(module: torch.nn.Module, layout: RecordLayout, encoding: str, count: int) -> Iterator[np.ndarray]:
    for expert in range(count):
        yield encode_expert(layout, encoding, expert_weights(module, expert))
