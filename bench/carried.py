"""What layers carry from token to token: the delta rule and the convolution of linear attention."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from bench import options
from bench.harness import Rows, Run, Table, bench, option, spread
from smoe.artifacts.program import (
    ABSENT,
    PROGRAM_WEIGHTS,
    Buffer,
    Constant,
    Op,
    Part,
    Program,
    Recurrent,
    View,
)
from smoe.runtime import kernels
from smoe.runtime.program import open_program

TAPS = 4


@bench(
    options.rounds(5),
    option("--heads", type=int, default=32, help="of values, as in Qwen3.5-35B-A3B"),
    option("--keys", type=int, default=128, help="numbers of a key"),
    option("--values", type=int, default=128, help="numbers of a value"),
    option("--layers", type=int, default=16, help="whose states follow one another in memory"),
    option("--rows", type=int, nargs="+", default=[1, 16, 512], help="tokens of a step"),
    option("--threads", type=int, default=None, help="of the kernels"),
)
def carried(run: Run) -> Rows:
    """The delta rule and the convolution before it: memory per second, and tokens.

    All layers after one another, each fed by the one before, so that a single token finds no state
    in the cache; GB/s counts each state as read and written once a step. With one thread it is the
    processor's time that is counted.
    """
    chosen = kernels.choose(threads=run.threads)
    programs = {"delta rule": _delta_rules(run), "convolution": _convolutions(run)}
    lines = []
    for name, (program, weights) in programs.items():
        moved = 8 * sum(int(np.prod(state.shape)) for state in program.recurrent)
        for rows in run.rows:
            took = spread([_seconds(program, weights, chosen, rows) for _ in range(run.rounds)])
            layer = took.median / run.layers
            lines.append([name, rows, layer * 1e6, moved / took.median / 1e9, rows / layer])
    columns = {"of a layer": "{}", "tokens": "{}", "us": "{:.0f}", "GB/s": "{:.1f}",
               "tokens/s": "{:.0f}"}  # fmt: skip
    title = f"{chosen.name}, {chosen.threads} threads, {run.heads} x {run.keys} x {run.values}"
    yield Table("carried", columns, lines, title)


def _seconds(program: Program, weights: bytes, chosen: kernels.Kernels, rows: int) -> float:
    """The best of a few steps of one sequence."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PROGRAM_WEIGHTS
        file.parent.mkdir()
        file.write_bytes(weights)
        executable = open_program(Path(folder), program, chosen, chosen.threads, ["x"])
    clock = time.process_time if chosen.threads == 1 else time.perf_counter
    steps = max(3, 64 // rows)
    state, best = executable.state(rows * (steps + 1), "f32"), np.inf
    for past in range(0, rows * steps, rows):
        step = executable.begin([(state, past, np.zeros(rows, np.int64))], np.zeros(0, np.int64))
        given = executable.read(step, "x")
        given[...] = np.random.default_rng(0).random(given.shape) / 16
        started = clock()
        executable.run(step, 0)
        best = min(best, clock() - started)
    return best


def _delta_rules(run: Run) -> tuple[Program, bytes]:
    h, d, e = run.heads, run.keys, run.values
    shapes = [(h, d), (h, d), (h, e), (h,), (h,)]
    views, at = [], 0
    for shape in shapes:
        views.append(View("x", at, shape, (shape[1], 1) if len(shape) == 2 else (1,)))
        at = views[-1].end
    states = [Recurrent(f"state {n}", 0, (h, d, e)) for n in range(run.layers)]
    buffers = [Buffer("x", "f32", (at,)), *(Buffer(s.name, "f32", (h, e)) for s in states)]
    ops = []
    for state in states:
        y = View(state.name, 0, (h, e), (e, 1))
        ops.append(Op("delta_rule", tuple(views), (y,), names={"state": state.name}))
        views[2] = y
    return Program(tuple(buffers), (), (), (Part(tuple(ops)),), tuple(states)), bytes(64)


def _convolutions(run: Run) -> tuple[Program, bytes]:
    """Of queries and keys of half as many heads, and values."""
    width = run.heads * (run.keys + run.values)
    weight = np.random.default_rng(0).random((TAPS, width), np.float32)
    constants = (Constant("weight", "f32", weight.shape, 0, weight.nbytes),)
    states = [Recurrent(f"state {n}", 0, (TAPS, width)) for n in range(run.layers)]
    buffers = [Buffer("x", "f32", (width,)), *(Buffer(s.name, "f32", (width,)) for s in states)]
    taps, x = View("weight", 0, weight.shape, (width, 1)), View("x", 0, (width,), (1,))
    ops = []
    for state in states:
        y = View(state.name, 0, (width,), (1,))
        ops.append(Op("convolution", (x, taps, ABSENT), (y,), names={"state": state.name}))
        x = y
    parts = (Part(tuple(ops)),)
    return Program(tuple(buffers), constants, (), parts, tuple(states)), weight.tobytes()
