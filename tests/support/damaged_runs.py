"""Damaged tables that pass the door (`support/damage.py`) run as any other program does: natively
and in NumPy, to the same bits, whatever they compute. In child processes, since what is wrong might
kill them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from smoe.artifacts.program import PROGRAM_WEIGHTS, Program
from smoe.runtime import kernels
from smoe.runtime.program import open_program

from . import damage
from .programs import same
from .tables import HIDDEN, LAYERS, pico

BATCH = 2000  # tables of a process
THREADS = 2


def runner(folder: Path) -> Callable[[Program], None]:
    """What runs a program with the pico program's weights, which are written to `folder`."""
    file = folder / PROGRAM_WEIGHTS
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pico()[1])
    names = [kernels.choose().name, "reference"]

    def run(program: Program) -> None:
        native, twin = (_logits(folder, program, name) for name in names)
        assert all(same(a, b) for a, b in zip(native, twin, strict=True)), "other bits"

    return run


def _logits(folder: Path, program: Program, name: str) -> list[np.ndarray]:
    """Of two sequences, a prompt each and then a token each."""
    opened = open_program(folder, program, kernels.choose(name, THREADS), THREADS)
    first, second = opened.state(9, "f16"), opened.state(9, "f16")
    steps = [
        ([(first, 0, [1, 2, 3, 0, 36]), (second, 0, [5, 5])], [0, 4, 6]),
        ([(first, 5, [7]), (second, 2, [8])], [0, 1]),
    ]
    said = []
    for spans, keep in steps:
        given = [(state, past, np.array(ids, np.int64)) for state, past, ids in spans]
        rows = opened.begin(given, np.array(keep, np.int64))
        random = np.random.default_rng(1)
        for number in range(len(program.parts)):
            if number >= 2:
                output = random.normal(0, 1, (rows.tokens, HIDDEN)).astype(np.float32)
                opened.write(rows, f"output.{number - 2}", output)
            opened.run(rows, number)
        said.append(opened.read(rows, "logits").copy())
    assert len(program.parts) == LAYERS + 2
    return said


def many(count: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """`damage.many` where the healthy ones run, in batches, each in a process of its own."""
    totals, wrong = {damage.HEALTHY: 0, damage.REFUSED: 0}, []
    for number, start in enumerate(range(0, count, BATCH)):
        arguments = [str(min(BATCH, count - start)), str(seed * 10**6 + number)]
        command = [sys.executable, "-m", "support.damaged_runs", *arguments]
        folder = Path(__file__).parents[1]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            wrong.append(f"process of {arguments} ended with {done.returncode}: {done.stderr}")
            continue
        counts, said = json.loads(done.stdout)
        wrong += said
        totals = {name: totals[name] + counts[name] for name in totals}
    return totals, wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        tables, seeds = map(int, sys.argv[1:])
        print(json.dumps(damage.many(tables, seeds, runner(Path(scratch)))))
