"""Nodes that move numbers or say where they are: views, but for what must lie together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from smoe.artifacts.program import View
from smoe.prep.program import turning
from smoe.prep.program.values import (
    INDEX,
    POSITION,
    TOKENS,
    Dim,
    Early,
    Known,
    Length,
    Lengths,
    Padded,
    Rows,
    Unknown,
    Value,
    length,
)
from smoe.prep.program.views import broadcast, reshaped, sliced, transposed, view_of, whole
from smoe.prep.program.writing import Handler, Node, Writing, integers

KINDS = {1: "f32", 6: "i64", 7: "i64", 9: "bool"}  # of ONNX's types, as a row has them


def _identity(w: Writing, node: Node) -> Sequence[Value]:
    """Also a state that a call returns as it received it."""
    return (node.given(0),)


def _cast(w: Writing, node: Node) -> Sequence[Value]:
    kind = KINDS.get(node.attributes["to"])
    value = node.given(0)
    if isinstance(value, (Known, Lengths)) and kind == "i64":
        return (integers(node.lengths(0)),)
    if isinstance(value, Known) and kind == "f32":
        return (Known(value.array.astype(np.float32)),)
    rows = node.rows(0)
    if kind is None:
        raise Unknown(f"converts to ONNX's type {node.attributes['to']}")
    if rows.kind == kind:
        return (rows,)
    if rows.view.source == POSITION:
        return (dataclasses.replace(rows, kind=kind),)
    view = w.read(rows)
    made = w.like(rows, view.shape, kind)
    w.emit("unary", (view,), (made.view,), names={"how": "copy"})
    return (made,)


def _shape(w: Writing, node: Node) -> Sequence[Value]:
    value = node.given(0)
    dims = list(value.array.shape) if isinstance(value, Known) else node.rows(0).dims()
    start, end = node.attributes.get("start", 0), node.attributes.get("end", len(dims))
    return (_integers(dims[start:end]),)


def _reshape(w: Writing, node: Node) -> Sequence[Value]:
    wanted = list(node.lengths(1))
    value = node.given(0)
    if isinstance(value, (Known, Lengths)):
        array = value.array if isinstance(value, Known) else node.lengths(0)
        return (_like(value, array.reshape([each.constant for each in wanted])),)
    rows = node.rows(0)
    dims = _filled_in(rows.dims(), wanted, bool(node.attributes.get("allowzero")))
    return (reshaped_rows(w, rows, dims),)


def _squeeze(w: Writing, node: Node) -> Sequence[Value]:
    value = node.given(0)
    if isinstance(value, (Known, Lengths)):
        axes = None if node.given(1) is None else tuple(node.constant(1).array.tolist())
        return (_like(value, value.array.squeeze(axes)),)
    rows = node.rows(0)
    dims = rows.dims()
    if node.given(1) is None:
        return (reshaped_rows(w, rows, [d for d in dims if d != 1]),)
    gone = {axis % len(dims) for axis in node.constant(1).array.tolist()}
    return (reshaped_rows(w, rows, [d for axis, d in enumerate(dims) if axis not in gone]),)


def _unsqueeze(w: Writing, node: Node) -> Sequence[Value]:
    value, added = node.given(0), node.constant(1).array.reshape(-1).tolist()
    if isinstance(value, (Known, Lengths)):
        return (_like(value, np.expand_dims(value.array, tuple(added))),)
    rows = node.rows(0)
    dims, rank = rows.dims(), rows.rank + len(added)
    for axis in sorted(axis % rank for axis in added):
        dims.insert(axis, 1)
    return (reshaped_rows(w, rows, dims),)


def _flatten(w: Writing, node: Node) -> Sequence[Value]:
    rows, axis = node.rows(0), node.attributes.get("axis", 1)
    dims = rows.dims()
    return (reshaped_rows(w, rows, [_product(dims[:axis]), _product(dims[axis:])]),)


def _transpose(w: Writing, node: Node) -> Sequence[Value]:
    value = node.given(0)
    if isinstance(value, Known):
        return (Known(value.array.transpose(node.attributes.get("perm"))),)
    rows = node.rows(0)
    order = node.attributes.get("perm", list(range(rows.rank))[::-1])
    inner = [rows.inner(axis) for axis in order if axis != rows.axis]
    view = transposed(rows.view, inner)
    axis = rows.axis if rows.alone else list(order).index(rows.axis)
    return (dataclasses.replace(rows, view=view, axis=axis),)


def _expand(w: Writing, node: Node) -> Sequence[Value]:
    value = node.given(0)
    wanted: list[Dim] = [_dim(each) for each in node.lengths(1)]
    if isinstance(value, (Known, Lengths)):
        return (_expanded(w, value, wanted),)
    rows = node.rows(0)
    rank = max(rows.rank, len(wanted))
    axis = rows.axis if rows.alone else rows.axis + rank - rows.rank
    wanted = [*(1,) * (rank - len(wanted)), *wanted]
    tokens = 1 if rows.alone else wanted.pop(axis)
    if tokens not in (1, TOKENS) or not all(isinstance(n, int) for n in wanted):
        raise Unknown("repeats its tokens")
    padded = (1,) * (rank - rows.rank) + rows.view.shape
    sizes = np.broadcast_shapes(padded, tuple(n for n in wanted if isinstance(n, int)))
    return (dataclasses.replace(rows, view=broadcast(rows.view, sizes), axis=axis),)


def _tile(w: Writing, node: Node) -> Sequence[Value]:
    rows, times = node.rows(0), node.constant(1).array.tolist()
    if not rows.alone and times.pop(rows.axis) != 1:
        raise Unknown("repeats its tokens")
    pairs = list(zip(rows.view.shape, times, strict=True))
    if any(size != 1 and count != 1 for size, count in pairs):
        raise Unknown("repeats an axis of several numbers")
    sizes = [size * count for size, count in pairs]
    return (dataclasses.replace(rows, view=broadcast(rows.view, sizes)),)


def _slice(w: Writing, node: Node) -> Sequence[Value]:
    value = node.given(0)
    if isinstance(value, (Known, Lengths)):
        rank, dims = value.array.ndim, list(value.array.shape)
    else:
        rank, dims = node.rows(0).rank, node.rows(0).dims()
    starts, ends = node.constant(1).array.tolist(), node.constant(2).array.tolist()
    axes, steps = node.optional(3), node.optional(4)
    along = [a % rank for a in (axes.array.tolist() if axes else range(len(starts)))]
    by = steps.array.tolist() if steps else [1] * len(starts)
    parts = [slice(None)] * rank
    for axis, start, end, step in zip(along, starts, ends, by, strict=True):
        parts[axis] = slice(start, end, step)
    if isinstance(value, (Known, Lengths)):
        return (_like(value, value.array[tuple(parts)]),)
    rows = node.rows(0)
    view = rows.view
    for axis, (part, size) in enumerate(zip(parts, dims, strict=True)):
        if part == slice(None) or (part.start in (0, None) and part.step == 1 and part.stop >> 31):
            continue
        inner = rows.inner(axis)
        chosen = range(view.shape[inner])[part]
        if not isinstance(size, int) or chosen.step < 1 or not len(chosen):
            raise Unknown("takes no numbers, or backwards")
        view = sliced(view, inner, chosen.start, len(chosen), chosen.step)
    return (dataclasses.replace(rows, view=view),)


def _split(w: Writing, node: Node) -> Sequence[Value]:
    rows, count = node.rows(0), len(node.names)
    inner = rows.inner(node.attributes.get("axis", 0))
    given, size = node.optional(1), rows.view.shape[inner]
    each = -(-size // count)
    sizes = given.array.tolist() if given else [each] * (count - 1) + [size - each * (count - 1)]
    starts = np.cumsum([0, *sizes]).tolist()
    return [
        dataclasses.replace(rows, view=sliced(rows.view, inner, start, size))
        for start, size in zip(starts, sizes, strict=False)
    ]


def _concat(w: Writing, node: Node) -> Sequence[Value]:
    if all(isinstance(value, (Known, Lengths)) for value in node.inputs):
        return (integers(np.concatenate([node.lengths(i) for i in range(len(node.inputs))])),)
    rows, axis = node.rows(0), node.attributes["axis"]
    tokens = rows.alone or axis % rows.rank == rows.axis
    if tokens and all(isinstance(v, Early) for v in node.inputs[1:]):
        return (Padded(rows),)
    parts = [node.rows(place) for place in range(len(node.inputs))]
    inner, kinds = rows.inner(axis), {part.kind for part in parts}
    if len(kinds) != 1 or len({(part.axis, part.kept, part.rank) for part in parts}) != 1:
        raise Unknown("its inputs have their tokens on different axes")
    last = inner == len(rows.view.shape) - 1
    if last and (turned := turning.halves(w, parts)) is not None:
        return (turned,)
    sizes = [part.view.shape[inner] for part in parts]
    joined = list(rows.view.shape)
    joined[inner] = sum(sizes)
    made = w.like(rows, joined)
    starts = np.cumsum([0, *sizes]).tolist()
    for part, start, size in zip(parts, starts, sizes, strict=False):
        target = sliced(made.view, inner, start, size)
        w.emit("unary", (w.read(part),), (target,), names={"how": "copy"})
    return (made,)


def _scatter_nd(w: Writing, node: Node) -> Sequence[Value]:
    """Some of the first axis replaced by others."""
    into, at, values = node.rows(0), node.constant(1).array, node.rows(2)
    if node.attributes.get("reduction", b"none") != b"none" or at.ndim != 2 or at.shape[1] != 1:
        raise Unknown("adds to what is there, or scatters along several axes")
    if (into.axis, into.rank) != (values.axis, values.rank) or into.axis == 0:
        raise Unknown("its inputs have their tokens on different axes")
    first, size, count = int(at[0, 0]), into.view.shape[0], len(at)
    if not 0 <= first <= size - count or at[:, 0].tolist() != list(range(first, first + count)):
        raise Unknown("scatters to numbers that do not follow one another")
    return (replaced(w, into, values, 0, first),)


def replaced(w: Writing, into: Rows, values: Rows, inner: int, first: int) -> Rows:
    """`into`, where `values` are written over an axis of its view from number `first` on."""
    made, size = w.like(into, into.view.shape), into.view.shape[inner]
    last = first + values.view.shape[inner]
    before = sliced(w.read(into), inner, 0, first)
    after = sliced(w.read(into), inner, last, size - last)
    for part, start in ((before, 0), (w.read(values), first), (after, last)):
        if part.shape[inner]:
            place = sliced(made.view, inner, start, part.shape[inner])
            w.emit("unary", (part,), (place,), names={"how": "copy"})
    return made


def gather(w: Writing, node: Node) -> Sequence[Value]:
    """Of the rows whose logits are wanted; or a part of every row."""
    value, at = node.given(0), node.given(1)
    axis = node.attributes.get("axis", 0)
    if isinstance(value, (Known, Lengths)) and isinstance(at, Known):
        taken = np.take(value.array, at.array, axis)
        return (_like(value, np.asarray(taken, value.array.dtype)),)
    rows = node.rows(0)
    tokens = rows.alone or axis % rows.rank == rows.axis
    if isinstance(at, Early) and at.name == "logits_to_keep" and tokens:
        return (keep(w, rows),)
    where = node.constant(1).array
    inner = rows.inner(axis)
    chosen = (where.reshape(-1) % rows.view.shape[inner]).tolist()
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    if where.ndim > 1 or step < 1 or chosen != list(range(chosen[0], chosen[-1] + 1, step)):
        raise Unknown("gathers numbers that do not follow one another")
    rows = dataclasses.replace(rows, view=sliced(rows.view, inner, chosen[0], len(chosen), step))
    dims = rows.dims()
    if where.ndim == 0:
        del dims[axis % rows.rank]
    return (reshaped_rows(w, rows, dims),)


def keep(w: Writing, rows: Rows) -> Rows:
    """The rows whose logits are wanted."""
    view = w.read(rows)
    made = Rows(w.fresh(view.shape, rows.kind, kept=True), rows.axis, rows.kind, kept=True)
    w.emit("keep", (view,), (made.view,))
    return made


def _range(w: Writing, node: Node) -> Sequence[Value]:
    start, end, step = (node.lengths(place).reshape(-1)[0] for place in range(3))
    if (start, end, step) == (Length(0), TOKENS, Length(1)):
        return (Rows(whole(INDEX, ()), 0, "i64"),)
    if start.is_number and end.is_number and step.is_number:
        return (Known(np.arange(start.constant, end.constant, step.constant)),)
    if step == Length(1) and (end - start).is_number:
        count = max(0, (end - start).constant)
        return (integers(np.array([start + i for i in range(count)], object)),)
    raise Unknown("counts something else than tokens")


def _constant_of_shape(w: Writing, node: Node) -> Sequence[Value]:
    dims = [_dim(each) for each in node.lengths(0)]
    filling = node.attributes.get("value", np.zeros(1, np.float32))
    return (_expanded(w, Known(np.asarray(filling).reshape(())), dims),)


def reshaped_rows(w: Writing, rows: Rows, dims: list[Dim]) -> Rows:
    """The same numbers in a shape of the graph; the tokens must stay one axis."""
    if rows.alone:
        return dataclasses.replace(rows, view=_in_shape(w, rows, dims))
    before = math.prod(rows.view.shape[: rows.axis])
    for axis, size in enumerate(dims):
        inner = [d for d in dims[:axis] + dims[axis + 1 :] if isinstance(d, int)]
        if size == TOKENS and len(inner) == len(dims) - 1 and math.prod(inner[:axis]) == before:
            return dataclasses.replace(rows, view=_in_shape(w, rows, inner), axis=axis)
    raise Unknown("mixes its tokens")


def _in_shape(w: Writing, rows: Rows, dims: Sequence[Dim]) -> View:
    shape = [size for size in dims if isinstance(size, int)]
    if len(shape) != len(dims):
        raise Unknown("becomes as long as all tokens so far")
    view = reshaped(rows.view, shape)
    if view is None:
        view = reshaped(w.copy(rows.view, rows.kind, rows.kept), shape)
    assert view is not None  # a copy is dense
    return view


def _expanded(w: Writing, value: Known | Lengths, dims: list[Dim]) -> Value:
    """A constant, repeated: for every token, where one of the sizes is theirs."""
    rank = max(len(dims), value.array.ndim)
    dims = [*(1,) * (rank - len(dims)), *dims]
    rest = [size for size in dims if isinstance(size, int)]
    if len(rest) == rank:
        sizes = np.broadcast_shapes(value.array.shape, tuple(rest))
        return _like(value, np.broadcast_to(value.array, sizes))
    padded = (1,) * (rank - value.array.ndim) + value.array.shape
    if not isinstance(value, Known) or TOKENS not in dims or len(rest) != rank - 1:
        raise Unknown("repeats something for every token so far")
    axis = dims.index(TOKENS)
    inner = padded[:axis] + padded[axis + 1 :]
    view = w.constant(value)
    view = view_of(view.source, 0, inner, whole("", inner).strides)
    return Rows(broadcast(view, np.broadcast_shapes(inner, tuple(rest))), axis)


def _filled_in(dims: list[Dim], wanted: list[Length], zero_is_zero: bool) -> list[Dim]:
    """A Reshape's target, what it leaves open filled in."""
    target: list[Dim] = [
        dims[i] if each == Length(0) and not zero_is_zero else _dim(each)
        for i, each in enumerate(wanted)
    ]
    if -1 in target:
        rest = length(_product([each for each in target if each != -1]))
        total = length(_product(dims))
        over = rest.constant or rest.tokens
        size: Dim = _dim(Length(total.constant // over, total.tokens // over))
        if rest.tokens:
            size = total.tokens // over
        target[target.index(-1)] = size
    return target


def _product(dims: Sequence[Dim]) -> Dim:
    total = Length(1)
    for size in dims:
        total = total * size
    return _dim(total)


def _dim(each: Length) -> Dim:
    """A size, as an integer where it is one."""
    return each.constant if each.is_number else each


def _integers(dims: list[Dim]) -> Known | Lengths:
    lengths = np.empty(len(dims), object)
    lengths[:] = [length(each) for each in dims]
    return integers(lengths)


def _like(value: Known | Lengths, array: np.ndarray) -> Known | Lengths:
    return Known(array) if isinstance(value, Known) else integers(array)


NODES: dict[str, Handler] = {
    "Identity": _identity,
    "Cast": _cast,
    "Shape": _shape,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Gather": gather,
    "ScatterND": _scatter_nd,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
}
