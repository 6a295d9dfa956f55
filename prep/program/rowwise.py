"""Nodes that compute on each row: elementwise, along an axis, norms, and what a router does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from smoe.artifacts.program import ABSENT, View
from smoe.prep.program import turning
from smoe.prep.program.shapes import replaced
from smoe.prep.program.values import (
    ALONE,
    INDEX,
    PAST,
    POSITION,
    Known,
    Lengths,
    Rows,
    Unknown,
    Value,
)
from smoe.prep.program.views import broadcast, reshaped, transposed, whole
from smoe.prep.program.writing import Handler, Node, Writing, integers

UNARY = {
    "Neg": "neg", "Abs": "abs", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Sin": "sin",
    "Reciprocal": "reciprocal", "Sigmoid": "sigmoid", "Tanh": "tanh", "Erf": "erf", "Cos": "cos",
    "Relu": "relu", "Softplus": "softplus", "Not": "not", "Floor": "floor", "Sign": "sign",
    "FastGelu": "gelu_tanh", "Gelu": "gelu",
}  # fmt: skip
BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Max": "max", "Min": "min",
    "Pow": "pow", "And": "and", "Or": "or", "Equal": "equal", "Less": "less",
    "LessOrEqual": "less_equal", "Greater": "greater", "GreaterOrEqual": "greater_equal",
}  # fmt: skip
LOGIC = ("and", "or")
COMPARED = ("equal", "less", "less_equal", "greater", "greater_equal")
REDUCED = {"ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "max"}
# What is done to each number before a sum, and to the sum.
SUMS = {
    "ReduceSumSquare": ("square", ""), "ReduceL2": ("square", "sqrt"), "ReduceL1": ("abs", ""),
    "ReduceLogSum": ("", "log"),
}  # fmt: skip


def _node_unary(w: Writing, node: Node) -> Sequence[Value]:
    if node.kind == "Neg" and isinstance(node.given(0), (Known, Lengths)):
        return (integers(np.asarray(node.lengths(0) * -1, object)),)
    rows, how = node.rows(0), UNARY[node.kind]
    if len(node.inputs) > 1:
        raise Unknown("has a bias of its own")
    if node.kind == "Gelu" and node.attributes.get("approximate") == b"tanh":
        how = "gelu_tanh"
    if rows.kind != ("bool" if how == "not" else "f32"):
        raise Unknown(f"of {rows.kind}")
    return (_unary(w, rows, how),)


def _unary(w: Writing, rows: Rows, how: str) -> Rows:
    view = w.read(rows)
    made = w.like(rows, view.shape)
    w.emit("unary", (view,), (made.view,), names={"how": how})
    return made


def _node_binary(w: Writing, node: Node) -> Sequence[Value]:
    """Also of lengths, as far as they go; `Max` and `Min` of any number of inputs."""
    how = BINARY[node.kind]
    if not any(isinstance(value, Rows) for value in node.inputs):
        return (_of_lengths(how, node),)
    if how == "add" and (moved := _position(node)) is not None:
        return (moved,)
    result: Value = node.inputs[0]
    for value in node.inputs[1:]:
        result = _binary(w, how, result, value)
    return (result,)


def _binary(w: Writing, how: str, a: Value, b: Value) -> Rows:
    if how == "mul" and (silu := _silu(w, a, b) or _silu(w, b, a)):
        return silu
    if how == "add" and isinstance(a, Rows) and isinstance(b, Rows):
        turned = turning.neighbours(w, a, b) or turning.neighbours(w, b, a)
        if turned is not None:
            return turned
    views, like = w.aligned((a, b))
    kinds = {value.kind for value in (a, b) if isinstance(value, Rows)}
    if kinds != {"bool" if how in LOGIC else "f32"}:
        raise Unknown(f"of {' and '.join(sorted(kinds))}")
    if how == "pow" and isinstance(b, Known) and b.array.size == 1 and b.array.item() == 2.0:
        how, views = "mul", [views[0], views[0]]
    made = w.like(like, like.view.shape, "bool" if how in LOGIC + COMPARED else "f32")
    w.emit("binary", views, (made.view,), names={"how": how})
    return made


def _of_lengths(how: str, node: Node) -> Value:
    """Arithmetic on sizes."""
    a, b = node.lengths(0), node.lengths(1)
    if how == "add":
        return integers(np.asarray(a + b))
    if how == "sub":
        return integers(np.asarray(a - b))
    if how == "mul":
        return integers(np.asarray(a * b))
    if how == "max" and all(_not_less(x, y) for x, y in np.broadcast(a, b)):
        return integers(np.broadcast_arrays(a, b)[0])
    raise Unknown(f"{how} of lengths")


def _not_less(a, b) -> bool:
    """Whether one length is never less than the other."""
    difference = a - b
    return min(difference.constant, difference.tokens, difference.past) >= 0


def _position(node: Node) -> Rows | None:
    """A row's number in its call, and the tokens before the call: its position."""
    for rows, offset in (node.inputs, node.inputs[::-1]):
        if not isinstance(rows, Rows) or not isinstance(offset, Lengths):
            continue
        if rows.view.source == INDEX and offset.array.reshape(-1).tolist() == [PAST]:
            view = dataclasses.replace(rows.view, source=POSITION)
            return dataclasses.replace(rows, view=view)
    return None


