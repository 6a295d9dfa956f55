"""The long checks, of which the tests run a tenth:  python -m bench soak NAME"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import Rows, Run, Table, bench, note, option, timed
from bench.models import CALIBRATION, EXAMPLE

SEED = option("--seed", type=int, default=0)


@bench(option("--count", type=int, default=10_000), SEED, soak=True)
def mutations(run: Run) -> Rows:
    """Damaged bundles behave or are refused with a sentence."""
    from tests.support import mutate

    totals, wrong = mutate.many(run.count, run.seed)
    columns = {"mutations": "{}", "behaved": "{}", "refused with a sentence": "{}", "neither": "{}"}
    line = [run.count, totals[mutate.BEHAVED], totals[mutate.REFUSED], len(wrong)]
    yield Table("mutations", columns, [line], f"Seed {run.seed}")
    if wrong:
        yield Table("wrong", {"neither behaved nor refused": "{}"}, [[text] for text in wrong])


@bench(option("--count", type=int, default=100_000), SEED, soak=True)
def programs(run: Run) -> Rows:
    """Damaged tables of a program end at the door, or run to the bits of their NumPy twin."""
    from tests.support import damaged_runs

    totals, wrong = damaged_runs.many(run.count, run.seed)
    columns = {"tables": "{}", "healthy": "{}", "refused with a sentence": "{}", "neither": "{}"}
    counts = [totals["healthy"], totals["refused"]]
    yield Table("programs", columns, [[run.count, *counts, len(wrong)]], f"Seed {run.seed}")
    if wrong:
        yield Table("wrong", {"neither healthy nor refused": "{}"}, [[text] for text in wrong])


@bench(option("--count", type=int, default=3_000), SEED, soak=True)
def sessions(run: Run) -> Rows:
    """Damaged session files are refused with a sentence, or go on."""
    from tests.support import damaged_sessions, program_bundle

    with tempfile.TemporaryDirectory() as folder:
        bundle = program_bundle.write(Path(folder) / "pico.smoe")
        totals, wrong = damaged_sessions.many(bundle, run.count, run.seed)
    columns = {"sessions": "{}", "went on": "{}", "refused with a sentence": "{}", "neither": "{}"}
    counts = [totals[damaged_sessions.WENT_ON], totals[damaged_sessions.REFUSED], len(wrong)]
    yield Table("sessions", columns, [[run.count, *counts]], f"Seed {run.seed}")
    if wrong:
        yield Table("wrong", {"neither refused nor went on": "{}"}, [[text] for text in wrong])


@bench(option("--count", type=int, default=1000), SEED, soak=True)
def sequences(run: Run) -> Rows:
    """Sequences that are forked, rewound, joined, given up and saved say what fresh ones say."""
    from tests.support import sequences

    done, wrong = sequences.many(run.count, run.seed)
    columns = {**dict.fromkeys(sorted(done), "{}"), "other bits": "{}"}
    counts = [done[name] for name in sorted(done)]
    yield Table("sequences", columns, [[*counts, len(wrong)]], f"Seed {run.seed}")
    if wrong:
        yield Table("wrong", {"where": "{}"}, [[text] for text in wrong])


@bench(option("--count", type=int, default=20, help="kills"), SEED, soak=True)
def kills(run: Run) -> Rows:
    """Builds killed at random moments and started again give the same bytes.

    The example model is built once in peace. Then builds are killed (SIGKILL) at moments drawn
    evenly over the time that took; every bundle that is finished on the way is compared with the
    first.
    """
    chance = random.Random(run.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, output = Path(folder) / "whole", Path(folder) / "killed"
        usual = timed(lambda: subprocess.run(_build(whole), check=True, capture_output=True))
        expected = _contents(whole)
        killed = builds = different = 0
        while killed < run.count or not output.exists():
            died = _build_killed(output, chance.uniform(0, usual) if killed < run.count else None)
            killed += died
            if output.exists():
                builds += 1
                different += _contents(output) != expected
                if killed < run.count:
                    shutil.rmtree(output)
            note(f"{killed} kills, {builds} finished builds, {different} with other bytes")
    columns = {
        "kills": "{}",
        "finished builds": "{}",
        "with other bytes": "{}",
        "a build, s": "{:.0f}",
    }
    yield Table("kills", columns, [[killed, builds, different, usual]])


def _build(output: Path) -> list[str]:
    return [
        sys.executable, "-m", "smoe.prep", "build", str(EXAMPLE), "-o", str(output),
        "--calibration", str(CALIBRATION), "--tokens", "16384", "--encoding", "f32",
    ]  # fmt: skip


def _build_killed(output: Path, seconds: float | None) -> bool:
    """Build, killed after so many seconds; whether it was. A build that fails by itself ends the
    bench."""
    process = subprocess.Popen(
        _build(output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, messages = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode:
        raise SystemExit(f"A build ended with {process.returncode}: {messages}")
    return False


def _contents(bundle: Path) -> dict[str, bytes]:
    return {str(f.relative_to(bundle)): f.read_bytes() for f in bundle.rglob("*") if f.is_file()}
