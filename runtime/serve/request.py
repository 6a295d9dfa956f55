"""One of many requests: what is asked, and what has become of it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from smoe.runtime.draft.decoder import Going
from smoe.runtime.errors import EngineError
from smoe.runtime.generation import Allowed, Continuation, Token
from smoe.runtime.ledger import LossLedger
from smoe.runtime.sampling import Sampling
from smoe.runtime.step import Sequence
from smoe.runtime.text import StopWhen

# Hears of every token, and of the end (None), in the loop's thread.
Listener = Callable[[Token | None], None]
ENDED = "This loop has ended; open the bundle again."
Score = tuple[float, tuple[tuple[int, float], ...]]


@dataclass(frozen=True)
class Request:
    """What is asked: up to `max_new_tokens` after `prompt`, a text or token ids. `loss` is what it
    may spend in nats per token (None: what the engine was opened with; 0: nothing, so that it is
    exact whoever shares its steps). `logprobs` as in `generation.Continuation`, `special` as in
    `Engine.generate`; with `scored` the prompt's own tokens have their probabilities too, each
    with so many of the likeliest ones. `allowed` is its own alone."""

    prompt: str | SequenceOf[int] | np.ndarray
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop: StopWhen = field(default_factory=StopWhen)
    loss: float | None = None
    logprobs: int | None = None
    special: bool = False
    scored: int | None = None
    allowed: Allowed | None = None


class Busy(EngineError):
    """Nothing is wrong with the request: it may be taken in another time."""


class Generation:
    """A request on its way. Iterating gives its tokens as they come; where no thread runs the loop,
    that runs it.

    `finish` says why it ended: length, end, stop, cancelled or failed, "" until then. `waits` says
    what it waits for before it begins, and `error` is what it failed of. `shared` tokens of its
    prompt were not computed for it. `seconds` are those from `submit` to the first token, None
    until there is one, and `nats` what its shortcuts should have cost. `scores` are of its prompt's
    tokens after the first one, where they were asked for: the logarithm of the probability, and
    ids and logarithms of the likeliest ones."""

    def __init__(
        self,
        ids: np.ndarray,
        continuation: Continuation,
        loss: float | None,
        nbytes: int,
        pump: Callable[[], bool],
        listener: Listener | None = None,
        scored: int | None = None,
    ):
        self.ids, self.continuation = ids, continuation
        self.loss, self.nbytes = loss, nbytes
        self.sequence: Sequence | None = None  # while it is on its way
        self.scored, self.scores = scored, list[Score]()
        self.alone = scored is not None  # whether it shares nothing before it generates
        self.finish, self.waits = "", "its turn"
        self.error: EngineError | None = None
        self.shared, self.nats = 0, 0.0
        self.last: Token | None = None  # to go on from
        self.seconds: float | None = None
        self.cancelled = False
        self._submitted, self._pump = time.perf_counter(), pump
        self._tokens: queue.SimpleQueue[Token | None] = queue.SimpleQueue()
        self._listener = listener or self._tokens.put

    @property
    def made(self) -> int:
        """Tokens so far."""
        return self.continuation.made

    def cancel(self) -> None:
        """It is not wanted any more: the loop frees its room before its next step. From any
        thread, as often as one likes."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Token]:
        while True:
            while self._tokens.empty() and self._pump():
                pass
            over = bool(self.finish) and self._tokens.empty()  # somebody has heard of its end
            token = None if over else self._tokens.get()
            if token is None:
                break
            yield token
        if self.error is not None:
            raise self.error

    # -- for the loop ------------------------------------------------------------------------------

    @property
    def going(self) -> Going:
        """What the next step of it needs, once it generates."""
        assert self.sequence is not None and self.last is not None
        return Going(self.sequence, self.continuation, self.last.id, self.take)

    def begin(self, sequence: Sequence) -> None:
        """Its prompt is read into `sequence`, which may hold the beginning of it."""
        self.sequence, self.shared, self.waits = sequence, sequence.length, ""

    def take(self, logits: np.ndarray) -> Token:
        """The next token, told to whoever listens."""
        self.last = self.continuation.take(logits)
        if self.seconds is None:
            self.seconds = time.perf_counter() - self._submitted
        self._tell(self.last)
        return self.last

    def end(self, finish: str, error: EngineError | None = None) -> None:
        """It is over, and what it held is free."""
        ledger = None if self.sequence is None else self.sequence.ledger
        if isinstance(ledger, LossLedger):
            self.nats = ledger.spent
        self.sequence, self.error, self.waits = None, error, ""
        self.finish = finish
        self._tell(None)

    def _tell(self, token: Token | None) -> None:
        try:
            self._listener(token)
        except Exception:  # noqa: BLE001  who listens badly is not wanted, and harms nobody else
            self.cancelled = True
