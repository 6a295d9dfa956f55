"""Between text and token ids: the tokenizer, chat templates, streaming that never splits a character, stop strings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers.decoders import DecodeStream

from smoe.runtime.errors import EngineError

# A template is part of an untrusted bundle: the sandbox keeps it from Python, and what it does wrong is an error.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                   RecursionError, MemoryError)  # fmt: skip


@dataclass(frozen=True)
class StopWhen:
    """What ends a generation besides its length: any of `strings` in the text (which ends before it), or a token of
    `ids` (None: the model's own end tokens)."""

    strings: tuple[str, ...] = ()
    ids: tuple[int, ...] | None = None


class Text:
    """The text side of a bundle. A bundle without a tokenizer has ids only; asking for text is then an error."""

    def __init__(self, path: Path):
        self._path = path
        file = path / "tokenizer.json"
        self.tokenizer: tokenizers.Tokenizer | None = None
        if file.is_file():
            try:
                self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:
                raise EngineError(f"{file} is not a tokenizer: {error}; copy the bundle again.") from error

    def encode(self, text: str, special: bool = True) -> list[int]:
        if self.tokenizer is None:
            raise EngineError("This bundle has no tokenizer; give token ids instead of text.")
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def chat(self, messages: list[dict[str, str]], template: str | None = None) -> list[int]:
        """Token ids of a conversation (`role`, `content`) rendered for the model's next turn."""
        settings = self._settings()
        source = template or self._template(settings)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        tokens = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
        try:
            rendered = environment.from_string(source).render(messages=messages, add_generation_prompt=True, **tokens)
        except TEMPLATE_ERRORS as error:
            raise EngineError(f"The chat template cannot render these messages: {error}.") from error
        return self.encode(rendered, special=False)  # the template writes the special tokens itself

    def _settings(self) -> dict:
        file = self._path / "tokenizer_config.json"
        if not file.is_file():
            return {}
        try:
            settings = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise EngineError(f"{file} is not JSON: {error}; copy the bundle again.") from error
        return settings if isinstance(settings, dict) else {}

    def _template(self, settings: dict) -> str:
        file = self._path / "chat_template.jinja"
        template = file.read_text("utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if not isinstance(template, str):
            raise EngineError(
                "This bundle has no chat template: the model was not made for chat. Use `smoe run`, or give a template "
                "with --chat-template FILE."
            )
        return template


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class Stream:
    """Text as it comes: `push(id)` returns what can be shown for sure, `finish()` the rest.

    Held back are the bytes of an unfinished character, and text that may turn out to begin a stop string.
    """

    def __init__(self, text: Text, stops: tuple[str, ...]):
        if stops and text.tokenizer is None:
            raise EngineError("This bundle has no tokenizer, so that stop strings cannot be found; stop at token ids.")
        if "" in stops:
            raise EngineError("A stop string is empty; it would stop before the first token.")
        self._tokenizer = text.tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        if self._tokenizer is None or self.stopped:
            return ""
        self._held += self._decode.step(self._tokenizer, token) or ""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
