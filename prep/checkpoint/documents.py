"""Where calibration text lies: files as people have them, directories of them, data sets. All are
read as streams, so that neither a long line nor a small file that unpacks into a huge one fills
the memory."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from smoe.artifacts.errors import first_line
from smoe.prep.checkpoint.records import Document, document
from smoe.prep.errors import PrepError

LONGEST = 64 << 20  # bytes of a line, or of a .json file: more is no record of text
PIECE = 1 << 20  # characters of a .txt file that are one document; a longer file is several
BATCH = 64  # rows of a table in memory at once
ABOUT = ("dataset_info.json", "dataset_infos.json")
SEVERAL = re.compile(r"([\w./-]+)(?:\[([\w.-]+)\])?(?:\(([\w.-]+)\))?(?::(\d+))?")


def _zstd(path: Path) -> io.BufferedIOBase:
    import pyarrow  # comes with datasets; Python's own zstd begins with 3.14

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


UNPACKED: dict[str, Callable[[Path], io.BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


def read_documents(source: str) -> Iterator[Document]:
    """The documents of a source, one after another."""
    path = Path(source)
    if not source:
        raise PrepError("The calibration source is empty; name a file, a directory or a dataset.")
    if path.is_file() and _reader(path):
        yield from _read_file(path)
    elif path.is_dir():
        yield from _read_directory(path)
    elif path.exists() or _reader(path):
        what = "is no file" if _reader(path) else f"is none of {', '.join(READERS)}"
        what = what if path.exists() else "does not exist"
        raise PrepError(
            f"{source} {what}; give calibration text as a file of these kinds (.gz, .bz2, .xz and "
            ".zst of them too), a directory of them or a datasets name."
        )
    else:
        match = SEVERAL.fullmatch(source)
        if not match:
            raise PrepError(
                f"{source!r} is neither a file nor a datasets name like name[subset](split):n."
            )
        yield from _read_dataset(match[1], match[2], match[3], int(match[4]) if match[4] else None)


def is_stream(source: str) -> bool:
    """Whether `source` names so many documents of a data set, which come over the network: they
    are fetched once."""
    match = SEVERAL.fullmatch(source)
    return not Path(source).exists() and match is not None and match[4] is not None


def _reader(path: Path) -> Callable[[Path], Iterator[Document]] | None:
    """What reads a file of this name; None for a name of no known kind."""
    packed = path.suffix.lower() in UNPACKED
    kind = Path(path.stem).suffix if packed else path.suffix
    reader = READERS.get(kind.lower())
    return None if packed and reader is _read_parquet else reader


def _read_file(path: Path) -> Iterator[Document]:
    reader = _reader(path)
    assert reader is not None
    return reader(path)


def _read_directory(path: Path) -> Iterator[Document]:
    """What `save_to_disk` left, or all files of a known kind in the order of their names."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _read_dataset(str(path), None, None, None)
        return
    files = sorted(
        file
        for file in path.rglob("*")
        if _reader(file) and file.is_file() and not _beside(file.relative_to(path))
    )
    for file in files:
        yield from _read_file(file)
    if not files:
        yield from _read_dataset(str(path), None, None, None)


def _beside(path: Path) -> bool:
    """Whether a file of a directory is no text: hidden, or what `datasets` writes about others."""
    return path.name in ABOUT or any(part.startswith(".") for part in path.parts)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, unpacked as they are read; one that is damaged is a `PrepError`."""
    unpack = UNPACKED.get(path.suffix.lower())
    if unpack is None:
        with open(path, "rb") as plain:
            yield plain
        return
    try:
        with unpack(path) as unpacked:
            yield unpacked
    except DAMAGED as error:
        raise PrepError(
            f"{path} cannot be unpacked ({first_line(error)}); it is damaged or not whole. Copy "
            "it again."
        ) from error


def _read_text(path: Path) -> Iterator[Document]:
    """A .txt file: one document, or several where it is long, cut at ends of lines."""
    decoder, held, read = codecs.getincrementaldecoder("utf-8")(), "", 0
    with _opened(path) as file:
        while True:
            block = file.read(PIECE)
            waiting = len(decoder.getstate()[0])
            try:
                held += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = read - waiting + error.start
                raise PrepError(f"{path} is not UTF-8 at byte {at}; convert it first.") from error
            if read == 0:
                held = held.removeprefix("\ufeff")
            read += len(block)
            while len(held) > PIECE or (held and not block):
                cut = piece_end(held, PIECE)
                text, held = held[:cut], held[cut:]
                yield Document(text.replace("\r\n", "\n").replace("\r", "\n"), str(path))
            if not block:
                return


def piece_end(text: str, longest: int) -> int:
    """Where to cut a text so that a piece of at most `longest` characters comes off: after a line
    if one ends in the second half, else before a space, else there."""
    if len(text) <= longest:
        return len(text)
    line = text.rfind("\n", longest // 2, longest)
    space = text.rfind(" ", longest // 2, longest)
    return line + 1 if line >= 0 else space if space >= 0 else longest


def _read_lines(path: Path) -> Iterator[Document]:
    """A record a line; lines of white space alone are none."""
    number = 0
    with _opened(path) as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST:
                raise PrepError(
                    f"{where} is longer than {LONGEST >> 20} MiB; give one document a line."
                )
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield document(_json(line, where), where)


def _read_json(path: Path) -> Iterator[Document]:
    """A list of records or a single one; or a record a line, as many such files have it."""
    with _opened(path) as file:
        content = file.read(LONGEST + 1)
    if content.lstrip(b" \t\r\n\xef\xbb\xbf")[:1] != b"[" and _whole_line(content):
        yield from _read_lines(path)
        return
    if len(content) > LONGEST:
        raise PrepError(
            f"{path} is one piece of more than {LONGEST >> 20} MiB; make it a .jsonl file, with a "
            "record a line."
        )
    records = _json(content, str(path))
    if not isinstance(records, list):
        yield document(records, str(path))
        return
    for number, record in enumerate(records, 1):
        yield document(record, f"{path}, record {number}")


def _whole_line(content: bytes) -> bool:
    """Whether the first line is a record by itself."""
    try:
        return isinstance(json.loads(content.lstrip().split(b"\n", 1)[0].decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _json(content: bytes, where: str) -> object:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PrepError(
            f"{where} is not UTF-8 at its byte {error.start}; convert it first."
        ) from error
    except (ValueError, RecursionError) as error:
        raise PrepError(f"{where} is not JSON: {error}.") from error


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield document(record, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise PrepError(
            f"{path} is not a whole Parquet file: {first_line(error)} Copy it again."
        ) from error


READERS = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _read_dataset(
    name: str, subset: str | None, split: str | None, limit: int | None
) -> Iterator[Document]:
    """Records of a data set: with a `limit` the first ones as they come, the rest is not fetched.
    Code in a data set is never run: `datasets` has no way to, since 4.0."""
    import datasets  # seconds to import, and seldom needed
    import pyarrow

    failures = (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
    )
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, subset, streaming=limit is not None)
        if isinstance(loaded, dict):
            split = split or ("train" if "train" in loaded else next(iter(loaded)))
            if split not in loaded:
                raise PrepError(
                    f"The dataset {name!r} has the splits {', '.join(loaded)}, not {split!r}."
                )
            loaded = loaded[split]
        records = iter(loaded if limit is None else loaded.take(limit))
        for index, record in enumerate(records):
            yield document(record, f"dataset {name}, record {index}")
    except failures as error:
        raise PrepError(f"The dataset {name!r} cannot be loaded: {first_line(error)}") from error
