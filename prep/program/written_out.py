"""Attention that a graph writes out: keys and values appended to a state, a product with the
queries, a mask, perhaps a sink, a softmax, and a product with the values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from smoe.artifacts.program import ABSENT, View
from smoe.prep.program import shapes
from smoe.prep.program.attending import remembered
from smoe.prep.program.values import (
    PAST,
    TOKENS,
    Appended,
    Interval,
    Known,
    Largest,
    Lengths,
    Remembered,
    Rows,
    Scores,
    Unknown,
    Value,
    length,
)
from smoe.prep.program.views import broadcast, reshaped, squeezed
from smoe.prep.program.writing import Handler, Node, Writing


def written_out(node: Node) -> Handler | None:
    """Who knows this node, where it is a part of such an attention."""
    if node.kind == "Concat" and isinstance(node.given(0), Remembered):
        return _append
    kinds = {type(value) for value in node.inputs}
    if kinds & {Scores, Largest}:
        return SCORES.get(node.kind)
    if Appended in kinds:
        return _moved if node.kind in MOVES else APPENDED.get(node.kind)
    return None


def _append(w: Writing, node: Node) -> Sequence[Value]:
    state, rows = node.given(0), node.rows(1)
    assert isinstance(state, Remembered)
    if len(node.inputs) != 2 or node.attributes["axis"] % rows.rank != rows.axis:
        raise Unknown("appends to a state along another axis than its tokens")
    return (Appended(state.name, rows, rows),)


def _moved(w: Writing, node: Node) -> Sequence[Value]:
    """A view of all tokens so far is that of the new ones."""
    value = node.given(0)
    assert isinstance(value, Appended)
    rest = [_as_new(each) for each in node.inputs[1:]]
    inner = dataclasses.replace(node, inputs=(value.rows, *rest))
    outputs = shapes.NODES[node.kind](w, inner)
    return [dataclasses.replace(value, rows=rows) for rows in outputs if isinstance(rows, Rows)]


def _as_new(value: Value) -> Value:
    """Sizes that count all tokens so far, as if they counted the new ones."""
    if not isinstance(value, Lengths):
        return value
    sizes = value.array.copy()
    for place, size in np.ndenumerate(value.array):
        if size == PAST + TOKENS:
            sizes[place] = TOKENS
        elif not length(size).is_number:
            raise Unknown("has sizes that do not follow the tokens")
    return Lengths(sizes)


def _scaled_keys(w: Writing, node: Node) -> Sequence[Value]:
    for value, other in (node.inputs, node.inputs[::-1]):
        if isinstance(value, Appended):
            return (dataclasses.replace(value, factor=value.factor * _number(other)),)
    raise Unknown("multiplies a state")


def _number(value: Value) -> float:
    if not isinstance(value, Known) or value.array.size != 1:
        raise Unknown("computes on all tokens so far with more than a number")
    return float(value.array.reshape(()))


def _product(w: Writing, node: Node) -> Sequence[Value]:
    """Queries `[1, h, T, d]` by keys `[1, h, S, d]`, turned here or before."""
    queries, keys = node.rows(0), node.given(1)
    assert isinstance(keys, Appended)
    turned = bool(node.attributes.get("transB"))
    if queries.rank != 4 or queries.axis != 2 or keys.rows.axis != (2 if turned else 3):
        raise Unknown("multiplies a state with something that is no query")
    alpha = float(node.attributes.get("alpha", 1.0))
    return (Scores(queries, keys, alpha * keys.factor),)


def _multiplied(w: Writing, node: Node) -> Sequence[Value]:
    scores, other = node.inputs if isinstance(node.given(0), Scores) else node.inputs[::-1]
    assert isinstance(scores, Scores)
    number = _number(other) if node.kind == "Mul" else 1 / _number(other)
    capped = scores.softcap and not scores.bent
    if scores.window is not None or capped or (node.kind == "Div" and node.given(0) is not scores):
        raise Unknown("scales what is masked")
    cap = number if scores.bent else scores.softcap  # c tanh(x / c)
    scale = scores.scale * number
    return (dataclasses.replace(scores, scale=scale, softcap=cap, bent=False),)


def _bent(w: Writing, node: Node) -> Sequence[Value]:
    scores = node.given(0)
    if not isinstance(scores, Scores) or scores.softcap or scores.window is not None:
        raise Unknown("bends scores that are masked or capped")
    return (dataclasses.replace(scores, bent=True),)


def _masked(w: Writing, node: Node) -> Sequence[Value]:
    """A mask is added, or chooses between scores and next to nothing."""
    scores = next(value for value in node.inputs if isinstance(value, Scores))
    mask = next((value for value in node.inputs if isinstance(value, Interval)), None)
    fits = mask is not None and scores.window is None and not scores.soft and not scores.bent
    if node.kind == "Where":
        fits = fits and node.given(0) is mask and node.given(1) is scores
        fits = fits and _number(node.given(2)) < -1e9
    if not fits or mask is None:
        raise Unknown("adds to scores what is no mask")
    return (dataclasses.replace(scores, window=mask.window),)


def _with_sinks(w: Writing, node: Node) -> Sequence[Value]:
    scores, sinks = node.given(0), node.rows(1)
    assert isinstance(scores, Scores)
    heads = scores.queries.view.shape[1]
    fits = len(node.inputs) == 2 and sinks.view.shape == (1, heads, 1) and sinks.axis == 2
    if not fits or node.attributes["axis"] not in (-1, 3) or scores.window is None or scores.sinks:
        raise Unknown("puts something behind scores that is no sink of each head")
    view = reshaped(sinks.view, (heads,))
    assert view is not None  # an axis of one number goes
    return (dataclasses.replace(scores, sinks=view, behind=True),)


def _largest(w: Writing, node: Node) -> Sequence[Value]:
    scores, axes = node.given(0), node.attributes.get("axes") or node.constant(1).array.tolist()
    assert isinstance(scores, Scores)
    if list(axes) not in ([-1], [3]) or scores.soft:
        raise Unknown("is over another axis than the scores'")
    return (Largest(scores),)


def _less_largest(w: Writing, node: Node) -> Sequence[Value]:
    scores, largest = node.inputs
    if not isinstance(largest, Largest) or largest.scores != scores:
        raise Unknown("takes something from scores")
    return (scores,)


def _softmax(w: Writing, node: Node) -> Sequence[Value]:
    scores = node.given(0)
    assert isinstance(scores, Scores)
    if node.attributes.get("axis", -1) not in (-1, 3) or scores.window is None or scores.soft:
        raise Unknown("of scores that are not masked")
    return (dataclasses.replace(scores, soft=True),)


def _without_sinks(w: Writing, node: Node) -> Sequence[Value]:
    """The sinks' column goes."""
    scores = node.given(0)
    given = [node.constant(place).array.reshape(-1).tolist() for place in range(1, 4)]
    step = node.optional(4)
    whole = given[:2] == [[0], [-1]] and given[2] in ([-1], [3])
    one = step is None or step.array.reshape(-1).tolist() == [1]
    if not isinstance(scores, Scores) or not (scores.soft and scores.behind and whole and one):
        raise Unknown("takes a part of the scores")
    return (dataclasses.replace(scores, behind=False),)


