"""Building at the size of models that people run: memory, disk and time of every stage beside what
`inspect` said before, what that means for published models, and builds that are killed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.footprint import Footprint, measured
from bench.geometries import GEOMETRIES
from bench.harness import ROOT, Rows, Run, Table, bench, note, option
from bench.page_cache import size
from bench.prep import smoe_prep
from bench.random_models import Mxfp4Shape, Shape, random_checkpoint, random_text
from smoe.artifacts.validate import sha256

GIGABYTE = 1e9
NESTED = "nested:2+1+1"
PUBLISHED = {"OLMoE-1B-7B": "olmoe-1b-7b", "Qwen3-30B-A3B": "qwen3-30b-a3b"}  # docs/models
# Stages that are products of matrices, and so shared by all cores; the others are Python, the disk,
# or one thread of NumPy.
PRODUCTS = ("sweep", "statistics", "packing", "gradients", "prices", "fit")
HERE, MANY = 2, 16  # cores
# Minutes of quantising alone on one H100, all experts of a layer at once: measured 2026-11-26 with
# the quantiser in blocks (docs/log.md), not by this bench.
ON_A_GPU = {"OLMoE-1B-7B": 3.4, "Qwen3-30B-A3B": 17.0}


def _options(tokens: int, layers: int) -> tuple[Any, ...]:
    return (
        option("--geometry", choices=["plain", *GEOMETRIES], default="plain"),
        option("--layers", type=int, default=layers),
        option("--tokens", type=int, default=tokens, help="of calibration text"),
        option("--gigabytes", type=float, default=4.0, help="of experts, where plain"),
        option("--stored", choices=["bf16", "mxfp4"], default="bf16", help="where plain"),
        option("--encoding", help=f"[default: {NESTED}, where plain as stored]"),
        option("--quantiser", help="of nested encodings"),
        option("--prices", type=int, default=8192, help="tokens that prices are from; 0: none"),
        option(
            "--self", dest="own", type=int, default=0, help="tokens that the model writes itself"
        ),
        option("--also", nargs="+", default=[], help="more options of smoe-prep build"),
        option("--keep", type=Path, help="a folder for the checkpoint and the bundle"),
    )


@bench(*_options(65536, 16))
def large(run: Run) -> Rows:
    """Memory, disk and time of every stage of a large build, beside what inspect said before.

    The checkpoint has random weights: 16 layers of sizes of no model (plain), or those of a
    published one. Memory is the peak of all resident pages of all processes together, mapped files
    included. What published models will take is what inspect says of them on this machine, times
    what was measured here over what was said.
    """
    shape = _shape(run)
    with tempfile.TemporaryDirectory(dir=run.keep) as scratch:
        folder = run.keep or Path(scratch)
        model = random_checkpoint(folder / "model", shape)
        note(f"experts: {shape.expert_bytes / GIGABYTE:.2f} GB in {run.stored}")
        text = random_text(folder / "ids.jsonl", run.tokens, shape.vocabulary)
        said, output = smoe_prep("inspect", model, *_about(run)), folder / "model.smoe"
        took, disk = _built(_build(model, output, text, run), output)
        built = json.loads(took.output)
        yield _stages(said, built["seconds"], took.seconds)
        yield _sizes(said, took, disk, size(output))
        yield _rates(shape, run, built["seconds"])
        if run.geometry != "plain":
            yield _published(run, said["stage_seconds"], built["seconds"])


def _shape(run: Run) -> Shape:
    if run.geometry != "plain":
        return GEOMETRIES[run.geometry](layers=run.layers)
    kind, bits = (Shape, 16) if run.stored == "bf16" else (Mxfp4Shape, 4.25)
    experts, hidden = 64, 1024
    each = run.gigabytes * GIGABYTE / (run.layers * experts * 3 * hidden * bits / 8)
    width = int(each / 32 + 1) * 32
    return kind(layers=run.layers, experts=experts, top_k=4, hidden=hidden, width=width)


def _about(run: Run) -> list[str]:
    """What inspect and build are both told."""
    own = run.geometry == "plain" or not GEOMETRIES[run.geometry].encoding
    encoding = run.encoding or ("stored" if own else NESTED)
    about = ["--tokens", run.tokens, "--encoding", encoding, "--prices", run.prices]
    about += ["--self", run.own]
    return [*map(str, about), *(["--quantiser", run.quantiser] if run.quantiser else [])]


def _build(model: Path, output: Path, text: Path, run: Run) -> list[str]:
    command = [sys.executable, "-m", "smoe.prep", "build", str(model), "-o", str(output), "--json"]
    return [*command, "--calibration", str(text), *_about(run), *run.also]


def _built(command: list[str], output: Path) -> tuple[Footprint, int]:
    """What a build took, and the most that lay in its directory."""
    partial, most = output.with_name(output.name + ".partial"), 0

    def look() -> None:
        nonlocal most
        most = max(most, _allocated(partial))

    took = measured(command, look)
    return took, max(most, size(output))


def _allocated(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # it was renamed meanwhile
            continue
    return total


# -- tables ----------------------------------------------------------------------------


def _stages(said: dict[str, Any], seconds: dict[str, float], whole: float) -> Table:
    before = said["stage_seconds"]
    lines = [
        [stage, before.get(stage), took, took / before[stage] if before.get(stage) else None]
        for stage, took in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    lines.append(["all", said["seconds"], whole, whole / said["seconds"]])
    columns = {"stage": "{}", "said, s": "{:.0f}", "measured, s": "{:.0f}", "of it": "{:.2f}"}
    return Table("stages", columns, lines, "Seconds")


def _sizes(said: dict[str, Any], took: Footprint, disk: int, bundle: int) -> Table:
    lines = [
        ["memory, all processes", said["memory"], took.peak],
        ["memory, the largest process", None, took.largest],
        ["disk", said["disk"], disk],
        ["bundle", said["bundle"], bundle],
    ]
    in_gb = [[name, *(n and n / GIGABYTE for n in numbers)] for name, *numbers in lines]
    columns = {"GB": "{}", "said": "{:.2f}", "measured": "{:.2f}"}
    return Table("sizes", columns, in_gb, "Memory and disk")


def _rates(shape: Shape, run: Run, seconds: dict[str, float]) -> Table:
    """Of the stages that one would compare."""
    weights = shape.layers * shape.experts * 3 * shape.hidden * shape.width
    counts = {
        "read": (2 if run.prices else 1, weights * 2 / 1e6, "MB/s"),
        "packing": (1, weights / 1e6, "million weights/s"),
        "sweep": (1, (run.tokens + run.prices) * shape.layers, "tokens x layers/s"),
        "gradients": (1, run.prices * shape.layers, "tokens x layers/s"),
        "prices": (1, run.prices * shape.layers, "tokens x layers/s"),
    }
    lines = [
        [stage, times * count / seconds[stage], unit]
        for stage, (times, count, unit) in counts.items()
        if seconds.get(stage)
    ]
    return Table("rates", {"stage": "{}", "rate": "{:.3g}", "": "{}"}, lines, "Rates")


def _published(run: Run, said: dict[str, float], took: dict[str, float]) -> Table:
    """Minutes that published models will take, with as many tokens."""
    lines: list[list[Any]] = []
    for name, folder in PUBLISHED.items():
        about = smoe_prep("inspect", ROOT / "docs" / "models" / folder, *_about(run))
        expected = about["stage_seconds"]
        here = {
            stage: seconds
            * (took[stage] / said[stage] if took.get(stage) and said.get(stage) else 1)
            for stage, seconds in expected.items()
        }
        many = {
            stage: seconds * (HERE / MANY if stage in PRODUCTS else 1)
            for stage, seconds in here.items()
        }
        for stage in sorted(here, key=here.__getitem__, reverse=True):
            lines.append([name, stage, here[stage] / 60, many[stage] / 60,
                          ON_A_GPU[name] if stage == "packing" else None])  # fmt: skip
        lines.append([name, "all", sum(here.values()) / 60, sum(many.values()) / 60, None])
    columns = {
        "model": "{}", "stage": "{}", f"{HERE} cores": "{:.1f}",
        f"{MANY} cores, if products scale": "{:.1f}", "GPU, measured elsewhere": "{:.1f}",
    }  # fmt: skip
    return Table("published", columns, lines, "Minutes, extrapolated")


# -- kills -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """In `stage`, as seen from outside: the directory `partial`, and what was said so far."""

    stage: str
    come: Callable[[Path, str], bool]


MOMENTS = (
    Moment("sweep", lambda partial, said: "sweep: " in said),
    Moment("packing", lambda partial, said: any(partial.glob("experts/*.part"))),
    Moment("gradients", lambda partial, said: "layers in " in said),
    Moment("export", lambda partial, said: "export: " in said),
    Moment("fit", lambda partial, said: (partial / "manifest.json").exists()),
)


@bench(*_options(8192, 1), option("--wait", type=float, default=1.0, help="seconds into a stage"))
def killed(run: Run) -> Rows:
    """A build that is killed (-9) in every stage and goes on, beside one that is left alone.

    Killed are MOMENTS in one build after another of the same command; the bundle in the end must
    have the same bytes.
    """
    shape = _shape(run)
    with tempfile.TemporaryDirectory(dir=run.keep) as scratch:
        folder = run.keep or Path(scratch)
        model = random_checkpoint(folder / "model", shape)
        text = random_text(folder / "ids.jsonl", run.tokens, shape.vocabulary)
        alone, broken = folder / "alone.smoe", folder / "broken.smoe"
        took = measured(_build(model, alone, text, run))
        lines: list[list[Any]] = [["left alone", took.seconds, "", ""]]
        for moment in MOMENTS:
            lines.append(_kill(_build(model, broken, text, run), broken, moment, run.wait))
        took = measured(_build(model, broken, text, run))
        same = _hashes(alone) == _hashes(broken)
        lines.append(["gone on to the end", took.seconds, "", "same" if same else "OTHER"])
        columns = {"": "{}", "seconds": "{:.0f}", "kept of it": "{}", "bytes": "{}"}
        yield Table("killed", columns, lines, f"{shape.layers} layers, {run.tokens} tokens")
        if not same:
            raise SystemExit("The bundle of the build that was killed has other bytes.")


def _kill(command: list[str], output: Path, moment: Moment, wait: float) -> list[Any]:
    """One build, killed so many seconds after the moment came."""
    partial, started = output.with_name(output.name + ".partial"), time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None and not moment.come(partial, _all(said)):
            time.sleep(0.05)
        time.sleep(wait)
        if process.poll() is not None:
            note(_all(said))
            return [f"killed in {moment.stage}", None, "it had ended", ""]
        process.send_signal(signal.SIGKILL)
        process.wait()
    seconds = time.monotonic() - started
    kept = sum(1 for path in partial.rglob("*") if path.is_file())
    return [f"killed in {moment.stage}", seconds, f"{kept} files", ""]


def _all(file: Any) -> str:
    file.seek(0)
    return file.read()


def _hashes(bundle: Path) -> dict[str, str]:
    files = (path for path in sorted(bundle.rglob("*")) if path.is_file())
    return {str(path.relative_to(bundle)): sha256(path) for path in files}
