"""The expert shards on disk: one record, one read, into memory that the engine owns.

Reads rather than mappings: the bytes count once, in the budget; and a shard that shrinks or fails under a running
engine is an error code here, where a mapping would be a signal that kills the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from smoe.artifacts import BundleError
from smoe.artifacts.encodings import checked_level, encoding_named, record_layout
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.manifest import Manifest
from smoe.artifacts.shard import shard_start
from smoe.runtime.errors import EngineError


class Shards:
    """All shards of a bundle, open for reading up to `level` (None: all of a record). `layouts[l]` is the record layout
    of layer l."""

    def __init__(self, path: Path, manifest: Manifest, level: int | None = None):
        self.level = checked_level(encoding_named(manifest.experts.encoding), level)
        self.layouts: list[RecordLayout] = []
        self._files: list[tuple[Path, BinaryIO, int]] = []  # path, file, start of record 0
        experts = manifest.experts
        for index, layer in enumerate(manifest.layers):
            layout = record_layout(manifest.expert_shape(index), experts.encoding, experts.page)
            file = path / manifest.shard(index)
            try:
                start = shard_start(file, layout, experts.page, layer.experts)
                opened = open(file, "rb", buffering=0)
            except (BundleError, OSError) as error:
                self.close()
                raise EngineError(f"{file} cannot be opened: {error}") from error
            self.layouts.append(layout)
            self._files.append((file, opened, start))

    def read(self, layer: int, expert: int, into: np.ndarray) -> int:
        """Fill `into` (uint8, long enough) with a record up to the level; returns the bytes read, or raises
        `EngineError`."""
        path, file, start = self._files[layer]
        size = self.layouts[layer].levels[self.level - 1]
        view, done = into[:size].data, 0
        try:
            file.seek(start + expert * self.layouts[layer].nbytes)
            while done < size:
                got = file.readinto(view[done:])  # type: ignore[attr-defined]
                if not got:
                    raise EngineError(f"{path} ends inside expert {expert}: it became shorter; copy the bundle again.")
                done += got
        except OSError as error:
            raise EngineError(f"{path}: reading expert {expert} failed: {error.strerror}.") from error
        return size

    @property
    def closed(self) -> bool:
        return not self._files

    def close(self) -> None:
        for _, file, _ in self._files:
            file.close()
        self._files = []
