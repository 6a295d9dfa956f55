"""Cutting a graph at its experts nodes into plain ONNX segments.

A node's stage is the highest of its inputs' stages; an experts node's output starts the next stage.
Stage 0 is the *prelude*: what follows from token ids and positions alone (embedding, masks, rotary
tables), up to the first norm or product. Segment s holds the nodes of stage s, and takes what
earlier segments gave; layer l's experts run after segment l + 1. Each cut also gives up the
router's selection scores and raw weights, found by `router_pattern.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from smoe.prep.backbone import router_pattern
from smoe.prep.backbone.router_pattern import name_of
from smoe.prep.errors import PrepError

OPSET = 23  # the first with RMSNormalization
LOGITS = "logits"
GIVEN = ("input_ids", "past_length")  # what the prelude takes
# What works on a hidden state, of which the first is the embedding: no prelude has it.
WORK = (
    "MatMul",
    "Gemm",
    "FusedMatMul",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "LayerNormalization",
    "Experts",
)
INLINE = 256  # bytes: smaller constants stay in the graph, where constant folding sees them


@dataclass(frozen=True)
class ExpertsNode:
    """What one layer's experts take and give, by value name. `found` is None where no pattern of
    routing fits."""

    layer: int
    hidden: str
    ids: str
    weights: str
    output: str
    found: router_pattern.Found | None


@dataclass(frozen=True)
class Pieces:
    """Segments in memory, without the values of large weights, and the weights of all of them by
    name."""

    segments: list[onnx.ModelProto]
    nodes: list[ExpertsNode]
    weights: dict[str, ir.TensorProtocol]


def cut(graph: ir.Graph) -> Pieces:
    """Cut `graph` at its experts nodes. A graph whose experts do not follow one another is a
    `PrepError`."""
    stages = _stages(graph)
    experts = sorted((n for n in stages if n.op_type == "Experts"), key=lambda n: stages[n])
    if [stages[n] for n in experts] != list(range(1, len(experts) + 1)) or not experts:
        raise PrepError(
            f"The exported graph has {len(experts)} experts nodes at stages "
            f"{[stages[n] for n in experts]}; they must "
            "follow one another, one per layer."
        )
    nodes = [_experts_node(layer, node) for layer, node in enumerate(experts)]
    output_names = {name_of(value) for value in graph.outputs}
    for wires in nodes:
        output_names |= {wires.hidden, wires.ids, wires.weights}
        output_names |= {wires.found.scores, wires.found.raw} if wires.found else set()
    by_stage: list[list[ir.Node]] = [[] for _ in range(len(experts) + 2)]
    for node, stage in stages.items():
        if node.op_type != "Experts":
            by_stage[stage].append(node)
    segments = [
        _segment(stage, members, stages, output_names) for stage, members in enumerate(by_stage)
    ]
    weights = {
        name_of(v): v.const_value
        for n in graph
        for v in n.inputs
        if v is not None and v.const_value is not None
    }
    return Pieces(segments, nodes, weights)


def _stages(graph: ir.Graph) -> dict[ir.Node, int]:
    """Every node's stage, in the graph's (topological) order."""
    stages: dict[ir.Node, int] = {}
    for node in graph:
        varying = [v for v in node.inputs if v is not None and v.const_value is None]
        makers = [value.producer() for value in varying]
        early = node.op_type not in WORK and all(
            name_of(value) in GIVEN if maker is None else stages[maker] == 0
            for value, maker in zip(varying, makers, strict=True)
        )
        before = [stages[m] + (m.op_type == "Experts") for m in makers if m is not None]
        stages[node] = 0 if early else max([1, *before])
    return stages


def _experts_node(layer: int, node: ir.Node) -> ExpertsNode:
    hidden, ids, weights = node.inputs
    return ExpertsNode(
        layer=layer,
        hidden=name_of(hidden),
        ids=name_of(ids),
        weights=name_of(weights),
        output=name_of(node.outputs[0]),
        found=router_pattern.find(ids, weights),
    )


def _segment(
    stage: int, members: list[ir.Node], stages: dict[ir.Node, int], output_names: set[str]
) -> onnx.ModelProto:
    own = set(members)
    inputs: dict[str, ir.Value] = {}
    constants: dict[str, ir.TensorProtocol] = {}
    outputs: dict[str, ir.Value] = {}
    for node in members:
        for value in node.inputs:
            if value is None:
                continue
            if value.const_value is not None:
                constants[name_of(value)] = value.const_value
            elif value.producer() not in own:
                inputs[name_of(value)] = value
        for value in node.outputs:
            leaves = any(
                stages[user] != stage for user, _ in value.uses() if user.op_type != "Experts"
            )
            if leaves or name_of(value) in output_names:
                outputs[name_of(value)] = value
    graph = onnx.helper.make_graph(
        [_node(node) for node in members],
        f"segment-{stage:02d}",
        [_value_info(v) for v in inputs.values()],
        [_value_info(v) for v in outputs.values()],
        [_tensor(name, tensor) for name, tensor in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="smoe")


def _node(node: ir.Node) -> onnx.NodeProto:
    proto = ir.to_proto(node)
    del proto.metadata_props[:]  # traces of the author's source tree
    proto.doc_string = ""
    # ONNX Runtime's private name for what the standard has since opset 23, in the standard's
    # domain: the checker refuses it. Same arithmetic, same bits (tried).
    if proto.op_type == "SimplifiedLayerNormalization":
        proto.op_type = "RMSNormalization"
    return proto


def _tensor(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """A constant, with its values where it stays in the graph: a large backbone fits twice into few
    memories."""
    if tensor.nbytes >= INLINE:
        external = onnx.TensorProto.EXTERNAL
        dims = tensor.shape.numpy()
        return onnx.TensorProto(
            name=name, dims=dims, data_type=tensor.dtype, data_location=external
        )
    proto = ir.to_proto(tensor)
    if not proto.HasField("raw_data"):  # one form for all, so that the writer can move it out
        proto = onnx.numpy_helper.from_array(tensor.numpy())
    proto.name = name
    return proto


def _value_info(value: ir.Value) -> onnx.ValueInfoProto:
    if value.dtype is None:
        raise PrepError(
            f"The exported graph does not say the type of {value.name}, which crosses a cut."
        )
    # Dimension names of the trace mean nothing across segments: a number, or unknown.
    shape = (
        None if value.shape is None else [d if isinstance(d, int) else None for d in value.shape]
    )
    return onnx.helper.make_tensor_value_info(name_of(value), value.dtype.value, shape)
