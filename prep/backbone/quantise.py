"""The backbone in fewer bits: products with constant matrices become MatMulNBits, the embedding
GatherBlockQuantized.

Both are ONNX Runtime's own, with one float32 scale for each block of a row's weights. A last pass
over segments that were exported in float32 and compared with the model as such. The products that
lead to a router's choice stay in float32: they are small, and an expert that is chosen wrongly
costs more than all the others' rounding. In int4, what costs most per byte has 8 bits: the
vocabulary's tables, and what narrows the hidden state, as keys and values of grouped heads do
(docs/log.md, 2026-11-27). Where text was watched (`watch.py`), codes of 4 bits are those that keep
what a matrix makes of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from smoe.artifacts.manifest import Backbone, Layer
from smoe.prep.backbone.compensate import Coded, nearest
from smoe.prep.backbone.export import write_segment, write_weights
from smoe.prep.errors import PrepError

BITS = {"int4": 4, "int8": 8}
BLOCK = 32  # weights of a row that share a scale, at least: a row of fewer stays in float32
WIDE_BLOCK = 64  # the same with 4 bits, where rows are made of whole ones
INT8_ACTIVATIONS = (
    4  # MatMulNBits' accuracy_level: activations in int8, several times faster than in float32
)


@dataclass(frozen=True)
class Known:
    """What a checkpoint says of its graph's matrices: rows of the vocabulary's tables, the width of
    the hidden state, weights of linear modules float32 `[n_out, n_in]` by name, and their codes of
    4 bits where text was watched."""

    vocabulary: int
    hidden: int
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    codes: dict[str, Coded] = field(default_factory=dict)

    def bits(self, n_out: int, n_in: int, precision: str) -> int:
        """Of a product's matrix."""
        narrows = n_in == self.hidden and 2 * n_out <= n_in
        return 8 if narrows or n_out == self.vocabulary else BITS[precision]

    def parts(self, rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """The modules whose weights `rows` `[n_out, n_in]` are, one after another (the exporter
        joins products of one input), by name; ("", rows) where they are not found."""
        found, low = [], 0
        while low < len(rows):
            name = self._first_rows.get(rows[low].tobytes(), "")
            weight = self.weights.get(name, rows[:0])
            part = rows[low : low + len(weight)]
            if not len(weight) or not np.array_equal(part, weight):
                return [("", rows)]
            found.append((name, part))
            low += len(weight)
        return found

    @cached_property
    def _first_rows(self) -> dict[bytes, str]:
        return {weight[0].tobytes(): name for name, weight in self.weights.items()}


def block_of(bits: int, columns: int) -> int:
    """Weights of a row of `columns` that share a scale."""
    return WIDE_BLOCK if bits == 4 and columns % WIDE_BLOCK == 0 else BLOCK


def check_precision(precision: str) -> None:
    """A `PrepError` for a precision that there is not."""
    if precision not in ("f32", *BITS):
        raise PrepError(f"There is no --backbone {precision}; there are f32, {' and '.join(BITS)}.")


def reduce(
    directory: Path, backbone: Backbone, layers: tuple[Layer, ...], precision: str, known: Known
) -> tuple[Backbone, str]:
    """Rewrite the segments of `directory` with weights in `precision`; the new manifest part, and a
    line for people that says how much was rewritten. A `PrepError` if nothing could be."""
    models = [onnx.load(str(directory / segment.file)) for segment in backbone.segments]
    counts = _Counts()
    prelude = [None] * backbone.prelude
    for model, layer in zip(models, [*prelude, *layers, None], strict=True):
        routers = set() if layer is None else _routers(model.graph, layer.wires.ids)
        _Rewriting(precision, known, counts).rewrite(model.graph, routers)
    if not counts.done:
        raise PrepError(
            f"No product of this backbone has a constant matrix with rows of {BLOCK} or more that "
            f"{precision} could hold; "
            "use --backbone f32."
        )
    weights = {
        t.name: numpy_helper.to_array(t) for model in models for t in model.graph.initializer
    }
    placed = write_weights(directory / backbone.weights, weights)
    segments = [
        write_segment(directory, segment.file, model, placed)
        for segment, model in zip(backbone.segments, models, strict=True)
    ]
    changed = dataclasses.replace(
        backbone, precision=precision, segments=tuple(segments), initializers=tuple(placed.values())
    )
    return changed, counts.line(precision)


@dataclass
class _Counts:
    """Of matrices: those of the graph, those in fewer bits, and weights by how codes were found."""

    total: int = 0
    done: int = 0
    weights: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, rows: np.ndarray) -> None:
        self.weights[kind] = self.weights.get(kind, 0) + rows.size

    def line(self, precision: str) -> str:
        shown = ", ".join(f"{n / 1e6:.2f} million {kind}" for kind, n in self.weights.items())
        return (
            f"{self.done} of {self.total} matrices in {precision} (weights: {shown}), the routers' "
            "and what is too small in float32"
        )


def _packed(coded: Coded) -> np.ndarray:
    """Two codes a byte, the first in the lower half, where they have 4 bits."""
    codes = coded.codes
    return codes if coded.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def _routers(graph: onnx.GraphProto, ids: str) -> set[str]:
    """Outputs of the products that lead to `ids` without another product between."""
    producer = {name: node for node in graph.node for name in node.output}
    outputs, seen, open_ = set(), set(), [ids]
    while open_:
        name = open_.pop()
        node = producer.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
            outputs.add(node.output[0])
        else:
            open_.extend(node.input)
    return outputs


