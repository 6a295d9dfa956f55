"""The expert shards on disk: one record, one read, into memory that the engine owns.

Reads rather than mappings: the bytes count once, in the budget; and a shard that shrinks or fails
under a running engine is an error code here, where a mapping would be a signal that kills the
process. `bench/reads.py` compares the ways; `direct` reads past the page cache, `buffered` through
it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts.bundle import Bundle
from smoe.artifacts.encodings import checked_level, encoding_named, float_fields
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.validate import all_finite
from smoe.runtime.budget import MemoryPlan
from smoe.runtime.errors import EngineError
from smoe.runtime.machine import memory_room
from smoe.runtime.system import aligned

IO = ("direct", "buffered")
TRIED = 8 << 20  # bytes read each way to measure them


class Shards:
    """All shards of a bundle, open for reading up to `level` (None: all of a record). `layouts[l]`
    is the record layout of layer l. `io` is one of `IO`."""

    def __init__(self, bundle: Bundle, level: int | None = None, io: str = "buffered"):
        self.level = checked_level(encoding_named(bundle.manifest.experts.encoding), level)
        self.io = io
        self.layouts = bundle.layouts
        self._floats = [_float_runs(layout) for layout in self.layouts]
        self._seeking = threading.Lock()
        self._files: list[tuple[Path, int, int]] = []  # path, descriptor, start of record 0
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        flags |= os.O_DIRECT if io == "direct" else 0
        for layer, start in enumerate(bundle.starts):
            file = bundle.shard(layer)
            try:
                opened = os.open(file, flags)
            except OSError as error:
                self.close()
                raise EngineError(f"{file} cannot be opened: {error}") from error
            self._files.append((file, opened, start))

    def read(
        self, layer: int, expert: int, into: np.ndarray, since: int = 0, level: int | None = None
    ) -> int:
        """Fill `into` (uint8, long enough, on a page boundary) with the planes of a record after
        the first `since`, up to `level` (None: the shards' own); returns the bytes read, or raises
        `EngineError`. Threads may read at once."""
        path, file, start = self._files[layer]
        ends = (0, *self.layouts[layer].levels)
        first, size = ends[since], ends[self.level if level is None else level] - ends[since]
        view, done = into[first : first + size].data, 0
        at = start + expert * self.layouts[layer].nbytes + first
        try:
            while done < size:
                got = self._read_at(file, view[done:], at + done)
                if not got:
                    raise EngineError(
                        f"{path} ends inside expert {expert}: it became shorter; copy the bundle "
                        f"again."
                    )
                done += got
        except OSError as error:
            raise EngineError(
                f"{path}: reading expert {expert} failed: {error.strerror}."
            ) from error
        if not since:
            self._check_floats(layer, expert, into)
        return size

    def _read_at(self, file: int, into: memoryview, at: int) -> int:
        """Bytes read at that place, 0 at the end; where the system lacks a way, the next best
        one."""
        if hasattr(os, "preadv"):
            return os.preadv(file, [into], at)
        if hasattr(os, "pread"):
            data = os.pread(file, len(into), at)
        else:
            with self._seeking:  # threads share the file's one position
                os.lseek(file, at, os.SEEK_SET)
                data = os.read(file, len(into))
        into[: len(data)] = data
        return len(data)

    def _check_floats(self, layer: int, expert: int, record: np.ndarray) -> None:
        """Scales, biases and norms must be finite. All of them lie in the base plane."""
        for dtype, start, end in self._floats[layer]:
            if not all_finite(record[start:end], dtype):
                raise EngineError(
                    f"{self._files[layer][0]}: {self._not_finite(layer, record)} of expert "
                    f"{expert} holds values that are not finite; copy the bundle again, or build "
                    "it again."
                )

    def _not_finite(self, layer: int, record: np.ndarray) -> str:
        """The first field that is not."""
        for field in float_fields(self.layouts[layer]):
            if not all_finite(record[field.offset : field.offset + field.nbytes], field.dtype):
                return field.name
        return "a value"

    def forget(self, layer: int, expert: int) -> None:
        """Take a record out of the page cache, so that the next read is one of the device, where
        the system can."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        _, file, start = self._files[layer]
        nbytes = self.layouts[layer].nbytes
        os.posix_fadvise(file, start + expert * nbytes, nbytes, os.POSIX_FADV_DONTNEED)

    @property
    def closed(self) -> bool:
        return not self._files

    def close(self) -> None:
        for _, file, _ in self._files:
            os.close(file)
        self._files = []


def _float_runs(layout: RecordLayout) -> list[tuple[str, int, int]]:
    """Dtype, start and end of a record's float fields, those that lie side by side as one: a check
    costs by the call."""
    runs: list[tuple[str, int, int]] = []
    for field in float_fields(layout):
        if runs and runs[-1][0] == field.dtype and runs[-1][2] == field.offset:
            runs[-1] = field.dtype, runs[-1][1], field.offset + field.nbytes
        else:
            runs.append((field.dtype, field.offset, field.offset + field.nbytes))
    return runs


@dataclass(frozen=True)
class Choice:
    """How records are read, one of `IO`, and why."""

    io: str
    reason: str


def choose(bundle: Bundle, level: int | None, requested: str | None, plan: MemoryPlan) -> Choice:
    """The way to read: `requested`, or the better one by a measurement from the device. Reading
    past the page cache is right where nothing else could hold the records; where the machine has
    memory to spare beside the budget, the page cache holds some of them for nothing. An
    `EngineError` if `requested` cannot be had."""
    if requested is not None and requested not in IO:
        raise EngineError(
            f"There is no way to read called {requested!r}; there are {' and '.join(IO)}."
        )
    if requested is None and plan.capacity == plan.experts:
        return Choice("buffered", "every record is read once")
    speeds: dict[str, float] = {}
    for io in [requested] if requested else IO:
        try:
            speeds[io] = _rate(bundle, level, io)
        except (
            EngineError,
            OSError,
            AttributeError,
        ) as error:  # AttributeError: a system without O_DIRECT
            if requested:
                raise EngineError(f"Records cannot be read {requested} here: {error}") from error
    if requested:
        return Choice(requested, f"asked for; {speeds[requested]:.2f} GB/s from the device")
    if "direct" not in speeds:
        return Choice("buffered", "this file system reads no other way")
    rates = ", ".join(f"{io} {rate:.2f}" for io, rate in speeds.items()) + " GB/s from the device"
    experts = sum(
        file.size for name, file in bundle.manifest.files.items() if name.startswith("experts/")
    )
    room = memory_room()
    spare = 0 if room is None else room.nbytes - plan.total
    if spare > experts // 10:
        return Choice(
            "buffered", f"{spare / 2**20:.0f}MiB beyond the budget can cache records; {rates}"
        )
    best = max(speeds, key=lambda io: speeds[io])
    return Choice(best, rates)


def _rate(bundle: Bundle, level: int | None, io: str) -> float:
    """GB/s of records that are not in the page cache, one at a time."""
    shards = Shards(bundle, level, io)
    try:
        layer = len(shards.layouts) - 1
        into = aligned(1, shards.layouts[layer].nbytes)[0]
        into[:] = 0  # so that no page of it is missing while the clock runs
        size = shards.layouts[layer].levels[shards.level - 1]
        experts = np.arange(bundle.manifest.layers[layer].experts)[:: -1 if io == "direct" else 1]
        experts = experts[: max(1, TRIED // size)]
        for expert in experts:
            shards.forget(layer, int(expert))
        started = time.perf_counter()
        done = sum(shards.read(layer, int(expert), into) for expert in experts)
        return done / (time.perf_counter() - started) / 1e9
    finally:
        shards.close()
