"""The backbone in fewer bits: products with constant matrices become MatMulNBits, the embedding
GatherBlockQuantized.

Both are ONNX Runtime's own, with blocks of 32 weights and one float32 scale each. A last pass over
segments that were exported in float32 and compared with the model as such. The products that lead
to a router's choice stay in float32: they are small, and an expert that is chosen wrongly costs
more than all the others' rounding.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from smoe.artifacts.manifest import Backbone, Layer
from smoe.prep.backbone.export import write_segment, write_weights
from smoe.prep.errors import PrepError

BITS = {"int4": 4, "int8": 8}
BLOCK = 32  # weights of a row that share a scale
INT8_ACTIVATIONS = (
    4  # MatMulNBits' accuracy_level: activations in int8, several times faster than in float32
)


def check_precision(precision: str) -> None:
    """A `PrepError` for a precision that there is not."""
    if precision not in ("f32", *BITS):
        raise PrepError(f"There is no --backbone {precision}; there are f32, {' and '.join(BITS)}.")


def reduce(
    directory: Path, backbone: Backbone, layers: tuple[Layer, ...], precision: str
) -> tuple[Backbone, str]:
    """Rewrite the segments of `directory` with weights in `precision`; the new manifest part, and a
    line for people that says how much was rewritten. A `PrepError` if nothing could be."""
    models = [onnx.load(str(directory / segment.file)) for segment in backbone.segments]
    done = total = 0
    for model, layer in zip(models, [*layers, None], strict=True):
        routers = set() if layer is None else _routers(model.graph, layer.wires.ids)
        rewritten, candidates = _rewrite(model.graph, routers, BITS[precision])
        done, total = done + rewritten, total + candidates
    if not done:
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
    return (
        changed,
        f"{done} of {total} matrices in {precision}, the routers' and what is too small in float32",
    )


def block_codes(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 `[n, blocks, 32]` and scales float32 `[n, blocks]` of `rows` float32 `[n, k]`,
    zeros behind the last: value = (code - 2^(bits-1)) * scale. The largest magnitude of a block
    gets the lowest code, so that none is lost."""
    n, k = rows.shape
    blocks = -(-k // BLOCK)
    padded = np.pad(rows, ((0, 0), (0, blocks * BLOCK - k))).reshape(n, blocks, BLOCK)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)
    middle = 1 << (bits - 1)
    scale = (largest / -middle).astype(np.float32)
    codes = np.rint(padded / np.where(scale == 0, 1, scale)) + middle
    return np.clip(codes, 0, 2 * middle - 1).astype(np.uint8), scale[..., 0]


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two codes a byte, the first in the lower half, where they have 4 bits."""
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


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


def _rewrite(graph: onnx.GraphProto, routers: set[str], bits: int) -> tuple[int, int]:
    """Replace what can be, in place: how many nodes were, and how many have a constant matrix."""
    constants = {t.name: t for t in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    added: dict[str, TensorProto] = {}
    candidates = 0
    for node in graph.node:
        matrix = _matrix(node, constants)
        candidates += matrix is not None
        if matrix is None or node.output[0] in routers or matrix.shape[1] < BLOCK:
            nodes.append(node)
        elif node.op_type == "Gather":
            nodes.append(_embedding(node, matrix, bits, added))
        else:
            nodes.append(_product(node, matrix, bits, added))
    rewritten = sum(node.op_type in ("MatMulNBits", "GatherBlockQuantized") for node in nodes)
    used = {name for node in nodes for name in node.input}
    initializers = [t for t in graph.initializer if t.name in used] + list(added.values())
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    return rewritten, candidates


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


def _product(
    node: onnx.NodeProto, rows: np.ndarray, bits: int, added: dict[str, TensorProto]
) -> onnx.NodeProto:
    codes, scale = block_codes(rows, bits)
    names = _add(added, f"{node.input[1]}.{bits}", _packed(codes, bits), scale.reshape(-1))
    bias = ["", "", node.input[2]] if node.op_type == "Gemm" and len(node.input) > 2 else []
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], *names, *bias],
        node.output,
        node.name,
        domain="com.microsoft",
        N=rows.shape[0],
        K=rows.shape[1],
        bits=bits,
        block_size=BLOCK,
        accuracy_level=INT8_ACTIVATIONS,
    )


def _embedding(
    node: onnx.NodeProto, rows: np.ndarray, bits: int, added: dict[str, TensorProto]
) -> onnx.NodeProto:
    codes, scale = block_codes(rows, bits)
    names = _add(
        added, f"{node.input[0]}.rows{bits}", _packed(codes, bits).reshape(len(rows), -1), scale
    )
    return helper.make_node(
        "GatherBlockQuantized",
        [names[0], node.input[1], names[1]],
        node.output,
        node.name,
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        block_size=BLOCK,
        bits=bits,
    )


def _add(
    added: dict[str, TensorProto], name: str, codes: np.ndarray, scale: np.ndarray
) -> list[str]:
    for suffix, array in (("codes", codes), ("scale", scale)):
        added[f"{name}.{suffix}"] = numpy_helper.from_array(
            np.ascontiguousarray(array), f"{name}.{suffix}"
        )
    return [f"{name}.codes", f"{name}.scale"]
