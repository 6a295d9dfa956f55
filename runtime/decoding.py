"""Token ids to text, one after another: what is shown is never taken back, and joined it is what
`tokenizers` decodes of all ids at once.

A tokenizer.json names its decoder as a row of steps over tokens. Each class below is one step that
takes a token when it comes and lets go of what no later token can change: bytes that may turn out
to be no character wait for the end of their run, all else goes on at once. `tokenizers` has such a
stream too (DecodeStream), which fails where bytes are no prefix of the text so far.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BROKEN = "\ufffd"
IDS = 1 << 32  # what a tokenizer takes for an id


class Step(Protocol):
    """A step of a decoder. What it lets go of are whole tokens, or, from a step on that joins them,
    pieces of the one token that is the text."""

    def push(self, token: str) -> list[str]: ...
    def finish(self) -> list[str]: ...


class Each:
    """What a token becomes by itself."""

    def __init__(self, change: Callable[[str], str]):
        self._change = change

    def push(self, token: str) -> list[str]:
        return [self._change(token)]

    def finish(self) -> list[str]:
        return []


class FirstAndOthers:
    """What a token becomes by whether it is the first one."""

    def __init__(self, first: Callable[[str], str], other: Callable[[str], str]):
        self._change, self._other = first, other

    def push(self, token: str) -> list[str]:
        changed, self._change = self._change(token), self._other
        return [changed]

    def finish(self) -> list[str]:
        return []


class Spelled:
    """ByteFallback: a run of byte tokens is the characters that it spells, or, if any of its bytes
    is out of place, as many U+FFFD: only its end tells."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> list[str]:
        byte = BYTE_TOKEN.fullmatch(token)
        if byte is None:
            return [*self.finish(), token]
        self._run.append(int(byte[1], 16))
        return []

    def finish(self) -> list[str]:
        run, self._run = self._run, bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return [BROKEN] * len(run)


class Bytes:
    """ByteLevel: a token's characters stand for bytes; those of an unfinished character wait."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> list[str]:
        return [self._decoder.decode(self.spelled(token))]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]

    @staticmethod
    def spelled(token: str) -> bytes:
        """The bytes that a token's characters stand for."""
        try:
            return bytes(BYTE_OF[c] for c in token)
        except KeyError:  # an added token, which is written as it is
            return token.encode("utf-8")


class Suffixed:
    """BPEDecoder: a suffix ends a word, and is a space if another token follows."""

    def __init__(self, suffix: str):
        self._suffix = suffix
        self._last: list[str] = []

    def push(self, token: str) -> list[str]:
        before, self._last = self._last, [token]
        return [word.replace(self._suffix, " ") for word in before]

    def finish(self) -> list[str]:
        last, self._last = self._last, []
        return [word.replace(self._suffix, "") for word in last]


class Stripped:
    """Strip, of the whole text: up to `start` of a character go at its start, up to `stop` at its
    end."""

    def __init__(self, content: str, start: int, stop: int):
        self._content, self._start, self._stop = content, start, stop
        self._held = ""

    def push(self, token: str) -> list[str]:
        text = self._held + token
        while self._start and text.startswith(self._content):
            text, self._start = text[1:], self._start - 1
        self._start = 0 if text else self._start
        ends = min(self._stop, len(text) - len(text.rstrip(self._content)))
        shown, self._held = text[: len(text) - ends], text[len(text) - ends :]
        return [shown]

    def finish(self) -> list[str]:
        return []  # what is held is what goes


