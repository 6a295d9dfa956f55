"""A layer's records in one safetensors file: page-aligned, all of one size, written in order.

The official reader opens a shard and finds `expert.0007.gate` and so on; the runtime ignores the
names and reads record e with one call at `start + e * nbytes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from smoe.artifacts import safetensors_file
from smoe.artifacts.errors import BundleError
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.safetensors_file import TensorSpec

METADATA = {"format": "smoe-shard"}


def write_shard(
    path: str | Path, layout: RecordLayout, page: int, records: Iterable[np.ndarray], count: int
) -> None:
    """Write `count` records (`uint8 [layout.nbytes]`, experts in order) to `path`, starting on a
    page."""
    safetensors_file.write(path, _tensors(layout, count), records, METADATA, align=page)


def shard_start(path: str | Path, layout: RecordLayout, page: int, count: int) -> int:
    """Where record 0 begins, after checking that the file holds exactly `count` records of this
    layout; a `BundleError` if it does not.

    The header that `write_shard` writes is known to the byte, and the same in every layer of this
    geometry. One that differs is parsed: the format allows the same header in other words.
    """
    raw, size = safetensors_file.read_raw_header(path)
    text, nbytes = _header_text(layout, count)
    start = 8 + len(raw)
    written = raw.startswith(text) and not raw[len(text) :].strip(b" ")
    if written and start % page == 0 and size == start + nbytes:
        return start
    return _parsed_start(path, layout, page, count)


@lru_cache(maxsize=4)  # layers differ in geometry seldom
def _header_text(layout: RecordLayout, count: int) -> tuple[bytes, int]:
    return safetensors_file.header_text(_tensors(layout, count), METADATA)


def _tensors(layout: RecordLayout, count: int) -> list[TensorSpec]:
    return [tensor for expert in range(count) for tensor in layout.tensors(expert)]


def _parsed_start(path: str | Path, layout: RecordLayout, page: int, count: int) -> int:
    header = safetensors_file.read_header(path)
    start = header.data_start
    if start % page:
        raise BundleError(
            f"{path}: records start at byte {start}, not on a page of {page}; build the bundle "
            "again."
        )
    expected = {}
    for expert in range(count):
        offset = start + expert * layout.nbytes
        for tensor in layout.tensors(expert):
            expected[tensor.name] = safetensors_file.Entry(
                tensor.dtype, tensor.shape, offset, offset + tensor.nbytes
            )
            offset += tensor.nbytes
    if header.entries != expected:
        odd = next(
            n for n in [*expected, *header.entries] if header.entries.get(n) != expected.get(n)
        )
        raise BundleError(
            f"{path}: tensor {odd!r} is {header.entries.get(odd)}, the manifest wants "
            f"{expected.get(odd)}; "
            "the shard belongs to another bundle or is damaged: copy it again."
        )
    return start
