"""Progress on stderr: one line that counts, with the time that is left. Silent where stderr is not
a terminal. And how long each stage took, for machines."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """`over` wraps a loop, `counter` counts, `say` prints a line; a quiet one prints nothing.
    `seconds` are those of every `stage`."""

    def __init__(self, quiet: bool = False):
        self.seconds: dict[str, float] = {}
        self._stages: list[str] = []  # that are open, the innermost last
        self._since = 0.0
        self.quiet = quiet
        self._live = not quiet and sys.stderr.isatty()

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block's time is that of stage `name`, less that of stages within it."""
        self._count()
        self._stages.append(name)
        try:
            yield
        finally:
            self._count()
            self._stages.pop()

    def _count(self) -> None:
        """What passed since the last call belongs to the innermost stage."""
        now = time.monotonic()
        if self._stages:
            name = self._stages[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def counter(self, stage: str, unit: str, total: int) -> Counter:
        return Counter(self, stage, unit, total)

    def over(self, items: Iterable[T], stage: str, unit: str, total: int) -> Iterator[T]:
        """Yield `items`, counting them."""
        count = self.counter(stage, unit, total)
        for done, item in enumerate(items, 1):
            yield item
            count.done(done)

    def line(self, text: str) -> None:
        """Show `text` in place of the line before, on a terminal."""
        if self._live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


class Counter:
    """How many of `total` are done, and how long the rest takes at the pace of those that were
    worked on: what an earlier run finished takes no time and says nothing about the rest."""

    def __init__(self, progress: Progress, stage: str, unit: str, total: int):
        self._progress, self._stage, self._unit, self._total = progress, stage, unit, total
        self._started = time.monotonic()
        self._last = self._started
        self._paces: list[float] = []  # seconds each

    def done(self, count: int, worked: bool = True) -> None:
        """`count` are done; the last of them took work, or was there already."""
        now = time.monotonic()
        if worked:
            self._paces.append(now - self._last)
        self._last = now
        if count < self._total:
            left = (
                ", "
                f"{duration(sorted(self._paces)[len(self._paces) // 2] * (self._total - count))} "
                "left"
                if self._paces
                else ""
            )
            self._progress.line(f"{self._stage}: {self._unit} {count}/{self._total}{left}")
            return
        before = self._total - len(self._paces)
        note = f" ({before} of an earlier run kept)" if before else ""
        self._progress.line("")
        self._progress.say(
            f"{self._stage}: {count} {self._unit} in {duration(now - self._started)}{note}"
        )


def peak_memory() -> int:
    """The most bytes that this process, or one that it waited for, has held so far."""
    ours, theirs = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return max(ours, theirs) * 1024


def duration(seconds: float) -> str:
    """Seconds, minutes or hours for people."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