def _byte_characters() -> dict[str, int]:
    """What each character of a byte-level vocabulary stands for (GPT-2): printable ones for
    themselves, the other bytes in turn for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_characters()


def _replace(spec: dict[str, Any]) -> Step:
    import tokenizers

    pattern = spec["pattern"]
    regex = tokenizers.Regex(pattern["Regex"]) if "Regex" in pattern else pattern["String"]
    decoder = tokenizers.decoders.Replace(regex, spec["content"])
    return Each(lambda token: decoder.decode([token]))


def _wordpiece(spec: dict[str, Any]) -> Step:
    import tokenizers

    decoder = tokenizers.decoders.WordPiece(spec["prefix"], spec["cleanup"])
    return FirstAndOthers(lambda t: decoder.decode([t]), lambda t: decoder.decode(["a", t])[1:])


def _metaspace(spec: dict[str, Any]) -> Step:
    mark, leading = spec["replacement"], " " if spec["prepend_scheme"] == "never" else ""
    return FirstAndOthers(lambda t: t.replace(mark, leading), lambda t: t.replace(mark, " "))


def _strip_each(spec: dict[str, Any]) -> Step:
    def strip(token: str) -> str:
        step = Stripped(spec["content"], spec["start"], spec["stop"])
        return "".join(step.push(token))

    return Each(strip)


TOKENWISE: dict[str, Callable[[dict[str, Any]], Step]] = {
    "Replace": _replace,
    "WordPiece": _wordpiece,
    "Metaspace": _metaspace,
    "Strip": _strip_each,
    "ByteFallback": lambda spec: Spelled(),
    "ByteLevel": lambda spec: Bytes(),
    "BPEDecoder": lambda spec: Suffixed(spec["suffix"]),
    "Fuse": lambda spec: Each(str),
}
JOINED: dict[str, Callable[[dict[str, Any]], Step]] = {  # of the text in pieces
    "Strip": lambda spec: Stripped(spec["content"], spec["start"], spec["stop"]),
    "Fuse": lambda spec: Each(str),
}
JOINING = ("Fuse", "ByteLevel")


def _steps(spec: dict[str, Any] | None) -> list[Step] | None:
    """The steps of a decoder as tokenizer.json describes it; None if there is one whose result may
    depend on all that follows, or that is not known here."""
    if spec is None:
        return [FirstAndOthers(str, lambda token: f" {token}")]
    steps: list[Step] = []
    known = TOKENWISE
    for part in _flat(spec):
        if part["type"] not in known:
            return None
        steps.append(known[part["type"]](part))
        known = JOINED if part["type"] in JOINING else known
    return steps


def _flat(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [part for inner in spec["decoders"] for part in _flat(inner)]


class IncrementalDecoder:
    """Text of one token after another. What `push` and, at the end, `finish` return is joined
    `tokenizer.decode(ids, skip_special_tokens=not special)`.

    An id that the tokenizer does not have has no text. The text of a decoder with a step that is
    not known here comes whole, at the end.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: bool = False):
        decoder = tokenizer.decoder
        self._tokenizer, self._special = tokenizer, special
        self._steps = _steps(None if decoder is None else json.loads(decoder.__getstate__()))
        self._hidden = set() if special else special_tokens(tokenizer)
        self._ids: list[int] = []  # all of them, where the text comes at the end

    def push(self, token: int) -> str:
        """What can be shown for sure once `token` has come."""
        spelled = self._tokenizer.id_to_token(token) if 0 <= token < IDS else None
        if spelled is None or spelled in self._hidden:
            return ""
        if self._steps is None:
            self._ids.append(token)
            return ""
        return _through(self._steps, [spelled])

    def has(self, step: type = object) -> bool:
        """Whether there are steps, one of such a class among them."""
        return any(isinstance(one, step) for one in self._steps or ())

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        if self._steps is None:
            ids, self._ids = self._ids, []
            return self._tokenizer.decode(ids, skip_special_tokens=not self._special)
        last = ""
        for n, step in enumerate(self._steps):
            last += _through(self._steps[n + 1 :], step.finish())
        return last


def _through(steps: list[Step], tokens: list[str]) -> str:
    for step in steps:
        tokens = [out for token in tokens for out in step.push(token)]
    return "".join(tokens)


def special_tokens(tokenizer: tokenizers.Tokenizer) -> set[str]:
    """The texts of the control tokens, which text is shown without."""
    added = tokenizer.get_added_tokens_decoder().values()
    return {token.content for token in added if token.special}


def token_bytes(tokenizer: tokenizers.Tokenizer, token: int) -> bytes:
    """What a token adds to a text that has begun, in UTF-8: part of a character, perhaps."""
    spelled = tokenizer.id_to_token(token) if 0 <= token < IDS else None
    decoder = IncrementalDecoder(tokenizer, special=True)
    if spelled is None:
        return b""
    byte = BYTE_TOKEN.fullmatch(spelled)
    if byte and decoder.has(Spelled):
        return bytes([int(byte[1], 16)])
    if decoder.has(Bytes):
        return Bytes.spelled(spelled)
    if not decoder.has():
        return tokenizer.decode([token], skip_special_tokens=False).encode()
    decoder.push(token)  # the text begins: now a space in front counts
    return decoder.push(token).encode()
