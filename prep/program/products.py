"""Nodes that multiply with a matrix of the graph, or look up a row of one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from smoe.artifacts.program import ABSENT, View
from smoe.prep.program.shapes import gather
from smoe.prep.program.values import IDS, Known, Rows, Unknown, Value
from smoe.prep.program.views import reshaped, whole
from smoe.prep.program.weights import Coded, Matrix
from smoe.prep.program.writing import Handler, Node, Writing

MOST = 64  # products that a node may stand for: one for every vector of a row


def _node_product(w: Writing, node: Node) -> Sequence[Value]:
    """MatMul, FusedMatMul, Gemm."""
    weight, attributes = node.constant(1), node.attributes
    if any(attributes.get(name) for name in ("transA", "transBatchA", "transBatchB")):
        raise Unknown("turns its input")
    if weight.array.ndim != 2 or weight.array.dtype != np.float32:
        raise Unknown(f"a matrix of {weight.array.dtype} {list(weight.array.shape)}")
    turned = not attributes.get("transB")
    array = weight.array.T if turned else weight.array
    name = f"{weight.name}.rows" if turned else weight.name
    name = w.weights.matrix(name, array.shape, lambda: np.ascontiguousarray(array))
    bias = node.optional(2)
    if attributes.get("beta", 1.0) != 1.0 and bias:
        bias = Known(bias.array * np.float32(attributes["beta"]))
    alpha = attributes.get("alpha", 1.0)
    rows = _product(w, node, name, array.shape, bias if alpha == 1.0 else None)
    if alpha != 1.0:
        rows = _scaled(w, rows, alpha, bias)
    return (rows,)


def _product_in_bits(w: Writing, node: Node) -> Sequence[Value]:
    """MatMulNBits, as `quantise` writes it."""
    codes, scales, attributes = node.constant(1), node.constant(2), node.attributes
    if node.given(3) is not None or node.given(4) is not None:
        raise Unknown("has zero points, or columns in another order")
    n_out, n_in, group = attributes["N"], attributes["K"], attributes["block_size"]
    read = _codes(codes, scales, attributes.get("bits", 4), n_out, n_in, group)
    name = w.weights.matrix(codes.name, (n_out, n_in), read)
    return (_product(w, node, name, (n_out, n_in), node.optional(5)),)


def _codes(
    codes: Known, scales: Known, bits: int, n_out: int, n_in: int, group: int
) -> Callable[[], Matrix]:
    """How a matrix in few bits is read; `Unknown` where no kernel multiplies with it."""
    groups = -(-n_in // group)
    if bits not in (4, 8) or group not in (32, 64, 128) or codes.array.dtype != np.uint8:
        raise Unknown(f"a matrix in {bits} bits by {group}")
    if codes.array.size * 8 != n_out * groups * group * bits or scales.array.size != n_out * groups:
        raise Unknown("a matrix whose codes are not as many as it says")
    if scales.array.dtype != np.float32:
        raise Unknown(f"scales of {scales.array.dtype}")

    def read() -> Matrix:
        packed = np.ascontiguousarray(codes.array).reshape(n_out, -1)
        if bits == 4:
            packed = np.stack([packed & 15, packed >> 4], -1).reshape(n_out, -1)
        scale = np.ascontiguousarray(scales.array).reshape(n_out, groups)
        return Coded(np.ascontiguousarray(packed[:, :n_in]), scale, bits, group)

    return read


def _lookup_in_bits(w: Writing, node: Node) -> Sequence[Value]:
    """GatherBlockQuantized, as `quantise` writes it."""
    codes, scales, attributes = node.constant(0), node.constant(2), node.attributes
    if node.given(3) is not None or attributes.get("gather_axis", 0) != 0 or codes.array.ndim != 2:
        raise Unknown("has zero points, or gathers along another axis")
    bits, group = attributes.get("bits", 4), attributes.get("block_size", 128)
    n_out, n_in = codes.array.shape[0], codes.array.shape[1] * 8 // bits
    read = _codes(codes, scales, bits, n_out, n_in, group)
    return (_embedding(w, node, w.weights.matrix(codes.name, (n_out, n_in), read), n_in),)


def _lookup(w: Writing, node: Node) -> Sequence[Value]:
    """A Gather of the tokens' rows, or another one."""
    table, at = node.given(0), node.given(1)
    if not isinstance(at, Rows) or at.view.source != IDS or not isinstance(table, Known):
        return gather(w, node)
    if table.array.ndim != 2 or node.attributes.get("axis", 0):
        raise Unknown("looks up tokens in something that is no matrix")
    name = w.weights.matrix(table.name, table.array.shape, lambda: table.array)
    return (_embedding(w, node, name, table.array.shape[1]),)


def _embedding(w: Writing, node: Node, weight: str, width: int) -> Rows:
    at = node.rows(1)
    if at.view.source != IDS:
        raise Unknown("looks up something else than tokens")
    made = w.like(dataclasses.replace(at, kind="f32"), (width,))
    w.emit("embedding", (), (made.view,), weight, {"scale": 1.0})
    view = reshaped(made.view, (*at.view.shape, width))
    assert view is not None
    return dataclasses.replace(made, view=view)


def _product(
    w: Writing, node: Node, weight: str, shape: tuple[int, ...], bias: Known | None
) -> Rows:
    """A product for every vector of a row."""
    rows = node.rows(0)
    rows.inner(-1)
    n_out, n_in = shape
    lead = rows.view.shape[:-1]
    if rows.view.shape[-1] != n_in or math.prod(lead) > MOST:
        raise Unknown(f"of {list(rows.view.shape)} with a matrix of {n_in} columns")
    x = reshaped(w.dense(rows), (math.prod(lead), n_in))
    made = w.like(rows, (*lead, n_out))
    y = reshaped(made.view, (math.prod(lead), n_out))
    assert x is not None and y is not None  # both are dense
    added = ABSENT if bias is None else w.constant(bias, (n_out,))
    for place in range(math.prod(lead)):
        vectors = (_at(x, place), _at(y, place))
        w.emit("product", (vectors[0], added), (vectors[1],), weight)
    return made


def _at(view: View, place: int) -> View:
    """Row `place` of a dense view `[m, n]`."""
    n = view.shape[-1]
    return dataclasses.replace(whole(view.source, (n,)), offset=view.offset + place * n)


def _scaled(w: Writing, rows: Rows, alpha: float, bias: Known | None) -> Rows:
    views, like = w.aligned((rows, Known(np.array(alpha, np.float32))))
    made = w.like(like, like.view.shape)
    w.emit("binary", views, (made.view,), names={"how": "mul"})
    if bias is None:
        return made
    views, like = w.aligned((made, bias))
    total = w.like(like, like.view.shape)
    w.emit("binary", views, (total.view,), names={"how": "add"})
    return total


NODES: dict[str, Handler] = {
    "MatMul": _node_product,
    "FusedMatMul": _node_product,
    "Gemm": _node_product,
    "MatMulNBits": _product_in_bits,
    "GatherBlockQuantized": _lookup_in_bits,
    "Gather": _lookup,
}
