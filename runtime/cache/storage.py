"""The expert shards on disk: one record, one read, into memory that the engine owns.

Reads rather than mappings: the bytes count once, in the budget; and a shard that shrinks or fails
under a running engine is an error code here, where a mapping would be a signal that kills the
process. `bench/reads.py` compares the ways; `direct` reads past the page cache, `buffered` through
it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts.bundle import Bundle
from smoe.artifacts.encodings import checked_level, encoding_named, float_fields
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.validate import all_finite
from smoe.runtime.budget import MemoryPlan
from smoe.runtime.cache.shard_file import ADVICE, ShardFile
from smoe.runtime.errors import EngineError
from smoe.runtime.machine import memory_room
from smoe.runtime.stats import Stats
from smoe.runtime.system import aligned

IO = ("direct", "buffered")
TRIED = 8 << 20  # bytes read each way to measure them


class Shards:
    """All shards of a bundle, open for reading up to `level` (None: all of a record). `layouts[l]`
    is the record layout of layer l. `io` is one of `IO`; `refused` says of each file that cannot be
    read past the page cache why; `stats` count them."""

    def __init__(
        self,
        bundle: Bundle,
        level: int | None = None,
        io: str = "buffered",
        stats: Stats | None = None,
    ):
        self.level = checked_level(encoding_named(bundle.manifest.experts.encoding), level)
        self.io, self.layouts, self._starts = io, bundle.layouts, bundle.starts
        self.refused: dict[Path, str] = {}
        self._stats = stats
        self._floats = [_float_runs(layout) for layout in self.layouts]
        self._files: list[ShardFile] = []
        for layer in range(len(bundle.starts)):
            file = bundle.shard(layer)
            try:
                self._files.append(ShardFile(file, io == "direct", self._refuse))
            except OSError as error:
                self.close()
                raise EngineError(f"{file} cannot be opened: {error}") from error

    def _refuse(self, path: Path, reason: str) -> None:
        self.refused[path] = reason
        if self._stats is not None:
            self._stats.shards_buffered += 1

    def line(self) -> str:
        """What was refused, for people."""
        if not self.refused:
            return ""
        (path, reason), *others = self.refused.items()
        which = f"{path.name} and {len(others)} others" if others else path.name
        return f"; {which} buffered, which their file system does not read directly: {reason}"

    def read(
        self, layer: int, expert: int, into: np.ndarray, since: int = 0, level: int | None = None
    ) -> int:
        """Fill `into` (uint8, long enough, on a page boundary) with the planes of a record after
        the first `since`, up to `level` (None: the shards' own); returns the bytes read, or raises
        `EngineError`. Threads may read at once."""
        file, ends = self._files[layer], (0, *self.layouts[layer].levels)
        first, size = ends[since], ends[self.level if level is None else level] - ends[since]
        at = self._starts[layer] + expert * self.layouts[layer].nbytes + first
        try:
            done = file.read(into[first : first + size].data, at)
        except OSError as error:
            advice = ADVICE.get(error.errno or 0, "see that it can be read, and try again")
            raise EngineError(
                f"{file.path}: reading expert {expert} failed: {error.strerror}; {advice}."
            ) from error
        if done < size:
            raise EngineError(
                f"{file.path} ends inside expert {expert}: it became shorter; copy the bundle "
                "again."
            )
        if not since:
            self._check_floats(layer, expert, into)
        return size

    def _check_floats(self, layer: int, expert: int, record: np.ndarray) -> None:
        """Scales, biases and norms must be finite. All of them lie in the base plane."""
        for dtype, start, end in self._floats[layer]:
            if not all_finite(record[start:end], dtype):
                raise EngineError(
                    f"{self._files[layer].path}: {self._not_finite(layer, record)} of expert "
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
        nbytes = self.layouts[layer].nbytes
        self._files[layer].forget(self._starts[layer] + expert * nbytes, nbytes)

    @property
    def closed(self) -> bool:
        return not self._files

    def close(self) -> None:
        for file in self._files:
            file.close()
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
    refusal = ""
    for io in [requested] if requested else IO:
        try:
            speeds[io] = _rate(bundle, level, io)
        except EngineError as error:
            if requested:
                raise EngineError(f"Records cannot be read {requested} here: {error}") from error
            refusal = str(error)
    if requested:
        return Choice(requested, f"asked for; {speeds[requested]:.2f} GB/s from the device")
    if "direct" not in speeds:
        return Choice("buffered", f"no other way here: {refusal}")
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
        if shards.io == "direct" and bundle.shard(layer) in shards.refused:
            raise EngineError(shards.refused[bundle.shard(layer)])
        return done / (time.perf_counter() - started) / 1e9
    finally:
        shards.close()
