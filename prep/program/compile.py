"""A backbone's segments, compiled into a program and its weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx

from smoe.artifacts.errors import printable
from smoe.artifacts.manifest import Backbone, Layer
from smoe.artifacts.program import (
    PROGRAM,
    PROGRAM_WEIGHTS,
    Buffer,
    Op,
    Part,
    Program,
)
from smoe.artifacts.safetensors_file import DTYPES
from smoe.prep.errors import PrepError
from smoe.prep.program.delta_rule import with_delta_rules
from smoe.prep.program.probe import FAR, Probe
from smoe.prep.program.scanning import recurrent, scanned
from smoe.prep.program.tidy import made_again, tidied
from smoe.prep.program.values import Unknown
from smoe.prep.program.walk import Graphs, Walk

LONGEST = 500  # characters of a reason


def compile(
    directory: Path, backbone: Backbone, layers: tuple[Layer, ...], context: int = FAR
) -> Program:
    """Compile the ONNX segments of `backbone` that lie in `directory`, for sequences of up to
    `context` tokens, and write program.json and program.data beside them.

    A segment with a node that no operation does is a `Part` without operations, whose `reason` says
    which; ONNX Runtime runs it. A `PrepError` says why none is known, and nothing is written.
    """
    graphs = _graphs(directory, backbone, layers, context)
    refused: dict[int, str] = {}
    while True:
        walk = Walk(graphs, refused)
        failed, segments = dict(walk.failed), list[list[Op]]()
        if failed.keys() <= refused.keys():
            failed, segments = _tidied(walk)
        if failed.keys() <= refused.keys():
            break
        refused = failed | refused
    if len(refused) == len(backbone.segments):
        reasons = "; ".join(sorted(set(refused.values())))
        raise PrepError(f"No segment of this backbone compiles: {reasons}")
    return _finished(directory, walk, segments)


def _graphs(directory: Path, backbone: Backbone, layers: tuple[Layer, ...], context: int) -> Graphs:
    """The segments, their large constants left in their file until they are read."""
    file = directory / backbone.weights
    constants: dict[str, np.ndarray] = {
        each.name: np.memmap(file, DTYPES[each.dtype], "r", each.offset, each.shape)
        for each in backbone.initializers
    }
    segments = []
    for segment in backbone.segments:
        graph = onnx.load(str(directory / segment.file), load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.name not in constants:
                constants[tensor.name] = onnx.numpy_helper.to_array(tensor)
        segments.append(graph)
    probe = Probe(segments, constants, context, backbone.one_at_a_time)
    return Graphs(backbone, layers, tuple(segments), constants, probe)


def _asked(walk: Walk) -> set[str]:
    """Buffers that others read or write."""
    return {name for name in walk.names.buffers if name in walk.called or name in walk.given}


def _tidied(walk: Walk) -> tuple[dict[int, str], list[list[Op]]]:
    """What a whole walk has written, in the end; or which segments cannot be, with reasons."""
    buffers, asked = walk.names.buffers, _asked(walk)
    segments = made_again([w.ops for w in walk.written], walk.elsewhere, walk.given)
    segments = with_delta_rules(segments, buffers, asked)
    segments = tidied(segments, buffers, asked, walk.weights)
    failed = {}
    for index, ops in enumerate(segments):
        try:
            segments[index] = scanned(ops, buffers)
        except Unknown as error:
            failed[index] = str(error)
    return failed, segments


def _finished(directory: Path, walk: Walk, segments: list[list[Op]]) -> Program:
    """Written, under the names that others ask for."""
    buffers, asked = walk.names.buffers, _asked(walk)
    sources = {v.source for ops in segments for op in ops for v in (*op.inputs, *op.outputs)}
    sources |= {op.weight for ops in segments for op in ops} | asked
    (directory / PROGRAM_WEIGHTS).parent.mkdir(exist_ok=True)
    constants, became = walk.weights.write(
        directory / PROGRAM_WEIGHTS, sources - set(buffers) - {""}
    )
    names = became | walk.called
    parts = [
        Part(None, printable(walk.refused[index])[:LONGEST])
        if index in walk.refused
        else Part(tuple(_renamed(op, names) for op in ops))
        for index, ops in enumerate(segments)
    ]
    kept = [_called(buffers[name], walk) for name in buffers if name in sources]
    states = [state for w in walk.written if w.index not in walk.refused for state in w.states]
    specs = {spec.input: spec for spec in walk.graphs.backbone.state}
    carried = [state for ops in segments for state in recurrent(ops, specs)]
    program = Program(tuple(kept), tuple(constants), tuple(states), tuple(parts), tuple(carried))
    (directory / PROGRAM).write_text(program.to_json())
    return program


def _renamed(op: Op, names: dict[str, str]) -> Op:
    inputs, outputs = (
        tuple(dataclasses.replace(v, source=names.get(v.source, v.source)) for v in views)
        for views in (op.inputs, op.outputs)
    )
    weight = names.get(op.weight, op.weight)
    return dataclasses.replace(op, inputs=inputs, outputs=outputs, weight=weight)


def _called(buffer: Buffer, walk: Walk) -> Buffer:
    """Under the name that is asked for; what experts take and give, and logits, are vectors."""
    name = walk.called.get(buffer.name, buffer.name)
    flat = name in walk.graphs.vectors()
    shape = (math.prod(buffer.shape),) if flat else buffer.shape
    return dataclasses.replace(buffer, name=name, shape=shape)
