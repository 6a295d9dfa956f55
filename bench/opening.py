"""How long a bundle takes to open, part by part, with warm files, in a fresh process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import options
from bench.harness import Rows, Run, Table, bench, child, interleave, option, spread, timed

CONTEXT = 512
TABLES = ("counts", "transition")  # what policies without prices and predictors read


@bench(
    options.rounds(5),
    option("--bundle", type=Path, help="instead of a random one"),
    option("--directory", type=Path, help="where the random bundle is, or is made"),
    option("--layers", type=int, default=48),
    option("--experts", type=int, default=128),
    option("--hidden", type=int, default=256),
    option("--width", type=int, default=32),
    option("--share", type=float, default=0.4, help="of the experts that is read at the start"),
    option("--old", type=Path, help="site folder of an old commit, to open the same bundle with"),
)
def opening(run: Run) -> Rows:
    """Seconds of each part of opening a bundle of many layers and experts, with warm files.

    Parts are timed one after another by themselves, sessions by ONNX Runtime alone; the whole is
    Engine.open in a process of its own, from before the import of smoe is counted on. The rest is
    what the parts do not explain.
    """
    with tempfile.TemporaryDirectory() as scratch:
        bundle = run.bundle or _bundle(run, run.directory or Path(scratch))
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "parts": lambda: child("opening:parts", bundle=bundle, share=run.share),
            "new": lambda: child("opening:whole", bundle=bundle, share=run.share),
        }
        if run.old:
            ways["old"] = lambda: child(
                "opening:whole", site=run.old, bundle=bundle, share=run.share
            )
        results = interleave(ways, run.rounds)
    parts = {name: spread([r[name] for r in results["parts"]]) for name in results["parts"][0]}
    totals = {n: spread([r["open"] for r in rs]) for n, rs in results.items() if n != "parts"}
    known = sum(part.median for name, part in parts.items() if name != "import")
    sessions = parts["sessions"].median
    lines: list[list[Any]] = [[n, [s.median, s.low, s.high]] for n, s in parts.items()]
    lines.append(["rest (kernels, memory, policies)", f"{totals['new'].median - known:.3f}"])
    lines += [[f"Engine.open, {n}", [s.median, s.low, s.high]] for n, s in totals.items()]
    lines += [
        [f"Engine.open, {name}, less sessions", f"{s.median - sessions:.3f}"]
        for name, s in totals.items()
    ]
    columns = {"part": "{}", "seconds": "{:.3f} ({:.3f} to {:.3f})"}
    yield Table("opening", columns, lines, f"{bundle.name}, {run.share:.0%} of the experts read")


@bench(
    options.rounds(5),
    option("--layers", type=int, default=48),
    option("--experts", type=int, default=128),
)
def door(run: Run) -> Rows:
    """Milliseconds of each part of open_bundle, on a bundle of real geometry whose files are holes.

    Manifest, checks, headers: all that opening does before sessions and reads.
    """
    from bench.hollow import hollow
    from smoe.artifacts import open_bundle, validate
    from smoe.artifacts.bundle import layouts_of

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "hollow.smoe"
        hollow(path, run.layers, run.experts)
        manifest = validate.read_manifest(path)
        layouts, page = layouts_of(manifest), manifest.experts.page
        calls: dict[str, Callable[[], Any]] = {
            "manifest": lambda: validate.read_manifest(path),
            "its problems": lambda: list(validate.manifest_problems(manifest)),
            "files": lambda: list(validate.file_problems(path, manifest)),
            "layouts": lambda: layouts_of(manifest),
            "shard headers": lambda: [
                validate.shard_start(path / manifest.shard(n), layout, page, run.experts)
                for n, layout in enumerate(layouts)
            ],
            "weights": lambda: validate.check_weights(manifest),
            "tables": lambda: validate.open_tables(path, manifest),
            "all of open_bundle": lambda: open_bundle(path),
        }
        times = interleave({n: partial(timed, call) for n, call in calls.items()}, run.rounds)
    lines = [[name, spread(values).median * 1e3] for name, values in times.items()]
    title = f"{run.layers} layers x {run.experts} experts"
    yield Table("door", {"part": "{}", "ms": "{:.1f}"}, lines, title)


def _bundle(run: Run, directory: Path) -> Path:
    from bench.models import random_bundle
    from bench.random_models import Shape

    shape = Shape(
        layers=run.layers, experts=run.experts, top_k=8, hidden=run.hidden, width=run.width, heads=4
    )
    name = f"random-{run.layers}x{run.experts}x{run.hidden}x{run.width}.smoe"
    return random_bundle(directory / name, shape, 256, "--encoding", "bf16", "--prices", "0")


def whole(bundle: str, share: float) -> dict[str, float]:
    """Seconds of Engine.open, of any commit."""
    from bench.budgets import beside, budget_for_share
    from smoe.runtime import Engine

    how = beside(budget_for_share(bundle, share, CONTEXT))
    started = time.perf_counter()
    with Engine.open(bundle, context=CONTEXT, io="buffered", **how):
        return {"open": time.perf_counter() - started}


def parts(bundle: str, share: float) -> dict[str, float]:
    """Seconds of each part by itself, in the order of opening."""
    seconds: dict[str, float] = {}

    def clock(name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - started
        return result

    def import_runtime() -> None:
        import smoe.runtime.engine  # noqa: F401

    clock("import", import_runtime)
    from smoe.artifacts import open_bundle, validate
    from smoe.runtime.text import Text

    path = Path(bundle)
    manifest = clock("manifest", lambda: validate.read_manifest(path))
    opened = clock("checks, shard and table headers", lambda: open_bundle(path))
    seconds["checks, shard and table headers"] -= seconds["manifest"]  # which it reads again
    clock("tables", lambda: opened.tables.layers(*TABLES))
    clock("sessions", lambda: _sessions(path, manifest.backbone.segments))
    clock("tokenizer", lambda: Text(path, manifest.files))
    clock("reading", lambda: _read(opened, share))
    return seconds


def _sessions(path: Path, segments: Any) -> list[Any]:
    """Every segment's session, by ONNX Runtime alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    return [
        onnxruntime.InferenceSession(str(path / segment.file), options, providers=providers)
        for segment in segments
    ]


def _read(opened: Any, share: float) -> None:
    """The same share of every layer's records, through the page cache."""
    for layer, (layout, start) in enumerate(zip(opened.layouts, opened.starts, strict=True)):
        experts = int(opened.manifest.layers[layer].experts * share)
        frame = bytearray(layout.nbytes)
        with open(opened.shard(layer), "rb", buffering=0) as shard:
            shard.seek(start)
            for _ in range(experts):
                shard.readinto(frame)
