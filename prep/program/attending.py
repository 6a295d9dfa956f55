"""Nodes that know where a token is, or look at the tokens before it: rotary and attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from smoe.artifacts.program import ABSENT, KeyValues, View
from smoe.prep.program.values import (
    INDEX,
    PAST,
    Interval,
    Known,
    Length,
    Padded,
    Remembered,
    Returned,
    Rows,
    Unknown,
    Value,
)
from smoe.prep.program.views import reshaped, sliced
from smoe.prep.program.writing import Handler, Node, Writing, told

# Inputs of GroupQueryAttention.
Q, K, V, KEYS, VALUES, LAST, TOTAL, COSINES, SINES, PLACES, MASK, SINKS = range(12)


def _rotary(w: Writing, node: Node) -> Sequence[Value]:
    """ONNX Runtime's node takes positions before its tables, the standard's (opset 23) behind."""
    standard = node.attributes.get("domain", "") == ""
    cos, sin, places = (1, 2, 3) if standard else (2, 3, 1)
    rows = node.rows(0)
    rows = rows.along(rows.rank - 2)
    tables = [_table(w, node.given(place), node.given(places)) for place in (cos, sin)]
    heads = node.attributes.get("num_heads", 0)
    view = w.read(rows)
    if rows.rank == 3:
        n = view.shape[-1]
        split = reshaped(view, (heads, n // heads)) if heads else None
        if split is None:
            raise Unknown("does not say its heads")
        view = split
    else:
        split = reshaped(view, view.shape[-2:])
        if split is None or rows.inner(-1) != len(rows.view.shape) - 1:
            raise Unknown(f"of {list(view.shape)}")
        view = split
    wide = node.attributes.get("rotary_embedding_dim", 0) or view.shape[-1]
    made = w.like(rows, view.shape)
    _turn(w, view, made.view, tables, wide, bool(node.attributes.get("interleaved")))
    whole_shape = reshaped(made.view, rows.view.shape)
    assert whole_shape is not None
    turned = dataclasses.replace(made, view=whole_shape)
    return (turned.single() if w.alone else turned,)


def _turn(w: Writing, x: View, y: View, tables: list[View], wide: int, neighbours: bool) -> None:
    """The first `wide` numbers of every head of `x` `[h, d]`; the others as they are."""
    if tables[0].shape != (wide // 2,) or tables[1].shape != (wide // 2,):
        raise Unknown(f"tables of {list(tables[0].shape)} for {wide} numbers of a head")
    pairs = {"pairs": "neighbours" if neighbours else "halves"}
    first = [sliced(view, 1, 0, wide) for view in (x, y)]
    w.emit("rotary", (first[0], *tables), (first[1],), names=pairs)
    if rest := x.shape[1] - wide:
        others = [sliced(view, 1, wide, rest) for view in (x, y)]
        w.emit("unary", (others[0],), (others[1],), names={"how": "copy"})


def _table(w: Writing, table: Value, places: Value) -> View:
    """A rotary table's row of each token."""
    own = isinstance(places, Rows) and places.view.source == INDEX
    own |= w.alone and isinstance(places, Known) and not places.array.any()
    rows = table.rows if isinstance(table, Padded) else table
    if places is None and isinstance(rows, Rows):
        own = rows is table
    if not own or not isinstance(rows, Rows):
        raise Unknown("takes rotary tables by other numbers than those of its rows")
    view = reshaped(w.dense(rows), rows.view.shape[-1:])
    if view is None:
        raise Unknown(f"rotary tables of {list(rows.view.shape)}")
    return view


