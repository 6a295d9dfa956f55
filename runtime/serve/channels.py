"""Parts of an answer that a model's control tokens tell apart: thoughts, what is said, and calls of
tools. The template names them; a reader takes text as it comes, and holds back what may turn out to
begin a mark."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from smoe.runtime.serve.calls import SYNTAXES, Called, Calls, Json, read_calls

CONTENT, THOUGHT = "content", "reasoning_content"  # as clients call them
THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


@dataclass(frozen=True)
class Said:
    """Some text of a `field`."""

    field: str
    text: str


Part = Said | Called


class Reader(Protocol):
    """Takes an answer apart."""

    def push(self, text: str) -> list[Part]:
        """What is known once `text` has come, which shows control tokens too."""
        ...

    def finish(self) -> list[Part]:
        """What was held back."""
        ...


@dataclass(frozen=True)
class Channels:
    """What there is in the answers of a template's model: whether they have channels as gpt-oss
    has, else the marks of its `thoughts`, and where its `calls` stand (None: nobody knows)."""

    harmony: bool
    thoughts: tuple[str, str] | None
    calls: Calls | None

    @classmethod
    def of(cls, template: str) -> Channels:
        """As a chat template writes them."""
        thoughts = next((pair for pair in THOUGHTS if pair[1] in template), None)
        calls = next((calls for mark, calls in SYNTAXES.items() if mark in template), None)
        return cls(all(mark in template for mark in HARMONY[:3]), thoughts, calls)

    def reader(
        self, hidden: Collection[str], prompt: str, tools: Mapping[str, Json] | None
    ) -> Reader | None:
        """For an answer to `prompt`, whose end may have begun a thought, with `tools` where some
        were offered. `hidden` are control tokens' texts. None where there is nothing to tell
        apart."""
        if self.harmony:
            return Harmony(hidden)
        calls = None if tools is None else self.calls
        if calls is None and self.thoughts is None:
            return None
        return Tagged(hidden, self.thoughts, self.thinks(prompt), calls, tools or {})

    def thinks(self, prompt: str) -> bool:
        """Whether a prompt ends within a thought."""
        return self.thoughts is not None and prompt.rstrip().endswith(self.thoughts[0])


class Scanner:
    """Text with `marks` in it, a piece at a time."""

    def __init__(self, marks: Collection[str]):
        self._marks = sorted(filter(None, marks), key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, self._marks)) or "(?!)")
        self._held = ""

    def push(self, text: str) -> list[tuple[str, str]]:
        """Pairs of text and the mark after it, "" where none is there."""
        self._held += text
        found, start = [], 0
        for match in self._find.finditer(self._held):
            found.append((self._held[start : match.start()], match[0]))
            start = match.end()
        self._held = self._held[start:]
        sure = len(self._held) - self._begun()
        found.append((self._held[:sure], ""))
        self._held = self._held[sure:]
        return found

    def finish(self) -> str:
        """What might have begun a mark."""
        held, self._held = self._held, ""
        return held

    def _begun(self) -> int:
        """Length of the longest end that begins a mark."""
        longest = len(self._marks[0]) - 1 if self._marks else 0
        ends = range(min(longest, len(self._held)), 0, -1)
        return next(
            (n for n in ends if any(mark.startswith(self._held[-n:]) for mark in self._marks)), 0
        )


class Speech:
    """Text by field, without the space that only stands between parts: before a part that follows
    another one, and after a thought. Parts that are said are lines."""

    def __init__(self) -> None:
        self._field, self._space, self._begun = "", "", False
        self._first, self._content = True, False

    def say(self, field: str, text: str) -> list[Part]:
        """More of a field."""
        if field != self._field:
            self._field, self._space, self._begun = field, "", False
        follows = not self._first or field == THOUGHT
        text = self._space + text
        if follows and not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if not shown:
            return []
        if field == CONTENT and not self._begun:
            shown = "\n" + shown if self._content else shown
            self._content = True
        self._begun, self._first = True, False
        return [Said(field, shown)]

    def apart(self) -> None:
        """Something else came between."""
        self._field, self._first = "", False

    def finish(self) -> list[Part]:
        """Space at the end is part of what was said."""
        last = self._field == CONTENT and self._space
        return [Said(CONTENT, last)] if last else []


class Tagged:
    """Thoughts and calls between marks; what stands outside is said."""

    def __init__(
        self,
        hidden: Collection[str],
        thoughts: tuple[str, str] | None,
        thinking: bool,
        calls: Calls | None,
        tools: Mapping[str, Json],
    ):
        self._thoughts, self._calls, self._tools = thoughts or ("", ""), calls, tools
        marks = [*self._thoughts, *((calls.opening, calls.closing or "") if calls else ())]
        self._scanner, self._speech = Scanner({*hidden, *marks}), Speech()
        self._state = THOUGHT if thinking else CONTENT
        self._call: list[str] | None = None  # what stands where a call does
        self._whole = bool(calls and calls.bare)  # the answer may still be a call as a whole

    def push(self, text: str) -> list[Part]:
        """As `Reader` says."""
        return [
            part
            for before, mark in self._scanner.push(text)
            for part in [*self._text(before), *self._mark(mark)]
        ]

    def finish(self) -> list[Part]:
        """As `Reader` says."""
        parts = [*self._text(self._scanner.finish()), *self._end_call()]
        return parts + self._speech.finish()

    def _text(self, text: str) -> list[Part]:
        if not text:
            return []
        if self._call is None and self._whole and self._state == CONTENT and text.strip():
            self._whole = False
            if text.lstrip()[0] in "{[":
                self._call = []
        if self._call is not None:
            self._call.append(text)
            return []
        return self._speech.say(self._state, text)

    def _mark(self, mark: str) -> list[Part]:
        opening, closing = self._thoughts
        if not mark or (
            self._call is not None and (self._calls is None or mark != self._calls.closing)
        ):
            return []
        if mark == opening:
            self._state = THOUGHT
        elif mark == closing:
            self._state = CONTENT
            self._speech.apart()
        elif self._calls is not None and mark == self._calls.opening:
            self._call, self._whole = [], False
        elif self._calls is not None and mark == self._calls.closing:
            return self._end_call()
        return []

    def _end_call(self) -> list[Part]:
        if self._call is None:
            return []
        text, self._call = "".join(self._call), None
        called = read_calls(text, self._tools)
        if called is None:
            return self._speech.say(CONTENT, text)
        self._speech.apart()
        return [*called]


class Harmony:
    """The channels of gpt-oss: `<|channel|>NAME<|message|>TEXT` and an end. `analysis` is thought,
    what goes to a function is a call, all else is said."""

    def __init__(self, hidden: Collection[str]):
        self._scanner, self._speech = Scanner({*hidden, *HARMONY}), Speech()
        self._header, self._inside = "", False
        self._arguments: list[str] = []

    def push(self, text: str) -> list[Part]:
        """As `Reader` says."""
        return [
            part
            for before, mark in self._scanner.push(text)
            for part in [*self._text(before), *self._mark(mark)]
        ]

    def finish(self) -> list[Part]:
        """As `Reader` says."""
        return [*self._text(self._scanner.finish()), *self._end(), *self._speech.finish()]

    def _text(self, text: str) -> list[Part]:
        if not self._inside:
            self._header += text
        elif RECIPIENT.search(self._header):
            self._arguments.append(text)
        elif text:
            thought = self._header.strip().rpartition(" ")[2].startswith("analysis")
            return self._speech.say(THOUGHT if thought else CONTENT, text)
        return []

    def _mark(self, mark: str) -> list[Part]:
        if mark == "<|message|>":
            self._inside = True
        elif mark == "<|channel|>" and not self._inside:
            self._header += " "
        elif mark in HARMONY:
            return self._end()
        return []

    def _end(self) -> list[Part]:
        recipient = RECIPIENT.search(self._header)
        arguments, self._arguments = "".join(self._arguments).strip(), []
        called = self._inside and recipient is not None
        self._header, self._inside = "", False
        self._speech.apart()
        return [Called(recipient[1], arguments or "{}")] if called and recipient else []
