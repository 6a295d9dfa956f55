"""A backbone that does what the model does: exported, cut, compared, and then brought to its
precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from smoe.artifacts.manifest import FORMAT, VERSION, Experts, Layer, Manifest, Model, Wires
from smoe.prep.backbone import cut
from smoe.prep.backbone.check import check_backbone
from smoe.prep.backbone.export import Exported, export
from smoe.prep.backbone.onnx_graph import continues
from smoe.prep.backbone.positions import reach
from smoe.prep.backbone.quantise import reduce
from smoe.prep.backbone.watch import known
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress


def export_checked(
    checkpoint: Checkpoint, directory: Path, experts: Experts, precision: str, progress: Progress
) -> Manifest:
    """The manifest, but for its files and provenance, of a backbone that is exported into
    `directory` and does what the model does, and is then brought to `precision`; a `PrepError` if
    there is none.

    A graph for any number of tokens is tried first; where the model or the graph does not go on
    from its state with several, one for single tokens.
    """
    why, far = "", reach(checkpoint.config)
    if far.why:
        progress.say(f"export: the longest context is {far.tokens} tokens: {far.why}")
    for one_at_a_time in (False, True) if continues(checkpoint) else (True,):
        progress.say(
            "export: tracing the backbone" + (" for one token at a time" if one_at_a_time else "")
        )
        try:
            exported = export(checkpoint, directory, one_at_a_time)
        except PrepError as error:
            why = why or str(error)
            continue
        draft = _draft(checkpoint, experts, exported)
        manifest, wrong = check_backbone(checkpoint, directory, draft, exported.nodes)
        if not wrong and precision == "f32":
            return manifest
        if not wrong:
            sources = known(checkpoint, directory)
            backbone, line = reduce(
                directory, manifest.backbone, manifest.layers, precision, sources
            )
            progress.say(f"export: {line}")
            return dataclasses.replace(manifest, backbone=backbone)
        why = why or wrong
    raise PrepError(
        f"{checkpoint.path}: the backbone of this {checkpoint.model.config.model_type} cannot be "
        f"exported: {why}"
    )


def _draft(checkpoint: Checkpoint, experts: Experts, exported: Exported) -> Manifest:
    """The manifest, but for its files, its provenance and what only running the segments shows."""
    config = checkpoint.config
    layers = [
        _layer(name, module, node)
        for (name, module), node in zip(checkpoint.layers, exported.nodes, strict=True)
    ]
    model = Model(
        checkpoint.model.config.model_type,
        type(checkpoint.model).__name__,
        int(config.vocab_size),
        reach(config).tokens,
        checkpoint.end_ids,
    )
    return Manifest(FORMAT, VERSION, model, tuple(layers), experts, exported.backbone, {}, {})


def _layer(name: str, module, node: cut.ExpertsNode) -> Layer:
    count, hidden, width = expert_geometry(module)
    scores, raw = (node.found.scores, node.found.raw) if node.found else ("", "")
    rule = node.found.rule if node.found else None
    refusal = (
        "" if node.found else f"no known pattern leads from {name}'s router scores to its choice"
    )
    wires = Wires(node.hidden, node.ids, node.weights, node.output, scores, raw)
    top_k = 1  # follows from running it
    return Layer(name, count, top_k, hidden, width, wires, rule, refusal)
