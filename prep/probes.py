"""How fast this machine does what a build does most: its own functions at the model's own shapes,
for a moment each.

Everything is timed through the functions that a build calls, so that an estimate follows when they
become faster.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts import nested
from smoe.artifacts.encodings import encoding_named, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.prep.backbone.compensate import compensated, inverse_factor
from smoe.prep.backbone.quantise import block_of
from smoe.prep.checkpoint.coded import all_finite
from smoe.prep.checkpoint.seam import (
    ExpertsModule,
    expert_geometry,
    expert_outputs,
    expert_weights,
    probe_gate,
)
from smoe.prep.pack.encode import encode_record
from smoe.prep.pack.pack import PAGE
from smoe.prep.pack.quantise import quantise
from smoe.runtime import kernels

ENOUGH = 0.06  # seconds of looking at one thing, if one call takes no more
PIECE = 8 << 20  # bytes read or written at once
ROWS = (64, 192)  # of a matrix to quantise: the cost of a row is their difference
COLUMNS = 2048  # of it, at most: what is wider is taken to be that much slower
AMONG = 1.35  # how much longer one of many experts takes than one alone, again and again
PRODUCTS = 4e9  # multiplications, at most, in one call
PYTHON = 0.0105  # seconds that `_interpreted` took where the rates of Python were measured


def seconds_of(work: Callable[[], object], enough: float = ENOUGH) -> float:
    """Of one call, the median of a few."""
    work()
    times: list[float] = []
    while not times or (sum(times) < enough and len(times) < 9):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def product_rate(hidden: int, tokens: int = 2048) -> float:
    """Multiplications per second of a pass of so many tokens through the backbone."""
    x, w = torch.randn(tokens, hidden), torch.randn(min(hidden, 2048), hidden)
    return x.shape[0] * w.numel() / seconds_of(lambda: x @ w.T)


def moment_rate(hidden: int) -> float:
    """Multiplications per second of products of many tokens with themselves."""
    x = torch.randn(1024, min(hidden, 4096))
    return x.shape[0] * x.shape[1] ** 2 / seconds_of(lambda: x.T @ x)


def single_rate(hidden: int) -> float:
    """The same in NumPy, which has one thread in a sweep."""
    from threadpoolctl import threadpool_limits

    x = np.ones((1024, min(hidden, 2048)), np.float32)
    with threadpool_limits(limits=1, user_api="blas"):
        return x.shape[0] * x.shape[1] ** 2 / seconds_of(lambda: x.T @ x)


def one_expert(module: ExpertsModule) -> ExpertsModule:
    """A module on the meta device with one expert of random weights."""
    one, experts = copy.deepcopy(module), expert_geometry(module)[0]
    for name, weight in list(one.named_parameters()):
        owner, _, last = name.rpartition(".")
        stacked = weight.shape[0] == experts
        shape = (1, *weight.shape[1:]) if stacked else weight.shape
        random = torch.randn(shape).mul_(0.02) if stacked else torch.ones(shape)
        parameter = torch.nn.Parameter(random.bfloat16(), requires_grad=False)
        setattr(one.get_submodule(owner), last, parameter)
    return one


@torch.no_grad()
def expert_seconds(one: ExpertsModule, tokens: int) -> float:
    """Of one expert and one token, where it gets so many at once."""
    _, hidden, width = expert_geometry(one)
    tokens = max(1, min(tokens, int(PRODUCTS / (3 * hidden * width))))
    x = torch.randn(tokens, hidden)
    return AMONG * seconds_of(lambda: expert_outputs(one, 0, x)) / tokens


def packing_seconds(one: ExpertsModule, encoding: str, quantiser: str | None) -> float:
    """Of one expert: its codes and its record; not what its moments take."""
    _, hidden, width = expert_geometry(one)
    if quantiser != "calibrated":
        layout = record_layout(_shape(one), encoding, PAGE)
        return AMONG * seconds_of(lambda: encode_record(layout, encoding, expert_weights(one, 0)))
    parsed, first = nested.parse(encoding), 2 if one.has_gate else 1
    seconds = seconds_of(lambda: expert_weights(one, 0))
    seconds += quantising_seconds(parsed.of("up"), parsed.group, first * width, hidden, 1)
    return seconds + quantising_seconds(
        parsed.of("down"), parsed.group, hidden, width, parsed.levels
    )


def quantising_seconds(
    split: nested.Split, group: int, rows: int, columns: int, wanted: int
) -> float:
    """Of a matrix `[rows, columns]`, which is `wanted` once or at each level otherwise: from two
    that have few rows, and not too many columns."""
    tried = min(columns, COLUMNS)
    x = torch.randn(wanted, 1, tried, tried)
    moment = x.mT @ x / tried

    def seconds(some: int) -> float:
        w = torch.randn(wanted, 1, some, tried)
        return seconds_of(lambda: quantise(w, moment, split, group), 0)

    few, more = (seconds(some) for some in ROWS)
    each = max(0.0, more - few) / (ROWS[1] - ROWS[0])
    fixed, wider = max(0.0, few - each * ROWS[0]), columns / tried
    return fixed * wider**3 + each * rows * wider**2  # a factorisation, and products


def backbone_seconds(rows: int, columns: int) -> float:
    """Of a matrix of the backbone `[rows, columns]` in 4 bits: its codes, and what they go by."""
    tried, some = min(columns, COLUMNS), min(rows, ROWS[1])
    x, w = torch.randn(tried, tried), torch.randn(some, tried)
    moment = x.T @ x / tried
    factor, wider = inverse_factor(moment), columns / tried
    fixed = seconds_of(lambda: inverse_factor(moment), 0)
    each = seconds_of(lambda: compensated(w, factor, 4, block_of(4, tried)), 0)
    return fixed * wider**3 + each * wider * rows / some


def kernel_seconds(one: ExpertsModule, encoding: str, tokens: int) -> float:
    """Of one expert and one token in the device's kernels at the full level."""
    shape = _shape(one)
    layout = record_layout(shape, encoding, PAGE)
    record = np.zeros((1, layout.nbytes), np.uint8)
    kernel = kernels.choose().layer(probe_gate(one), shape, encoding, layout)
    tokens = max(1, min(tokens, int(PRODUCTS / (3 * shape.hidden * shape.width))))
    x = np.ones((tokens, shape.hidden), np.float32)
    level = np.array([encoding_named(encoding).levels])
    work = kernels.Work(np.array([0]), level, np.array([0, tokens]), np.arange(tokens))
    return seconds_of(lambda: kernel(record, work, x)) / tokens


