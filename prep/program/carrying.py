"""State that every token replaces: where a convolution goes along the last tokens, by an operation
of its own; else, in a graph of a single token, recalled and stored as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import NoneType

import numpy as np

from smoe.artifacts.manifest import State
from smoe.artifacts.program import ABSENT, View
from smoe.prep.program.values import (
    ALONE,
    Carried,
    Convolved,
    Dim,
    Known,
    Length,
    Lengths,
    Returned,
    Rows,
    Shifted,
    Unknown,
    Value,
    length,
)
from smoe.prep.program.views import broadcast, reshaped, sliced
from smoe.prep.program.writing import Handler, Node, Writing

LAST = 1 << 31  # a place of a Slice from which on it is the end


def is_carried(spec: State) -> bool:
    """Whether a state keeps its shape, and is more than one number."""
    return spec.growing < 0 and spec.dtype == "F32" and math.prod(spec.shape) > 1


def carrying(w: Writing, node: Node) -> Handler | None:
    """Who knows this node, where it is a part of a convolution along the tokens."""
    first = node.given(0)
    if node.kind == "Concat" and isinstance(first, Carried):
        return _shift if _is_shift(w, node, first) else None
    if isinstance(first, Shifted):
        if node.kind == "Slice" and _part(node, size := _size(w, first)) == (w.tokens, size):
            return _kept
        return _convolve if node.kind == "Conv" and _is_depthwise(w, node, first) else None
    if isinstance(first, Convolved) and node.kind == "Slice":
        return _sliced if _part(node, first.places) else None
    return None


def _before(w: Writing, shifted: Shifted) -> int:
    """The tokens before the call that the state has vectors of."""
    return w.specs[shifted.state.name].shape[-1]


def _size(w: Writing, shifted: Shifted) -> Length:
    """All vectors."""
    return w.tokens + _before(w, shifted)


def _is_shift(w: Writing, node: Node, state: Carried) -> bool:
    shape, rows = w.specs[state.name].shape, node.given(1)
    fits = len(shape) == 3 and shape[0] == 1 and node.attributes["axis"] in (-1, 2)
    wanted: list[Dim] = [1, shape[1], w.tokens] if len(shape) == 3 else []
    sizes = rows.dims() if isinstance(rows, Rows) else []
    same = [length(size) for size in sizes] == [length(size) for size in wanted]
    return fits and same and len(node.inputs) == 2


def _shift(w: Writing, node: Node) -> Sequence[Value]:
    state, rows = node.given(0), node.rows(1)
    assert isinstance(state, Carried)
    return (Shifted(state, rows),)


def _part(node: Node, size: Length) -> tuple[Length, Length] | None:
    """What a Slice takes of the last of three axes, from and to; None where it is not known."""
    if any(not isinstance(node.given(place), (Known, Lengths, NoneType)) for place in range(1, 5)):
        return None
    axes, steps = node.optional(3), node.optional(4)
    along = axes is not None and axes.array.tolist() in ([-1], [2])
    if not along or (steps is not None and steps.array.tolist() != [1]):
        return None
    ends = [_counted(node.lengths(place).reshape(-1)[0], size) for place in (1, 2)]
    low, high = ends
    return None if low is None or high is None else (low, high)


def _counted(place: Length, size: Length) -> Length | None:
    """A place of a Slice, counted from the start; None where that depends on lengths."""
    if place.is_number and place.constant >= LAST:
        return size
    if min(place.constant, place.tokens, place.past) < 0:
        place = size + place
    within = size - place
    known = min(place.constant, place.tokens, place.past) >= 0
    return place if known and min(within.constant, within.tokens, within.past) >= 0 else None


def _kept(w: Writing, node: Node) -> Sequence[Value]:
    """The state with the call's vectors, and without as many of the oldest."""
    shifted = node.given(0)
    assert isinstance(shifted, Shifted)
    return (Returned(shifted.state.name),)


def _is_depthwise(w: Writing, node: Node, shifted: Shifted) -> bool:
    attributes, weight, bias = node.attributes, node.given(1), node.given(2)
    numbers = w.specs[shifted.state.name].shape[1]
    if not isinstance(weight, Known) or not (bias is None or isinstance(bias, Known)):
        return False
    plain = attributes.get("auto_pad") in (None, b"NOTSET")
    plain &= all(set(attributes.get(name, [1])) == {1} for name in ("strides", "dilations"))
    shape = weight.array.shape
    each = attributes.get("group", 1) == numbers and len(shape) == 3 and shape[:2] == (numbers, 1)
    return plain and each and shape[2] <= _before(w, shifted) + 1


def _convolve(w: Writing, node: Node) -> Sequence[Value]:
    shifted, weight = node.given(0), node.constant(1)
    assert isinstance(shifted, Shifted)
    taps, pads = weight.array.shape[2], node.attributes.get("pads", [0, 0])
    places = _size(w, shifted) + (sum(pads) + 1 - taps)
    end = Length(taps - 1 - pads[0])
    return (_settled(w, Convolved(shifted, weight, node.optional(2), end, places)),)


