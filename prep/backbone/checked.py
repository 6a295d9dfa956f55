"""A backbone that does what the model does: exported, cut, compared, then brought to its precision
and compiled."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from smoe.artifacts.manifest import FORMAT, VERSION, Experts, Layer, Manifest, Model, Wires
from smoe.artifacts.program import PROGRAM, PROGRAM_WEIGHTS
from smoe.prep.backbone import cut
from smoe.prep.backbone.check import check_backbone, check_program
from smoe.prep.backbone.export import Exported, export
from smoe.prep.backbone.onnx_graph import continues
from smoe.prep.backbone.positions import reach
from smoe.prep.backbone.quantise import reduce
from smoe.prep.backbone.watch import known
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry
from smoe.prep.errors import PrepError
from smoe.prep.program import compile
from smoe.prep.progress import Progress


def export_checked(
    checkpoint: Checkpoint, directory: Path, experts: Experts, precision: str, progress: Progress
) -> Manifest:
    """The manifest, but for its files and provenance, of a backbone that is exported into
    `directory` and does what the model does, and is then brought to `precision` and compiled as far
    as that goes; a `PrepError` if there is none.

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
        if not wrong and precision != "f32":
            sources = known(checkpoint, directory)
            backbone, line = reduce(
                directory, manifest.backbone, manifest.layers, precision, sources
            )
            progress.say(f"export: {line}")
            manifest = dataclasses.replace(manifest, backbone=backbone)
        if not wrong:
            _compile(checkpoint, directory, manifest, progress)
            return manifest
        why = why or wrong
    raise PrepError(
        f"{checkpoint.path}: the backbone of this {checkpoint.model.config.model_type} cannot be "
        f"exported: {why}"
    )


def _compile(
    checkpoint: Checkpoint,
    directory: Path,
    manifest: Manifest,
    progress: Progress,
) -> None:
    """The backbone's program, of what compiles and does what the backbone does."""
    backbone = manifest.backbone
    try:
        program = compile(directory, backbone, manifest.layers, manifest.model.context)
    except PrepError as error:
        progress.say(f"export: no program, ONNX Runtime runs the backbone: {error}")
        return
    if why := check_program(checkpoint, directory, manifest, program):
        for name in (PROGRAM, PROGRAM_WEIGHTS):
            (directory / name).unlink()
        progress.say(f"export: no program, ONNX Runtime runs the backbone: {why}")
        return
    known = sum(part.ops is not None for part in program.parts)
    progress.say(f"export: {known} of {len(program.parts)} segments in the program")
    reasons = Counter(part.reason for part in program.parts if part.ops is None)
    for reason, count in reasons.items():
        progress.say(f"export: {count} stay with ONNX Runtime: {reason}")


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