def _attention(w: Writing, node: Node) -> Sequence[Value]:
    """GroupQueryAttention over a state that grows in place."""
    attributes = node.attributes
    if attributes.get("local_window_size", -1) > 0 or attributes.get("smooth_softmax", 0) > 0:
        raise Unknown("has a window or a softmax of its own")
    _check_lengths(w, node)
    heads, groups = attributes["num_heads"], attributes["kv_num_heads"]
    q, k, v = _projected(w, node, heads, groups)
    if attributes.get("do_rotary"):
        tables = [_table(w, node.given(place), node.given(PLACES)) for place in (COSINES, SINES)]
        wide, turned = 2 * tables[0].shape[-1], []
        for view in (q, k):
            made = w.fresh(view.shape)
            _turn(w, view, made, tables, wide, bool(attributes.get("rotary_interleaved")))
            turned.append(made)
        q, k = turned
    scale = attributes.get("scale") or 1 / math.sqrt(q.shape[1])
    sinks = ABSENT if node.given(SINKS) is None else w.constant(node.constant(SINKS))
    numbers = {
        "scale": float(scale),
        "window": float(_window(node.given(MASK))),
        "softcap": float(attributes.get("softcap", 0.0)),
    }
    keys, values = node.given(KEYS), node.given(VALUES)
    if not isinstance(keys, Remembered) or not isinstance(values, Remembered):
        raise Unknown("its keys and values are no state")
    state = remembered(w, keys.name, values.name, (groups, k.shape[1], v.shape[1]))
    made = w.fresh((heads, v.shape[1]))
    w.emit("attention", (q, k, v, sinks), (made,), "", numbers, {"state": state.keys})
    joined = reshaped(made, (1, heads * v.shape[1]))
    assert joined is not None
    y = Rows(joined, 1)
    return (y.single() if w.alone else y, Returned(state.keys), Returned(state.values))


def _check_lengths(w: Writing, node: Node) -> None:
    """The state holds what lies before the call, and after it the call's tokens as well."""
    total = PAST + w.tokens
    if node.lengths(TOTAL).reshape(-1).tolist() != [total]:
        raise Unknown("attends to another number of tokens than there are")
    if node.lengths(LAST).reshape(-1).tolist() != [total - Length(1)]:
        raise Unknown("appends somewhere else than behind its state")


def _projected(w: Writing, node: Node, heads: int, groups: int) -> list[View]:
    """Queries, keys and values `[heads or groups, d]`, which may lie in one input."""
    counts = (heads, groups, groups)
    if node.given(K) is None and node.given(V) is None:
        view = w.dense(node.rows(Q))
        width = math.prod(view.shape) // sum(counts)
        whole = reshaped(view, (sum(counts), width))
        assert whole is not None
        starts = (0, heads, heads + groups)
        return [sliced(whole, 0, s, n) for s, n in zip(starts, counts, strict=True)]
    parts = []
    for place, count in zip((Q, K, V), counts, strict=True):
        rows = node.rows(place).along(1)
        if rows.axis != 1 or rows.rank != 3:
            raise Unknown(f"input {place} has its tokens on axis {rows.axis}")
        width = rows.view.shape[-1] // count
        split = reshaped(w.read(rows), (count, width))
        if split is None or (width > 1 and split.strides[1] != 1):
            split = reshaped(w.copy(rows.view, rows.kind, rows.kept), (count, width))
        assert split is not None
        parts.append(split)
    return parts


def _window(mask: Value) -> int:
    """How many keys a token sees (0: all before it)."""
    if mask is None:
        return 0
    if isinstance(mask, Interval):
        return mask.window
    if isinstance(mask, Known) and not mask.array.any():
        return 0
    raise Unknown(f"its mask {told(mask)}")


def remembered(w: Writing, keys: str, values: str, sizes: tuple[int, int, int]) -> KeyValues:
    """The state that an attention appends to, of so many heads, and numbers of a key and a
    value."""
    groups, key_width, value_width = sizes
    check_growing(w, keys, groups, key_width)
    check_growing(w, values, groups, value_width)
    state = KeyValues(keys, values, w.index, groups, key_width, value_width)
    w.states.append(state)
    return state


def check_growing(w: Writing, name: str, heads: int, width: int) -> None:
    """`Unknown` unless a state of this segment appends so many heads of that width."""
    spec = w.specs[name]
    shape = [size for axis, size in enumerate(spec.shape) if axis != spec.growing]
    if shape != [1, heads, width] or spec.growing != 2 or spec.segment != w.index:
        raise Unknown(f"its state {name} is of {list(spec.shape)}")


NODES: dict[str, Handler] = {"RotaryEmbedding": _rotary, "GroupQueryAttention": _attention}
