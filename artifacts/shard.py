"""A layer's records in one safetensors file: page-aligned, all of one size, written in order.

The official reader opens a shard and finds `expert.0007.gate` and so on; the runtime ignores the names and reads
record e with one call at `start + e * nbytes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from smoe.artifacts import safetensors_file
from smoe.artifacts.errors import BundleError
from smoe.artifacts.layout import RecordLayout


def write_shard(
    path: str | Path, layout: RecordLayout, page: int, records: Iterable[np.ndarray], count: int
) -> None:
    """Write `count` records (`uint8 [layout.nbytes]`, experts in order) to `path`, starting on a page."""
    tensors = [tensor for expert in range(count) for tensor in layout.tensors(expert)]
    safetensors_file.write(path, tensors, records, {"format": "smoe-shard"}, align=page)


def shard_start(path: str | Path, layout: RecordLayout, page: int, count: int) -> int:
    """Where record 0 begins, after checking that the file holds exactly `count` records of this layout."""
    header = safetensors_file.read_header(path)
    start = header.data_start
    if start % page:
        raise BundleError(
            f"{path}: records start at byte {start}, not on a page of {page}; build the bundle again."
        )
    wanted = {}
    for expert in range(count):
        offset = start + expert * layout.nbytes
        for tensor in layout.tensors(expert):
            wanted[tensor.name] = safetensors_file.Entry(
                tensor.dtype, tensor.shape, offset, offset + tensor.nbytes
            )
            offset += tensor.nbytes
    if header.entries != wanted:
        odd = next(n for n in [*wanted, *header.entries] if header.entries.get(n) != wanted.get(n))
        raise BundleError(
            f"{path}: tensor {odd!r} is {header.entries.get(odd)}, the manifest wants {wanted.get(odd)}; "
            "the shard belongs to another bundle or is damaged: copy it again."
        )
    return start
