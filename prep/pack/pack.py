"""Experts to shards: one layer at a time, one record at a time.

Encodings of one plane are a function of the weights. Nested ones are quantised on calibration text:
when a sweep reaches a layer, its experts are in memory, and so is what they receive. Rounding to
nearest is there as the control (`quantiser` "nearest"); codes that a checkpoint is stored in are
found again (`quantiser` "kept").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from smoe.artifacts import nested
from smoe.artifacts.encodings import (
    encoding_named,
    record_layout,
)
from smoe.artifacts.layout import ExpertShape, RecordLayout
from smoe.artifacts.manifest import ExpertActivation, Experts, Manifest
from smoe.artifacts.shard import write_shard
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import (
    ExpertsModule,
    expert_geometry,
    expert_weights,
    probe_gate,
)
from smoe.prep.errors import PrepError
from smoe.prep.options import STORED
from smoe.prep.pack.calibrated import Calibrated, Losses
from smoe.prep.pack.encode import encode_record
from smoe.prep.pack.kept import kept_record
from smoe.prep.progress import Progress
from smoe.prep.sweep.forward import Arrays, AtExperts, sweep
from smoe.prep.workdir import FINISHED, write_whole

PAGE = 16384  # bytes: some aarch64 kernels use pages of this size

Made = TypeVar("Made")


class Packing:
    """An observer of a sweep that writes each layer's shard, if it is not there."""

    name = "packing"

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: Path,
        experts: Experts,
        quantiser: str | None,
        progress: Progress,
    ):
        """Shards go to `directory`/experts; the `quantiser` "calibrated" goes by what arrives."""
        (directory / "experts").mkdir(parents=True, exist_ok=True)
        self._checkpoint, self._directory, self._experts = checkpoint, directory, experts
        self._quantiser, self._progress = quantiser, progress

    def missing(self) -> list[int]:
        """The layers without a shard. What is there is whole: shards are renamed when they are."""
        layers = range(len(self._checkpoint.layers))
        return [layer for layer in layers if not self._shard(layer).exists()]

    def visit(self, at: AtExperts) -> Arrays:
        if not self._shard(at.layer).exists() and self._quantiser == "calibrated":
            quantiser = Calibrated(
                at, nested.parse(self._experts.encoding), self._layout(at.module)
            )
            self._write(at.layer, at.module, self._noting(at.layer, quantiser))
            name = self._checkpoint.layers[at.layer][0]
            self._progress.say(f"pack: {name}: {quantiser.report()}")
        elif not self._shard(at.layer).exists():
            self.round(at.layer, at.module)
        return {}

    def resume(self, at: AtExperts, known: Arrays) -> None:
        pass

    def finish(self) -> list[Arrays]:
        return []

    def round(self, layer: int, module: ExpertsModule) -> None:
        """Write a layer's shard without calibration; `module` has its weights."""
        layout, encoding = self._layout(module), self._experts.encoding
        experts = _ahead(lambda e: expert_weights(module, e), expert_geometry(module)[0])
        if self._quantiser == "kept":
            name = self._checkpoint.layers[layer][0]
            records = (
                kept_record(layout, encoding, weights, f"{name}, expert {e}")
                for e, weights in enumerate(experts)
            )
        else:
            records = (encode_record(layout, encoding, weights) for weights in experts)
        self._write(layer, module, records)

    def _noting(self, layer: int, quantiser: Calibrated) -> Iterator[np.ndarray]:
        """Its records; what they lost is noted before the shard is there."""
        yield from quantiser.records()
        note = _note(self._directory, layer)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(quantiser.losses()))

    def _shard(self, layer: int) -> Path:
        return self._directory / Manifest.shard(layer)

    def _write(self, layer: int, module: ExpertsModule, records: Iterator[np.ndarray]) -> None:
        count = expert_geometry(module)[0]
        write_shard(self._shard(layer), self._layout(module), PAGE, records, count)

    def _layout(self, module: ExpertsModule) -> RecordLayout:
        return _layout(self._experts, module)


def pack(
    checkpoint: Checkpoint,
    directory: Path,
    encoding: str,
    progress: Progress,
    quantiser: str | None = None,
    rows: list[np.ndarray] | None = None,
    device: str = "cpu",
) -> Experts:
    """Write every layer's experts to `directory`/experts in `encoding`; returns what all shards
    have in common.

    The `quantiser` "calibrated" of a nested encoding goes by `rows` of token ids, on `device`;
    "kept" finds the checkpoint's own codes; in any other way weights are rounded. A shard that an
    interrupted run left is kept.
    """
    experts = unpacked(checkpoint, encoding)
    packing = Packing(checkpoint, directory, experts, quantiser, progress)
    missing = packing.missing()
    if quantiser == "calibrated" and missing:
        sweep(checkpoint, rows or [], [packing], device, progress=progress)
        return experts
    count = progress.counter("pack", "layers", len(checkpoint.layers))
    for layer in range(len(checkpoint.layers)):
        if layer in missing:
            with checkpoint.experts(layer, apart=True) as module:
                packing.round(layer, module)
        count.done(layer + 1, worked=layer in missing)
    return experts


def _ahead(made: Callable[[int], Made], count: int) -> Iterator[Made]:
    """`made(0)`, `made(1)` and so on to `count`, each made while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(made, 0)
        for number in range(1, count + 1):
            one = following.result()
            if number < count:
                following = pool.submit(made, number)
            yield one


def losses(directory: Path, layers: int) -> Losses:
    """What calibrated codes in `directory` lost in the mean of its `layers`; nothing where they
    were made in another way."""
    notes = [_note(directory, layer) for layer in range(layers)]
    lost = [json.loads(note.read_text("utf-8")) for note in notes if note.exists()]
    return {
        matrices: np.mean([layer[matrices] for layer in lost], axis=0).tolist()
        for matrices in (lost[0] if lost else ())
    }


def _note(directory: Path, layer: int) -> Path:
    return directory / FINISHED / "lost" / f"{layer:02d}.json"


def chosen_encoding(checkpoint: Checkpoint, asked: str, progress: Progress) -> str:
    """The encoding that was asked for, or what `STORED` comes to; said, with what is lost."""
    if asked != STORED:
        return asked
    kept = checkpoint.kept_encoding
    progress.say(f"encoding: {kept}, for experts stored in {checkpoint.stored_in}")
    return kept


def unpacked(checkpoint: Checkpoint, encoding: str) -> Experts:
    """What all shards in `encoding` will have in common; a `PrepError` if the layers' experts
    differ in kind."""
    return Experts(encoding_named(encoding).name, PAGE, *common_kind(checkpoint))


def common_kind(checkpoint: Checkpoint) -> tuple[ExpertActivation, bool, bool]:
    """The gate of all experts, whether their matrices have biases, and whether their outputs are
    normalised; a `PrepError` if layers differ."""
    kinds = {
        (probe_gate(m), bool(m.has_bias), bool(m.has_post_expert_norm))
        for _, m in checkpoint.layers
    }
    if len(kinds) > 1:
        raise PrepError(
            f"The layers' experts differ in kind ({kinds}); this version packs one kind per model."
        )
    return kinds.pop()


def _layout(experts: Experts, module: ExpertsModule) -> RecordLayout:
    _, hidden, width = expert_geometry(module)
    shape = ExpertShape(hidden, width, experts.gate.kind != "plain", experts.biased, experts.normed)
    return record_layout(shape, experts.encoding, PAGE)
