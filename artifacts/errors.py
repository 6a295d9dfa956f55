"""Errors that a user can act on: a sentence with the value, the limit and the next step. Commands
print them bare."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Iterator

CONTROLS = ("Cc", "Cs")  # control characters, and surrogates, which no stream can write


class SmoeError(Exception):
    """What every command catches and prints without a traceback."""


class BundleError(SmoeError):
    """A bundle that cannot be opened, or a file in it that is not what its manifest says."""


def first_line(error: BaseException, longest: int = 600) -> str:
    """What an exception of somebody else's code says, in one line: its class where it says
    nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:longest] if lines else type(error).__name__


@contextlib.contextmanager
def as_sentence(sentence: Callable[[str], SmoeError]) -> Iterator[None]:
    """Whatever a library lets out that does not say what it raises is the error that
    `sentence` makes of its first line: a panic in Rust too, which is no `Exception`."""
    try:
        yield
    except (SmoeError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise sentence(first_line(error)) from error


def printable(text: str) -> str:
    """`text` without what a terminal would obey. Lines and tabs stay, and what joins an emoji's
    parts."""
    return "".join(
        "\ufffd" if unicodedata.category(c) in CONTROLS and c not in "\n\t" else c for c in text
    )
