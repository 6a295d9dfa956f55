"""The backbone: everything but the experts, exported to ONNX and cut at the experts into plain
segments.

The experts run as one custom node per layer while `transformers`' own exporter traces the model
(`experts.symbolic`), so no modelling code is repeated here. `cut.py` turns the graph into segments;
this file makes the graph, decides what is state, and puts weights and segments on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from smoe.artifacts.manifest import Backbone, Initializer, Segment, State
from smoe.artifacts.safetensors_file import DTYPES
from smoe.prep.backbone import cut
from smoe.prep.backbone import onnx_graph as tracing
from smoe.prep.backbone.onnx_graph import Sample
from smoe.prep.backbone.router_pattern import name_of
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.errors import PrepError

WEIGHTS = "backbone/weights.data"
ALIGN = 64  # bytes, of every weight in the file
ELEMENTWISE = (
    "Mul",
    "Div",
    "Add",
    "Tanh",
    "Cast",
    "Identity",
)  # what may follow the last product (scales, caps)
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")


@dataclass(frozen=True)
class Exported:
    """The backbone's part of the manifest, and what each layer's experts are wired to."""

    backbone: Backbone
    nodes: tuple[cut.ExpertsNode, ...]


def export(checkpoint: Checkpoint, directory: Path, one_at_a_time: bool = False) -> Exported:
    """Export the backbone in float32 into `directory`/backbone and say what is there.

    Every segment is a plain ONNX model that passes `onnx.checker`; they share one weight file. With
    `one_at_a_time` they take exactly one token per call.
    """
    sample = tracing.sample(checkpoint, one_at_a_time)
    graph = tracing.trace(checkpoint, sample)
    state = _state(graph, sample)
    _lengths_from_input(graph, state)
    _sizes_as_constants(graph)
    _keep_positions(graph)
    pieces = cut.cut(graph)
    (directory / "backbone").mkdir(parents=True, exist_ok=True)
    initializers = write_weights(directory / WEIGHTS, pieces.weights)
    segments = []
    for i, piece in enumerate(pieces.segments):
        file = f"backbone/segment-{i:02d}.onnx"
        segments.append(write_segment(directory, file, piece, initializers))
    placed = _place(state, segments)
    heads = int(getattr(checkpoint.config, "num_attention_heads", 1))
    backbone = Backbone(
        "f32",
        heads,
        WEIGHTS,
        tuple(segments),
        tuple(initializers.values()),
        tuple(placed),
        one_at_a_time,
        prelude=True,
    )
    return Exported(backbone, tuple(pieces.nodes))


def _state(graph: ir.Graph, sample: Sample) -> list[State]:
    """Pair the graph's state inputs with its outputs, as their names do (`input.X`, `output.X`).

    State is updated in place where one GroupQueryAttention alone reads the input and writes the
    output: bound to one buffer it appends without copying.
    """
    outputs = {name_of(value): value for value in graph.outputs}
    states = []
    inputs = [value for value in graph.inputs if name_of(value).startswith("input.")]
    for value, leaf, axis in zip(inputs, sample.leaves, sample.growing, strict=True):
        given = name_of(value)
        returned = given.replace("input.", "output.", 1)
        if returned not in outputs:
            raise PrepError(f"The exported graph takes the state {given} but does not return it.")
        readers = {node for node, _ in value.uses() if node.op_type != "Shape"}
        writer = outputs[returned].producer()
        attends = writer is not None and writer.op_type == "GroupQueryAttention"
        in_place = axis >= 0 and attends and readers == {writer}
        dtype = next(n for n, d in DTYPES.items() if d == leaf.numpy().dtype)
        states.append(State(-1, given, returned, dtype, tuple(leaf.shape), axis, in_place))
    return states


def _lengths_from_input(graph: ir.Graph, state: list[State]) -> None:
    """Every length that the graph takes from its state's shape becomes the input `past_length`,
    int64 `[1]`.

    Then a buffer longer than what it holds can be bound as state.
    """
    length = ir.Value(
        name="past_length", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1])
    )
    graph.inputs.append(length)
    by_name = {s.input: s for s in state}
    for node in list(graph):
        if node.op_type != "Shape" or name_of(node.inputs[0]) not in by_name:
            continue
        spec = by_name[name_of(node.inputs[0])]
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(spec.shape))
        axes = range(len(spec.shape))[start:end]
        parts = [length if a == spec.growing else _constant(graph, spec.shape[a]) for a in axes]
        if len(parts) == 1:
            replacement = parts[0]
        else:
            concat = ir.node("Concat", parts, attributes={"axis": 0})
            concat.outputs[0].dtype, concat.outputs[0].shape = (
                ir.DataType.INT64,
                ir.Shape([len(parts)]),
            )
            graph.insert_before(node, concat)
            replacement = concat.outputs[0]
        node.outputs[0].replace_all_uses_with(replacement)
        graph.remove(node, safe=True)


def _sizes_as_constants(graph: ir.Graph) -> None:
    """Sizes that are the same for every call, so that what follows from lengths alone does not pass
    through a layer to be asked for one."""
    for node in list(graph):
        shape = node.inputs[0].shape if node.op_type == "Shape" and node.inputs[0] else None
        if shape is None:
            continue
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(shape))
        sizes = [size for size in list(shape)[start:end] if isinstance(size, int)]
        if len(sizes) == len(list(shape)[start:end]):
            node.outputs[0].replace_all_uses_with(_constant(graph, *sizes))
            graph.remove(node, safe=True)


def _keep_positions(graph: ir.Graph) -> None:
    """Compute logits only at the positions of the new input `logits_to_keep`, int64 `[n]`: over a
    long prompt all of them would be most of the work and the memory.

    The hidden state is gathered before the last product, which is found by walking back over
    elementwise operations. (`transformers`' own argument of this name exports to a product that
    ONNX Runtime 1.31 refuses.)
    """
    value = next(v for v in graph.outputs if v.name == cut.LOGITS)
    node = value.producer()
    while node is not None and node.op_type in ELEMENTWISE:
        varying = [v for v in node.inputs if v is not None and v.const_value is None]
        node = varying[0].producer() if len(varying) == 1 else None
    hidden = node.inputs[0] if node is not None and node.op_type in PRODUCTS else None
    if node is None or hidden is None or len(hidden.shape or ()) != 3:
        return  # all logits then; the runtime picks
    keep = ir.Value(
        name="logits_to_keep", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([None])
    )
    gather = ir.node("Gather", [hidden, keep], attributes={"axis": 1})
    gather.outputs[0].type = hidden.type
    graph.inputs.append(keep)
    graph.insert_before(node, gather)
    node.replace_input_with(0, gather.outputs[0])


def _constant(graph: ir.Graph, *values: int) -> ir.Value:
    name = "_".join(["smoe_constant", *map(str, values)])
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        constant = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape([len(values)]),
        )
        graph.register_initializer(constant)
    return graph.initializers[name]


def write_weights(
    path: Path, weights: dict[str, ir.TensorProtocol] | dict[str, np.ndarray]
) -> dict[str, Initializer]:
    """All weights one after another, aligned, equal bytes once; what is too small to matter stays
    in the segments."""
    placed: dict[str, Initializer] = {}
    written: dict[bytes, int] = {}  # offsets by what is there
    offset = 0
    with open(path, "wb") as file:
        for name, tensor in weights.items():
            array = np.ascontiguousarray(
                tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
            )
            if array.nbytes < cut.INLINE:
                continue
            dtype = next(n for n, d in DTYPES.items() if d == array.dtype)
            data = array.reshape(-1).view(np.uint8).data
            digest = hashlib.sha256(data).digest()
            if digest not in written:
                file.write(b"\0" * (-offset % ALIGN))
                written[digest] = offset + -offset % ALIGN
                offset = written[digest] + file.write(data)
            placed[name] = Initializer(name, dtype, array.shape, written[digest], array.nbytes)
    return placed


def write_segment(
    directory: Path, file: str, piece: onnx.ModelProto, placed: dict[str, Initializer]
) -> Segment:
    """Write one ONNX file, its large weights as external data, and check it."""
    graph = piece.graph
    outside = [tensor for tensor in graph.initializer if tensor.name in placed]
    for tensor in outside:
        where = placed[tensor.name]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", Path(WEIGHTS).name),
            ("offset", where.offset),
            ("length", where.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
    (directory / file).write_bytes(piece.SerializeToString())
    onnx.checker.check_model(str(directory / file))
    names = [tuple(v.name for v in values) for values in (graph.input, graph.output, outside)]
    return Segment(file, *names)


def _place(state: list[State], segments: list[Segment]) -> Iterator[State]:
    """Say of each state which segment it belongs to."""
    for s in state:
        home = next(i for i, segment in enumerate(segments) if s.output in segment.outputs)
        yield State(home, s.input, s.output, s.dtype, s.shape, s.growing, s.in_place)