def _shape(module: ExpertsModule) -> ExpertShape:
    _, hidden, width = expert_geometry(module)
    return ExpertShape(
        hidden,
        width,
        bool(module.has_gate),
        bool(module.has_bias),
        bool(module.has_post_expert_norm),
    )


def read_rate(files: Sequence[Path]) -> float:
    """Bytes per second of these files, read here and there, merged and looked through; of a file
    that is written for it where there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        largest = max(files, key=lambda file: file.stat().st_size, default=None)
        if largest is None or largest.stat().st_size < PIECE:
            largest = Path(scratch) / "zeros"
            largest.write_bytes(bytes(PIECE))
        size = largest.stat().st_size
        with open(largest, "rb", buffering=0) as file:
            piece = torch.empty(PIECE, dtype=torch.uint8)
            starts = iter(np.random.default_rng(os.getpid()).integers(0, size - PIECE + 1, 100))

            def read() -> None:
                file.seek(int(next(starts)))
                file.readinto(piece.numpy().data)
                merged = torch.cat([part.view(torch.bfloat16) for part in piece.split(PIECE // 4)])
                all_finite(merged)

            return PIECE / seconds_of(read)


def write_rate() -> float:
    """Bytes per second to the disk."""
    data = os.urandom(PIECE)
    with tempfile.TemporaryFile() as file:

        def write() -> None:
            file.write(data)
            os.fsync(file.fileno())

        return PIECE / seconds_of(write)


def slowness() -> float:
    """How many times slower Python is here than where its rates were measured."""
    return seconds_of(_interpreted) / PYTHON


def _interpreted() -> int:
    counts: dict[str, int] = {}
    for number in range(50000):
        name = f"node_{number % 997}"
        counts[name] = counts.get(name, 0) + number
    return len(counts)