def _silu(w: Writing, x: Value, gate: Value) -> Rows | None:
    """x * sigmoid(x) at once."""
    if not isinstance(x, Rows) or not isinstance(gate, Rows) or x.axis != gate.axis:
        return None
    made = w.maker(gate.view)
    same = made is not None and made.names == {"how": "sigmoid"} and x.kept == gate.kept
    if made is None or not same or made.inputs[0] != x.view:
        return None
    return _unary(w, x, "silu")


def _where(w: Writing, node: Node) -> Sequence[Value]:
    condition = node.given(0)
    if isinstance(condition, Known) and condition.array.size == 1:
        chosen, other = (1, 2) if condition.array.item() else (2, 1)
        rows = node.rows(chosen)
        views, like = w.aligned((rows, node.given(other)))
        return (dataclasses.replace(rows, view=views[0], axis=like.axis),)
    (test, a, b), like = w.aligned(node.inputs)
    if node.rows(0).kind != "bool":
        raise Unknown("chooses by something that is not true or false")
    kinds = {value.kind for value in node.inputs[1:] if isinstance(value, Rows)}
    made = w.like(like, like.view.shape, kinds.pop() if len(kinds) == 1 else "f32")
    w.emit("where", (test, a, b), (made.view,))
    return (made,)


def _clip(w: Writing, node: Node) -> Sequence[Value]:
    result: Value = node.rows(0)
    for place, how in ((1, "max"), (2, "min")):
        if node.given(place) is not None:
            result = _binary(w, how, result, node.constant(place))
    return (result,)


def _quick_gelu(w: Writing, node: Node) -> Sequence[Value]:
    """x * sigmoid(alpha x)."""
    alpha = Known(np.array(node.attributes.get("alpha", 1.702), np.float32))
    gate = _unary(w, _binary(w, "mul", node.rows(0), alpha), "sigmoid")
    return (_binary(w, "mul", node.rows(0), gate),)


def _last(w: Writing, rows: Rows, axis: int) -> tuple[View, list[int]]:
    """A view with an axis of the graph's as its last, and the order of its axes."""
    view, inner = w.read(rows), rows.inner(axis)
    order = [i for i in range(len(view.shape)) if i != inner] + [inner]
    return transposed(view, order), order