def _sliced(w: Writing, node: Node) -> Sequence[Value]:
    value = node.given(0)
    assert isinstance(value, Convolved)
    part = _part(node, value.places)
    assert part is not None  # `carrying` has asked
    first, end = part
    return (_settled(w, replace(value, end=value.end + first, places=end - first)),)


def _settled(w: Writing, value: Convolved) -> Value:
    """The operation, once what is left is what the call's tokens get."""
    if (value.end, value.places) != (Length(_before(w, value.shifted)), w.tokens):
        return value
    name, rows = value.shifted.state.name, value.shifted.rows
    if name in w.convolved:
        raise Unknown("convolves a state twice")
    w.convolved.add(name)
    numbers = rows.view.shape[1]
    x = reshaped(w.dense(rows), (numbers,))
    taps = np.ascontiguousarray(value.weight.array[:, 0].T)
    weight = w.constant(Known(taps, value.weight.name and f"{value.weight.name}.taps"))
    bias = ABSENT if value.bias is None else w.constant(value.bias, (numbers,))
    made = w.fresh((numbers,))
    assert x is not None  # it is dense
    w.emit("convolution", (x, weight, bias), (made,), names={"state": name})
    view = reshaped(made, rows.view.shape)
    assert view is not None
    return replace(rows, view=view)


# -- as numbers of a row ---------------------------------------------------------------------------


def recalled(w: Writing, value: Value) -> Value:
    """What a node takes that knows nothing of such states."""
    if not w.alone:
        return value
    if isinstance(value, Carried):
        return _recall(w, value)
    if isinstance(value, Shifted):
        return _joined(w, value)
    if isinstance(value, Convolved):
        return _everywhere(w, value)
    return value


def _recall(w: Writing, state: Carried) -> Rows:
    if state.name not in w.recalled:
        made = w.fresh(w.specs[state.name].shape)
        w.emit("recall", (), (made,), names={"state": state.name})
        w.recalled[state.name] = made
    return Rows(w.recalled[state.name], ALONE)


def _joined(w: Writing, value: Shifted) -> Rows:
    before, new = _recall(w, value.state).view, value.rows.view
    tokens = before.shape[-1]
    made = w.fresh((*before.shape[:-1], tokens + 1))
    for part, start in ((before, 0), (new, tokens)):
        target = sliced(made, 2, start, part.shape[-1])
        w.emit("unary", (part,), (target,), names={"how": "copy"})
    return Rows(made, ALONE)


def _everywhere(w: Writing, value: Convolved) -> Rows:
    along = _joined(w, value.shifted).view
    numbers, _, taps = value.weight.array.shape
    places, start = value.places.constant, value.end.constant + 1 - taps
    if start < 0 or start + places + taps - 1 > along.shape[2]:
        raise Unknown("convolves what is filled up")
    weight = w.constant(Known(np.ascontiguousarray(value.weight.array[:, 0])))
    made = w.fresh((1, numbers, places))
    for place in range(places):
        window = sliced(along, 2, start + place, taps)
        products = w.fresh(window.shape)
        both = (window, broadcast(weight, window.shape))
        w.emit("binary", both, (products,), names={"how": "mul"})
        target = sliced(made, 2, place, 1)
        sums = View(target.source, target.offset, target.shape[:-1], target.strides[:-1])
        w.emit("reduce", (products,), (sums,), names={"how": "sum"})
    if value.bias is None:
        return Rows(made, ALONE)
    total = w.fresh(made.shape)
    bias = reshaped(w.constant(value.bias), (1, numbers, 1))
    assert bias is not None
    both = (made, broadcast(bias, made.shape))
    w.emit("binary", both, (total,), names={"how": "add"})
    return Rows(total, ALONE)


# -- the end of a segment --------------------------------------------------------------------------


def returned(w: Writing, spec: State, value: Value) -> Value:
    """What a segment returns of a state, stored; `Unknown` where the state is replaced in a way
    that no operation does."""
    name = spec.input
    if isinstance(value, Returned) and value.name == name:
        if name not in w.convolved or name in w.recalled:
            raise Unknown(f"the state {spec.output} is read in another way than it is replaced")
        return value
    rows = recalled(w, value)
    if not isinstance(rows, Rows) or rows.kind != "f32" or name in w.convolved:
        raise Unknown(f"the state {spec.output} is replaced by something that is no row of floats")
    if name not in w.recalled or rows.view.source not in w.names.buffers:
        raise Unknown(f"the state {spec.output} does not follow from what it was")
    w.called = spec.output
    x = reshaped(w.dense(rows), spec.shape)
    assert x is not None
    w.emit("store", (x,), (), names={"state": name})
    return Returned(name)
