"""Experts to shards: one layer at a time, one record at a time.

Encodings of one plane are a function of the weights. Nested ones are quantised on calibration text, which runs through
the model in lockstep as in profiling: when it reaches a layer, the layer's experts are in memory, and so is what they
receive. Rounding to nearest is there as the control (`quantiser` "nearest").
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts import nested
from smoe.artifacts.encodings import (
    encode_expert,
    encoding_named,
    fill_record,
    is_bias_or_norm,
    record_layout,
)
from smoe.artifacts.layout import ExpertShape, RecordLayout
from smoe.artifacts.manifest import ExpertActivation, Experts, Manifest
from smoe.artifacts.shard import write_shard
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry, expert_inner, expert_weights, probe_gate
from smoe.prep.errors import PrepError
from smoe.prep.pack.quantise import Quantised, quantise, second_moment
from smoe.prep.progress import Progress
from smoe.prep.statistics.profile import batches, run
from smoe.prep.sweep.forward import Arrived, lockstep, outputs

PAGE = 16384  # bytes: some aarch64 kernels use pages of this size
COMMON = 256  # tokens of the layer at large, spread over the text, that every expert's second moment sees
AT_ONCE = 256 << 20  # bytes of second moments in memory


def pack(
    checkpoint: Checkpoint,
    directory: Path,
    encoding: str,
    progress: Progress,
    rows: list[np.ndarray] | None = None,
) -> Experts:
    """Write every layer's experts to `directory`/experts in `encoding`; returns what all shards have in common.

    With `rows` of token ids a nested encoding is calibrated on them; without, and in any other encoding, weights are
    rounded. A shard that an interrupted run left there is whole, and kept.
    """
    experts = unpacked(checkpoint, encoding)
    (directory / "experts").mkdir(parents=True, exist_ok=True)
    files = [directory / Manifest.shard(layer) for layer in range(len(checkpoint.layers))]
    count = progress.counter("pack", "layers", len(files))
    finished = [file.exists() for file in files]  # whole: shards are written beside and renamed
    if experts.encoding.startswith("nested") and rows is not None and not all(finished):
        visit = partial(_visit, checkpoint, experts, files, count, progress)
        passes = [partial(run, checkpoint.model, batch) for batch in batches(rows)]
        for _ in lockstep(checkpoint, passes, visit):
            pass
        return experts
    for layer, file in enumerate(files):
        if not finished[layer]:
            with checkpoint.experts(layer) as module:
                layout = _layout(experts, module)
                write_shard(
                    file,
                    layout,
                    PAGE,
                    _rounded(module, layout, experts.encoding),
                    expert_geometry(module)[0],
                )
        count.done(layer + 1, worked=not finished[layer])
    return experts


def unpacked(checkpoint: Checkpoint, encoding: str) -> Experts:
    """What all shards in `encoding` will have in common; a `PrepError` if the layers' experts differ in kind."""
    return Experts(encoding_named(encoding).name, PAGE, *common_kind(checkpoint))


def common_kind(checkpoint: Checkpoint) -> tuple[ExpertActivation, bool, bool]:
    """The gate of all experts, whether their matrices have biases, and whether their outputs are normalised; a
    `PrepError` if layers differ."""
    kinds = {
        (probe_gate(m), bool(m.has_bias), bool(m.has_post_expert_norm))
        for _, m in checkpoint.layers
    }
    if len(kinds) > 1:
        raise PrepError(
            f"The layers' experts differ in kind ({kinds}); this version packs one kind per model."
        )
    return kinds.pop()


def _layout(experts: Experts, module: torch.nn.Module) -> RecordLayout:
    _, hidden, width = expert_geometry(module)
    shape = ExpertShape(hidden, width, experts.gate.kind != "plain", experts.biased, experts.normed)
    return record_layout(shape, experts.encoding, PAGE)


def _rounded(module: torch.nn.Module, layout: RecordLayout, encoding: str) -> Iterator[np.ndarray]:
    for expert in range(expert_geometry(module)[0]):
        yield encode_expert(layout, encoding, expert_weights(module, expert))


def _visit(
    checkpoint: Checkpoint,
    experts: Experts,
    files: list[Path],
    count,
    progress: Progress,
    layer: int,
    arrived: list[Arrived],
) -> Iterator[torch.Tensor]:
    """Pack one layer, as `lockstep` reaches it, and compute what the model would."""
    work = not files[layer].exists()
    with checkpoint.experts(layer) as module:
        if work:
            calibrated = _Calibrated(
                module, nested.parse(experts.encoding), _layout(experts, module), arrived
            )
            write_shard(
                files[layer],
                calibrated.layout,
                PAGE,
                calibrated.records(),
                expert_geometry(module)[0],
            )
            progress.say(f"pack: {checkpoint.layers[layer][0]}: {calibrated.report()}")
        count.done(layer + 1, worked=work)
        yield from outputs(module, arrived)


class _Calibrated:
    """Quantises the experts of one layer, a few at a time, on what arrives there."""

    def __init__(
        self,
        module: torch.nn.Module,
        encoding: nested.Nested,
        layout: RecordLayout,
        arrived: list[Arrived],
    ):
        self.layout = layout
        self._module, self._encoding, self._arrived = module, encoding, arrived
        self._lost: dict[str, list[np.ndarray]] = {}
        total = sum(len(slots.ids) for slots in arrived)
        every = max(1, total // COMMON)
        self._common = torch.cat(
            [slots.tokens[:: min(every, len(slots.ids))] for slots in arrived]
        )[:COMMON]
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
        first = [name for name in ("gate", "up") if name in weights[0]]
        codes = self._quantised(first, weights, [m[0] for m in moments])
        codes |= self._quantised(["down"], weights, [m[1] for m in moments])
        for i, w in enumerate(weights):
            tensors = {name: vector for name, vector in w.items() if is_bias_or_norm(name)}
            for name, found in codes.items():
                tensors |= nested.pack_matrix(self._encoding, name, found.codes[i], found.scale[i])
            yield fill_record(self.layout, tensors)

    def _quantised(
        self, names: list[str], weights: list[dict], moments: list[torch.Tensor]
    ) -> dict[str, Quantised]:
        """Matrices with the same inputs, at once."""
        w = torch.stack(
            [torch.cat([torch.from_numpy(of[name]) for name in names]) for of in weights]
        )
        split = self._encoding.of(names[0])
        found = quantise(w.to(self._device), torch.stack(moments), split, self._encoding.group)
        self._lost.setdefault("+".join(names), []).append(found.error)
        parts = zip(
            names,
            np.split(found.codes, len(names), 1),
            np.split(found.scale, len(names), 1),
            strict=True,
        )
        return {name: Quantised(codes, scale, found.error) for name, codes, scale in parts}

    def _moments(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Second moments of what the first matrices and the last one of an expert receive."""
        x, weights = [], []
        for slots in self._arrived:
            tokens, ranks = torch.where(slots.ids == expert)
            x.append(slots.tokens[tokens])
            weights.append(slots.weights[tokens, ranks].float())
        own, common, w = torch.cat(x), self._common, torch.cat(weights)
        inner = [expert_inner(self._module, expert, part) for part in (own, common)]
        return tuple(
            second_moment(a.to(self._device), w.to(self._device), b.to(self._device))
            for a, b in ((own, common), tuple(inner))
        )
