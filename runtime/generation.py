"""What becomes of the logits of one sequence: a token, its text, and an end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from smoe.runtime.errors import EngineError
from smoe.runtime.sampling import Sampler, ranked
from smoe.runtime.text import Stream

if TYPE_CHECKING:
    from smoe.runtime.draft.decoder import Draft

MOST_LOGPROBS = 64  # tokens beside the one that was drawn


@dataclass(frozen=True)
class Token:
    """A generated token. `text` may be empty while a character or a stop string is undecided;
    joined it is the text. Where they were asked for, `logprob` is the logarithm of its probability
    before temperature and filters, and `best` has ids and logarithms of the likeliest tokens."""

    id: int
    text: str
    logprob: float | None = None
    best: tuple[tuple[int, float], ...] = ()


class Allowed(Protocol):
    """Holds an answer to a form."""

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """float32 `[vocabulary]`, -inf where a token may not come next."""
        ...

    def take(self, token: int) -> None:
        """It came."""
        ...


class Continuation:
    """Up to `count` tokens of one sequence: drawn by `sampler`, until one of `ends` or a stop
    string of `stream`, of those that are `allowed`. `logprobs` is how many of the likeliest tokens
    are wanted with each (None: no probabilities). `finish` says why it ended: length, end, stop.
    `draft` guesses what comes."""

    def __init__(
        self,
        sampler: Sampler,
        ends: Collection[int],
        stream: Stream,
        count: int,
        logprobs: int | None = None,
        allowed: Allowed | None = None,
        draft: Draft | None = None,
    ):
        count = _whole("max_new_tokens", count)
        if logprobs is not None:
            logprobs = _whole("logprobs", logprobs)
        if count < 1:
            raise EngineError(f"max_new_tokens is {count}; at least 1 is wanted.")
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise EngineError(
                f"logprobs is {logprobs}; 0 to {MOST_LOGPROBS} of the likeliest tokens can be had."
            )
        self._sampler, self._ends, self._stream = sampler, ends, stream
        self._count, self._logprobs, self._allowed = count, logprobs, allowed
        self.made, self.finish, self.draft = 0, "", draft

    @property
    def left(self) -> int:
        """Tokens that may come yet."""
        return self._count - self.made

    def draws(self) -> Sampler:
        """One that draws as the next tokens will be drawn, before `allowed`; it changes nothing."""
        return self._sampler.fork()

    def take(self, logits: np.ndarray) -> Token:
        """The next token, from float32 `[vocabulary]`; with the last one `finish` is set."""
        stream, allowed = self._stream, self._allowed
        token = self._sampler.draw(logits if allowed is None else allowed.allow(logits))
        if allowed is not None:
            allowed.take(token)
        end = token in self._ends
        text = stream.push(token) if not end or stream.special else ""
        self.made += 1
        self.finish = (
            "end" if end else "stop" if stream.stopped
            else "length" if self.made == self._count else ""
        )  # fmt: skip
        if self.finish and not stream.stopped:
            text += stream.finish()
        if self._logprobs is None:
            return Token(token, text)
        return Token(token, text, *probabilities(logits, token, self._logprobs))


def _whole(name: str, value: object) -> int:
    if isinstance(value, (int, np.integer)):
        return int(value)
    raise EngineError(f"{name} is {value!r}; a whole number is wanted.")


def probabilities(
    logits: np.ndarray, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The logarithm of a token's probability by float32 `[vocabulary]`, and ids and logarithms of
    the `count` likeliest ones."""
    most = float(logits.max())
    total = most + float(np.log(np.exp(logits - np.float32(most), dtype=np.float64).sum()))
    best = ranked(logits, count).tolist() if count else []
    return float(logits[token]) - total, tuple((i, float(logits[i]) - total) for i in best)
