"""Reading and writing safetensors files with the standard library and NumPy.

The official library reorders tensors and chooses its own offsets; a shard needs both in its own
hands, and the device should not need the library. Every file written here opens in it, and every
file read here is checked first: bounded header, known dtypes, tensors that follow one another
without a hole, and an end that is the end of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoe.artifacts.errors import BundleError

MAX_HEADER = 64 << 20  # bytes; a layer of 512 experts with 12 tensors each needs about 1 MiB

# bfloat16 has no NumPy type: its bits are read and written as uint16.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}


@dataclass(frozen=True)
class Entry:
    """One tensor: `begin` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors; their data begin at byte `data_start`."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def dtype_name(array: np.ndarray) -> str:
    """The safetensors name of an array's dtype; a dtype that the format lacks is a
    `BundleError`."""
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise BundleError(
            f"safetensors has no name for dtype {array.dtype}; convert the array first."
        )
    return name


def read_raw_header(path: str | os.PathLike[str]) -> tuple[bytes, int]:
    """The header of `path` as it lies in the file, and the size of the file in bytes. A header that
    is longer than it may be, or than the file, is a `BundleError`."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, MAX_HEADER):
                raise BundleError(
                    f"{path}: the header says it is {length} bytes long, but the file has {size} "
                    "bytes and headers "
                    f"may have {MAX_HEADER}; the file is damaged or not a safetensors file."
                )
            return file.read(length), size
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from error


def read_header(path: str | os.PathLike[str]) -> Header:
    """Parse and check the header of `path`. Anything wrong is a `BundleError` that names file,
    field and value."""
    path = Path(path)
    raw, size = read_raw_header(path)
    try:
        parsed = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: the header is not JSON ({error}); copy the file again."
        ) from error
    if not isinstance(parsed, dict):
        raise BundleError(
            f"{path}: the header is {type(parsed).__name__}, not an object; copy the file again."
        )
    return _checked(path, parsed, 8 + len(raw), size)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _checked(path: Path, parsed: dict[str, Any], data_start: int, size: int) -> Header:
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BundleError(f"{path}: __metadata__ must map strings to strings; copy the file again.")
    entries: dict[str, Entry] = {}
    for name, fields in parsed.items():
        entries[name] = _entry(path, name, fields, data_start)
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise BundleError(
                f"{path}: {name} starts at byte {entry.begin}, where {end} was wanted."
            )
        end = entry.end
    if end != size:
        raise BundleError(
            f"{path}: its tensors end at byte {end}, the file at {size}; copy the file again."
        )
    return Header(entries, metadata, data_start)


def _entry(path: Path, name: str, fields: object, data_start: int) -> Entry:
    def integers(value: object, count: int | None = None) -> bool:
        return (
            isinstance(value, list)
            and (count is None or len(value) == count)
            and all(type(v) is int and 0 <= v < 2**62 for v in value)
        )

    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("dtype"), str)
        or fields["dtype"] not in DTYPES
        or not integers(fields.get("shape"))
        or len(fields["shape"]) > 8
        or not integers(fields.get("data_offsets"), 2)
    ):
        raise BundleError(
            f"{path}: tensor {name!r} needs a known dtype, a shape and two data_offsets."
        )
    begin, end = (data_start + offset for offset in fields["data_offsets"])
    nbytes = math.prod(fields["shape"]) * DTYPES[fields["dtype"]].itemsize
    if end - begin != nbytes:
        raise BundleError(
            f"{path}: tensor {name!r} has {end - begin} bytes, its shape wants {nbytes}."
        )
    return Entry(fields["dtype"], tuple(fields["shape"]), begin, end)


def load_some(
    path: str | os.PathLike[str], names: Collection[str], header: Header | None = None
) -> dict[str, np.ndarray]:
    """Those tensors of `names` that a file has, as `load` gives them; nothing else is read.
    `header` spares reading it again."""
    header, arrays = header or read_header(path), {}
    with open(path, "rb") as file:
        for name, entry in header.entries.items():
            if name not in names:
                continue
            file.seek(entry.begin)
            array = np.fromfile(file, DTYPES[entry.dtype], math.prod(entry.shape))
            if array.nbytes != entry.end - entry.begin:
                raise BundleError(f"{path} became shorter while it was read; copy it again.")
            array.flags.writeable = False
            arrays[name] = array.reshape(entry.shape)
    return arrays


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a (small) file as owned, read-only arrays, bfloat16 as uint16."""
    header = read_header(path)
    data = np.fromfile(path, dtype=np.uint8)
    data.flags.writeable = False
    arrays = {}
    for name, entry in header.entries.items():
        if entry.end > data.size:
            raise BundleError(f"{path} became shorter while it was read; copy it again.")
        # Offsets in foreign files need not be aligned to the dtype: copy where they are not.
        piece = data[entry.begin : entry.end]
        dtype = DTYPES[entry.dtype]
        aligned = piece if entry.begin % dtype.itemsize == 0 else piece.copy()
        arrays[name] = aligned.view(dtype).reshape(entry.shape)
    return arrays


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: what the header says of it. Its bytes come later, in the same
    order."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def header_text(
    tensors: Iterable[TensorSpec], metadata: dict[str, str] | None = None
) -> tuple[bytes, int]:
    """What `write` writes as the header of these tensors, without the padding, and the bytes of
    their data."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    return json.dumps(header, separators=(",", ":")).encode(), offset


def write(
    path: str | os.PathLike[str],
    tensors: Iterable[TensorSpec],
    chunks: Iterator[np.ndarray] | Iterable[np.ndarray],
    metadata: dict[str, str] | None = None,
    align: int = 8,
) -> None:
    """Write `tensors` in the given order, their data starting at a multiple of `align` bytes.

    `chunks` yields the data in the same order, in pieces of any size whose bytes add up to the
    tensors'. The file is written under another name and renamed when it is complete.
    """
    raw, nbytes = header_text(tensors, metadata)
    raw += b" " * (-(8 + len(raw)) % align)  # the format allows trailing spaces
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        written = 0
        for chunk in chunks:
            written += file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    if written != nbytes:
        beside.unlink()
        raise ValueError(f"{path}: {written} bytes came for tensors of {nbytes} bytes")
    os.replace(beside, path)


def save(
    path: str | os.PathLike[str],
    arrays: dict[str, np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write named arrays, largest item size first so that every tensor is aligned to its dtype."""
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    write(
        path,
        [TensorSpec(name, dtype_name(arrays[name]), arrays[name].shape) for name in order],
        (arrays[name].astype(arrays[name].dtype.newbyteorder("<"), copy=False) for name in order),
        metadata,
        align=64,
    )
