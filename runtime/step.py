"""Who advances by which tokens: phase and owner are data, never inferred from a shape.

A step is a set of spans, each a run of new tokens of one sequence. Nothing here knows an executor:
what the segments remember of a sequence is theirs (`SequenceState`)."""

from __future__ import annotations

import enum
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np

from smoe.runtime.errors import EngineError
from smoe.runtime.ledger import Ledger

T = TypeVar("T")
# Work that pauses where another step may run, and what it ends with.
Parts = Generator[None, None, T]
Kinds = dict[str, tuple[np.dtype, tuple[int, ...]]]  # and shapes of arrays, by their names


class Phase(enum.Enum):
    """What a span's tokens are: a prompt, the next token of a generation, or given tokens whose
    logits are wanted.

    A prompt takes no shortcuts and spends no nats; the other two are decoding.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    VERIFY = "verify"


class SequenceState(Protocol):
    """What the segments remember of one sequence: the executor's own arrays."""

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` tokens, or more where there is no way back to that
        many: how many are left, 0 at worst."""
        ...

    def fork(self, length: int) -> SequenceState:
        """A copy, of the first `length` tokens, that goes its own way."""
        ...

    def snapshot(self, length: int) -> object:
        """What `restore` needs to undo the steps after the first `length` tokens, which are all, as
        long as nothing was rewound before them."""
        ...

    def restore(self, snapshot: object) -> None:
        """Back to where `snapshot` was taken."""
        ...

    def arrays(self, length: int) -> Iterator[tuple[str, np.ndarray]]:
        """All that there is of a sequence of `length` tokens, for a file, one after another and as
        often as it is asked for the same. Names are parts with dots between them."""
        ...

    def check(self, kinds: Kinds, length: int) -> None:
        """An `EngineError` where arrays of such `kinds` are not those of so many tokens."""
        ...

    def load(self, arrays: Mapping[str, np.ndarray], length: int) -> None:
        """Become what `arrays` was of, whose kinds were checked; nothing was consumed before. Those
        whose names differ in their last part alone are asked for together."""
        ...


class Sequence:
    """One request's past: the token `ids` it consumed, the `state` that the segments left, and its
    own `ledger` of what it loses (None: nothing). What is decoded of it takes no shortcut where it
    is `exact`."""

    def __init__(self, state: SequenceState, ledger: Ledger | None = None, exact: bool = False):
        self.ids: list[int] = []
        self.state = state
        self.ledger = ledger
        self.exact = exact

    @property
    def length(self) -> int:
        """Tokens consumed."""
        return len(self.ids)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens. State that cannot be shortened to that is
        shortened further, so look at `length` afterwards."""
        if length < self.length:
            del self.ids[self.state.rewind(length) :]

    def fork(self) -> Sequence:
        """A sequence with the same past that goes its own way, with the ledger as it is now."""
        ledger = None if self.ledger is None else self.ledger.fork()
        copy = Sequence(self.state.fork(self.length), ledger, self.exact)
        copy.ids = list(self.ids)
        return copy


@dataclass(frozen=True, eq=False)
class Span:
    """A run of new tokens of one sequence: `ids` int64 `[t]`, and `keep` int64 `[n]`, positions
    among them whose logits are wanted."""

    sequence: Sequence
    ids: np.ndarray
    keep: np.ndarray
    phase: Phase


@dataclass(frozen=True, eq=False)
class Step:
    """Tokens that advance together, span after span: T in all."""

    spans: tuple[Span, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return sum(len(span.ids) for span in self.spans)

    @cached_property
    def owner(self) -> np.ndarray:
        """int64 `[T]`: the span of every token."""
        return np.repeat(np.arange(len(self.spans)), [len(span.ids) for span in self.spans])

    @cached_property
    def decoding(self) -> np.ndarray:
        """bool `[T]`: the tokens that are no prompt."""
        return np.repeat(
            [span.phase is not Phase.PREFILL for span in self.spans],
            [len(span.ids) for span in self.spans],
        )

    @cached_property
    def decodes(self) -> bool:
        """Whether all of its tokens are decoded."""
        return bool(self.decoding.all())

    @cached_property
    def shortened(self) -> np.ndarray:
        """bool `[T]`: the tokens that may take shortcuts, those that are decoded of sequences that
        are not exact."""
        exact = [span.sequence.exact for span in self.spans]
        return self.decoding & ~np.repeat(exact, [len(span.ids) for span in self.spans])

    @cached_property
    def ledgers(self) -> SequenceOf[Ledger | None]:
        """Of every span, its sequence's."""
        return [span.sequence.ledger for span in self.spans]


def finished(parts: Parts[T]) -> T:
    """What `parts` end with, without a pause."""
    try:
        while True:
            next(parts)
    except StopIteration as end:
        return end.value


def checked_ids(
    ids: SequenceOf[int] | np.ndarray, vocabulary: int, context: int, longest: int, more: int = 0
) -> np.ndarray:
    """`ids` as int64 `[T]`; an `EngineError` if they are not of the vocabulary, or if they and
    `more` new tokens are more than a `context`, which may be up to `longest`."""
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError) as error:
        raise EngineError("Token ids must be a flat sequence of integers.") from error
    if array.size == 0:
        raise EngineError("The prompt is empty; give at least one token.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise EngineError("Token ids must be a flat sequence of integers.")
    if not (array.min() >= 0 and array.max() < vocabulary):
        raise EngineError(
            f"Token ids go from {array.min()} to {array.max()}; this model has 0 to "
            f"{vocabulary - 1}."
        )
    if len(array) + more > context:
        raise EngineError(
            f"{len(array)} prompt tokens and {more} new ones are more than the context of "
            f"{context}; shorten the prompt, ask for fewer tokens, or open the bundle with a "
            f"longer context (this model takes up to {longest})."
        )
    return array.astype(np.int64)


def shared_start(held: list[int], ids: np.ndarray) -> int:
    """How many tokens two sequences share at their start."""
    n = min(len(held), len(ids))
    differ = np.flatnonzero(np.asarray(held[:n], np.int64) != ids[:n])
    return int(differ[0]) if len(differ) else n
