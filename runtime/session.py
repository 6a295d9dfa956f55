"""A session: a sequence that outlives its process. One file holds the ids that it consumed, the
state that the segments left, and of a chat what was said.

A safetensors file: `ids` int64 `[tokens]`, the state's arrays, and last `sha256`, of the header and
of all data before it. Its metadata say what it goes with: the bundle's weights, and the arithmetic
that the state is of. It is written beside and renamed, and a file that is read is untrusted:
everything is checked before memory is taken, and the file is left alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smoe.artifacts import BundleError, Manifest
from smoe.artifacts.safetensors_file import (
    DTYPES,
    Entry,
    Header,
    TensorSpec,
    dtype_name,
    header_text,
    read_header,
    read_raw_header,
    write,
)
from smoe.runtime.conversation import Conversation
from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.step import Sequence, SequenceState

FORMAT = "smoe session 1"
IDS, DIGEST = "ids", "sha256"
MAX_HEADER = 16 << 20  # bytes; nearly all of them are a conversation's
PIECE = 1 << 20  # bytes that are read at once where nothing is kept


@dataclass(frozen=True)
class Saved:
    """What a file held: so many `tokens`, and the conversation that they are of."""

    tokens: int
    conversation: Conversation


def save(
    engine: Engine,
    file: Path,
    conversation: Conversation | None = None,
    sequence: Sequence | None = None,
) -> None:
    """Write what `sequence` (None: the engine's) is now into `file`, which is what it was, or
    whole. An `EngineError` where that cannot be written."""
    sequence = sequence or engine.sequence
    about = goes_with(engine) | {"conversation": json.dumps(_said(conversation or Conversation()))}
    specs = [TensorSpec(name, dtype_name(a), a.shape) for name, a in _arrays(sequence)]
    specs.append(TensorSpec(DIGEST, "U8", (hashlib.sha256().digest_size,)))
    header, _ = header_text(specs, about)
    try:
        write(file, specs, _digested(header, sequence), about, align=64)
    except OSError as error:
        file.with_name(file.name + ".part").unlink(missing_ok=True)
        raise EngineError(
            f"The session cannot be saved in {file} ({error.strerror}), which is left as it was; "
            "make room, or name another file."
        ) from error


def load(engine: Engine, file: Path) -> Saved:
    """Go on from what `file` holds: the engine's sequence is that one now. An `EngineError` says
    why not, and what to do; then the sequence is what it was."""
    engine.sequence, conversation = read(engine, file)
    return Saved(engine.sequence.length, conversation)


def read(engine: Engine, file: Path) -> tuple[Sequence, Conversation]:
    """A sequence of its own, as `file` holds it. An `EngineError` says why not, and what to do."""
    try:
        return _read_all(engine, file)
    except (BundleError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise _refused(file, (said or "").removeprefix(f"{file}: ").rstrip(".")) from error


def refuse_unwritable(file: Path) -> None:
    """An `EngineError` where no session can be written, said before there is one."""
    folder = file.parent
    if file.exists() and not file.is_file():
        raise EngineError(f"{file} is no file; --session FILE names one, or one that is yet to be.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EngineError(f"{folder} is no folder to write {file.name} into; name another one.")


@contextmanager
def kept(
    engine: Engine, file: Path | None, conversation: Conversation | None = None
) -> Iterator[str]:
    """The block goes on from `file`, if that is there, and leaves the sequence in it: also where
    the user ends it, and not where it fails. Gives a line for people, "" without a file. What was
    said is added to `conversation`."""
    if file is None:
        yield ""
        return
    refuse_unwritable(file)
    line = f"session: {file} is new"
    if file.exists():
        saved = load(engine, file)
        line = f"session: {file} goes on after {saved.tokens} tokens"
        if conversation is not None:
            conversation.turns = saved.conversation.turns
            conversation.system = conversation.system or saved.conversation.system
            turns = len(conversation.turns)
            line += f" and {turns} turn{'' if turns == 1 else 's'}"
    try:
        yield line
    except KeyboardInterrupt:
        save(engine, file, conversation)
        raise
    save(engine, file, conversation)


def _arrays(sequence: Sequence) -> Iterator[tuple[str, np.ndarray]]:
    """All of a file but the digest, one after another: there is never a second copy of a state."""
    yield IDS, np.array(sequence.ids, np.int64)
    yield from sequence.state.arrays(sequence.length)


def _digested(header: bytes, sequence: Sequence) -> Iterator[np.ndarray]:
    """What is in the arrays, and the digest of the header and of them."""
    digest = hashlib.sha256(header)
    for _, array in _arrays(sequence):
        flat = np.ascontiguousarray(array).reshape(-1)
        digest.update(flat.view(np.uint8).data)
        yield flat
    yield np.frombuffer(digest.digest(), np.uint8)


# -- what a file goes with -------------------------------------------------------------------------


def fingerprint(manifest: Manifest) -> str:
    """Of all that a token's state depends on: backbone, program and experts, by their hashes."""
    files = sorted(manifest.files.items())
    told = [(name, f.sha256) for name, f in files if name.startswith(("backbone/", "experts/"))]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def arithmetic(engine: Engine) -> str:
    """Who runs which segments, what their state is kept in, and what of the experts is read."""
    division, runs = engine.division, []
    for onnx, group in groupby(division.onnx):
        runs.append(f"{len(list(group))} in {'ONNX Runtime' if onnx else division.kind}")
    level = f"level {engine.level} of {engine.bundle.levels}"
    lossy = [] if engine.policies.lossless else ["with shortcuts"]
    return ", ".join([*runs, level, *lossy])


def goes_with(engine: Engine) -> dict[str, str]:
    """What another engine must have in common to go on from a session of this one."""
    return {
        "format": FORMAT,
        "bundle": fingerprint(engine.manifest),
        "arithmetic": arithmetic(engine),
    }


def _said(conversation: Conversation) -> dict[str, Any]:
    return {"system": conversation.system, "turns": conversation.turns}


# -- reading ---------------------------------------------------------------------------------------


def _read_all(engine: Engine, file: Path) -> tuple[Sequence, Conversation]:
    if not file.is_file():
        raise _refused(file, "it is no file")
    header = _header(file)
    _refuse_foreign(engine, file, header.metadata)
    conversation = _conversation(file, header.metadata.get("conversation", ""))
    tokens = _tokens(engine, file, header.entries)
    sequence = engine.new_sequence()
    _refuse_unlike(file, header.entries, sequence.state, tokens)
    with open(file, "rb") as opened:
        _refuse_damaged(file, opened, header)
        ids = _read(opened, header.entries[IDS])
        if tokens and not 0 <= ids.min() <= ids.max() < engine.manifest.model.vocabulary:
            raise _refused(file, "it has token ids that the bundle has not")
        try:
            sequence.state.load(_Arrays(opened, header.entries), tokens)
        except EngineError as error:
            raise _refused(file, f"its state is damaged ({str(error).rstrip('.')})") from error
    sequence.ids = ids.tolist()
    return sequence, conversation


class _Arrays(Mapping[str, np.ndarray]):
    """A state's arrays, read when they are asked for: of those in memory, names differ in their
    last part alone."""

    def __init__(self, opened: BinaryIO, entries: dict[str, Entry]):
        self._opened, self._entries = opened, _of_state(entries)
        self._together, self._held = "", dict[str, np.ndarray]()

    def __getitem__(self, name: str) -> np.ndarray:
        together, _, _ = name.rpartition(".")
        if together != self._together:
            self._together, self._held = together, {}
        if name not in self._held:
            self._held[name] = _read(self._opened, self._entries[name])
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _of_state(entries: dict[str, Entry]) -> dict[str, Entry]:
    return {name: entry for name, entry in entries.items() if name not in (IDS, DIGEST)}


def _read(opened: BinaryIO, entry: Entry) -> np.ndarray:
    opened.seek(entry.begin)
    array = np.fromfile(opened, DTYPES[entry.dtype], int(np.prod(entry.shape, dtype=np.int64)))
    if array.nbytes != entry.end - entry.begin:
        raise BundleError("it became shorter while it was read")
    return array.reshape(entry.shape)


def _header(file: Path) -> Header:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_HEADER:
        raise _refused(file, f"its header has {length} bytes, {MAX_HEADER} are allowed")
    return read_header(file)


def _refuse_foreign(engine: Engine, file: Path, metadata: dict[str, str]) -> None:
    """A file of something else, of another bundle, or of another arithmetic."""
    about = goes_with(engine)
    given = {name: metadata.get(name, "") for name in about}
    if given["format"] != about["format"]:
        what = f"is of {given['format'][:40]!r}" if given["format"] else "is no session"
        raise _refused(file, f"it {what}, and this smoe reads {FORMAT!r}")
    if given["bundle"] != about["bundle"]:
        raise _refused(file, "it is of another bundle")
    if given["arithmetic"] != about["arithmetic"]:
        raise _refused(
            file,
            f"its state was made by other arithmetic (segments: {given['arithmetic'][:200]}; here "
            f"{about['arithmetic']})",
            "give the options that it was made with",
        )


def _conversation(file: Path, text: str) -> Conversation:
    """As `_said` gives it: all of it text that can be encoded."""
    try:
        said = json.loads(text)
        system, turns = said["system"], [(user, answer) for user, answer in said["turns"]]
        contents = [content for turn in turns for content in turn]
        for content in contents if system is None else [system, *contents]:
            content.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _refused(file, "its conversation is damaged") from error
    return Conversation(system, turns)


def _tokens(engine: Engine, file: Path, entries: dict[str, Entry]) -> int:
    """How many a file has, where they fit."""
    ids = entries.get(IDS)
    if ids is None or ids.dtype != "I64" or len(ids.shape) != 1:
        raise _refused(file, "it has no list of token ids")
    (tokens,), longest = ids.shape, engine.manifest.model.context
    if tokens > engine.context:
        more = f"give a --context above {tokens}" if tokens <= longest else "remove it"
        raise _refused(file, f"it has {tokens} tokens, and the context is {engine.context}", more)
    return tokens


def _refuse_unlike(
    file: Path, entries: dict[str, Entry], state: SequenceState, tokens: int
) -> None:
    """Other arrays than those of such a state."""
    last = max(entries.values(), key=lambda entry: (entry.end, entry.begin))
    if last is not entries.get(DIGEST) or last.shape != (hashlib.sha256().digest_size,):
        raise _refused(file, "it does not end with a digest of its bytes")
    kinds = {name: (DTYPES[e.dtype], e.shape) for name, e in _of_state(entries).items()}
    try:
        state.check(kinds, tokens)
    except EngineError as error:
        raise _refused(file, f"its state is another one ({str(error).rstrip('.')})") from error


def _refuse_damaged(file: Path, opened: BinaryIO, header: Header) -> None:
    """Bytes that are not those that were written."""
    end = header.entries[DIGEST]
    raw, _ = read_raw_header(file)
    digest = hashlib.sha256(raw.rstrip(b" "))
    opened.seek(header.data_start)
    left = end.begin - header.data_start
    while left and (piece := opened.read(min(left, PIECE))):
        digest.update(piece)
        left -= len(piece)
    if left or opened.read(end.end - end.begin) != digest.digest():
        raise _refused(file, "its bytes are not those that were saved")


def _refused(file: Path, why: str, way_out: str = "") -> EngineError:
    ways = f"{way_out}, or name" if way_out else "name"
    return EngineError(
        f"The session {file} cannot be gone on with: {why}. It is left as it is; {ways} another "
        "--session FILE, or remove it to begin anew."
    )
