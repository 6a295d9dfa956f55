"""A segment's operations as they are written, and what a node is for those who write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smoe.artifacts.manifest import State
from smoe.artifacts.program import Buffer, KeyValues, Op, View
from smoe.prep.program.values import (
    ALONE,
    IDS,
    INDEX,
    PAST,
    POSITION,
    TOKENS,
    Early,
    Interval,
    Known,
    Length,
    Lengths,
    Rows,
    Unknown,
    Value,
    length,
)
from smoe.prep.program.views import broadcast, is_dense, view_of, whole
from smoe.prep.program.weights import Weights

VIRTUAL = (IDS, INDEX, POSITION)


@dataclass(frozen=True)
class Node:
    """A node of the graph whose inputs are known: `names` are those of its outputs. `alone`: the
    graph takes a single token."""

    kind: str
    inputs: tuple[Value, ...]
    names: tuple[str, ...]
    attributes: dict[str, Any]
    alone: bool = False

    def given(self, place: int) -> Value:
        """An input, or None where it is left out."""
        return self.inputs[place] if place < len(self.inputs) else None

    def rows(self, place: int) -> Rows:
        """An input that has a row for every token."""
        value = self.given(place)
        if isinstance(value, Rows):
            return value
        if self.alone and isinstance(value, Lengths) and all(n == PAST for n in value.array.flat):
            return Rows(broadcast(whole(POSITION, ()), value.array.shape), ALONE, "i64")
        raise Unknown(f"input {place} {told(value)}")

    def constant(self, place: int) -> Known:
        """An input that the graph knows."""
        value = self.given(place)
        if isinstance(value, Known):
            return value
        raise Unknown(f"input {place} {told(value)}")

    def optional(self, place: int) -> Known | None:
        """A constant that may be left out."""
        return None if self.given(place) is None else self.constant(place)

    def lengths(self, place: int) -> np.ndarray:
        """An input of integers, as an array of `Length`."""
        value = self.given(place)
        if isinstance(value, Lengths):
            return value.array
        if isinstance(value, Known) and value.array.dtype.kind in "iu":
            return as_lengths(value.array)
        raise Unknown(f"input {place} {told(value)}")


def as_lengths(array: np.ndarray) -> np.ndarray:
    """The same integers as an array of `Length`."""
    lengths = np.empty(array.shape, object)
    for place in np.ndindex(array.shape):
        lengths[place] = length(array[place].item())
    return lengths


def integers(array: np.ndarray) -> Known | Lengths:
    """An array of `Length`, known where all of it is numbers."""
    if all(each.is_number for each in array.flat):
        flat = [each.constant for each in array.flat]
        return Known(np.array(flat, np.int64).reshape(array.shape))
    return Lengths(array)


def told(value: Value) -> str:
    """What a value is, for reasons."""
    known = {Known: "is a constant", Lengths: "is a length", Rows: "is a row of numbers"}
    if isinstance(value, Early):
        return "follows from lengths in no known way"
    if isinstance(value, Interval):
        return "is a mask"
    return known.get(type(value), "is left out" if value is None else "is a state")


@dataclass
class Names:
    """Buffers of a program, each with a name of its own, and who writes them."""

    buffers: dict[str, Buffer] = field(default_factory=dict)
    writers: dict[str, list[Op]] = field(default_factory=dict)
    reserved: frozenset[str] = frozenset()  # those that others ask for by name

    def add(self, name: str, kind: str, shape: Sequence[int], kept: bool) -> View:
        """A new buffer, called `name` or something like it."""
        unique, number = name, 0
        while unique in self.buffers or unique in self.reserved:
            number += 1
            unique = f"{name}.{number}"
        self.buffers[unique] = Buffer(unique, kind, tuple(shape), kept)
        return whole(unique, shape)


@dataclass
class Writing:
    """The operations of segment `index` so far. `alone`: its graph takes a single token."""

    index: int
    names: Names
    weights: Weights
    specs: dict[str, State]  # of the manifest, by input
    alone: bool = False
    ops: list[Op] = field(default_factory=list)
    states: list[KeyValues] = field(default_factory=list)
    called: str = ""  # the node's first output
    # States that every token replaces: recalled, to where; convolved.
    recalled: dict[str, View] = field(default_factory=dict)
    convolved: set[str] = field(default_factory=set)

    @property
    def tokens(self) -> Length:
        """Of a call."""
        return Length(1) if self.alone else TOKENS

    def emit(
        self,
        kind: str,
        inputs: Sequence[View],
        outputs: Sequence[View],
        weight: str = "",
        numbers: dict[str, float] | None = None,
        names: dict[str, str] | None = None,
    ) -> None:
        """Add an operation."""
        op = Op(kind, tuple(inputs), tuple(outputs), weight, numbers, names)
        self.ops.append(op)
        for view in outputs:
            self.names.writers.setdefault(view.source, []).append(op)

    def fresh(self, shape: Sequence[int], kind: str = "f32", kept: bool = False) -> View:
        """All of a new buffer."""
        return self.names.add(self.called, kind, shape, kept)

    def maker(self, view: View) -> Op | None:
        """The operation that alone wrote a buffer, of which `view` is all, in any shape."""
        ops = self.names.writers.get(view.source, [])
        alone = len(ops) == 1 and is_dense(view) and not view.offset
        buffer = self.names.buffers.get(view.source)
        return ops[0] if alone and buffer and buffer.numbers == math.prod(view.shape) else None

    def read(self, rows: Rows) -> View:
        """A view that an operation can take."""
        view = rows.view
        if view.source not in VIRTUAL:
            return view
        if view.source != POSITION:
            raise Unknown("computes with token ids or with a row's number")
        made = self.fresh((), rows.kind)
        self.emit("position", (), (made,))
        return view_of(made.source, 0, view.shape, view.strides)

    def dense(self, rows: Rows) -> View:
        """The same, its numbers one after another."""
        view = self.read(rows)
        return view if is_dense(view) else self.copy(view, rows.kind, rows.kept)

    def copy(self, view: View, kind: str, kept: bool) -> View:
        """The numbers of a view in a buffer of their own."""
        made = self.fresh(view.shape, kind, kept)
        self.emit("unary", (view,), (made,), names={"how": "copy"})
        return made

    def constant(self, known: Known, shape: Sequence[int] | None = None) -> View:
        """A view of a float constant, as `shape`."""
        if known.array.dtype != np.float32:
            raise Unknown(f"a constant of {known.array.dtype} where floats are wanted")
        view = self.weights.vector(known)
        return view if shape is None else broadcast(view, shape)

    def aligned(self, values: Sequence[Value]) -> tuple[list[View], Rows]:
        """Values broadcast to one shape, as views, and rows of that shape, which say where the
        tokens are and whether they are the kept ones."""
        given = [value for value in values if isinstance(value, Rows)]
        known = [value.array.ndim for value in values if isinstance(value, Known)]
        if not given or len(given) + len(known) != len(values):
            odd = next((v for v in values if not isinstance(v, (Rows, Known))), None)
            raise Unknown(f"an input {told(odd)}")
        rank = max([rows.rank for rows in given] + known)
        axes = {ALONE if rows.alone else rows.axis + rank - rows.rank for rows in given}
        if len(axes) != 1 or len({rows.kept for rows in given}) != 1:
            raise Unknown("its inputs have their tokens on different axes")
        (axis,) = axes
        views = [self._inner(value, axis, rank) for value in values]
        shape = np.broadcast_shapes(*(view.shape for view in views))
        like = Rows(whole("", shape), axis, given[0].kind, given[0].kept)
        return [broadcast(view, shape) for view in views], like

    def _inner(self, value: Value, axis: int, rank: int) -> View:
        """A value's numbers of one row, with as many axes as `rank` less the tokens'."""
        if isinstance(value, Rows):
            view = self.read(value)
            return broadcast(view, (1,) * (rank - value.rank) + view.shape)
        assert isinstance(value, Known)
        shape = (1,) * (rank - value.array.ndim) + value.array.shape
        if axis != ALONE and shape[axis] != 1:
            raise Unknown("a constant with a number for every token")
        inner = shape if axis == ALONE else shape[:axis] + shape[axis + 1 :]
        if value.array.dtype == np.float32:
            view = self.weights.vector(value)
            return view_of(view.source, 0, inner, whole("", inner).strides)
        return self._filled(value.array, inner)

    def _filled(self, array: np.ndarray, shape: Sequence[int]) -> View:
        """Integers or truths that are all the same."""
        if array.size != 1:
            raise Unknown(f"a constant of {array.dtype} with several numbers")
        kind = "bool" if array.dtype == bool else "i64"
        made = self.fresh((), kind)
        self.emit("fill", (), (made,), numbers={"value": float(array.reshape(())[()])})
        return broadcast(made, shape)

    def like(self, rows: Rows, shape: Sequence[int], kind: str = "") -> Rows:
        """A new buffer's rows, tokens where those of `rows` are."""
        kind = kind or rows.kind
        return Rows(self.fresh(shape, kind, rows.kept), rows.axis, kind, rows.kept)


Handler = Callable[[Writing, Node], Sequence[Value]]