@dataclass
class _Rewriting:
    """One segment's graph, brought to `precision`."""

    precision: str
    known: Known
    counts: _Counts
    added: dict[str, TensorProto] = field(default_factory=dict)

    def rewrite(self, graph: onnx.GraphProto, routers: set[str]) -> None:
        """Replace what can be, in place."""
        constants = {t.name: t for t in graph.initializer}
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            matrix = _matrix(node, constants)
            self.counts.total += matrix is not None
            if matrix is None or node.output[0] in routers or matrix.shape[1] < BLOCK:
                nodes.append(node)
                continue
            self.counts.done += 1
            nodes += (
                [self._embedding(node, matrix)]
                if node.op_type == "Gather"
                else self._product(node, matrix)
            )
        used = {name for node in nodes for name in node.input}
        initializers = [t for t in graph.initializer if t.name in used] + list(self.added.values())
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(initializers)

    def _product(self, node: onnx.NodeProto, rows: np.ndarray) -> list[onnx.NodeProto]:
        """The product with `rows` `[n_out, n_in]`: one for each run of rows with as many bits."""
        runs: list[list[Coded]] = []
        for name, part in self.known.parts(rows):
            coded = self._coded(name, part)
            if runs and runs[-1][-1].bits == coded.bits:
                runs[-1].append(coded)
            else:
                runs.append([coded])
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        if len(runs) == 1:
            return [self._multiply(node, _joined(runs[0]), rows.shape[1], node.output[0], bias)]
        outputs = [f"{node.output[0]}.{number}" for number in range(len(runs))]
        nodes = [
            self._multiply(node, _joined(run), rows.shape[1], output)
            for run, output in zip(runs, outputs, strict=True)
        ]
        whole = f"{node.output[0]}.whole" if bias else node.output[0]
        nodes.append(helper.make_node("Concat", outputs, [whole], axis=-1))
        if bias:
            nodes.append(helper.make_node("Add", [whole, bias], node.output))
        return nodes

    def _coded(self, name: str, rows: np.ndarray) -> Coded:
        """Codes of a module's weights, or of a whole matrix without a name."""
        n_out, n_in = rows.shape
        bits = self.known.bits(n_out, n_in, self.precision)
        if bits == 4 and name in self.known.codes:
            self.counts.add("in 4 bits, calibrated", rows)
            return self.known.codes[name]
        self.counts.add(f"in {bits} bits, rounded", rows)
        return nearest(rows, bits, block_of(bits, n_in))

    def _multiply(
        self, node: onnx.NodeProto, coded: Coded, n_in: int, output: str, bias: str = ""
    ) -> onnx.NodeProto:
        names = self._add(f"{output}.{node.input[1]}", _packed(coded), coded.scale.reshape(-1))
        return helper.make_node(
            "MatMulNBits",
            [node.input[0], *names, *(["", "", bias] if bias else [])],
            [output],
            domain="com.microsoft",
            N=len(coded.codes),
            K=n_in,
            bits=coded.bits,
            block_size=coded.codes.shape[-1],
            accuracy_level=INT8_ACTIVATIONS,
        )

    def _embedding(self, node: onnx.NodeProto, rows: np.ndarray) -> onnx.NodeProto:
        """The lookup of `rows` in 8 bits: where the last product's matrix is the same, so are its
        codes, and they are stored once."""
        coded = nearest(rows, 8, BLOCK)
        self.counts.add("in 8 bits, rounded", rows)
        codes = _packed(coded).reshape(len(rows), -1)
        names = self._add(f"{node.output[0]}.{node.input[0]}", codes, coded.scale)
        return helper.make_node(
            "GatherBlockQuantized",
            [names[0], node.input[1], names[1]],
            node.output,
            node.name,
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            block_size=BLOCK,
            bits=8,
        )

    def _add(self, name: str, codes: np.ndarray, scale: np.ndarray) -> list[str]:
        for suffix, array in (("codes", codes), ("scale", scale)):
            self.added[f"{name}.{suffix}"] = numpy_helper.from_array(
                np.ascontiguousarray(array), f"{name}.{suffix}"
            )
        return [f"{name}.codes", f"{name}.scale"]


def _joined(coded: list[Coded]) -> Coded:
    codes = np.concatenate([each.codes for each in coded])
    scale = np.concatenate([each.scale for each in coded])
    return Coded(codes, scale, coded[0].bits)


def _matrix(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> np.ndarray | None:
    """The constant matrix of a product as `[n_out, n_in]`, or of a lookup as `[rows, columns]`;
    None if there is none."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    place = 0 if node.op_type == "Gather" else 1
    if (
        node.op_type not in ("MatMul", "Gemm", "FusedMatMul", "Gather")
        or node.input[place] not in constants
    ):
        return None
    tensor = constants[node.input[place]]
    if len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT:
        return None
    if node.op_type == "Gather":
        usable, turned = attributes.get("axis", 0) == 0 and tensor.dims[1] % BLOCK == 0, False
    else:
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        plain &= not any(attributes.get(name) for name in ("transA", "transBatchA", "transBatchB"))
        usable, turned = plain and _is_row(node, constants), not attributes.get("transB")
    if not usable:
        return None
    array = numpy_helper.to_array(tensor)
    return np.ascontiguousarray(array.T) if turned else array


def _is_row(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Whether a product's third input, if it has one (a Gemm's), is a vector that is added to every
    row."""
    return len(node.input) < 3 or (
        node.input[2] in constants and len(constants[node.input[2]].dims) == 1
    )
