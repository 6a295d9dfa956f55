"""What filters, tests, methods and operators cost, asked before they run.

Each function reads what it is given, and where more may come out than eight times of that, asks
whether so much could be afforded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from string import Formatter
from typing import Any

from smoe.runtime.templates.meter import ITEM, Meter, TooMuch

Cost = Callable[..., None]
WRITTEN = 12  # characters at most that Python, JSON or a URL writes for one
ANY_VALUE = 400  # characters at most of a number


def shallow(meter: Meter, value: Any, *arguments: Any) -> None:
    """The value is passed on, or gone through by somebody who counts."""
    meter.read(*arguments)


def linear(meter: Meter, *values: Any) -> None:
    """All is looked at, and perhaps written."""
    meter.afford(WRITTEN * meter.read(*values))


def compared(meter: Meter, *values: Any) -> None:
    """All is looked at some twenty times."""
    meter.spend(meter.read(*values))


def squared(meter: Meter, *values: Any) -> None:
    """What is seldom used: numbers may be lengths, and time grow with the square."""
    numbers = sum(abs(int(v)) for v in values if isinstance(v, (int, float)) and abs(v) < 1e18)
    meter.spend((meter.read(*values) + numbers) ** 2 // ITEM)


def padded(meter: Meter, *values: Any) -> None:
    """Made longer by a number of characters or elements."""
    numbers = sum(abs(v) for v in values if isinstance(v, int))
    meter.afford(ITEM * (meter.read(*values) + numbers))


def listed(meter: Meter, value: Any) -> None:
    """An element for each character."""
    meter.afford(ITEM * len(value) if hasattr(value, "__len__") else 0)


def rounded(meter: Meter, value: Any, precision: Any = 0, *method: Any) -> None:
    """A power of ten is made of the precision."""
    meter.number(4 * abs(precision) if isinstance(precision, int) else 0)


def summed(meter: Meter, values: Any, *arguments: Any) -> None:
    """Lists are copied once for each that is added."""
    weight = meter.read(values, *arguments)
    plain = all(isinstance(v, (int, float)) for v in values)
    meter.spend(0 if plain else len(values) * weight // ITEM)


def replaced(meter: Meter, text: Any, old: Any, new: Any = "", *count: Any) -> None:
    """`new` wherever there was `old`."""
    text, old, new = (_written(meter, value) for value in (text, old, new))
    meter.afford(meter.read(text, old, new) + text.count(old) * len(new))


def translated(meter: Meter, text: str, table: Any) -> None:
    """A text for each character."""
    meter.afford(len(text) * (1 + meter.read(table)))


def tabulated(meter: Meter, text: str, size: Any = 8) -> None:
    """Spaces for each tab."""
    meter.afford(len(text) + text.count("\t") * abs(size) if isinstance(size, int) else 0)


def indented(meter: Meter, text: Any, width: Any = 4, *where: Any) -> None:
    """Spaces, or a text, for each line."""
    text = _written(meter, text)
    size = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    meter.afford(meter.read(text) + (len(text.splitlines()) + 2) * (abs(size) + ITEM))


def joined(meter: Meter, values: Any, separator: Any = "", *attribute: Any) -> None:
    """Values with a text between them."""
    number = len(values) if hasattr(values, "__len__") else 0
    between = len(_written(meter, separator))
    meter.afford(WRITTEN * meter.read(values) + number * (between + ITEM))


def joined_by(meter: Meter, separator: str, values: Any = ()) -> None:
    """The same as a method."""
    joined(meter, values, separator)


def split(meter: Meter, text: str, separator: Any = None, *limit: Any) -> None:
    """Pieces of a text, each an object."""
    known = isinstance(separator, str) and separator != ""
    pieces = text.count(separator) if known else len(text) // 2
    meter.afford(meter.read(text) + ITEM * (pieces + 1))


def searched_backwards(meter: Meter, text: str, what: Any = " ", *limit: Any) -> None:
    """Python searches backwards character by character."""
    split(meter, text, what)
    meter.spend(len(text) * len(what) // ITEM if isinstance(what, str) else 0)


def printed(meter: Meter, form: Any, *values: Any) -> None:
    """Text after a printf string: its widths, and each value as often as there are places."""
    form = form.decode("latin-1") if isinstance(form, bytes) else _written(meter, form)
    nested = "(" in form.replace("%(", "")
    numbers = re.findall(r"\d+" if nested else r"(?:%(?:\([^)]*\))?[#0 +-]*|\.)(\d+)", form)
    widths = sum(int(number[:18]) for number in numbers)
    if "*" in form:
        widths += sum(abs(v) for v in values if isinstance(v, int)) * form.count("*")
    meter.afford(widths + form.count("%") * (WRITTEN * meter.read(form, *values) + ANY_VALUE))


def formatted(meter: Meter, form: str, *values: Any) -> None:
    """The same of a format string; a width that is a value itself could be anything."""
    try:
        fields = [spec or "" for _, name, spec, _ in Formatter().parse(form) if name is not None]
    except ValueError:
        return  # not a format string: what runs it will say so
    if any("{" in spec for spec in fields):
        raise TooMuch("a format string takes a width from a value, which is not supported")
    widths = sum(int(number[:18]) for spec in fields for number in re.findall(r"\d+", spec))
    meter.afford(widths + len(fields) * (WRITTEN * meter.read(form, *values) + ANY_VALUE))


def as_json(meter: Meter, value: Any, indent: Any = 0, separators: Any = ()) -> None:
    """JSON: an escape is up to twelve characters, and each line begins with the indentation."""
    width = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    between = meter.read(*separators) if isinstance(separators, (list, tuple)) else 0
    weight, depth = meter.weigh(value)
    meter.read(value)
    meter.afford(WRITTEN * weight + weight // ITEM * (max(width, 0) * depth + between))


def operated(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """An operator between two values."""
    meter.spend(ITEM)
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            meter.number(left.bit_length() * max(right, 0))
        elif operator == "*":
            meter.number(left.bit_length() + right.bit_length())
    elif operator == "%" and isinstance(left, (str, bytes)):
        printed(meter, left, *(right if isinstance(right, tuple) else (right,)))
    elif operator == "*":
        lengths = [len(v) if hasattr(v, "__len__") else v for v in (left, right)]
        if all(isinstance(length, int) for length in lengths):
            meter.afford(ITEM * max(lengths[0], 0) * max(lengths[1], 0))
    elif hasattr(left, "__len__") and hasattr(right, "__len__"):
        meter.afford(len(left) + len(right))
        if operator == "-":  # of the keys of dictionaries
            meter.read(left, right)


def _written(meter: Meter, value: Any) -> str:
    """A value as Python writes it."""
    if not isinstance(value, str):
        meter.afford(WRITTEN * meter.read(value))
    return str(value)
