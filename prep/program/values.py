"""What a value of the graph is while a segment is compiled: numbers of every row, something known,
or something that follows from the lengths of a call alone."""

from __future__ import annotations

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
    `axis`."""

    view: View
    axis: int
    kind: str = "f32"
    kept: bool = False

    @property
    def rank(self) -> int:
        return len(self.view.shape) + 1

    def dims(self) -> list[Dim]:
        """The graph's shape."""
        shape: list[Dim] = list(self.view.shape)
        return [*shape[: self.axis], TOKENS, *shape[self.axis :]]

    def inner(self, axis: int) -> int:
        """The view's axis that is the graph's `axis`; `Unknown` for the tokens'."""
        axis += self.rank if axis < 0 else 0
        if axis == self.axis:
            raise Unknown("works along the tokens")
        return axis - (axis > self.axis)


@dataclass(frozen=True)
class Padded:
    """A row for every token, and others behind them that nobody looks at."""

    rows: Rows


@dataclass(frozen=True)
class Remembered:
    """A state as a call receives it."""

    name: str


@dataclass(frozen=True)
class Returned:
    """What a call returns of a state: `name` is the input that will receive it."""

    name: str


@dataclass(frozen=True)
class Appended:
    """A state with the call's tokens behind it: `rows` has the new ones, and where these have the
    tokens' axis, the whole has that of all tokens so far. `own` are the new ones as they were
    appended; `factor` is what all of it was multiplied with since."""

    name: str
    rows: Rows
    own: Rows
    factor: float = 1.0


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
    | Returned
    | Appended
    | Scores
    | Largest
    | Early
    | Interval
    | Lost
    | None
)
