"""Guesses by the model itself, on what is in memory: it never reads."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from smoe.runtime.cache.residency import Key
from smoe.runtime.experts import Held, LocalExperts, Pending
from smoe.runtime.generation import Continuation
from smoe.runtime.model import Model
from smoe.runtime.routing import Assignment, Available, Dispatch, Routed
from smoe.runtime.step import Phase, Sequence, Span, Step


def on_resident(routed: Routed, available: Available) -> Assignment:
    """A `routing.Chooser`: slots whose experts are missing are left out, others keep their weights,
    and what is resident runs at the level it has."""
    levels = np.append(available.level, 0)[routed.ids]
    nothing = len(available.level)
    ids = np.where(levels > 0, routed.ids, nothing)
    weights = np.where(levels > 0, routed.weights, np.float32(0))
    return Assignment(ids=ids, weights=weights, levels=levels)


class ResidentExperts:
    """Those that are in memory now, and nothing else: nobody hears that they were used
    (`experts.Experts`)."""

    def __init__(self, experts: LocalExperts):
        self._experts = experts

    def available(self, layer: int) -> Available:
        return self._experts.available(layer)

    def observe(self, routed: Routed) -> None:
        pass

    def expect(self, guesses: Iterable[Key]) -> None:
        pass

    def at_hand(
        self, routed: Routed, assignment: Assignment, available: Available
    ) -> np.ndarray | None:
        outputs = np.zeros((*assignment.ids.shape, routed.hidden.shape[1]), np.float32)
        dispatch = Dispatch.of(assignment, available)
        self._experts.compute(routed.layer, dispatch, routed.hidden, outputs)
        return outputs

    def held(self) -> Held | None:
        return None

    def used(self, layer: int, ids: np.ndarray) -> None:
        pass

    def start(self, layer: int, dispatch: Dispatch, x: np.ndarray, out: np.ndarray) -> Pending:
        raise AssertionError("what is assigned is resident")

    def lend(self, borrower: object, nbytes: int) -> bool:
        return False

    def close(self) -> None:
        pass


class OnResident:
    """The `model` on `ResidentExperts`, one token after another, in a fork of the sequence: its
    state is shared, so that the guesses begin from what the model itself remembers. They are drawn
    by the draws that the tokens will have. Where the likeliest token has less than `sure` of the
    probability, that one is not guessed, nor what comes after it."""

    odds: SequenceOf[float] = (0.6,)

    def __init__(self, model: Model, sure: float):
        self._model, self._sure = model, sure

    def sure(self, sequence: Sequence, last: int) -> int:
        """For `decoder.Proposer`: that is seen when it guesses."""
        return 0

    def propose(self, sequence: Sequence, made: Continuation, last: int, count: int) -> list[int]:
        """For `decoder.Proposer`."""
        fork, sampler, ids = sequence.fork(), made.draws(), list[int]()
        fork.ledger, fork.exact = None, False  # what is missing is left out, whoever asks
        while len(ids) < count:
            logits = self._logits(fork, last)
            if not self._likely(logits):
                break
            ids.append(last := sampler.draw(logits))
        return ids

    def _logits(self, fork: Sequence, token: int) -> np.ndarray:
        span = Span(fork, np.array([token]), np.array([0]), Phase.DECODE)
        (logits,) = self._model.step(Step((span,)))
        return logits[0]

    def _likely(self, logits: np.ndarray) -> bool:
        most = logits.max()
        return bool(np.exp(logits - most, dtype=np.float64).sum() * self._sure <= 1)
