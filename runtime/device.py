"""What a device can do with a bundle, measured there: `smoe bench --device` writes it, `smoe-prep plan` reads it.

Four figures make a decode step: the backbone, one expert at each level, and latency and bandwidth of reads of records.
Experts are timed in the engine, among so many others that no cache holds them: alone a kernel is up to twice as fast.
`step_seconds` puts them together as the engine does: reads go on while what is here is computed, and what has arrived is
computed while the rest is read.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import open_bundle
from smoe.artifacts.encodings import encoding_named
from smoe.artifacts.manifest import Manifest
from smoe.runtime import kernels, memory, store
from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.experts import READERS
from smoe.runtime.machine import aligned, spare_memory
from smoe.runtime.policies.named import Policies
from smoe.runtime.policies.substitution import Choice, Chosen
from smoe.runtime.reader import Reader, Request

STEPS = 48  # tokens that are decoded to time a step
BEYOND_CACHES = 256 << 20  # bytes of experts among which computing is timed, if there are so many
MANY = 4  # records read at once, beside one
REPEATS = 24


@dataclass(frozen=True)
class Device:
    """Seconds, bytes, and bytes per second. `expert_seconds[j - 1]` is one expert for one token at level j, among the
    others of its layer; `backbone_seconds` is a token without its experts. `bundle` is what it was measured with."""

    bundle: str
    memory: int
    io: str
    read_latency: float
    read_bandwidth: float
    backbone_seconds: float
    expert_seconds: tuple[float, ...]
    kernels: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Device:
        """The description at `path`; an `EngineError` says what is wrong with it."""
        try:
            found = json.loads(path.read_text("utf-8"))
            names = {field.name for field in dataclasses.fields(cls)}
            if not isinstance(found, dict) or set(found) != names:
                raise ValueError(f"it needs {', '.join(sorted(names))}")
            made = cls(
                str(found["bundle"]),
                int(found["memory"]),
                str(found["io"]),
                float(found["read_latency"]),
                float(found["read_bandwidth"]),
                float(found["backbone_seconds"]),
                tuple(map(float, found["expert_seconds"])),
                str(found["kernels"]),
            )
        except (OSError, ValueError, TypeError) as error:
            raise EngineError(f"{path} is no device description ({error}); write one with smoe bench --device.") from error
        values = np.array([made.memory, made.read_latency, made.read_bandwidth, made.backbone_seconds, *made.expert_seconds])
        if not (np.isfinite(values).all() and (values >= 0).all() and made.read_bandwidth > 0 and made.expert_seconds):
            raise EngineError(f"{path}: times and sizes are finite and not negative, and the bandwidth is not zero.")
        return made

    def step_seconds(self, computed: np.ndarray, records: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
        """The experts' part of steps of one token: seconds of kernels `computed`, and what was read, each `[steps]`; one
        step is one layer."""
        reading = np.where(records > 0, self.read_latency + nbytes / self.read_bandwidth, 0.0)
        last = np.where(records > 0, self.expert_seconds[-1], 0.0)  # what comes last waits for nothing else
        return np.maximum(computed, reading + last)


def measure_device(path: Path, io: str | None = None) -> Device:
    """Measure this machine with the bundle at `path`, in little memory: that in which it runs, and `BEYOND_CACHES`."""
    manifest = open_bundle(path)
    plan = memory.plan(manifest, None, min(256, manifest.model.context))
    records = min(plan.experts, max(plan.smallest, BEYOND_CACHES // plan.record))
    budget = plan.fixed + records * plan.record
    chosen = store.choose(path, manifest, None, io, memory.plan(manifest, budget, plan.context))
    latency, bandwidth = _storage(path, manifest, chosen.io)
    backbone = _token_seconds(path, budget, plan.context, manifest, _without_experts)
    whole = _token_seconds(path, budget, plan.context, manifest, _among_residents)
    alone = np.array(list(_kernels(path, manifest)))
    spare = spare_memory(0)
    return Device(
        manifest.provenance.get("source_fingerprint", ""),
        spare if spare is not None else plan.total,
        chosen.io,
        latency,
        bandwidth,
        backbone,
        tuple((alone / alone[-1] * max(whole - backbone, alone[-1]) / plan.token_cycle).tolist()),
        kernels.choose().name,
    )


def _without_experts(choice: Choice) -> Chosen:
    return Chosen(np.full(choice.ids.shape, len(choice.resident)), np.zeros_like(choice.weights))


def _among_residents(choice: Choice) -> Chosen:
    """Others than were chosen where those are missing, so that nothing is read and as much is computed."""
    here = np.flatnonzero(choice.resident)
    if not len(here):
        return _without_experts(choice)
    ids = choice.ids.copy()
    for row in ids:
        others = np.setdiff1d(here, row)
        missing = np.flatnonzero(~np.isin(row, here))
        row[missing] = np.resize(np.roll(others if len(others) else here, int(row.sum())), len(missing))
    return Chosen(ids, choice.weights)


def _token_seconds(
    path: Path, budget: int, context: int, manifest: Manifest, substitution: Callable[[Choice], Chosen]
) -> float:
    """The median of a decode step."""
    ids = np.random.default_rng(0).integers(0, manifest.model.vocabulary, min(STEPS, context - 1) + 1)
    times = []
    with Engine.open(path, budget, context, policies=Policies(substitution=substitution), io="buffered") as engine:
        before = time.perf_counter()
        for _ in engine.score(ids, 1):
            times.append(time.perf_counter() - before)
            before = time.perf_counter()
    return float(np.median(times[len(times) // 4 :]))


def _kernels(path: Path, manifest: Manifest) -> Iterator[float]:
    """Seconds of the k experts of the widest layer for one token, at every level: how levels compare."""
    shards = store.Shards(path, manifest)
    try:
        layer = max(range(len(manifest.layers)), key=lambda i: shards.layouts[i].nbytes)
        spec, k = manifest.layers[layer], manifest.layers[layer].top_k
        frames = aligned(k, shards.layouts[layer].nbytes)
        for expert in range(k):
            shards.read(layer, expert, frames[expert])
        kernel = kernels.choose().layer(
            manifest.experts.gate, manifest.expert_shape(layer), manifest.experts.encoding, shards.layouts[layer]
        )
    finally:
        shards.close()
    x = np.random.default_rng(0).standard_normal((1, spec.hidden)).astype(np.float32)
    for level in range(1, encoding_named(manifest.experts.encoding).levels + 1):
        work = kernels.Work(np.arange(k), np.full(k, level), np.arange(k + 1), np.zeros(k, np.int64))
        yield _median(lambda work=work: kernel(frames, work, x), REPEATS)


def _storage(path: Path, manifest: Manifest, io: str) -> tuple[float, float]:
    """Latency, and bandwidth with as many readers as the engine has, of records that are not in the page cache."""
    shards = store.Shards(path, manifest, io=io)
    reader = Reader(shards.read, READERS)
    try:
        size = max(layout.nbytes for layout in shards.layouts)
        frames = aligned(MANY, size)
        frames[:] = 0  # so that no page of it is missing while the clock runs
        keys = [(layer, expert) for layer, spec in enumerate(manifest.layers) for expert in range(spec.experts)]
        random = np.random.default_rng(0)

        def seconds(count: int) -> float:
            picked = [keys[i] for i in random.choice(len(keys), min(count, len(keys)), replace=False)]
            for key in picked:
                shards.forget(*key)
            before = time.perf_counter()
            asked = [
                reader.demand(Request(layer, expert, frames[i], 0, shards.level))
                for i, (layer, expert) in enumerate(picked)
            ]
            for request in asked:
                reader.wait([request])
                if request.error:
                    raise request.error
            return time.perf_counter() - before

        times = np.array([[seconds(1), seconds(MANY)] for _ in range(REPEATS)])
        one, many = np.median(times, 0)
    finally:
        reader.close()
        shards.close()
    each = max((many - one) / (MANY - 1), 1e-9)
    return float(max(one - each, 0.0)), size / float(each)


def _median(run, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return float(np.median(times))
