"""The exported backbone, run as the runtime runs it, against the model itself; and its program,
against the same or, in fewer bits, against ONNX Runtime. Nothing is shipped that was not compared.

The experts are left to a stand-in on both sides, which any hidden state can go through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts.manifest import Manifest
from smoe.artifacts.program import Program
from smoe.prep.backbone import router_pattern
from smoe.prep.backbone.cut import ExpertsNode
from smoe.prep.backbone.onnx_graph import CLOSE
from smoe.prep.backbone.positions import original_length
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import experts_run_by
from smoe.runtime.backbone import Backbone
from smoe.runtime.budget import CHUNK
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import Execution, divide
from smoe.runtime.step import Phase, Sequence, Span, Step

# A prompt of a whole chunk, a decode step, two continuations: what a graph does with 3 tokens it
# need not do with 70.
PARTS = (CHUNK, 1, 43, 70)
# Tokens: where a model was made for no more, the check goes on past that length, if its context
# does. What is stretched is the same at every length; what is not ends there (`positions`).
FAR = 2048
# Of the largest logit: in few bits a rounding that falls the other way changes a token's choice of
# experts, and what comes after.
ROUNDED = 0.1


def check_backbone(
    checkpoint: Checkpoint, directory: Path, manifest: Manifest, nodes: tuple[ExpertsNode, ...]
) -> tuple[Manifest, str]:
    """`manifest` completed by what running the segments shows (top_k, and which routing rules
    hold), and why they do not do what the model does; '' if they do."""
    ids = _ids(checkpoint, manifest)
    try:
        logits, seen = _run(Backbone(directory, manifest), manifest, ids, nodes)
    except EngineError as error:
        return manifest, str(error)
    if why := _differs(logits, _original(checkpoint, ids), CLOSE):
        return manifest, f"the logits of the exported backbone {why}"
    layers = []
    for layer, node, values in zip(manifest.layers, nodes, seen, strict=True):
        layer = dataclasses.replace(layer, top_k=values["ids"].shape[1])
        if node.found:
            why = router_pattern.check(
                node.found, values["scores"], values["raw"], values["ids"], values["weights"]
            )
            if why:
                layer = dataclasses.replace(
                    layer, routing=None, routing_refusal=f"{layer.name}: {why}"
                )
        layers.append(layer)
    return dataclasses.replace(manifest, layers=tuple(layers)), ""


def check_program(
    checkpoint: Checkpoint, directory: Path, manifest: Manifest, program: Program
) -> str:
    """Why `program` does not do what the backbone of `manifest` does; '' if it does. What it does
    not know, ONNX Runtime runs."""
    ids = _ids(checkpoint, manifest)
    exact = manifest.backbone.precision == "f32"
    return program_differs(
        directory, manifest, program, ids, _original(checkpoint, ids) if exact else None
    )


def program_differs(
    directory: Path,
    manifest: Manifest,
    program: Program,
    ids: np.ndarray,
    expected: np.ndarray | None = None,
) -> str:
    """Why the logits of `program` are not those that are `expected`, float32 `[T, vocabulary]`
    (None: ONNX Runtime's) after `ids`; '' if they are."""
    execution = Execution(state="f32" if program.states else None)
    try:
        division = divide(manifest, program, execution)
        logits = _logits(Backbone(directory, manifest, division=division), manifest, ids)
        if expected is None:
            expected = _logits(Backbone(directory, manifest), manifest, ids)
    except EngineError as error:
        return str(error).rstrip(".")
    close = CLOSE if manifest.backbone.precision == "f32" else ROUNDED
    why = _differs(logits, expected, close)
    return why and f"its logits {why}"


def _differs(logits: np.ndarray, expected: np.ndarray, close: float) -> str:
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    return "" if difference <= close else f"are off by {difference:.1e} of the largest"


def _run(
    backbone: Backbone, manifest: Manifest, ids: np.ndarray, nodes: tuple[ExpertsNode, ...]
) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Logits `[T, vocabulary]` of the segments, and per layer ids, weights, scores and raw weights
    of all tokens."""
    sequence = Sequence(backbone.new_state(len(ids)))
    logits = []
    seen: list[dict[str, list[np.ndarray]]] = [{} for _ in nodes]
    for part in _parts(ids, backbone.chunk == 1):
        count = len(part)
        flow = backbone.begin(Step((Span(sequence, part, np.arange(count), Phase.PREFILL),)))
        for index, node in enumerate(nodes):
            names = {"hidden": node.hidden, "ids": node.ids, "weights": node.weights}
            if node.found:
                names |= {"scores": node.found.scores, "raw": node.found.raw}
            arrays = backbone.values(index, flow, list(names.values()))
            for name, array in zip(names, arrays, strict=True):
                seen[index].setdefault(name, []).append(array.reshape(count, -1))
            output = _stand_in(seen[index].pop("hidden")[0], seen[index]["weights"][-1])
            backbone.mix(index, flow, np.ascontiguousarray(output, np.float32))
        logits += backbone.finish(flow)
    joined = [{name: np.concatenate(parts) for name, parts in layer.items()} for layer in seen]
    return np.concatenate(logits), joined


def _logits(backbone: Backbone, manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """The logits alone, of a manifest that is whole."""
    sequence, logits = Sequence(backbone.new_state(len(ids))), []
    for part in _parts(ids, backbone.chunk == 1):
        flow = backbone.begin(Step((Span(sequence, part, np.arange(len(part)), Phase.PREFILL),)))
        for layer in range(len(manifest.layers)):
            routed = backbone.route(layer, flow)
            output = _stand_in(routed.hidden, routed.weights)
            backbone.mix(layer, flow, np.ascontiguousarray(output, np.float32))
        logits += backbone.finish(flow)
    return np.concatenate(logits)


def _parts(ids: np.ndarray, single: bool) -> Iterator[np.ndarray]:
    """The tokens of one call after another, of a `single` one each or of more."""
    parts = (1,) * len(ids) if single else PARTS + (CHUNK,) * (len(ids) // CHUNK)
    return filter(len, np.split(ids, np.cumsum(parts)))


def _ids(checkpoint: Checkpoint, manifest: Manifest) -> np.ndarray:
    """The tokens on which is compared."""
    original = original_length(checkpoint.config)
    count = max(sum(PARTS), original + PARTS[-1] if original <= FAR else 0)
    random = np.random.default_rng(0)
    return random.integers(0, manifest.model.vocabulary, min(count, manifest.model.context))


@torch.no_grad()
def _original(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    def run(layer, module, hidden, ids, weights):
        return _stand_in(hidden.reshape(len(weights), -1), weights).reshape(hidden.shape)

    with experts_run_by(checkpoint.model, checkpoint.layers, run):
        return (
            checkpoint.model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
            .logits[0]
            .numpy()
        )


def _stand_in(hidden, weights):
    """Continuous in the weights, whichever experts they belong to: a near tie that falls the other
    way changes little."""
    return hidden * (weights * weights).sum(-1)[:, None]
