"""What a chat template may cost: its work is counted, and stopped when it is too much.

A unit of work is a character that is made, or a node of the template that runs; to read a text is
a quarter of it. Counting what happens, not time, gives every machine the same verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import jinja2

ALLOWED = 2**22  # units whatever the conversation, a second or two of a small device
PER_CHARACTER = 32  # and so many more for each character that goes in; real templates use ten
ITEM = 8  # units of an element of a list
CALL = 32  # units of a call, a filter, a test
READ = 4  # characters read for the price of one made
DEPTH = 100  # lists in lists: what goes deeper is refused before Python's own stack ends
NUMBER = 2**14  # bits of an integer
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
CONTAINERS = (list, tuple, dict, set, frozenset, *VIEWS)


class TooMuch(jinja2.TemplateError):
    """A template loops for too long, or makes too much."""


class Meter:
    """The work that is left to one rendering. Everything raises `TooMuch` where none is."""

    def __init__(self, given: int):
        """`given`: the characters that go in."""
        self.left = ALLOWED + PER_CHARACTER * given

    def spend(self, units: int) -> None:
        """Count work."""
        self.afford(units)
        self.left -= units

    def afford(self, units: int) -> None:
        """Whether so much work would still be possible; asked before something large is made."""
        if units > self.left:
            raise TooMuch("it loops for too long or makes too much text, and was stopped")

    def read(self, *values: Any) -> int:
        """Count that all of `values` is looked at; returns what they weigh."""
        total = 0
        for value in values:
            weight, _ = self.weigh(value)
            total += weight
            self.spend(weight if isinstance(value, CONTAINERS) else weight // READ)
        return total

    def made(self, value: Any) -> Any:
        """Count a new value, not what is in it; an iterator is counted as it goes, by the one that
        is returned in its place."""
        if isinstance(value, (str, bytes)):
            self.spend(len(value))
        elif isinstance(value, CONTAINERS):
            self.spend(ITEM * len(value))  # type: ignore[arg-type]
        elif isinstance(value, int):
            self.number(value.bit_length())
        elif type(value).__module__ == "builtins" and isinstance(value, Iterator):
            return self._counted(value)
        return value

    def number(self, bits: int) -> None:
        """Refuse an integer so long."""
        if bits > NUMBER:
            raise TooMuch(f"it makes an integer of {bits} bits, and {NUMBER} are the most")

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(ITEM)
            yield self.made(value)

    def weigh(self, value: Any) -> tuple[int, int]:
        """Characters and elements in a value, counted as often as they are in it, and how deep they
        are nested."""
        if isinstance(value, (str, bytes)):
            return len(value), 0
        if isinstance(value, range):
            return ITEM * len(value), 0
        if not isinstance(value, CONTAINERS):
            return 1, 0
        deepest = 1
        total, nested = ITEM, [iter(_elements(value))]
        while nested:
            for element in nested[-1]:
                total += ITEM
                if isinstance(element, (str, bytes)):
                    total += len(element)
                elif isinstance(element, CONTAINERS):
                    nested.append(iter(_elements(element)))
                    break
            else:
                nested.pop()
            self.afford(total)
            deepest = max(deepest, len(nested))
            if deepest > DEPTH:
                raise TooMuch(f"something in it is nested deeper than {DEPTH} times")
        return total, deepest


def _elements(container: Any) -> Iterable[Any]:
    return chain.from_iterable(container.items()) if isinstance(container, dict) else container
