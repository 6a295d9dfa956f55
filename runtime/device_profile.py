"""What a device can do with a bundle, measured there: `smoe bench --machine` writes it, `smoe-prep
plan` reads it.

Reads and kernels share processors and a memory bus, so that a step is not the longer of its parts
measured alone. So the engine itself is timed, made to read so many of a layer's experts at such a
level: `layer_seconds` is that grid, and `step_seconds` looks up in it what a policy would do.
Latency and bandwidth of the storage alone are there to compare devices by.
"""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import Bundle, open_bundle, safetensors_file
from smoe.runtime import kernels
from smoe.runtime.allowance import allow
from smoe.runtime.budget import RESERVE, memory_for, plan_memory
from smoe.runtime.cache import storage
from smoe.runtime.cache.cache import READERS
from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.machine import memory_room
from smoe.runtime.options import Policies
from smoe.runtime.routing import Assignment, Available, Routed
from smoe.runtime.system import aligned

SECONDS = 8.0  # to spend on the steps of one level, at most `STEPS` of each kind
STEPS = 24
TURN, SETTLE = 8, 2  # steps of a turn, and those of them that are not counted
TEXT = 4096  # tokens to take turns with
MANY = 4  # records read at once, beside one
REPEATS = 24


@dataclass(frozen=True)
class Device:
    """Seconds, bytes, and bytes per second. `memory` is what a process may hold there in all.
    `backbone_seconds` is a token without its experts.
    `layer_seconds[j - 1][m]` is one layer with k experts for one token at level j, of which m are
    read, up to k, as a mean over layers; `record_bytes[j - 1]` are the bytes of one. `bundle` is
    what it was measured with."""

    bundle: str
    memory: int
    io: str
    read_latency: float
    read_bandwidth: float
    backbone_seconds: float
    layer_seconds: tuple[tuple[float, ...], ...]
    record_bytes: tuple[int, ...]
    kernels: str

    @property
    def expert_seconds(self) -> list[float]:
        """One expert for one token, at each level."""
        return [row[0] / (len(row) - 1) for row in self.layer_seconds]

    def to_json(self) -> str:
        """The text of the file that `load` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Device:
        """The description at `path`; an `EngineError` says what is wrong with it."""
        try:
            data = json.loads(path.read_text("utf-8"))
            names = {field.name for field in dataclasses.fields(cls)}
            if not isinstance(data, dict) or set(data) != names:
                raise ValueError(f"it needs {', '.join(sorted(names))}")
            made = cls(
                str(data["bundle"]),
                int(data["memory"]),
                str(data["io"]),
                float(data["read_latency"]),
                float(data["read_bandwidth"]),
                float(data["backbone_seconds"]),
                tuple(tuple(map(float, row)) for row in data["layer_seconds"]),
                tuple(map(int, data["record_bytes"])),
                str(data["kernels"]),
            )
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise EngineError(
                f"{path} is no device description ({error}); write one with smoe bench --machine "
                "FILE."
            ) from error
        rows, sizes = made.layer_seconds, made.record_bytes
        if not (
            rows
            and len(rows) == len(sizes)
            and len({len(row) for row in rows}) == 1
            and len(rows[0]) >= 2
        ):
            raise EngineError(
                f"{path}: layer_seconds has a row for each of record_bytes, and in each k + 1 "
                "times."
            )
        values = np.array(
            [made.read_latency, made.read_bandwidth, made.backbone_seconds, *np.ravel(rows)]
        )
        above = (
            min(made.read_bandwidth, made.backbone_seconds, *sizes) > 0
            and max(made.memory, *sizes) < 1 << 60
        )
        if not (np.isfinite(values).all() and (values >= 0).all() and made.memory >= 0 and above):
            raise EngineError(
                f"{path}: times and sizes are finite and not negative, and bytes, bandwidth and "
                "the backbone's time not zero."
            )
        if not (np.diff(sizes) > 0).all():
            raise EngineError(f"{path}: record_bytes rise from level to level.")
        return made

    def step_seconds(
        self, computed: np.ndarray, level: int, records: np.ndarray, nbytes: np.ndarray
    ) -> np.ndarray:
        """The experts' part of steps of one token and layer, float64 `[steps]`: experts `computed`
        at `level`, and what was read in how many records. Between what was measured, and below the
        smallest record, it is linear."""
        grid, sizes = np.array(self.layer_seconds), np.array(self.record_bytes)
        beyond = np.stack(
            [np.interp(records, np.arange(grid.shape[1]), row - row[0]) for row in grid]
        )  # [levels, steps]
        reading = beyond[-1]
        if len(sizes) > 1:
            each = nbytes / np.maximum(records, 1)
            above = np.clip(np.searchsorted(sizes, each), 1, len(sizes) - 1)
            share = (each - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
            low, high = (beyond[row, np.arange(len(records))] for row in (above - 1, above))
            reading = low + share * (high - low)
        return computed * self.expert_seconds[level - 1] + np.where(
            records > 0, np.maximum(reading, 0), 0
        )


def measure_device(path: Path, io: str | None = None) -> Device:
    """Measure this machine with the bundle at `path`, with half of the experts in memory, or as
    many as half of the memory that is there."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    context = min(256, manifest.model.context)
    allowed, room = allow(bundle, context=context), memory_room()
    least = plan_memory(bundle, None, context).minimum
    half = memory_for(bundle, allowed.experts // 2, context)
    there = (allowed.budget or allowed.total) - allowed.process
    beside = max(least, min(half, there // 2))
    chosen = storage.choose(bundle, None, io, allow(bundle, beside=beside, context=context))
    latency, bandwidth = _storage(bundle, chosen.io)
    backbone, layers = _engine(bundle, beside, context, chosen.io)
    return Device(
        manifest.provenance.get("source_fingerprint", ""),
        allowed.total if room is None else room.nbytes - room.nbytes // RESERVE,
        chosen.io,
        latency,
        bandwidth,
        backbone,
        layers,
        _record_bytes(bundle),
        kernels.choose().name,
    )


def _record_bytes(bundle: Bundle) -> tuple[int, ...]:
    """Of a record at each level, as a mean over layers."""
    return tuple(int(size) for size in np.mean([layout.levels for layout in bundle.layouts], 0))


class ScriptedMisses:
    """A chooser for one token: `missing` experts that have to be read up to `level`, and others
    that are resident at it, `computed` in all: those that the router chose as far as there are
    such, so that caches are hit as often as they will be, and any beside."""

    def __init__(self, computed: int):
        self.computed, self.missing, self.level = computed, 0, 0
        self._random = np.random.default_rng(0)

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        (chosen,), experts = routed.ids, len(available.level)
        read = self._some(available.level == 0, chosen, min(self.missing, len(chosen)))
        left = min(self.computed, len(chosen)) - len(read)
        used = self._some(available.level >= self.level, chosen, left)
        ids = np.full(routed.ids.shape, experts)
        ids[:, : len(read) + len(used)] = np.concatenate([read, used])
        return Assignment(ids=ids, weights=routed.weights, levels=np.full(ids.shape, self.level))

    def _some(self, able: np.ndarray, preferred: np.ndarray, count: int) -> np.ndarray:
        """Up to `count` experts that are `able` (bool `[E]`), the `preferred` ones first."""
        order = self._random.permutation(len(able))
        order = np.concatenate(
            [preferred[preferred < len(able)], order[~np.isin(order, preferred)]]
        )
        return order[able[order]][:count]


def _engine(
    bundle: Bundle, beside: int, context: int, io: str
) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """Seconds of a token without experts, and of one layer's experts by level and by how many of
    them are read."""
    manifest, levels = bundle.manifest, bundle.levels
    k = max(layer.top_k for layer in manifest.layers)
    counts = np.unique(np.rint(np.linspace(0, k, 5)).astype(int))
    script, grid = ScriptedMisses(0), np.zeros((levels, k + 1))
    policies = Policies(substitution=script)
    with Engine.open(
        bundle.path, beside=beside, context=context, policies=policies, io=io
    ) as engine:
        backbone = _token_seconds(engine, script, np.zeros(1, int))[0]
        script.computed = k
        for level in range(
            levels, 0, -1
        ):  # downward: what is here at a lower level than wanted could not be used
            script.level = level
            tokens = _token_seconds(engine, script, counts)
            layer = np.maximum(tokens - backbone, 0) / len(manifest.layers)
            grid[level - 1] = np.interp(np.arange(k + 1), counts, np.maximum.accumulate(layer))
    return float(backbone), tuple(map(tuple, grid.tolist()))


def _token_seconds(engine: Engine, script: ScriptedMisses, counts: np.ndarray) -> np.ndarray:
    """The median of a decode step that reads so many experts of every layer, for each of `counts`
    float64. They take turns of `TURN` steps; the first of these still find in the caches what the
    turn before left there."""
    tokens = _tokens(engine.bundle)
    times: list[list[float]] = [[] for _ in counts]
    started = time.perf_counter()
    while not times[-1] or (len(times[-1]) < STEPS and time.perf_counter() - started < SECONDS):
        for count, seconds in zip(counts.tolist(), times, strict=True):
            script.missing = count
            steps = engine.score(tokens[: 1 + TURN])
            tokens = np.roll(tokens, -TURN)
            for number in range(1 + TURN):
                before = time.perf_counter()
                next(steps)
                if number > SETTLE:
                    seconds.append(time.perf_counter() - before)
    return np.array([np.median(seconds) for seconds in times])


def _tokens(bundle: Bundle) -> np.ndarray:
    """Text: that of the bundle's trace if it has one."""
    trace = bundle.study("trace.safetensors")
    if trace:
        return np.resize(safetensors_file.load_some(trace, {"tokens"})["tokens"], TEXT)
    return np.random.default_rng(0).integers(0, bundle.manifest.model.vocabulary, TEXT)


def _storage(bundle: Bundle, io: str) -> tuple[float, float]:
    """Latency, and bandwidth with as many readers as the engine has, of records that are not in the
    page cache."""
    shards, random = storage.Shards(bundle, io=io), np.random.default_rng(0)
    size = max(layout.nbytes for layout in bundle.layouts)
    frames = aligned(MANY, size)
    frames[:] = 0  # so that no page of it is missing while the clock runs
    layers = bundle.manifest.layers
    keys = [(layer, e) for layer, spec in enumerate(layers) for e in range(spec.experts)]

    def seconds(pool: ThreadPoolExecutor, count: int) -> float:
        picked = random.choice(len(keys), min(count, len(keys)), replace=False)
        for i in picked:
            shards.forget(*keys[i])
        before = time.perf_counter()
        reads = [
            pool.submit(shards.read, keys[i][0], keys[i][1], frame)
            for i, frame in zip(picked, frames, strict=False)
        ]
        for read in reads:
            read.result()
        return time.perf_counter() - before

    try:
        with ThreadPoolExecutor(READERS) as pool:
            times = [[seconds(pool, 1), seconds(pool, MANY)] for _ in range(REPEATS)]
    finally:
        shards.close()
    one, many = np.median(times, 0)
    each = max((many - one) / (MANY - 1), 1e-9)
    return float(max(one - each, 0.0)), size / float(each)
