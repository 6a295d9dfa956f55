"""A backbone's segments, node after node, into operations: once with those segments left out that
are known not to compile, which says whether that is all of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from smoe.artifacts.manifest import Backbone, Layer
from smoe.artifacts.program import Buffer, Op
from smoe.prep.program import attending, products, rowwise, shapes
from smoe.prep.program.carrying import carrying, is_carried, recalled, returned
from smoe.prep.program.probe import GIVEN, Probe
from smoe.prep.program.values import (
    ALONE,
    IDS,
    INDEX,
    PAST,
    Appended,
    Carried,
    Early,
    Known,
    Lengths,
    Lost,
    Remembered,
    Returned,
    Rows,
    Unknown,
    Value,
)
from smoe.prep.program.views import whole
from smoe.prep.program.weights import Weights
from smoe.prep.program.writing import VIRTUAL, Handler, Names, Node, Writing, told
from smoe.prep.program.written_out import written_out

NODES: dict[str, Handler] = shapes.NODES | rowwise.NODES | products.NODES | attending.NODES
DOMAINS = ("", "ai.onnx", "com.microsoft")
KEEP = "logits_to_keep"
LOGITS = "logits"
# What a graph that says something else than it means may raise while it is read.
MALFORMED = (Unknown, ValueError, LookupError, ArithmeticError, TypeError)
TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "f32",
    onnx.TensorProto.INT64: "i64",
    onnx.TensorProto.BOOL: "bool",
}


@dataclass(frozen=True)
class Graphs:
    """A backbone as it is compiled: its segments, and all constants of them by name."""

    backbone: Backbone
    layers: tuple[Layer, ...]
    segments: tuple[onnx.GraphProto, ...]
    constants: dict[str, np.ndarray]
    probe: Probe

    def wires(self) -> set[str]:
        """What the experts of all layers are given."""
        parts = (
            (each.hidden, each.ids, each.weights, each.scores, each.raw)
            for each in (layer.wires for layer in self.layers)
        )
        return {name for each in parts for name in each if name}

    def vectors(self) -> set[str]:
        """Buffers that are one run of numbers, whatever shape the graph gives them."""
        return self.wires() | set(self.outputs_of_experts()) | {LOGITS}

    def outputs_of_experts(self) -> dict[str, int]:
        """What the experts give, and the width of it."""
        return {layer.wires.output: layer.hidden for layer in self.layers}


@dataclass
class Walk:
    """One pass over all segments; those that are `refused`, with reasons, give what the others
    take, and no operations."""

    graphs: Graphs
    refused: dict[int, str]
    names: Names = field(init=False)
    weights: Weights = field(default_factory=Weights)
    values: dict[str, Value] = field(default_factory=dict)
    written: list[Writing] = field(default_factory=list)
    elsewhere: list[Op] = field(default_factory=list)  # operations of refused segments
    failed: dict[int, str] = field(default_factory=dict)
    # Buffers by the name that others ask for, and those that others fill.
    called: dict[str, str] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    _early: set[str] = field(default_factory=lambda: set(GIVEN))

    def __post_init__(self) -> None:
        g = self.graphs
        self._asked = g.wires() | {LOGITS} | self._crossing()
        self.names = Names(reserved=frozenset(self._asked | set(g.outputs_of_experts())))
        alone = g.backbone.one_at_a_time
        ids = Rows(whole(IDS, (1, 1)), ALONE, "i64") if alone else Rows(whole(IDS, (1,)), 1, "i64")
        past = np.empty(1, object)
        past[0] = PAST
        self.values = {
            "input_ids": ids,
            "past_length": Lengths(past),
            KEEP: Early(KEEP),
        }
        for spec in g.backbone.state:
            carried = is_carried(spec)
            self.values[spec.input] = Carried(spec.input) if carried else Remembered(spec.input)
        for index in range(len(g.segments)):
            self._segment(index)
        self._check_states()

    def _crossing(self) -> set[str]:
        """Values that a refused segment takes of one that is not, or gives it."""
        makers = {n: i for i, s in enumerate(self.graphs.backbone.segments) for n in s.outputs}
        return {
            name
            for i, segment in enumerate(self.graphs.backbone.segments)
            for name in segment.inputs
            if name in makers and (i in self.refused) != (makers[name] in self.refused)
        }

    def _segment(self, index: int) -> None:
        graph = self.graphs.segments[index]
        specs = {spec.input: spec for spec in self.graphs.backbone.state}
        alone = self.graphs.backbone.one_at_a_time
        w = Writing(index, self.names, self.weights, specs, alone)
        self._take(index, graph)
        for proto in graph.node:
            self._node(w, proto)
        self._store(w)
        outputs = [value for value in graph.output if value.name in self._asked]
        for value in outputs:
            if index in self.refused:
                self.values[value.name] = self._elsewhere(value, index)
            else:
                self._give(w, value.name)
        if index in self.refused:
            self.elsewhere += w.ops
            w.ops = []
        self.written.append(w)

    def _store(self, w: Writing) -> None:
        """What every token replaces of a segment's state."""
        for spec in self.graphs.backbone.state:
            value = self.values.get(spec.output)
            mine = spec.segment == w.index and is_carried(spec)
            if not mine or value is None or isinstance(value, Lost):
                continue
            try:
                self.values[spec.output] = returned(w, spec, value)
            except Unknown as error:
                self.failed.setdefault(w.index, str(error))

    def _take(self, index: int, graph: onnx.GraphProto) -> None:
        """The values that experts, or a segment before, give."""
        widths = self.graphs.outputs_of_experts()
        for value in graph.input:
            if value.name in widths and value.name not in self.values:
                self.values[value.name] = self._declared(value, index, widths[value.name])

    def _elsewhere(self, value: onnx.ValueInfoProto, index: int) -> Value:
        """What a refused segment gives: a buffer, where it has a row for every token."""
        known, sizes = self.values[value.name], value.type.tensor_type.shape.dim
        if isinstance(known, Rows) and known.view.source in VIRTUAL:
            return known
        hidden = {layer.hidden for layer in self.graphs.layers}
        wide = len(sizes) == 2 and sizes[1].dim_value in hidden
        second = len(sizes) > 2 and not sizes[1].HasField("dim_value")
        alone = self.graphs.backbone.one_at_a_time
        lost = isinstance(known, Lost) and (wide or second or alone)
        if isinstance(known, Rows) or lost or value.name in self.graphs.vectors():
            return self._declared(value, index)
        return known

    def _declared(self, value: onnx.ValueInfoProto, index: int, width: int = 0) -> Value:
        """A buffer for what is computed elsewhere, as the graph declares it."""
        tensor = value.type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
        kind = TYPES.get(tensor.elem_type)
        axis = sizes.index(0) if 0 in sizes else ALONE
        inner = sizes[:axis] + sizes[axis + 1 :]
        fits = kind is not None and sizes.count(0) == 1 and math.prod(sizes[:axis]) == 1
        if self.graphs.backbone.one_at_a_time:
            axis, inner, fits = ALONE, sizes, kind is not None and 0 not in sizes
        if not fits or (width and math.prod(inner) != width):
            return Lost(f"{value.name} is no row of numbers", index)
        assert kind is not None
        self.given.add(value.name)
        self.names.buffers[value.name] = Buffer(value.name, kind, tuple(inner))
        view = whole(value.name, inner)
        return Rows(view, axis, kind)

    def _node(self, w: Writing, proto: onnx.NodeProto) -> None:
        """The values of a node's outputs, and the operations that give them."""
        early = all(self._is_early(name) for name in proto.input)
        given = tuple(self._value(w.index, name, early) for name in proto.input)
        attributes: dict[str, Any] = {a.name: _attribute(a) for a in proto.attribute}
        attributes["domain"] = proto.domain
        node = Node(proto.op_type, given, tuple(proto.output), attributes, w.alone)
        w.called = next(name for name in proto.output if name)
        lost = next((value for value in given if isinstance(value, Lost)), None)
        outputs: list[Value] = [lost for _ in proto.output]
        if lost is None:
            try:
                handler = written_out(node) or carrying(w, node)
                if handler is None:
                    handler = NODES.get(proto.op_type)
                    inputs = tuple(recalled(w, each) for each in given)
                    node = dataclasses.replace(node, inputs=inputs)
                if handler is None or proto.domain not in DOMAINS:
                    raise Unknown("no operation does it")
                outputs = list(handler(w, node))
            except MALFORMED as error:
                lost = Lost(f"{proto.op_type} {w.called}: {error}", w.index)
                outputs = [Early(name) if early else lost for name in proto.output]
                if not early:
                    self.failed.setdefault(w.index, lost.why)
        if early:
            self._early.update(proto.output)
        self.values.update(zip(proto.output, outputs, strict=False))

    def _is_early(self, name: str) -> bool:
        return not name or name in self._early or name in self.graphs.constants

    def _value(self, index: int, name: str, early: bool) -> Value:
        """Of an input; where more than lengths meet, what follows from them alone is looked up."""
        if not name:
            return None
        if name in self.graphs.constants:
            return Known(self.graphs.constants[name], name)
        value = self.values.get(name)
        if value is None:
            why = self.failed.setdefault(index, f"nothing gives {name}")
            return Lost(why, index)
        if isinstance(value, Early) and not early and value.name != KEEP:
            return self.graphs.probe.look(value)
        return value

    def _give(self, w: Writing, name: str) -> None:
        """A value that others ask for, in a buffer of its name."""
        value = self.values[name]
        if isinstance(value, Lost):
            self._lacks(w.index, value)
            return
        first = isinstance(value, Rows) and (
            value.alone or math.prod(value.view.shape[: value.axis]) == 1
        )
        if not isinstance(value, Rows) or not first or value.view.source in (IDS, INDEX):
            self.failed.setdefault(w.index, f"{name}, which others take, {told(value)}")
            return
        w.called = name
        if name == LOGITS and not value.kept:
            value = shapes.keep(w, value)
        view = w.dense(value)
        buffer = self.names.buffers.get(view.source)
        own = buffer is not None and math.prod(buffer.shape) == math.prod(view.shape)
        own = own and view.source not in self.called and self._writes(w, view.source)
        if not own or view.source in self._asked:
            view = w.copy(view, value.kind, value.kept)
        self.called[view.source] = name
        self.values[name] = dataclasses.replace(value, view=view)

    def _lacks(self, index: int, value: Lost) -> None:
        """A segment cannot give what it should, as long as that other one is not refused which
        takes the blame; then it is refused itself."""
        mine = value.segment in self.refused
        self.failed.setdefault(index if mine else value.segment, value.why)

    def _writes(self, w: Writing, buffer: str) -> bool:
        """Whether this segment does."""
        return any(op in w.ops for op in self.names.writers.get(buffer, []))

    def _check_states(self) -> None:
        """Every state that a segment returns is one that it appends to, or leaves as it is; and
        nobody else looks at it."""
        backbone = self.graphs.backbone
        for spec in backbone.state:
            value = self.values.get(spec.output)
            kept = value.name if isinstance(value, (Returned, Remembered, Carried)) else ""
            kept = value.state if isinstance(value, Appended) else kept
            if isinstance(value, Lost):
                self._lacks(spec.segment, value)
            elif kept != spec.input and spec.segment not in self.refused:
                self.failed.setdefault(spec.segment, f"the state {spec.output} is not appended to")
            for index, segment in enumerate(backbone.segments):
                if spec.input in segment.inputs and index != spec.segment:
                    for each in {index, spec.segment} - set(self.refused):
                        self.failed.setdefault(each, f"segments share the state {spec.input}")


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
