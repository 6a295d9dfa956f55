"""What a value of the graph is while a segment is compiled: numbers of every row, something known,
or something that follows from the lengths of a call alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.program import View


class Unknown(Exception):
    """A node that no operation of a program does; says why."""


@dataclass(frozen=True)
class Length:
    """An integer of a call: `constant` + `tokens` * its new tokens + `past` * those before."""

    constant: int
    tokens: int = 0
    past: int = 0

    def __add__(self, other: Length | int) -> Length:
        o = length(other)
        parts = (self.constant + o.constant, self.tokens + o.tokens, self.past + o.past)
        return Length(*parts)

    def __sub__(self, other: Length | int) -> Length:
        return self + length(other) * -1

    def __mul__(self, other: Length | int) -> Length:
        o = length(other)
        if o.is_number:
            n = o.constant
            return Length(self.constant * n, self.tokens * n, self.past * n)
        if self.is_number:
            return o * self.constant
        raise Unknown("a product of lengths")

    @property
    def is_number(self) -> bool:
        return not (self.tokens or self.past)


def length(value: Length | int) -> Length:
    """An integer as one."""
    return value if isinstance(value, Length) else Length(int(value))


TOKENS, PAST = Length(0, tokens=1), Length(0, past=1)
ALONE = -1  # in place of the tokens' axis, where a graph takes a single token and needs none

Dim = Length | int

# Sources of rows that are no buffers: they are never read as numbers, or made when they are.
IDS = "#ids"  # of the tokens
INDEX = "#index"  # of a row among those of its call
POSITION = "#position"  # tokens of its sequence before it


@dataclass(frozen=True)
class Known:
    """The same for every call: a constant of the graph."""

    array: np.ndarray
    name: str = ""  # of the initializer


@dataclass(frozen=True, eq=False)
class Lengths:
    """Integers that follow from the lengths of a call: an array of `Length`."""

    array: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Numbers of every row. The graph's shape is the view's, with the tokens' axis put in as number
    `axis`; where the graph takes a single token it is the view's as it is, and `axis` is ALONE."""

    view: View
    axis: int
    kind: str = "f32"
    kept: bool = False

    @property
    def alone(self) -> bool:
        return self.axis == ALONE

    @property
    def rank(self) -> int:
        return len(self.view.shape) + (not self.alone)

    def dims(self) -> list[Dim]:
        """The graph's shape."""
        shape: list[Dim] = list(self.view.shape)
        if self.alone:
            return shape
        return [*shape[: self.axis], TOKENS, *shape[self.axis :]]

    def inner(self, axis: int) -> int:
        """The view's axis that is the graph's `axis`; `Unknown` for the tokens'."""
        axis += self.rank if axis < 0 else 0
        if axis == self.axis:
            raise Unknown("works along the tokens")
        return axis - (axis > self.axis and not self.alone)

    def along(self, axis: int) -> Rows:
        """The same with the tokens on this axis of the graph's, where it has one for them."""
        if not self.alone:
            return self
        shape, strides = list(self.view.shape), list(self.view.strides)
        if axis >= len(shape) or shape.pop(axis) != 1:
            raise Unknown(f"has several numbers on axis {axis}")
        del strides[axis]
        view = dataclasses.replace(self.view, shape=tuple(shape), strides=tuple(strides))
        return dataclasses.replace(self, view=view, axis=axis)

    def turned(self) -> Rows:
        """The last two axes of the graph's the other way round."""
        rank = self.rank
        if self.axis in (rank - 1, rank - 2):
            return dataclasses.replace(self, axis=2 * rank - 3 - self.axis)
        view, axes = self.view, list(range(len(self.view.shape)))
        order = [*axes[:-2], *axes[-2:][::-1]]
        shape, strides = ([part[i] for i in order] for part in (view.shape, view.strides))
        view = dataclasses.replace(view, shape=tuple(shape), strides=tuple(strides))
        return dataclasses.replace(self, view=view)

    def single(self) -> Rows:
        """The same as a graph of a single token has it."""
        if self.alone:
            return self
        shape, strides = list(self.view.shape), list(self.view.strides)
        shape.insert(self.axis, 1)
        strides.insert(self.axis, 0)
        view = dataclasses.replace(self.view, shape=tuple(shape), strides=tuple(strides))
        return dataclasses.replace(self, view=view, axis=ALONE)


@dataclass(frozen=True)
class Padded:
    """A row for every token, and others behind them that nobody looks at."""

    rows: Rows


@dataclass(frozen=True)
class Remembered:
    """A state as a call receives it."""

    name: str


@dataclass(frozen=True)
class Carried:
    """A state that every token replaces, as a call receives it."""

    name: str


@dataclass(frozen=True)
class Shifted:
    """A state of vectors of the last tokens, `[1, c, n]`, and behind them those of the call's,
    `rows`."""

    state: Carried
    rows: Rows


@dataclass(frozen=True, eq=False)
class Convolved:
    """A part of a convolution along all of `shifted`, each of the c numbers for itself: `weight`
    `[c, 1, taps]`. It has so many `places`; the window of the first ends with vector number `end`
    of the state and the call."""

    shifted: Shifted
    weight: Known
    bias: Known | None
    end: Length
    places: Length


@dataclass(frozen=True)
class Returned:
    """What a call returns of a state: `name` is the input that will receive it."""

    name: str


@dataclass(frozen=True)
class Appended:
    """What is worked out of every token so far by itself: `rows` has that of the call's tokens, and
    where these have the tokens' axis, the whole has that of all tokens so far. It follows from the
    states in `own`, by name, which has the rows that the call appended to each; a state with the
    call's tokens behind it is one whose `rows` are these. `factor` is what all of it was multiplied
    with since."""

    rows: Rows
    own: dict[str, Rows]
    factor: float = 1.0

    @property
    def state(self) -> str:
        """The name of the state that this is, as a call leaves it; '' where it is more or less."""
        return next((name for name, rows in self.own.items() if self.rows == rows), "")


@dataclass(frozen=True)
class Scores:
    """Attention on its way, written out: scores of every token with all so far, `scale` q . k, and
    then a softmax of them. `window` is None until they are masked; `sinks` `[heads]` are a column
    behind the others as long as they are `behind`."""

    queries: Rows
    keys: Appended
    scale: float
    softcap: float = 0.0
    window: int | None = None
    sinks: View | None = None
    behind: bool = False
    bent: bool = False  # by a tanh, and not yet multiplied by the cap
    soft: bool = False

    def numbers(self) -> dict[str, float]:
        """Those of the operation that this comes to."""
        window = float(self.window or 0)
        return {"scale": self.scale, "window": window, "softcap": self.softcap}


@dataclass(frozen=True)
class Largest:
    """Of every token's scores: no softmax minds what is taken from all of them."""

    scores: Scores


@dataclass(frozen=True)
class Early:
    """Follows from the lengths of a call in a way that only running it tells (`probe`)."""

    name: str


@dataclass(frozen=True)
class Interval:
    """A mask: a token sees itself and those before it, `window` of them at most (0: all)."""

    window: int


@dataclass(frozen=True)
class Lost:
    """What a node that no operation does would give, and what follows from it; `segment` has that
    node."""

    why: str
    segment: int


Value = (
    Known
    | Lengths
    | Rows
    | Padded
    | Remembered
    | Carried
    | Shifted
    | Convolved
    | Returned
    | Appended
    | Scores
    | Largest
    | Early
    | Interval
    | Lost
    | None
)
