"""The long checks, of which the tests run a tenth:  python -m bench soak NAME"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness import Rows, Run, Table, bench, note, option, timed
from bench.models import CALIBRATION, EXAMPLE

if TYPE_CHECKING:
    from tests.support.traffic import Known

SERVED = Path(__file__).parents[1] / "tests" / "golden" / "v7.smoe"  # with text, run by its program
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


@bench(option("--count", type=int, default=200), SEED, soak=True)
def hangups(run: Run) -> Rows:
    """Clients of a server that hang up at random moments, while prompts are read too.

    How long it works for them afterwards, and what it holds."""
    from tests.support import server, traffic

    asked = _known(run.seed)
    with server.serving(SERVED) as client:
        traffic.hang_ups(client, asked, run.count // 10, run.seed + 1)
        before = client.metric("smoe_memory_bytes")
        seen = traffic.hang_ups(client, asked, run.count, run.seed)
        more = client.metric("smoe_memory_bytes") - before
    ended = sorted(seen.ended)
    columns = {
        "hung up": "{}", "work ended after, ms": "{:.1f}", "99 of 100 after, ms": "{:.1f}",
        "longest, ms": "{:.1f}", "more memory, KiB": "{:.0f}", "wrong answers": "{}",
    }  # fmt: skip
    times = [1e3 * ended[int(len(ended) * share)] for share in (0.5, 0.99)]
    line = [run.count, *times, 1e3 * ended[-1], more / 1024, len(seen.wrong)]
    yield Table("hangups", columns, [line], f"Seed {run.seed}")


@bench(
    option("--seconds", type=float, default=600.0), option("--clients", type=int, default=16),
    SEED, soak=True,
)  # fmt: skip
def load(run: Run) -> Rows:
    """Clients of a server that ask, hang up and send nonsense at random."""
    from tests.support import server, traffic

    asked = _known(run.seed)
    with server.serving(SERVED, waiting=run.clients) as client:
        seen = traffic.load(client, asked, run.seconds, run.clients, run.seed)
    between = sorted(seen.between)
    columns = {"answers": "{}", "how many": "{}"}
    yield Table("answers", columns, [list(pair) for pair in sorted(seen.statuses.items())])
    columns = {"parts of streams": "{}", "between, ms": "{:.1f}", "99 of 100, ms": "{:.1f}",
               "longest, ms": "{:.0f}", "wrong": "{}"}  # fmt: skip
    times = [1e3 * between[int(len(between) * share)] for share in (0.5, 0.99)]
    line = [len(between), *times, 1e3 * between[-1], len(seen.wrong)]
    yield Table("load", columns, [line], f"{run.clients} clients for {run.seconds:g} s")
    if seen.wrong:
        yield Table("wrong", {"what": "{}"}, [[text] for text in seen.wrong[:50]])


def _known(seed: int) -> list[Known]:
    from smoe.runtime import Engine
    from tests.support import traffic

    with Engine.open(SERVED, context=300) as engine:
        return traffic.known(engine, 24, seed)


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
