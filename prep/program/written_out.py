"""Attention that a graph writes out: keys and values appended to a state, a product with the
queries, a mask, perhaps a sink, a softmax, and a product with the values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from smoe.artifacts.program import ABSENT, View
from smoe.prep.program import latent, products, rowwise, shapes
from smoe.prep.program.attending import remembered
from smoe.prep.program.origins import origins
from smoe.prep.program.values import (
    PAST,
    TOKENS,
    Appended,
    Interval,
    Known,
    Largest,
    Length,
    Lengths,
    Remembered,
    Rows,
    Scores,
    Unknown,
    Value,
    length,
)
from smoe.prep.program.views import reshaped
from smoe.prep.program.writing import Handler, Node, Writing, told


def written_out(node: Node) -> Handler | None:
    """Who knows this node, where it is a part of such an attention."""
    if node.kind == "Concat" and isinstance(node.given(0), Remembered):
        return _append
    sizes = node.given(0)
    if node.kind == "ConstantOfShape" and isinstance(sizes, Lengths):
        every = PAST + (Length(1) if node.alone else TOKENS)
        return _same_for_all if every in sizes.array.tolist() else None
    kinds = {type(value) for value in node.inputs}
    if kinds & {Scores, Largest}:
        return SCORES.get(node.kind)
    if Appended not in kinds:
        return None
    if node.kind in PRODUCTS and isinstance(node.given(1), Appended):
        return _product
    return ON_STATES.get(node.kind, _lifted)


def _append(w: Writing, node: Node) -> Sequence[Value]:
    state, rows = node.given(0), node.rows(1)
    assert isinstance(state, Remembered)
    rows = rows.along(node.attributes["axis"] % rows.rank)
    if len(node.inputs) != 2 or node.attributes["axis"] % rows.rank != rows.axis:
        raise Unknown("appends to a state along another axis than its tokens")
    return (Appended(rows, {state.name: rows}),)


def _lifted(w: Writing, node: Node) -> Sequence[Value]:
    """What is done to every token so far by itself is done to the new ones; whether it comes to
    something that can be remembered is seen where it is attended to."""
    if node.kind not in LIFTED:
        raise Unknown("no operation does it to all tokens so far")
    given = [value for value in node.inputs if isinstance(value, Appended)]
    factors = {value.factor for value in given}
    if factors != {1.0} and (node.kind not in MOVES or len(given) > 1):
        raise Unknown("computes with a state that was multiplied")
    own = {name: rows for value in given for name, rows in value.own.items()}
    inner = dataclasses.replace(node, inputs=tuple(_as_new(w, value) for value in node.inputs))
    outputs = LIFTED[node.kind](w, inner)
    if not all(isinstance(rows, Rows) and not rows.kept for rows in outputs):
        raise Unknown("takes something else than numbers of a state")
    return [Appended(rows, own, *factors) for rows in outputs if isinstance(rows, Rows)]


def _size(w: Writing, node: Node) -> Sequence[Value]:
    """Sizes of a state count all tokens so far."""
    value = node.given(0)
    assert isinstance(value, Appended)
    inner = dataclasses.replace(node, inputs=(value.rows,))
    (sizes,) = shapes.NODES[node.kind](w, inner)
    if not isinstance(sizes, Lengths):
        return (sizes,)
    counts = sizes.array.copy()
    for place, size in enumerate(sizes.array):
        counts[place] = size + (PAST + w.tokens - TOKENS) * size.tokens
    return (Lengths(counts),)


def _same_for_all(w: Writing, node: Node) -> Sequence[Value]:
    """A constant for all tokens so far, which something is written over."""
    inner = dataclasses.replace(node, inputs=(_as_new(w, node.given(0)),))
    (rows,) = shapes.NODES[node.kind](w, inner)
    if not isinstance(rows, Rows):
        raise Unknown("is not for all tokens so far")
    return (Appended(rows, {}),)


def _as_new(w: Writing, value: Value) -> Value:
    """What is of all tokens so far, as if it were of the new ones."""
    if isinstance(value, Appended):
        return value.rows
    if value is None or isinstance(value, Known):
        return value
    if not isinstance(value, Lengths):
        raise Unknown(f"computes with a state and what {told(value)}")
    sizes = value.array.copy()
    for place, size in np.ndenumerate(value.array):
        if size == PAST + w.tokens:
            sizes[place] = TOKENS
        elif not length(size).is_number:
            raise Unknown("has sizes that do not follow the tokens")
    return Lengths(sizes)


def _scaled(w: Writing, node: Node) -> Sequence[Value]:
    """By a number, which is kept until scores are made."""
    for value, other in (node.inputs, node.inputs[::-1]):
        if isinstance(value, Appended) and isinstance(other, Known) and other.array.size == 1:
            return (dataclasses.replace(value, factor=value.factor * _number(other)),)
    return _lifted(w, node)


def _number(value: Value) -> float:
    if not isinstance(value, Known) or value.array.size != 1:
        raise Unknown("computes on all tokens so far with more than a number")
    return float(value.array.reshape(()))


def _product(w: Writing, node: Node) -> Sequence[Value]:
    """Queries `[1, h, T, d]` by keys `[1, h, S, d]`, turned here or before."""
    queries, keys = node.rows(0).along(2), node.given(1)
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
    if w.alone and scores.window is None:  # the last token sees all there are
        scores = dataclasses.replace(scores, window=0)
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
    alone = len(scores.keys.own) == len(values.own) == 1 and scores.keys.own != values.own
    attend = _attend_to_heads if alone else latent.attend
    made = attend(w, scores, values, q)
    view = reshaped(made, (1, *made.shape))
    assert view is not None
    y = Rows(view, 2)
    return (y.single() if w.alone else y,)


def _attend_to_heads(w: Writing, scores: Scores, values: Appended, q: View) -> View:
    """q `[h, d]` over keys and values that are remembered as they are: `[h, e]`."""
    k, v = (_own_heads(w, each, q.shape[0]) for each in (scores.keys, values))
    (keys,), (other,) = scores.keys.own, values.own
    state = remembered(w, keys, other, (k.shape[0], k.shape[1], v.shape[1]))
    made = w.fresh((q.shape[0], v.shape[1]))
    inputs = (q, k, v, scores.sinks or ABSENT)
    w.emit("attention", inputs, (made,), "", scores.numbers(), {"state": state.keys})
    return made


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
    (rows,) = value.own.values()
    own = _heads(w, rows)
    g = own.shape[0]
    there = origins(w.names, rows.view).part(0)
    if heads % g or not there.repeated(heads // g).same(origins(w.names, value.rows.view)):
        raise Unknown("attends to heads that are not repeated in groups")
    return own


# What is the same whether a state was multiplied by a number before or after.
MOVES = ("Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose", "Split", "Identity", "Cast")
LIFTED: dict[str, Handler] = shapes.NODES | rowwise.NODES | products.NODES
PRODUCTS = ("MatMul", "FusedMatMul")
ON_STATES: dict[str, Handler] = {"Mul": _scaled, "Shape": _size}
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
