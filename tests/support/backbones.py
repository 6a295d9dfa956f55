"""Backbones alone, with something simple in place of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from smoe.artifacts.manifest import Layer, Manifest
from smoe.artifacts.program import PROGRAM, PROGRAM_WEIGHTS, Op, Program
from smoe.artifacts.program_checks import problems
from smoe.prep.program import compile
from smoe.runtime import kernels
from smoe.runtime.backbone import Backbone
from smoe.runtime.execution import Division
from smoe.runtime.routing import Routed
from smoe.runtime.step import Phase, Span, Step
from smoe.runtime.step import Sequence as Sequence_

StandIn = Callable[[Routed, Layer], np.ndarray]


def by_squares(routed: Routed, layer: Layer) -> np.ndarray:
    """Float32 `[tokens, hidden]` that depends on all that experts are given."""
    squares = (routed.weights**2 * (1 + routed.ids / layer.experts)).sum(-1)
    return routed.hidden.reshape(len(squares), -1) * squares[:, None]


def logits_of(
    path: Path,
    manifest: Manifest,
    parts: Sequence[np.ndarray],
    division: Division | None = None,
    name: str | None = None,
    stand_in: StandIn = by_squares,
) -> np.ndarray:
    """Of every token of a sequence that comes in `parts`; by ONNX Runtime where there is no
    `division`, on the kernels of this `name` (None: the best)."""
    chosen = kernels.choose(name, 2)
    backbone = Backbone(path, manifest, division=division, chosen=chosen)
    sequence, logits = Sequence_(backbone.new_state(sum(map(len, parts)))), []
    for part in parts:
        flow = backbone.begin(Step((Span(sequence, part, np.arange(len(part)), Phase.PREFILL),)))
        for number, layer in enumerate(manifest.layers):
            mixed = stand_in(backbone.route(number, flow), layer)
            backbone.mix(number, flow, np.ascontiguousarray(mixed, np.float32))
        logits += backbone.finish(flow)
    return np.concatenate(logits)


def compiled(path: Path, manifest: Manifest) -> Program:
    """The program of the graphs at `path`, as the door finds it."""
    program = compile(path, manifest.backbone, manifest.layers, manifest.model.context)
    assert Program.parse((path / PROGRAM).read_text(), "program.json") == program
    assert not list(problems(program, manifest, (path / PROGRAM_WEIGHTS).stat().st_size))
    return program


def operations(program: Program, kind: str) -> list[Op]:
    """All of this kind."""
    return [op for _, op in program.operations() if op.kind == kind]
