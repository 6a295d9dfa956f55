"""A step of sequences that generate: a token for each, and more where guesses are right."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from smoe.runtime.draft.pays import Odds, StepTimes, guesses_that_pay
from smoe.runtime.errors import EngineError
from smoe.runtime.generation import Continuation, Token
from smoe.runtime.model import FEW
from smoe.runtime.stats import Stats
from smoe.runtime.step import Phase, Sequence, Span, Step


class Proposer(Protocol):
    """Guesses for one sequence. `odds` are how likely one is right before any was checked, by how
    sure the proposer is."""

    odds: SequenceOf[float]

    def sure(self, sequence: Sequence, last: int) -> int:
        """How sure it is of what comes after `last`: a place in `odds`, or -1 if it has nothing to
        propose. Cheap."""
        ...

    def propose(self, sequence: Sequence, made: Continuation, last: int, count: int) -> list[int]:
        """Up to `count` tokens after `last`, which comes after what `sequence` consumed. Nothing of
        either changes."""
        ...


@dataclass(eq=False)
class Draft:
    """The guesses of one generation: who makes them, and how they did, by how `sure` that was of
    the last ones. `seconds` are what one takes to make."""

    proposer: Proposer
    odds: list[Odds] = field(init=False)
    sure: int = -1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.odds = [Odds(first) for first in self.proposer.odds]


@dataclass(frozen=True, eq=False)
class Going:
    """A sequence whose token `last` was `made` and not consumed yet. `take` draws the next one from
    float32 `[vocabulary]`, and `made` hears of it."""

    sequence: Sequence
    made: Continuation
    last: int
    take: Callable[[np.ndarray], Token]


class Decoder:
    """`step` runs the model and `stats` counts. `new_proposer` makes who guesses for a generation,
    up to `most` tokens in a step (None: nobody does)."""

    def __init__(
        self,
        step: Callable[[Step], list[np.ndarray]],
        stats: Stats,
        new_proposer: Callable[[], Proposer] | None = None,
        most: int = 0,
    ):
        self._step, self._stats = step, stats
        self._new_proposer, self._most = new_proposer, most
        self._times = StepTimes()

    def new_draft(self) -> Draft | None:
        """For one generation."""
        return None if self._new_proposer is None else Draft(self._new_proposer())

    def advance(self, going: SequenceOf[Going]) -> list[list[Token] | EngineError]:
        """What comes of each, in one step: tokens as they would come one by one, or what it failed
        of. An `EngineError` that is nobody's own leaves all sequences as they were."""
        started = time.perf_counter()
        guesses = [self._guess(one, len(going) - 1) for one in going]
        guessed = time.perf_counter()
        try:
            rows = self._rows(going, guesses)
        except EngineError:  # which may be of a guess
            if not any(guesses):
                raise
            guesses = [[] for _ in going]
            rows = self._rows(going, guesses)
        came = [self._take(*each) for each in zip(going, guesses, rows, strict=True)]
        ended = time.perf_counter()
        self._times.seen(len(going) + sum(map(len, guesses)), ended - guessed)
        self._stats.decode_steps += 1
        self._stats.decode_seconds += ended - started
        return came

    def _rows(self, going: SequenceOf[Going], guesses: SequenceOf[list[int]]) -> list[np.ndarray]:
        """Of each, the logits float32 `[1 + guesses, vocabulary]`."""
        spans = tuple(_span(one, its) for one, its in zip(going, guesses, strict=True))
        with _ledgers_kept(spans):
            return self._step(Step(spans))

    def _guess(self, one: Going, others: int) -> list[int]:
        """As many guesses as pay in a step in which so many `others` have a token each."""
        draft, room = one.made.draft, FEW // (others + 1) - 1
        most = min(self._most, room, one.made.left - 1)
        if draft is None or most < 1:
            return []
        draft.sure = draft.proposer.sure(one.sequence, one.last)
        if draft.sure < 0:
            return []
        odds = draft.odds[draft.sure]
        count = guesses_that_pay(self._times, others, odds.right, most, draft.seconds)
        if not count:
            odds.rest()
            return []
        started = time.perf_counter()
        guesses = draft.proposer.propose(one.sequence, one.made, one.last, count)
        draft.seconds = (time.perf_counter() - started) / max(1, len(guesses))
        return guesses

    def _take(
        self, one: Going, guesses: list[int], logits: np.ndarray
    ) -> list[Token] | EngineError:
        """The tokens that come, by logits float32 `[1 + guesses, vocabulary]`: if one is what was
        guessed, the next one can be drawn too."""
        start, tokens = one.sequence.length - len(logits), list[Token]()
        try:
            for row, guess in zip(logits, [*guesses, None], strict=True):
                tokens.append(one.take(row))
                if one.made.finish or tokens[-1].id != guess:
                    break
            self._count(one, guesses, len(tokens) - 1)
            self._settle(one, guesses, start + len(tokens))
        except EngineError as error:
            return error
        return tokens

    def _count(self, one: Going, guesses: list[int], right: int) -> None:
        self._stats.guesses_checked += len(guesses)
        self._stats.guesses_right += right
        if guesses and one.made.draft is not None:
            odds = one.made.draft.odds[one.made.draft.sure]
            odds.seen(right, right < len(guesses) and not one.made.finish)

    def _settle(self, one: Going, guesses: list[int], length: int) -> None:
        """The sequence consumed `length` tokens, one by one as it were. State that cannot be
        shortened to that is shortened further, and what is missing is consumed again."""
        sequence, ids = one.sequence, [one.last, *guesses]
        start = sequence.length - len(ids)
        sequence.rewind(length)
        again = ids[sequence.length - start : length - start]
        if again:
            nothing = np.zeros(0, np.int64)
            self._step(Step((Span(sequence, np.array(again), nothing, Phase.VERIFY),)))


@contextlib.contextmanager
def _ledgers_kept(spans: SequenceOf[Span]) -> Iterator[None]:
    """A step that fails costs nobody anything."""
    sequences = [span.sequence for span in spans]
    before = [one.ledger and one.ledger.fork() for one in sequences]
    try:
        yield
    except BaseException:
        for sequence, ledger in zip(sequences, before, strict=True):
            sequence.ledger = ledger
        raise


def _span(one: Going, guesses: list[int]) -> Span:
    """With the logits of every token."""
    ids = np.array([one.last, *guesses])
    phase = Phase.VERIFY if guesses else Phase.DECODE
    return Span(one.sequence, ids, np.arange(len(ids)), phase)
