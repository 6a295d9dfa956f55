"""Between text and token ids: the tokenizer, conversations, stop strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoe.artifacts.errors import as_sentence
from smoe.artifacts.manifest import File
from smoe.artifacts.validate import sha256
from smoe.runtime.control import Marks, Written, control_tokens
from smoe.runtime.decoding import IncrementalDecoder, special_tokens
from smoe.runtime.encoding import encoded
from smoe.runtime.errors import EngineError

if TYPE_CHECKING:
    # imported where it is used, as jinja2 is: together a third of `import smoe.runtime`
    import tokenizers

ANSWER = "an answer and nothing else"  # stands for one where a template is looked at


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
            self.tokenizer = _open_tokenizer(path / "tokenizer.json", files["tokenizer.json"])

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special` as the model's authors frame a prompt."""
        tokenizer = self._required()
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EngineError(
                f"The text is not UTF-8 at character {error.start}; convert it first."
            ) from error
        with as_sentence(_no_tokens):
            return encoded(tokenizer, text, special)

    def decode(self, ids: Sequence[int], special: bool = False, stops: tuple[str, ...] = ()) -> str:
        """The text of `ids` up to one of `stops`; with `special`, that of special tokens too."""
        self._required()
        stream = Stream(self, stops, special)
        return "".join(map(stream.push, ids)) + stream.finish()

    def is_special(self, token: int) -> bool:
        """Whether a token is one of control, whose text is shown where it is asked for only."""
        return self._required().id_to_token(token) in special_tokens(self._required())

    def named(self) -> dict[str, str | None]:
        """What others know the tokenizer by: the texts of its tokens that begin, end and fill a
        text, and the chat template that answers to no name."""
        settings = self._settings()
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        given = {name: settings.get(name) for name in names}
        texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in given.items()}
        return texts | {"chat_template": self._templates(settings).get("default")}

    def template(self, tools: object | None = None) -> str:
        """The chat template for a conversation, with `tools` or without."""
        from smoe.runtime import chat

        return chat.chosen(self._templates(self._settings()), None, tools)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._templates(self._settings()))

    def controls(self) -> set[str]:
        """The texts of the tokens that text is shown without."""
        return special_tokens(self._required())

    def chat(
        self,
        messages: list[dict[str, Any]],
        /,
        template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation rendered for the model's next turn, as `chat.render` says;
        `template` is one, or the name of one of the bundle's. What a message spells gives no
        control token, unless the model wrote it (`answer`)."""
        from smoe.runtime import chat  # loads jinja2, which only chats need

        settings = self._settings()
        source = chat.chosen(self._templates(settings), template, tools)
        marks = Marks(self._controls(source), [messages, tools, documents, variables], source)
        put = marks.put
        rendered = chat.render(
            source, put(messages), settings, put(tools), put(documents), **put(variables)
        )
        if marks.spelled:
            with as_sentence(_no_tokens):
                return marks.encode(self._required(), rendered)
        return self.encode(rendered, special=False)  # the template writes the special tokens itself

    def answer(
        self, ids: Sequence[int], template: str | None = None, stops: tuple[str, ...] = ()
    ) -> str:
        """What a conversation's history holds of an answer that the model gave as `ids`, up to one
        of `stops`.

        A template writes an answer in a frame, like `<|channel|>final<|message|>`, and some refuse
        to find that in a message. So of an answer with such a frame the history has what is in it,
        and what the model thought before is gone, as with its authors. An answer in no frame is
        kept with its special tokens, by which templates take thoughts out and which hold its parts
        apart; if the template refuses that, the parts are lines.
        """
        from smoe.runtime import chat

        tokenizer, settings = self._required(), self._settings()
        source = chat.chosen(self._templates(settings), template)
        special = special_tokens(tokenizer)
        if ids and tokenizer.id_to_token(ids[-1]) in special:  # the end, which the template writes
            ids = ids[:-1]
        shown, whole = (self.decode(ids, all_of_it, stops) for all_of_it in (False, True))
        # Control tokens are the model's own, unless it also spelled one in ordinary tokens.
        added = tokenizer.get_added_tokens_decoder()
        spelled = self.decode([i for i in ids if i not in added])
        own = str if any(text in spelled for text in self._controls(source)) else Written
        if shown == whole:
            return own(shown)
        split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))).split
        frame = self._frame(source, settings)
        if len(split(frame)) > 1 and frame in whole:
            return own(split(whole.rpartition(frame)[2])[0])
        try:
            chat.render(source, [*_asked(whole), *_asked()], settings)
        except EngineError:
            return own("\n".join(filter(None, split(whole))))
        return own(whole)

    def _frame(self, template: str, settings: dict[str, Any]) -> str:
        """What a template writes between the opening of an answer, where the model goes on, and the
        answer; "" if it does not open it so."""
        from smoe.runtime import chat

        try:
            opened = chat.render(template, _asked(), settings)
            past = chat.render(template, [*_asked(ANSWER), *_asked()], settings)
        except EngineError:  # the next turn will say so
            return ""
        before, found, _ = past.partition(ANSWER)
        return before.removeprefix(opened) if found and before.startswith(opened) else ""

    def _controls(self, template: str) -> set[str]:
        """The tokens that a message may not give."""
        named = self._settings().get("chat_control_tokens")
        return control_tokens(
            self._required(), template, named if isinstance(named, list) else None
        )

    def _required(self) -> tokenizers.Tokenizer:
        if self.tokenizer is None:
            raise EngineError("This bundle has no tokenizer; give token ids instead of text.")
        return self.tokenizer

    def _settings(self) -> dict[str, Any]:
        if "tokenizer_config.json" not in self._files:
            return {}
        file = self._path / "tokenizer_config.json"
        try:
            settings = json.loads(read_text(file))
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{file} is not JSON: {error}; copy the bundle again.") from error
        return settings if isinstance(settings, dict) else {}

    def _templates(self, settings: dict[str, Any]) -> dict[str, str]:
        """The bundle's chat templates by name."""
        from smoe.runtime import chat

        if "chat_template.jinja" in self._files:
            return {"default": read_text(self._path / "chat_template.jinja")}
        return chat.named_templates(settings.get("chat_template"))


def _no_tokens(said: str) -> EngineError:
    return EngineError(
        f"The tokenizer has no tokens for this text ({said}); leave out what it was not made for."
    )


def _asked(answer: str | None = None) -> list[dict[str, Any]]:
    """A turn, for looking at a template."""
    question = {"role": "user", "content": "?"}
    return [question] if answer is None else [question, {"role": "assistant", "content": answer}]


def _open_tokenizer(path: Path, file: File) -> tokenizers.Tokenizer:
    """tokenizer.json without what is left in it from training: a length to cut or fill texts to,
    and merges left out at random. `AutoTokenizer` does not apply the first two to a text either."""
    import tokenizers

    source = read_text(path)

    def unread(said: str) -> EngineError:
        # What the build wrote was read back there: copying it again changes nothing.
        mend = (
            "its bytes are those that were built, so a newer version wrote it: `pip install "
            "--upgrade tokenizers`"
            if sha256(path) == file.sha256
            else "copy the bundle again"
        )
        return EngineError(
            f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads ({said}); "
            f"{mend}."
        )

    with as_sentence(unread):
        tokenizer = tokenizers.Tokenizer.from_str(source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def read_text(path: Path) -> str:
    """The text of a file; one that cannot be read or is not UTF-8 is an `EngineError`."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise EngineError(f"{path} is not UTF-8 at byte {error.start}.") from error


class Stream:
    """Text as it comes: `push(id)` returns what can be shown for sure, `finish()` what was held
    back at the end. Joined it is the text of all ids decoded at once, up to a stop string.

    Held back is what may turn out to begin a stop string, and bytes that may still become another
    character. Special tokens have no text unless `special` asks for it; a stop string sees them
    either way, since they are where a model's turns and channels end.
    """

    def __init__(self, text: Text, stops: tuple[str, ...], special: bool = False):
        if stops and text.tokenizer is None:
            raise EngineError(
                "This bundle has no tokenizer, so that stop strings cannot be found; stop at token "
                "ids."
            )
        if "" in stops:
            raise EngineError("A stop string is empty; it would stop before the first token.")
        tokenizer = text.tokenizer
        self._shown = IncrementalDecoder(tokenizer, special) if tokenizer else None
        self._whole = IncrementalDecoder(tokenizer, True) if tokenizer and stops else None
        self._stops, self.special = stops, special
        self._held: list[tuple[str, str]] = []  # of each token: its whole text, what is shown of it
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown once `token` has come; nothing any more after a stop string, or without
        a tokenizer."""
        if self._shown is None or self.stopped:
            return ""
        shown = self._shown.push(token)
        if self._whole is None:
            return shown
        self._held.append((self._whole.push(token), shown))
        return self._sure()

    def finish(self) -> str:
        """What was held back because more might have followed."""
        if self._shown is None or self.stopped:
            return ""
        shown = self._shown.finish()
        if self._whole is None:
            return shown
        self._held.append((self._whole.finish(), shown))
        sure = self._sure()
        return sure if self.stopped else sure + self._release(None)

    def _sure(self) -> str:
        """What can be shown of what is held: all before a stop string, or before what may begin
        one."""
        whole = "".join(text for text, _ in self._held)
        positions = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if not positions:
            keep = max(_overlap(whole, stop) for stop in self._stops)
            return self._release(len(whole) - keep)
        self.stopped = True
        assert self._shown is not None
        text, shown = self._held[-1]
        self._held[-1] = (text, shown + self._shown.finish())
        return self._release(min(positions))

    def _release(self, length: int | None) -> str:
        """Take the first `length` characters of the whole text (None: all), and return what is
        shown of them."""
        released = ""
        while self._held:
            text, shown = self._held[0]
            if length is not None and len(text) > length:
                break
            length = None if length is None else length - len(text)
            released += shown
            del self._held[0]
        if length and self._held and (text.endswith(shown) or self.stopped):
            # what is not shown of a token was in front of the rest, like a space that is stripped
            hidden = len(text) - len(shown) if text.endswith(shown) else 0
            cut = max(length - hidden, 0)
            released += shown[:cut]
            self._held[0] = (text[length:], shown[cut:])
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