def _attend(w: Writing, node: Node) -> Sequence[Value]:
    """The softmax by values `[1, h, S, e]`."""
    scores, values = node.inputs[:2]
    if not isinstance(scores, Scores) or not isinstance(values, Appended):
        raise Unknown("multiplies scores with something that is no state")
    odd = values.factor != 1 or values.rows.axis != 2 or node.attributes.get("transB")
    if odd or scores.behind or not scores.soft:
        raise Unknown("multiplies scores with other columns than there are values")
    q = _heads(w, scores.queries)
    k, v = (_own_heads(w, each, q.shape[0]) for each in (scores.keys, values))
    names = (scores.keys.name, values.name)
    state = remembered(w, *names, (k.shape[0], k.shape[1], v.shape[1]))
    numbers = {
        "scale": scores.scale,
        "window": float(scores.window or 0),
        "softcap": scores.softcap,
    }
    made = w.fresh((q.shape[0], v.shape[1]))
    sinks = scores.sinks or ABSENT
    w.emit("attention", (q, k, v, sinks), (made,), "", numbers, {"state": state.keys})
    view = reshaped(made, (1, *made.shape))
    assert view is not None
    return (Rows(view, 2),)


def _heads(w: Writing, rows: Rows) -> View:
    """`[1, h, T, d]` as heads `[h, d]` whose numbers lie one after another."""
    view = reshaped(w.read(rows), rows.view.shape[1:])
    if view is None or (view.shape[1] > 1 and view.strides[1] != 1):
        view = reshaped(w.copy(rows.view, rows.kind, rows.kept), rows.view.shape[1:])
    assert view is not None
    return view


def _own_heads(w: Writing, value: Appended, heads: int) -> View:
    """What was appended, `[g, d]`, once it is seen that each of its heads is repeated for so many
    of the `heads`."""
    own, view = _heads(w, value.own), value.rows.view
    copy = w.maker(view)
    if copy is not None and copy.names == {"how": "copy"}:
        view = copy.inputs[0]
    g, d = value.own.view.shape[1:]
    one = reshaped(value.own.view, (g, 1, d))
    if one is None or heads % g or squeezed(broadcast(one, (g, heads // g, d))) != squeezed(view):
        raise Unknown("attends to heads that are not repeated in groups")
    return own


MOVES = ("Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose", "Identity", "Cast")
APPENDED: dict[str, Handler] = {"Mul": _scaled_keys, "MatMul": _product, "FusedMatMul": _product}
SCORES: dict[str, Handler] = {
    "Mul": _multiplied,
    "Div": _multiplied,
    "Tanh": _bent,
    "Add": _masked,
    "Where": _masked,
    "Concat": _with_sinks,
    "ReduceMax": _largest,
    "Sub": _less_largest,
    "Softmax": _softmax,
    "Slice": _without_sinks,
    "MatMul": _attend,
    "FusedMatMul": _attend,
}