def _back(order: list[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]


def _softmax(w: Writing, node: Node) -> Sequence[Value]:
    rows = node.rows(0)
    view, order = _last(w, rows, node.attributes.get("axis", -1))
    made = w.like(rows, view.shape)
    w.emit("softmax", (view,), (made.view,))
    return (dataclasses.replace(made, view=transposed(made.view, _back(order))),)


def _reduced(w: Writing, node: Node) -> Sequence[Value]:
    rows, axes = node.rows(0), node.attributes.get("axes")
    if axes is None:
        given = node.optional(1)
        axes = given.array.reshape(-1).tolist() if given else []
    if node.kind == "ArgMax":
        axes = [node.attributes.get("axis", 0)]
        if node.attributes.get("select_last_index"):
            raise Unknown("takes the last of equal numbers")
    if len(axes) != 1 or rows.kind != "f32":
        raise Unknown("reduces another number of axes than one")
    view, _ = _last(w, rows, axes[0])
    inner = rows.inner(axes[0])
    kind = "i64" if node.kind == "ArgMax" else "f32"
    made = w.like(rows, view.shape[:-1], kind)
    how = REDUCED.get(node.kind, "argmax")
    w.emit("reduce", (view,), (made.view,), names={"how": how})
    if node.attributes.get("keepdims", 1):
        shape = list(view.shape[:-1])
        shape.insert(inner, 1)
        kept = reshaped(made.view, shape)
        assert kept is not None  # an axis of one number
        return (dataclasses.replace(made, view=kept),)
    gone = not rows.alone and axes[0] % rows.rank < rows.axis
    return (dataclasses.replace(made, axis=rows.axis - gone),)


def _sum_of(w: Writing, node: Node) -> Sequence[Value]:
    """Sums of squares or magnitudes, their roots, logarithms of sums."""
    before, behind = SUMS[node.kind]
    rows = node.rows(0)
    if before == "square":
        rows = _binary(w, "mul", rows, rows)
    elif before:
        rows = _unary(w, rows, before)
    total = _sum(w, node, rows, "ReduceSum")
    return (_unary(w, total, behind) if behind else total,)


def _log_sum_exp(w: Writing, node: Node) -> Sequence[Value]:
    """The largest, and the logarithm of the sum of what is less than it by a factor."""
    rows = node.rows(0)
    shape = dict(node.attributes, keepdims=1)
    inner = dataclasses.replace(node, attributes=shape)
    most = _sum(w, inner, rows, "ReduceMax")
    less = _unary(w, _binary(w, "sub", rows, most), "exp")
    total = _unary(w, _sum(w, node, less, "ReduceSum"), "log")
    if not node.attributes.get("keepdims", 1):
        most = _sum(w, node, rows, "ReduceMax")
    return (_binary(w, "add", most, total),)


def _sum(w: Writing, node: Node, rows: Rows, kind: str) -> Rows:
    """Of other rows along the axes of a node, `kind` the node that does it."""
    inputs = (rows, *node.inputs[1:])
    (total,) = _reduced(w, dataclasses.replace(node, kind=kind, inputs=inputs))
    assert isinstance(total, Rows)
    return total


def _top_k(w: Writing, node: Node) -> Sequence[Value]:
    rows, axis = node.rows(0), node.attributes.get("axis", -1)
    if not node.attributes.get("largest", 1) or rows.kind != "f32":
        raise Unknown("does not take the largest")
    view, order = _last(w, rows, axis)
    k = int(node.constant(1).array.reshape(-1)[0])
    if not 1 <= k <= view.shape[-1]:
        raise Unknown(f"takes {k} of {view.shape[-1]}")
    shape = (*view.shape[:-1], k)
    values, ids = w.like(rows, shape), w.like(rows, shape, "i64")
    w.emit("top_k", (view,), (values.view, ids.view))
    back = _back(order)
    return [dataclasses.replace(r, view=transposed(r.view, back)) for r in (values, ids)]


def _gather_elements(w: Writing, node: Node) -> Sequence[Value]:
    rows, at = node.rows(0), node.rows(1)
    if (rows.axis, rows.rank, rows.kept) != (at.axis, at.rank, at.kept):
        raise Unknown("its inputs have their tokens on different axes")
    axis = node.attributes.get("axis", 0)
    view, order = _last(w, rows, axis)
    places, _ = _last(w, at, axis)
    made = w.like(rows, places.shape)
    w.emit("gather", (view, places), (made.view,))
    return (dataclasses.replace(made, view=transposed(made.view, _back(order))),)


def _scatter_elements(w: Writing, node: Node) -> Sequence[Value]:
    axis = node.attributes.get("axis", 0)
    if node.attributes.get("reduction", b"none") != b"none":
        raise Unknown("adds to what is there")
    if isinstance(node.given(1), Known):
        return (_scattered(w, node, axis),)
    (into, values), like = _pair(w, node)
    at = node.rows(1)
    if (like.axis, like.rank) != (at.axis, at.rank):
        raise Unknown("its inputs have their tokens on different axes")
    made = w.like(like, into.shape)
    w.emit("unary", (into,), (made.view,), names={"how": "copy"})
    places, order = _last(w, at, axis)
    values = transposed(values, order)
    w.emit("scatter", (places, broadcast(values, places.shape)), (transposed(made.view, order),))
    return (made,)


def _scattered(w: Writing, node: Node, axis: int) -> Rows:
    """Some numbers of an axis replaced by others, all of what lies behind them."""
    into, at, values = node.given(0), np.moveaxis(node.constant(1).array, axis, 0), node.rows(2)
    dims = list(into.array.shape) if isinstance(into, Known) else node.rows(0).dims()
    first, count = int(at.flat[0]) if at.size else -1, len(at)
    order = first + np.arange(count).reshape(-1, *(1,) * (at.ndim - 1))
    size, wanted = dims[axis], list(dims)
    wanted[axis] = count
    whole_ = list(node.constant(1).array.shape) == wanted == values.dims()
    within = isinstance(size, int) and 0 <= first <= size - count
    if not whole_ or not within or not (at == order).all():
        raise Unknown("scatters to numbers that do not follow one another")
    if count == size:
        return values
    rows = node.rows(0)
    if (rows.axis, rows.kept) != (values.axis, values.kept):
        raise Unknown("its inputs have their tokens on different axes")
    return replaced(w, rows, values, rows.inner(axis), first)


def _pair(w: Writing, node: Node) -> tuple[tuple[View, View], Rows]:
    """What is scattered into, and what is, of which either may be the same for every token."""
    into, values = (_or_constant(w, node, place) for place in (0, 2))
    if (into.axis, into.rank) != (values.axis, values.rank):
        raise Unknown("its inputs have their tokens on different axes")
    return (w.read(into), w.read(values)), into


def _or_constant(w: Writing, node: Node, place: int) -> Rows:
    """An input of the row, which a graph of a single token may know."""
    value = node.given(place)
    if node.alone and isinstance(value, Known):
        return Rows(w.constant(value), ALONE)
    return node.rows(place)


def _norm(w: Writing, node: Node) -> Sequence[Value]:
    rows = node.rows(0)
    how = "layer" if node.kind == "LayerNormalization" else "rms"
    if node.attributes.get("axis", -1) not in (-1, rows.rank - 1):
        raise Unknown("is over more than the last axis")
    rows.inner(-1)
    view = w.read(rows)
    weight, bias = _of_norm(w, node, 1, view), _of_norm(w, node, 2, view)
    made = w.like(rows, view.shape)
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    w.emit("norm", (view, weight, bias), (made.view,), "", {"epsilon": epsilon}, {"how": how})
    return (made,)


def _add_norm(w: Writing, node: Node) -> Sequence[Value]:
    """A norm of the sum with a residual, and the sum."""
    simplified = node.kind == "SkipSimplifiedLayerNormalization"
    rows, residual = node.rows(0), node.rows(1)
    if rows.dims() != residual.dims() or np.prod(rows.view.shape[:-1]) != 1:
        raise Unknown("adds something that is not as long")
    n = rows.view.shape[-1]
    views = [_vector(w.dense(each)) for each in (rows, residual)]
    like = whole("", (n,))
    bias, added = (None, 3) if simplified else (3, 4)
    weight, extra = _of_norm(w, node, 2, like), _of_norm(w, node, added, like)
    offset = ABSENT if bias is None else _of_norm(w, node, bias, like)
    y, total = w.like(rows, (n,)), w.like(rows, (n,))
    numbers = {"epsilon": float(node.attributes.get("epsilon", 1e-12))}
    names = {"how": "rms" if simplified else "layer"}
    inputs = (*views, weight, offset, extra)
    w.emit("add_norm", inputs, (y.view, total.view), "", numbers, names)
    given = [dataclasses.replace(r, view=broadcast(r.view, rows.view.shape)) for r in (y, total)]
    return (given[0], None, None, given[1])


def _vector(view: View) -> View:
    vector = reshaped(view, view.shape[-1:])
    assert vector is not None  # the others are of one number
    return vector


def _of_norm(w: Writing, node: Node, place: int, like: View) -> View:
    """What a norm multiplies with or adds, one number for each of the last axis."""
    if node.given(place) is None:
        return ABSENT
    return w.constant(node.constant(place), like.shape[-1:])


NODES: dict[str, Handler] = {
    **dict.fromkeys(UNARY, _node_unary),
    **dict.fromkeys(BINARY, _node_binary),
    **dict.fromkeys((*REDUCED, "ArgMax"), _reduced),
    **dict.fromkeys(SUMS, _sum_of),
    "ReduceLogSumExp": _log_sum_exp,
    "Where": _where,
    "Clip": _clip,
    "QuickGelu": _quick_gelu,
    "Softmax": _softmax,
    "TopK": _top_k,
    "GatherElements": _gather_elements,
    "ScatterElements": _scatter_elements,
    "RMSNormalization": _norm,
    "SimplifiedLayerNormalization": _norm,
    "LayerNormalization": _norm,
    "SkipLayerNormalization": _add_norm,
    "SkipSimplifiedLayerNormalization": _add_norm,
}
