"""Between text and token ids: the tokenizer, streaming that never splits a character, stop
strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoe.artifacts.manifest import File
from smoe.runtime.errors import EngineError

if TYPE_CHECKING:
    # imported where it is used, as jinja2 is: together a third of `import smoe.runtime`
    import tokenizers

UNFINISHED = "\ufffd"  # what a tokenizer decodes the bytes of an unfinished character to
HELD_TOKENS = (
    32  # no character has so many bytes: from here on what is held back is broken, and shown so
)


@dataclass(frozen=True)
class StopWhen:
    """What ends a generation besides its length: any of `strings` in the text (which ends before
    it), or a token of `ids` (None: the model's own end tokens)."""

    strings: tuple[str, ...] = ()
    ids: tuple[int, ...] | None = None


class Text:
    """The text side of a bundle: of its files only those that the manifest lists.

    A bundle without a tokenizer has ids only; asking for text is then an error.
    """

    def __init__(self, path: Path, files: Mapping[str, File]):
        self._path, self._files = path, files
        self.tokenizer: tokenizers.Tokenizer | None = None
        if "tokenizer.json" in files:
            import tokenizers

            source = read_text(path / "tokenizer.json")
            try:
                self.tokenizer = tokenizers.Tokenizer.from_str(source)
            except Exception as error:
                raise EngineError(
                    f"{path}/tokenizer.json is not a tokenizer: {error}; copy the bundle again."
                ) from error

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special` as the model's authors frame a prompt."""
        if self.tokenizer is None:
            raise EngineError("This bundle has no tokenizer; give token ids instead of text.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EngineError(
                f"The text is not UTF-8 at character {error.start}; convert it first."
            ) from error
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def chat(self, messages: list[dict[str, str]], template: str | None = None) -> list[int]:
        """Token ids of a conversation (`role`, `content`) rendered for the model's next turn."""
        from smoe.runtime import chat  # loads jinja2, which only chats need

        settings = self._settings()
        rendered = chat.render(template or self._template(settings), messages, settings)
        return self.encode(rendered, special=False)  # the template writes the special tokens itself

    def _settings(self) -> dict[str, Any]:
        if "tokenizer_config.json" not in self._files:
            return {}
        file = self._path / "tokenizer_config.json"
        try:
            settings = json.loads(read_text(file))
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{file} is not JSON: {error}; copy the bundle again.") from error
        return settings if isinstance(settings, dict) else {}

    def _template(self, settings: dict[str, Any]) -> str:
        template = settings.get("chat_template")
        if "chat_template.jinja" in self._files:
            template = read_text(self._path / "chat_template.jinja")
        if isinstance(template, list):  # several named ones
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if not isinstance(template, str):
            raise EngineError(
                "This bundle has no chat template: the model was not made for chat. Use `smoe "
                "run`, or give a template "
                "with --chat-template FILE."
            )
        return template


def read_text(path: Path) -> str:
    """The text of a file; one that cannot be read or is not UTF-8 is an `EngineError`."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise EngineError(f"{path} is not UTF-8 at byte {error.start}.") from error


class IncrementalDecoder:
    """Text of one token after another. Joined, it is the text of all of them decoded at once.

    A tokenizer decodes a token by its neighbours: a space in front of a word, a character out of
    several byte tokens. So the tokens that were shown last are decoded again before each new one,
    and what is longer is new; `transformers` and vLLM stream so. An unfinished character decodes to
    U+FFFD and is held back until it is whole. Bytes that are no character at all may change what a
    tokenizer with byte fallback makes of the bytes before them; what was shown stays.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens whose text was shown last
        self._pending: list[int] = []  # those after them
        self._shown = 0  # characters of the pending ones that were shown

    def push(self, token: int) -> str:
        """What can be shown for sure once `token` has come."""
        self._pending.append(token)
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        if not text.startswith(before):
            before, text = "", self._tokenizer.decode(self._pending)
        text = text[len(before) :]
        full = len(self._pending) >= HELD_TOKENS
        sure = text if full else text.rstrip(UNFINISHED)
        new, self._shown = sure[self._shown :], max(self._shown, len(sure))
        if text and sure == text:
            self._context, self._pending, self._shown = self._pending, [], 0
        elif full:  # special tokens, which have no text
            self._pending = []
        return new


class Stream:
    """Text as it comes: `push(id)` returns what can be shown for sure, `finish()` what was held
    back at the end.

    Held back is text that may turn out to begin a stop string, and the bytes of an unfinished
    character; if those stay unfinished to the end, they are never shown.
    """

    def __init__(self, text: Text, stops: tuple[str, ...]):
        if stops and text.tokenizer is None:
            raise EngineError(
                "This bundle has no tokenizer, so that stop strings cannot be found; stop at token "
                "ids."
            )
        if "" in stops:
            raise EngineError("A stop string is empty; it would stop before the first token.")
        self._decoder = IncrementalDecoder(text.tokenizer) if text.tokenizer else None
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown once `token` has come; nothing any more after a stop string, or without
        a tokenizer."""
        if self._decoder is None or self.stopped:
            return ""
        self._held += self._decoder.push(token)
        positions = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if positions:
            self.stopped = True
            shown, self._held = self._held[: min(positions)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def finish(self) -> str:
        """What was held back because it might have begun a stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
