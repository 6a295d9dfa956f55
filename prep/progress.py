"""Progress on stderr: one line that counts, with the time that is left. Silent where stderr is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """`over` wraps a loop; `say` prints a line. A quiet one does neither."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()

    def say(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def over(self, items: Iterable[T], stage: str, unit: str) -> Iterator[T]:
        """Yield `items`, saying how many of how many are done and how long the rest will take at this pace."""
        total = len(items) if isinstance(items, Sized) else 0
        started = time.monotonic()
        done = 0
        for done, item in enumerate(items, 1):
            yield item
            if self._live:
                spent = time.monotonic() - started
                left = f", {spent / done * (total - done):.0f} s left" if total else ""
                print(f"\r{stage}: {unit} {done}/{total or '?'}{left}   ", end="", file=sys.stderr, flush=True)
        if self._live:
            print("\r\033[K", end="", file=sys.stderr)
        self.say(f"{stage}: {done} {unit} in {time.monotonic() - started:.1f} s")
