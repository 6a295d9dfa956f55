"""How many guesses pay: by what steps took, and by how many of the guesses before were right."""

from __future__ import annotations

FORGET = 0.97  # what a step still counts for after the next one
LEARN = 0.9  # the same of a guess
HOPE = 1 / 64  # of the way back to the first odds, with every time that they were too low to guess


class StepTimes:
    """Seconds of a step by its tokens: a line through those that were, the last ones most."""

    def __init__(self) -> None:
        self._steps = self._tokens = self._squares = self._seconds = self._products = 0.0

    def seen(self, tokens: int, seconds: float) -> None:
        """A step of so many."""
        self._steps = FORGET * self._steps + 1
        self._tokens = FORGET * self._tokens + tokens
        self._squares = FORGET * self._squares + tokens * tokens
        self._seconds = FORGET * self._seconds + seconds
        self._products = FORGET * self._products + tokens * seconds

    def line(self) -> tuple[float, float]:
        """Seconds of a step, and of every token in it: the latter 0 as long as none had another
        number of tokens than others."""
        if not self._steps:
            return 1.0, 0.0
        mean, usual = self._tokens / self._steps, self._seconds / self._steps
        spread = self._squares / self._steps - mean * mean
        if spread < 1e-6:
            return usual, 0.0
        slope = (self._products / self._steps - mean * usual) / spread
        slope = min(max(slope, 0.0), usual / mean)  # a step has a beginning, and tokens cost
        return usual - slope * mean, slope


class Odds:
    """How likely a guess of a sequence is right: `first`, and then by those before."""

    def __init__(self, first: float) -> None:
        self.first = self.right = first

    def seen(self, right: int, wrong: bool) -> None:
        """So many were right, and the one after them `wrong`."""
        for _ in range(right):
            self.right = LEARN * self.right + (1 - LEARN)
        if wrong:
            self.right *= LEARN

    def rest(self) -> None:
        """Nothing was guessed."""
        self.right += HOPE * (self.first - self.right)


def guesses_that_pay(
    times: StepTimes, others: int, right: float, most: int, each: float = 0.0
) -> int:
    """Up to `most`: as many as make most tokens a second, in a step that has so many `others`, if
    each guess after a right one is `right` with that probability and takes `each` seconds to
    make."""
    step, token = times.line()
    best, rate, tokens, chance = 0, 0.0, float(others + 1), 1.0
    for guesses in range(most + 1):
        seconds = step + token * (others + 1 + guesses) + each * guesses
        if tokens / max(seconds, 1e-9) > rate:
            best, rate = guesses, tokens / max(seconds, 1e-9)
        chance *= right
        tokens += chance
    return best
