"""Calibration text: where it comes from, and how it becomes sequences of token ids. Seeded, so that
a run repeats.

Documents are shuffled, tokenised one by one and joined end to end; the stream is cut into rows of
`length`. The last row may be shorter and is run as it is, so there is no padding anywhere.
Conversations are written as the model's own chat template writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from smoe.prep.checkpoint.documents import PIECE, is_stream, piece_end, read_documents
from smoe.prep.checkpoint.records import Conversation, Document
from smoe.prep.errors import PrepError
from smoe.prep.options import MINIMUM
from smoe.runtime import chat
from smoe.runtime.errors import EngineError

if TYPE_CHECKING:
    from smoe.prep.checkpoint.checkpoint import Checkpoint

LENGTH = 512  # of a row
DEFAULT_TOKENS = 128 * LENGTH
DOCUMENTS = 1024  # in memory at once


@dataclass(frozen=True)
class Origin:
    """Where text comes from: the name of what was read, if anything was; the seed that drew its
    order, what the model wrote and all samples; the length of its rows; and how many of its tokens
    the model wrote itself (`own`), with experts packed by the quantiser `writer`."""

    source: str
    seed: int
    length: int
    own: int = 0
    writer: str = ""

    def __str__(self) -> str:
        own = "text written by the model" if self.own else ""
        return " and ".join(part for part in (self.source, own) if part)

    def as_dict(self, tokens: int) -> dict[str, str | int]:
        """For profile.json, of text of so many `tokens`."""
        made: dict[str, str | int] = {"source": str(self), "tokens": tokens}
        made |= {"length": self.length, "seed": self.seed}
        if self.own:
            made |= {"own_tokens": self.own, "written_with": self.writer}
        return made


@dataclass(frozen=True)
class Calibration:
    """`source` is a file of text or of records, a directory of them, or a `datasets` name
    `name[subset](split):n`, of which n records are fetched (documents.py and records.py say what is
    read). `tokens` None takes 128 x 512, or all there are if that is less."""

    source: str
    tokens: int | None = None
    seed: int = 0
    length: int = LENGTH

    @property
    def origin(self) -> Origin:
        """Of this text alone."""
        return Origin(source=Path(self.source).name, seed=self.seed, length=self.length)

    def refuse_wrong(self) -> None:
        """A `PrepError` for numbers that no text can meet."""
        if self.tokens is not None and self.tokens < MINIMUM:
            raise PrepError(
                f"--tokens is {self.tokens}; at least {MINIMUM} are needed for statistics."
            )
        if self.length < 2 or self.seed < 0:
            raise PrepError(
                f"length is {self.length} and seed {self.seed}; 2 and more, and 0 and more, are "
                "wanted."
            )

    def rows(
        self, checkpoint: Checkpoint, say: Callable[[str], None] = lambda line: None
    ) -> list[np.ndarray]:
        """Sequences of token ids, int64 `[length]` each but the last; a `PrepError` if there is too
        little text. `say` hears, once, that the model has no template for conversations."""
        self.refuse_wrong()
        tokens = DEFAULT_TOKENS if self.tokens is None else self.tokens
        pieces, total = [], 0
        encoder = _Encoder(checkpoint, say)
        for ids in encoder.encode(_shuffled(self.source, self.seed)):
            pieces.append(ids)
            total += len(ids)
            if total >= tokens:
                break
        stream = np.concatenate(pieces)[:tokens] if pieces else np.zeros(0, np.int64)
        if len(stream) < MINIMUM:
            raise PrepError(
                f"{self.source} holds {len(stream)} tokens; at least {MINIMUM} are needed, "
                f"{DEFAULT_TOKENS} are usual. "
                "Give more text."
            )
        if self.tokens is not None and len(stream) < tokens:
            raise PrepError(
                f"{self.source} holds {len(stream)} tokens, fewer than the {tokens} asked for; "
                "give more text or a smaller --tokens."
            )
        return rows_of(stream, self.length)

    def settings(self, rows: list[np.ndarray]) -> dict[str, str]:
        """What `rows` depend on, and a digest of them."""
        tokens = "all there are" if self.tokens is None else str(self.tokens)
        return {
            "--calibration": f"{Path(self.source).name} ({digest(rows)[:12]})",
            "--tokens": tokens,
            "--seed": str(self.seed),
        }


def rows_of(stream: np.ndarray, length: int) -> list[np.ndarray]:
    """A stream of token ids, cut: each `[length]`, the last as long as is left."""
    return [stream[i : i + length] for i in range(0, len(stream), length)]


def digest(rows: list[np.ndarray]) -> str:
    """SHA-256 of the token ids."""
    return hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest()


def _shuffled(source: str, seed: int) -> Iterator[Document]:
    """The documents of a source in an order drawn with `seed`. Of a file a few are in memory at
    once: it is read once to count them, and again for every so many. So many of a data set are
    fetched once and kept."""
    kept = list(read_documents(source)) if is_stream(source) else None
    count = len(kept) if kept is not None else sum(1 for _ in read_documents(source))
    order = list(range(count))
    np.random.default_rng(seed).shuffle(order)
    if kept is not None:
        yield from (kept[index] for index in order)
        return
    for start in range(0, len(order), DOCUMENTS):
        picked = order[start : start + DOCUMENTS]
        needed = set(picked)
        documents = {i: text for i, text in enumerate(read_documents(source)) if i in needed}
        for index in picked:
            yield documents.pop(index)


class _Encoder:
    """Documents to token ids, as the checkpoint's authors frame them."""

    def __init__(self, checkpoint: Checkpoint, say: Callable[[str], None]):
        written = checkpoint.text_files.get("tokenizer.json")
        self._tokenizer = None if written is None else tokenizers.Tokenizer.from_buffer(written)
        self._path, self._vocabulary = checkpoint.path, checkpoint.config.vocab_size
        self._template, self._settings = _chat_template(checkpoint.text_files)
        self._say = say
        self._joined = False  # whether a conversation was joined for want of a template

    def encode(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """Token ids, int64 `[n]`, of one piece of a document after another."""
        for document in documents:
            for piece in self._pieces(document):
                ids = np.asarray(piece, np.int64)
                if ids.size and ids.max() >= self._vocabulary:
                    raise PrepError(
                        f"{document.where} has the token id {ids.max()}; this model has 0 to "
                        f"{self._vocabulary - 1}."
                    )
                yield ids

    def _pieces(self, document: Document) -> Iterator[list[int]]:
        """The ids of a document; of a long text a piece at a time, since what a tokenizer says of
        it takes a hundred times its size."""
        if isinstance(document.content, list):
            yield document.content
            return
        if self._tokenizer is None:
            raise PrepError(
                f"{self._path} has no tokenizer, so text cannot be used; give a .jsonl file "
                "with `input_ids`."
            )
        text, special = self._text(document)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PrepError(
                f"{document.where} has \\u{ord(text[error.start]):04x} at character {error.start}, "
                "half a character, which is no text; take it out."
            ) from error
        while True:
            end = piece_end(text, PIECE)
            yield self._tokenizer.encode(text[:end], add_special_tokens=special).ids
            text, special = text[end:], False
            if not text:
                return

    def _text(self, document: Document) -> tuple[str, bool]:
        """The text of a document, and whether the tokenizer is to frame it: a template writes the
        special tokens itself."""
        if not isinstance(document.content, Conversation):
            assert isinstance(document.content, str)
            return document.content, True
        messages = document.content.messages
        if self._template is None:
            if not self._joined:
                self._say(
                    "calibration: this model has no chat template, so the messages of a "
                    "conversation are joined by empty lines"
                )
            self._joined = True
            return "\n\n".join(str(message["content"]) for message in messages), True
        try:
            text = chat.render(
                self._template, messages, self._settings, add_generation_prompt=False
            )
        except EngineError as error:
            raise PrepError(f"{document.where}: {error}") from error
        return text, False


def _chat_template(text_files: dict[str, bytes]) -> tuple[str | None, dict[str, Any]]:
    """The model's chat template, if it has one, and tokenizer_config.json."""
    settings = json.loads(text_files.get("tokenizer_config.json", b"{}"))
    templates = chat.named_templates(settings.get("chat_template"))
    if "chat_template.jinja" in text_files:
        templates["default"] = text_files["chat_template.jinja"].decode("utf-8")
    return templates.get("default"), settings
