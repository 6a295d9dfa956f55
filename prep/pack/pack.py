"""Experts to shards: one layer at a time, one record at a time.

Encodings of one plane are a function of the weights. Nested ones are quantised on calibration text:
when a sweep reaches a layer, its experts are in memory, and so is what they receive. Rounding to
nearest is there as the control (`quantiser` "nearest"); codes that a checkpoint is stored in are
found again (`quantiser` "kept").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from smoe.artifacts import nested
from smoe.artifacts.encodings import (
    encoding_named,
    fill_record,
    is_bias_or_norm,
    record_layout,
)
from smoe.artifacts.layout import ExpertShape, RecordLayout
from smoe.artifacts.manifest import ExpertActivation, Experts, Manifest
from smoe.artifacts.shard import write_shard
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import (
    ExpertsModule,
    expert_geometry,
    expert_inner,
    expert_weights,
    probe_gate,
)
from smoe.prep.errors import PrepError
from smoe.prep.options import STORED
from smoe.prep.pack.encode import encode_record
from smoe.prep.pack.kept import kept_record
from smoe.prep.pack.quantise import Quantised, quantise, second_moment
from smoe.prep.progress import Progress
from smoe.prep.sweep.forward import Arrays, AtExperts, sweep

PAGE = 16384  # bytes: some aarch64 kernels use pages of this size
COMMON = 256  # tokens of the layer at large, spread over the text, in every second moment
AT_ONCE = 256 << 20  # bytes of second moments in memory

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
            quantiser = _Calibrated(
                at, nested.parse(self._experts.encoding), self._layout(at.module)
            )
            self._write(at.layer, at.module, quantiser.records())
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
    """`made(0)`, `made(1)` and so on, each made while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(made, 0) if count else None
        for number in range(count):
            assert following is not None
            one = following.result()
            following = pool.submit(made, number + 1) if number + 1 < count else None
            yield one


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


class _Calibrated:
    """Quantises the experts of one layer, a few at a time, on what arrives there."""

    def __init__(self, at: AtExperts, encoding: nested.Nested, layout: RecordLayout):
        self._at, self._module, self._encoding, self._layout = at, at.module, encoding, layout
        self._lost: dict[str, list[np.ndarray]] = {}
        stride = max(1, len(at.ids) // COMMON)
        passes = [at.hidden[tokens] for tokens in at.passes()]
        self._common = torch.cat([part[:: min(stride, len(part))] for part in passes])[:COMMON]

    def records(self) -> Iterator[np.ndarray]:
        count, hidden, width = expert_geometry(self._module)
        at_once = max(1, AT_ONCE // (4 * max(hidden, width) ** 2))
        for first in range(0, count, at_once):
            yield from self._some(range(first, min(first + at_once, count)))

    def report(self) -> str:
        """The loss of output by level, over all experts, for people."""
        shown = []
        for matrices, lost in self._lost.items():
            shown.append(
                f"{matrices} " + ", ".join(f"{share:.2%}" for share in np.mean(lost, axis=0))
            )
        return "output lost by level: " + "; ".join(shown)

    def _some(self, experts: range) -> Iterator[np.ndarray]:
        weights = [expert_weights(self._module, e) for e in experts]
        moments = [self._moments(e) for e in experts]
        first: list[str] = [name for name in ("gate", "up") if name in weights[0]]
        codes = self._quantised(first, weights, [m[0] for m in moments])
        codes |= self._quantised(["down"], weights, [m[1] for m in moments])
        for i, w in enumerate(weights):
            tensors = {name: vector for name, vector in w.items() if is_bias_or_norm(name)}
            for name, matrix in codes.items():
                tensors |= nested.pack_matrix(
                    self._encoding, name, matrix.codes[i], matrix.scale[i]
                )
            yield fill_record(self._layout, tensors)

    def _quantised(
        self, names: list[str], weights: list[dict], moments: list[torch.Tensor]
    ) -> dict[str, Quantised]:
        """Matrices with the same inputs, at once."""
        stacked = torch.stack(
            [torch.cat([torch.from_numpy(w[name]) for name in names]) for w in weights]
        )
        split = self._encoding.of(names[0])
        stacked = stacked.to(self._common.device)
        result = quantise(stacked, torch.stack(moments), split, self._encoding.group)
        self._lost.setdefault("+".join(names), []).append(result.error)
        parts = zip(
            names,
            np.split(result.codes, len(names), 1),
            np.split(result.scale, len(names), 1),
            strict=True,
        )
        return {name: Quantised(codes, scale, result.error) for name, codes, scale in parts}

    def _moments(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Second moments of what the first matrices and the last one of an expert receive."""
        tokens, ranks = torch.where(self._at.ids == expert)
        own, w = self._at.hidden[tokens], self._at.weights[tokens, ranks].float()
        own_inner = expert_inner(self._module, expert, own)
        common_inner = expert_inner(self._module, expert, self._common)
        return (
            second_moment(own, w, self._common),
            second_moment(own_inner, w, common_inner),
        )
