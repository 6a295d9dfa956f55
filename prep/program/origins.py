"""Where the numbers of a view come from, once copies are seen through: how a pattern that is spread
over many nodes which only move numbers is recognised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smoe.artifacts.program import Op, View
from smoe.prep.program.writing import Names


@dataclass(frozen=True, eq=False)
class Origins:
    """Of every number of a view: the buffer or constant that it was computed in, str, and which
    number of a row it is there, int64; both have the view's shape."""

    sources: np.ndarray
    places: np.ndarray

    def same(self, other: Origins) -> bool:
        """Whether both are the same numbers in the same order, in any shape."""
        return np.array_equal(self.sources.reshape(-1), other.sources.reshape(-1)) and (
            np.array_equal(self.places.reshape(-1), other.places.reshape(-1))
        )

    def part(self, *where: int | slice | np.ndarray) -> Origins:
        """Those of a part of the view."""
        return Origins(self.sources[where], self.places[where])

    def repeated(self, times: int) -> Origins:
        """Each along the first axis so many times."""
        return Origins(np.repeat(self.sources, times, 0), np.repeat(self.places, times, 0))


def origins(names: Names, view: View) -> Origins:
    """Those of `view`, whose buffer has been written whole."""
    at, writers = _places(view), names.writers.get(view.source, [])
    if not writers or not all(_copies(names, op) for op in writers):
        return Origins(np.full(at.shape, view.source, object), at)
    count = names.buffers[view.source].numbers
    sources, places = np.full(count, view.source, object), np.arange(count)
    for op in writers:
        given, into = origins(names, op.inputs[0]), _places(op.outputs[0])
        sources[into], places[into] = given.sources, given.places
    return Origins(sources[at], places[at])


def _places(view: View) -> np.ndarray:
    """Which number of a row each of a view is, int64 of its shape."""
    at = np.array(view.offset, np.int64)
    for size, stride in zip(view.shape, view.strides, strict=True):
        at = at[..., None] + np.arange(size) * stride
    return at


def _copies(names: Names, op: Op) -> bool:
    """Whether an operation only moves numbers: a copy may also convert them."""
    views = (*op.inputs, *op.outputs)
    kinds = {names.buffers[v.source].kind if v.source in names.buffers else "f32" for v in views}
    return op.kind == "unary" and op.names == {"how": "copy"} and len(kinds) == 1
