"""Small costs, each alone: reads, threads, segments, batches, kernels, imports."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from bench import onnx_models, options
from bench.harness import (
    Rows,
    Run,
    Table,
    bench,
    child,
    interleave,
    option,
    spread,
    timed,
)
from smoe.artifacts import Bundle, open_bundle, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import ExpertActivation
from smoe.runtime import kernels as expert_kernels
from smoe.runtime.cache.storage import Shards
from smoe.runtime.system import aligned

POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; not yet in mmap
READERS = 2  # threads that read in the engine

# -- reads -----------------------------------------------------------------------------

READS: dict[str, tuple[str, int | None]] = {
    **{f"{io}, {n} threads": (io, n) for io in ("buffered", "direct") for n in (1, 2, 4)},
    "mapped, touched": ("mapped", None),
    "mapped, WILLNEED": ("mapped", mmap.MADV_WILLNEED),
    "mapped, POPULATE_READ": ("mapped", POPULATE_READ),
    "mapped, RANDOM": ("mapped", mmap.MADV_RANDOM),
}


@bench(
    options.BUNDLE,
    options.rounds(3),
    option("--megabytes", type=int, default=200, help="read in a round"),
)
def reads(run: Run) -> Rows:
    """Ways to bring records from the device into memory: owned frames or mappings, threads, advice.

    All ways read records in a random order; their pages are dropped from the page cache before.
    Mapped ways touch every page, as a kernel would. cpu: processor time per second of wall clock.
    """
    opened = open_bundle(run.bundle)
    record = opened.layouts[0].levels[-1]
    layers = enumerate(opened.manifest.layers)
    records = [(layer, expert) for layer, spec in layers for expert in range(spec.experts)]
    number = max(4, run.megabytes * 10**6 // record)
    random = np.random.default_rng(0)

    def once(io: str, how: int | None) -> tuple[float, float]:
        keys = [records[i] for i in random.permutation(len(records))[:number]]
        return read_rate(opened, keys, io, how)

    results = interleave(
        {name: lambda way=way: once(*way) for name, way in READS.items()}, run.rounds
    )
    rates = {name: spread([rate for rate, _ in runs]).median for name, runs in results.items()}
    lines = [
        [name, rate, rate / max(rates.values()), spread([cpu for _, cpu in results[name]]).median]
        for name, rate in rates.items()
    ]
    columns = {"way": "{}", "GB/s": "{:.2f}", "of best": "{:.2f}", "cpu": "{:.2f}"}
    yield Table("reads", columns, lines, f"Records of {record / 1e6:.1f} MB, {number} a round")


def read_rate(
    bundle: Bundle, keys: list[tuple[int, int]], io: str, how: int | None
) -> tuple[float, float]:
    """GB/s and processor seconds per second of one way."""
    shards = Shards(bundle, io="direct" if io == "direct" else "buffered")
    record = bundle.layouts[0].levels[-1]
    frames = aligned(8, record)
    frames[:] = 0  # so that no page of it is missing while the clock runs
    for key in keys:
        shards.forget(*key)
    started, cpu = time.perf_counter(), time.process_time()
    if io == "mapped":
        _mapped(bundle, keys, how)
    else:
        _owned(shards, keys, frames, how or 1)
    seconds = time.perf_counter() - started
    busy = (time.process_time() - cpu) / seconds
    shards.close()
    return len(keys) * record / seconds / 1e9, busy


def _owned(shards: Shards, keys: list[tuple[int, int]], frames: np.ndarray, threads: int) -> None:
    """As the engine reads: threads that take the next record."""
    following = count()

    def work() -> None:
        while (i := next(following)) < len(keys):
            shards.read(*keys[i], frames[i % len(frames)])

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _mapped(bundle: Bundle, keys: list[tuple[int, int]], advice: int | None) -> None:
    """A mapping of every shard, with `advice` for each record, of which every page is then
    touched."""
    maps = []
    for layer in range(len(bundle.layouts)):
        with open(bundle.shard(layer), "rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    for layer, expert in keys:
        layout = bundle.layouts[layer]
        start, size = bundle.starts[layer] + expert * layout.nbytes, layout.levels[-1]
        if advice is not None:
            maps[layer].madvise(advice, start, size)
        np.frombuffer(maps[layer], np.uint8, size, start)[:: mmap.PAGESIZE].sum()


# -- the backbone ----------------------------------------------------------------------


@bench(options.rounds(25))
def threads(run: Run) -> Rows:
    """From which size on do two threads pay for one product?"""
    lines = []
    for size in (256, 512, 1024, 1448, 2048):
        sessions = {n: onnx_models.products(size, threads=n) for n in (1, 2)}
        for tokens in (1, 128):
            feeds = {"x": np.random.default_rng(0).standard_normal((tokens, size), np.float32)}
            calls = {str(n): partial(s.run, None, feeds) for n, s in sessions.items()}
            times = interleave({n: partial(timed, call) for n, call in calls.items()}, run.rounds)
            one, two = (spread(values).median * 1e6 for values in times.values())
            lines.append([size * size * 4 / 2**20, tokens, one, two, one / two])
    columns = {
        "MiB per matrix": "{:.2f}", "tokens": "{}", "us, 1 thread": "{:.0f}",
        "us, 2 threads": "{:.0f}", "ratio": "{:.2f}",
    }  # fmt: skip
    yield Table("threads", columns, lines, "Four products in a session, idle workers that wait")


@bench(options.BUNDLE, options.rounds(7))
def segments(run: Run) -> Rows:
    """What the backbone's threads give: decode steps, prompts of 500 tokens, busy cores.

    In processes of their own. cores busy: processor seconds per second over the decode steps; more
    than what the threads do together would be spinning.
    """
    results = interleave(
        {
            name: lambda n=n: child("micro:segments_once", bundle=run.bundle, threads=n)
            for name, n in (("1", 1), ("2", 2), ("as many as pay", None))
        },
        run.rounds,
    )
    lines = [
        [name, *(spread(column).median for column in zip(*runs, strict=True))]
        for name, runs in results.items()
    ]
    columns = {
        "threads": "{}", "us / decode step": "{:.0f}", "ms / prompt of 500": "{:.0f}",
        "cores busy": "{:.2f}",
    }  # fmt: skip
    yield Table("segments", columns, lines, "All experts in memory")


def segments_once(bundle: str, threads: int | None) -> list[float]:
    """Microseconds of a decode step, milliseconds of a prompt, cores busy while decoding."""
    from smoe.runtime import Engine

    with Engine.open(bundle, context=512, threads=threads) as engine:
        list(engine.generate(np.ones(200, np.int64), max_new_tokens=2))
        stream = engine.score(np.arange(300) % 97 + 1, prompt=200)
        next(stream)
        engine.reset_stats()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in stream:
            pass
        busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        step = engine.stats.decode_seconds / engine.stats.decode_steps
        prompt = timed(lambda: list(engine.generate(np.arange(500) % 97 + 1, max_new_tokens=1)))
    return [step * 1e6, prompt * 1e3, busy]


@bench()
def batching(run: Run) -> Rows:
    """Is one GroupQueryAttention over sequences of several lengths what single calls give?

    Shown on buffers bound as past and present at once: the largest difference of outputs and of
    what was appended.
    """
    difference = onnx_models.lengths_per_sequence()
    yield Table("batching", {"largest difference": "{:.1e}"}, [[difference]], "One call for three")


# -- kernels ---------------------------------------------------------------------------

ENCODING = "nested:2+1+1:128"
SHAPES = ((2048, 768), (2048, 1024))  # hidden, width
WORKING_SET = 600 << 20  # bytes, far beyond the caches
Call = Callable[[int], Any]


@bench(
    option("--seconds", type=float, default=60, help="for all of it"),
    option("--threads", type=int, default=2),
    option(
        "--experts", type=int, default=8, help="a call, as many as a token of a large model has"
    ),
    option("--tokens", type=int, nargs="+", default=[1, 2, 4, 16, 64, 256], help="of a call"),
)
def kernels(run: Run) -> Rows:
    """Expert kernels per level beside ONNX Runtime's MatMulNBits and a plain sum over memory.

    MatMulNBits has 4 bits, blocks of 32, int8 activations, and the same experts in one graph. Every
    call takes other experts, so that weights come from memory. Medians of turns.
    """
    chosen = expert_kernels.choose(threads=run.threads)
    columns = {
        "shape": "{}", "tokens": "{}", "kernel": "{}", "us": "{:.0f}", "Gweights/s": "{:.2f}",
        "GB/s": "{:.1f}", "of sum": "{:.2f}", "x NBits": "{:.2f}",
    }  # fmt: skip
    for hidden, width in SHAPES:
        lines = []
        for tokens in run.tokens:
            seconds = run.seconds / len(run.tokens) / len(SHAPES)
            lines += _kernel_rows(hidden, width, tokens, run.threads, run.experts, seconds)
        title = (
            f"{chosen.name} ({chosen.reason}), {run.threads} threads, {run.experts} experts a call"
        )
        yield Table(f"{hidden}x{width}", columns, lines, title)


def _kernel_rows(
    hidden: int, width: int, tokens: int, threads: int, experts: int, seconds: float
) -> list[list[Any]]:
    calls = {f"level {n}": _ours(hidden, width, tokens, n, threads, experts) for n in (1, 2, 3)}
    calls["MatMulNBits"] = _matmul_nbits(hidden, width, tokens, threads, experts)
    calls["sum"] = _sum(threads)
    repeats = {name: 1 if name == "sum" else max(1, 16 // tokens) for name in calls}
    times = _turns({name: (call, repeats[name]) for name, (call, _) in calls.items()}, seconds)
    rates = {name: calls[name][1] / times[name] / 1e9 for name in calls}
    lines: list[list[Any]] = []
    for name, took in times.items():
        weights = None if name == "sum" else experts * 3 * hidden * width / took / 1e9
        other = None if name == "sum" else times["MatMulNBits"] / took
        lines.append([f"{hidden}x{width}", tokens, name, took * 1e6, weights, rates[name],
                      rates[name] / rates["sum"], other])  # fmt: skip
    return lines


def _ours(
    hidden: int, width: int, tokens: int, level: int, threads: int, experts: int
) -> tuple[Call, int]:
    """A function whose call i computes `experts` experts on the same tokens, and the bytes it
    reads."""
    shape = ExpertShape(hidden, width)
    layout = record_layout(shape, ENCODING, 16384)
    size = layout.levels[level - 1]
    number = max(2 * experts, WORKING_SET // size)
    records = np.random.default_rng(0).integers(0, 256, (number, size), np.uint8)
    for record in records:
        for name, view in layout.views(record).items():
            if name.endswith("_scale"):
                view[...] = 0x3A00  # about 5e-4
    chosen = expert_kernels.choose(threads=threads)
    kernel = chosen.layer(ExpertActivation("gated", "silu"), shape, ENCODING, layout)
    x = np.random.default_rng(1).standard_normal((tokens, hidden)).astype(np.float32)
    works = [
        expert_kernels.Work(
            np.arange(i, i + experts), np.full(experts, level), np.arange(experts + 1) * tokens,
            np.tile(np.arange(tokens), experts),
        )
        for i in range(0, len(records) - experts + 1, experts)
    ]  # fmt: skip
    return (lambda i: kernel(records, works[i % len(works)], x)), size * experts


def _matmul_nbits(
    hidden: int, width: int, tokens: int, threads: int, experts: int
) -> tuple[Call, int]:
    """The same in ONNX Runtime: many sessions, of which a call takes the next."""
    nbytes = onnx_models.nbits_bytes(hidden, width) * experts
    number = max(2, WORKING_SET // nbytes)
    sessions = [
        onnx_models.nbits_experts(hidden, width, seed, threads, experts) for seed in range(number)
    ]
    x = np.random.default_rng(1).standard_normal((tokens, hidden)).astype(np.float32)
    return (lambda i: sessions[i % number].run(None, {"x": x})), nbytes


def _sum(threads: int) -> tuple[Call, int]:
    """A plain sum over a large array by as many threads."""
    array = np.ones(WORKING_SET // 8, np.int64)
    parts = np.array_split(array, threads)
    pool = ThreadPoolExecutor(threads)
    return (lambda i: list(pool.map(np.sum, parts))), array.nbytes


def _turns(calls: dict[str, tuple[Call, int]], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each, so many repeats a turn, the first turn left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    until, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < until or turn < 7:
        for name, (call, repeats) in calls.items():
            started = time.perf_counter()
            for i in range(repeats):
                call(turn * repeats + i)
            times[name].append((time.perf_counter() - started) / repeats)
        turn += 1
    return {name: spread(values[1:]).median for name, values in times.items()}


# -- imports ---------------------------------------------------------------------------

IMPORTS = {"numpy, onnxruntime": "import numpy, onnxruntime", "smoe.runtime": "import smoe.runtime"}


@bench(options.rounds(21))
def imports(run: Run) -> Rows:
    """What importing smoe.runtime costs over what it is made of, in fresh processes."""

    def seconds(code: str) -> float:
        return timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))

    results = interleave(
        {name: lambda code=code: seconds(code) for name, code in IMPORTS.items()}, run.rounds
    )
    medians = {name: spread(values).median for name, values in results.items()}
    base = next(iter(medians.values()))
    lines = [[name, value * 1e3, value / base] for name, value in medians.items()]
    yield Table("imports", {"import": "{}", "ms": "{:.0f}", "of the first": "{:.2f}"}, lines)
