"""Calibration text: where it comes from, and how it becomes sequences of token ids. Seeded, so that
a run repeats.

Documents are shuffled, tokenised one by one and joined end to end; the stream is cut into rows of
`length`. The last row may be shorter and is run as it is, so there is no padding anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from smoe.artifacts.errors import first_line
from smoe.prep.errors import PrepError

if TYPE_CHECKING:
    from smoe.prep.checkpoint.checkpoint import Checkpoint

MINIMUM = 128  # tokens: below this the statistics would be of nothing
DEFAULT_TOKENS = 128 * 512
DOCUMENTS = 1024  # in memory at once


@dataclass(frozen=True)
class Calibration:
    """`source` is a .txt or .jsonl file (`text` or `input_ids` a line), a dataset directory, or a
    `datasets` name `name[subset](split):n`. `tokens` None takes 128 x 512, or all there are if that
    is less."""

    source: str
    tokens: int | None = None
    seed: int = 0
    length: int = 512

    def rows(self, checkpoint: Checkpoint) -> list[np.ndarray]:
        """Sequences of token ids, int64 `[length]` each but the last; a `PrepError` if there is too
        little text."""
        tokens = DEFAULT_TOKENS if self.tokens is None else self.tokens
        if tokens < MINIMUM:
            raise PrepError(f"--tokens is {tokens}; at least {MINIMUM} are needed for statistics.")
        if self.length < 2 or self.seed < 0:
            raise PrepError(
                f"length is {self.length} and seed {self.seed}; 2 and more, and 0 and more, are "
                "wanted."
            )
        pieces, total = [], 0
        documents = _shuffled(self.source, self.seed)
        for ids in _encode(documents, checkpoint, self.source):
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
        return [stream[i : i + self.length] for i in range(0, len(stream), self.length)]

    def settings(self, rows: list[np.ndarray]) -> dict[str, str]:
        """What `rows` depend on, and a digest of them."""
        tokens = "all there are" if self.tokens is None else str(self.tokens)
        return {
            "--calibration": f"{Path(self.source).name} ({self.digest(rows)[:12]})",
            "--tokens": tokens,
            "--seed": str(self.seed),
        }

    @staticmethod
    def digest(rows: list[np.ndarray]) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest()


def _shuffled(source: str, seed: int) -> Iterator[str | list[int]]:
    """The documents of a source in an order drawn with `seed`; a few are in memory at once, so the
    source is read once to count them, and again for every so many."""
    order = list(range(sum(1 for _ in read_documents(source))))
    np.random.default_rng(seed).shuffle(order)
    for start in range(0, len(order), DOCUMENTS):
        picked = order[start : start + DOCUMENTS]
        needed = set(picked)
        documents = {i: text for i, text in enumerate(read_documents(source)) if i in needed}
        for index in picked:
            yield documents.pop(index)


def read_documents(source: str) -> Iterator[str | list[int]]:
    """The documents of a source, one after another, as text or as token ids."""
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        yield _utf8(path)
    elif path.suffix == ".jsonl" and path.is_file():
        yield from _read_jsonl(path)
    elif path.is_dir():
        yield from _read_dataset(source, None, None, None)
    elif path.suffix in (".txt", ".jsonl") or path.exists():
        what = "is not a .txt or .jsonl file" if path.exists() else "does not exist"
        raise PrepError(
            f"{source} {what}; give calibration text as .txt, .jsonl, a dataset directory or a "
            "datasets name."
        )
    else:
        match = re.fullmatch(r"([\w./-]+)(?:\[([\w.-]+)\])?(?:\(([\w.-]+)\))?(?::(\d+))?", source)
        if not match:
            raise PrepError(
                f"{source!r} is neither a file nor a datasets name like name[subset](split):n."
            )
        yield from _read_dataset(match[1], match[2], match[3], int(match[4]) if match[4] else None)


def _utf8(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PrepError(f"{path} is not UTF-8 at byte {error.start}; convert it first.") from error


def _read_jsonl(path: Path) -> Iterator[str | list[int]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _document(_record(path, number, line), f"{path}, line {number}")


def _record(path: Path, number: int, line: bytes) -> object:
    """The JSON of one line."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PrepError(
            f"{path}, line {number} is not UTF-8 at its byte {error.start}; convert it first."
        ) from error
    except (ValueError, RecursionError) as error:
        raise PrepError(f"{path}, line {number} is not JSON: {error}.") from error


def _document(record: object, where: str) -> str | list[int]:
    fields = record if isinstance(record, dict) else {}
    text, ids = fields.get("text"), fields.get("input_ids")
    if isinstance(text, str):
        return text
    if isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids):
        return ids
    raise PrepError(f"{where} has neither a string `text` nor a list of token ids `input_ids`.")


def _read_dataset(
    name: str, subset: str | None, split: str | None, limit: int | None
) -> Iterator[str | list[int]]:
    import datasets  # seconds to import, and seldom needed

    try:
        on_disk = (Path(name) / "state.json").is_file() or (
            Path(name) / "dataset_dict.json"
        ).is_file()
        dataset = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, subset)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise PrepError(f"The dataset {name!r} cannot be loaded: {first_line(error)}") from error
    if isinstance(dataset, dict):
        split = split or ("train" if "train" in dataset else next(iter(dataset)))
        if split not in dataset:
            raise PrepError(
                f"The dataset {name!r} has the splits {', '.join(dataset)}, not {split!r}."
            )
        dataset = dataset[split]
    for index, record in enumerate(dataset):
        if limit is not None and index >= limit:
            return
        yield _document(record, f"dataset {name}, record {index}")


def _encode(
    documents: Iterable[str | list[int]], checkpoint: Checkpoint, source: str
) -> Iterator[np.ndarray]:
    vocabulary, written = checkpoint.config.vocab_size, checkpoint.text_files.get("tokenizer.json")
    tokenizer = None if written is None else tokenizers.Tokenizer.from_buffer(written)
    for document in documents:
        if isinstance(document, str):
            if tokenizer is None:
                raise PrepError(
                    f"{checkpoint.path} has no tokenizer, so text cannot be used; give a "
                    ".jsonl file "
                    "with `input_ids`."
                )
            document = tokenizer.encode(document).ids
        ids = np.asarray(document, np.int64)
        if ids.size and ids.max() >= vocabulary:
            raise PrepError(
                f"{source} has the token id {ids.max()}; this model has 0 to {vocabulary - 1}."
            )
        yield ids
