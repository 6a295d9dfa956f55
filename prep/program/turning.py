"""Rotary that a graph writes out, found again: products with cosines and sines, a sum and a
difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from smoe.artifacts.program import Op, View
from smoe.prep.program.values import Rows
from smoe.prep.program.views import broadcast, reshaped, sliced, squeezed, view_of
from smoe.prep.program.writing import Writing


def halves(w: Writing, parts: Sequence[Rows]) -> Rows | None:
    """(x1 cos - x2 sin, x2 cos + x1 sin) that are to be joined, where x1 and x2 are the halves of
    every head."""
    if len(parts) != 2 or len(parts[0].view.shape) < 2:
        return None
    low, high = (w.maker(part.view) for part in parts)
    first, second = _products(w, low, "sub"), _products(w, high, "add")
    n = parts[0].view.shape[-1]
    if not first or not second:
        return None
    for x1, cos in _orders(first[0]):
        for x2, sin in _orders(first[1]):
            sums, crossed = [{*pair} for pair in second], [{x2, cos}, {x1, sin}]
            x = _joined(x1, x2, n)
            if x is not None and sums in (crossed, crossed[::-1]):
                return _rotary(w, parts[0], x, (cos, sin), "halves")
    return None


def neighbours(w: Writing, a: Rows, b: Rows) -> Rows | None:
    """x cos + r sin, where r has -x[2i + 1] and x[2i] side by side, and each cosine and sine is
    there twice."""
    plain, turned = (w.maker(rows.view) for rows in (a, b))
    if not _is(plain, "mul") or not _is(turned, "mul"):
        return None
    assert plain is not None and turned is not None
    for x, cos in _orders(plain.inputs):
        for r, sin in _orders(turned.inputs):
            tables = [_once(w, table, x) for table in (cos, sin)]
            if None not in tables and _is_turned(w, r, x):
                return _rotary(w, a, x, [t for t in tables if t is not None], "neighbours")
    return None


def _is(op: Op | None, how: str) -> bool:
    return op is not None and op.kind == "binary" and op.names == {"how": how}


def _orders(pair: Sequence[View]) -> list[tuple[View, View]]:
    return [(pair[0], pair[1]), (pair[1], pair[0])]


def _products(w: Writing, op: Op | None, how: str) -> list[tuple[View, View]]:
    """The factors of both products that a difference or sum is of; none where it is not."""
    if op is None or not _is(op, how):
        return []
    makers = [w.maker(view) for view in op.inputs]
    if not all(_is(maker, "mul") for maker in makers):
        return []
    return [(maker.inputs[0], maker.inputs[1]) for maker in makers if maker is not None]


def _joined(x1: View, x2: View, n: int) -> View | None:
    """The heads whose halves these are."""
    there = (x2.source, x2.offset, x2.shape, x2.strides)
    if there != (x1.source, x1.offset + n, x1.shape, x1.strides) or x1.strides[-1] != 1:
        return None
    shape = (*x1.shape[:-1], 2 * n)
    return view_of(x1.source, x1.offset, shape, x1.strides)


def _is_turned(w: Writing, r: View, x: View) -> bool:
    """Whether r[2i] is -x[2i + 1], and r[2i + 1] is x[2i]."""
    writers, last = w.names.writers.get(r.source, []), len(x.shape) - 1
    if len(writers) != 2 or any(op.names != {"how": "copy"} for op in writers) or r.offset:
        return False
    n = x.shape[-1] // 2
    even, odd = (sliced(x, last, start, n, 2) for start in (0, 1))
    places = [squeezed(sliced(r, last, start, n, 2)) for start in (0, 1)]
    if [squeezed(op.outputs[0]) for op in writers] != places:
        return False
    minus = w.maker(writers[0].inputs[0])
    negative = minus is not None and minus.names == {"how": "neg"}
    right = squeezed(writers[1].inputs[0]) == squeezed(even)
    return right and negative and minus is not None and squeezed(minus.inputs[0]) == squeezed(odd)


def _once(w: Writing, table: View, x: View) -> View | None:
    """A table's row with each number once, where `table` has each twice, for every head."""
    width = x.shape[-1]
    row = view_of(table.source, table.offset, (width,), table.strides[-1:])
    if table != broadcast(row, x.shape):
        return None
    copy = w.maker(row)
    if copy is None or copy.names != {"how": "copy"}:
        return None
    twice = squeezed(copy.inputs[0])
    if twice.shape != (width // 2, 2) or twice.strides[1] != 0:
        return None
    return view_of(twice.source, twice.offset, twice.shape[:1], twice.strides[:1])


def _rotary(w: Writing, like: Rows, x: View, tables: Sequence[View], pairs: str) -> Rows | None:
    """The operation, on heads `[h, d]`."""
    heads = reshaped(x, x.shape[-2:])
    rows = [_row(table, x.shape[-1] // 2) for table in tables]
    if heads is None or None in rows:
        return None
    made = w.like(like, heads.shape)
    w.emit(
        "rotary", (heads, *[r for r in rows if r is not None]), (made.view,), names={"pairs": pairs}
    )
    view = reshaped(made.view, x.shape)
    return None if view is None else dataclasses.replace(made, view=view)


def _row(table: View, n: int) -> View | None:
    """A table that is the same for every head, as one row."""
    row = view_of(table.source, table.offset, (n,), table.strides[-1:])
    return row if table == row or table == broadcast(row, table.shape) else None
