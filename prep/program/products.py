"""Nodes that multiply with a matrix of the graph, or look up a row of one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from smoe.artifacts.program import ABSENT, View
from smoe.prep.program.shapes import gather
from smoe.prep.program.values import IDS, Known, Rows, Unknown, Value
from smoe.prep.program.views import broadcast, reshaped, whole, with_last_axes_turned
from smoe.prep.program.weights import Coded, Matrix
from smoe.prep.program.writing import Handler, Node, Writing

MOST = 64  # products that a node may stand for: one for every vector of a row


def _turned(node: Node, name: str) -> bool:
    """Whether an input is transposed; `Unknown` where it is in another way than its last axes."""
    if any(node.attributes.get(batch) for batch in ("transBatchA", "transBatchB")):
        raise Unknown("turns its input")
    return bool(node.attributes.get(name))


def _of_columns(w: Writing, node: Node) -> Rows:
    """A matrix times one column, `[.., n_in, 1]`: a product like any other."""
    matrix, rows = node.constant(0), node.rows(1)
    array = matrix.array.T if _turned(node, "transA") else matrix.array
    shape = list(rows.view.shape)
    n_in, one = shape[::-1][:2] if _turned(node, "transB") else shape[-2:]
    plain = array.ndim == 2 and array.dtype == np.float32 and array.shape[1] == n_in
    if not plain or one != 1 or math.prod(shape[:-2]) != 1 or node.given(2) is not None:
        raise Unknown("multiplies a matrix with several columns")
    name = f"{matrix.name}.rows" if _turned(node, "transA") else matrix.name
    weight = w.weights.matrix(name, array.shape, lambda: np.ascontiguousarray(array))
    x, n_out = reshaped(w.dense(rows), (n_in,)), array.shape[0]
    made = w.fresh((n_out,))
    y = reshaped(made, (*shape[:-2], n_out, 1))
    assert x is not None and y is not None  # both are dense
    w.emit("product", (x, ABSENT), (made,), weight)
    made_of = dataclasses.replace(rows, view=y)
    alpha = node.attributes.get("alpha", 1.0)
    return made_of if alpha == 1.0 else _scaled(w, made_of, alpha, None)


def _of_rows(w: Writing, node: Node) -> Rows:
    """A product of two things of the row, one of them a vector: `[.., i, k]` by `[.., k, j]`, where
    i or j is 1."""
    a, b = node.rows(0), node.rows(1)
    left = with_last_axes_turned(w.read(a)) if _turned(node, "transA") else w.read(a)
    right = w.read(b) if _turned(node, "transB") else with_last_axes_turned(w.read(b))
    i, j, n = left.shape[-2], right.shape[-2], left.shape[-1]
    if 1 not in (i, j) or right.shape[-1] != n or a.kept != b.kept or node.given(2) is not None:
        raise Unknown("multiplies what are both no vectors")
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    rows = reshaped(left, (*left.shape[:-1], 1, n))
    columns = reshaped(right, (*right.shape[:-2], 1, j, n))
    assert rows is not None and columns is not None  # an axis of one number more
    products = w.like(a, (*lead, i, j, n))
    both = [broadcast(view, products.view.shape) for view in (rows, columns)]
    w.emit("binary", both, (products.view,), names={"how": "mul"})
    made = w.like(a, (*lead, i, j))
    w.emit("reduce", (products.view,), (made.view,), names={"how": "sum"})
    alpha = node.attributes.get("alpha", 1.0)
    return made if alpha == 1.0 else _scaled(w, made, alpha, None)


def _node_product(w: Writing, node: Node) -> Sequence[Value]:
    """MatMul, FusedMatMul, Gemm."""
    if node.alone and isinstance(node.given(1), Rows):
        return (_of_columns(w, node) if isinstance(node.given(0), Known) else _of_rows(w, node),)
    weight, attributes = node.constant(1), node.attributes
    if _turned(node, "transA"):
        inputs = (node.rows(0).turned(), *node.inputs[1:])
        node = dataclasses.replace(node, inputs=inputs)
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
