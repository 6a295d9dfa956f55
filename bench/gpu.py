"""Profiling and calibrated codes on another device: how far from the processor's, and how long.

What differs is shown on the example model. Times are of a slice of a published geometry, random
weights and text, in a process of its own; what all its layers take is the slice's time by layers,
and so counts the start of the device too often.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.geometries import GEOMETRIES
from bench.harness import EXAMPLES, Rows, Run, Table, bench, child, note, option
from bench.random_models import random_checkpoint, random_text
from smoe.artifacts import nested, safetensors_file

ENCODING = "nested:2+1+1:128"
MATRICES = ("gate", "up", "down")
# Stages that go to the device; the others read files and write them.
STAGES = ("sweep", "statistics", "packing")

Arrays = dict[str, np.ndarray]


@bench(
    option("--device", default="cuda", help="as torch names it"),
    option("--geometry", choices=GEOMETRIES, default="olmoe"),
    option("--layers", type=int, default=2, help="of that geometry"),
    option("--tokens", type=int, default=8192, help="of text, of the slice and of the example"),
)  # fmt: skip
def gpu(run: Run) -> Rows:
    """Profiles and calibrated codes of a device beside the processor's, and minutes of a model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds: dict[str, dict[str, float]] = {}
        ours, theirs = folder / "processor", folder / "device"
        for device, output in (("cpu", ours), (run.device, theirs)):
            note(f"the example on {device}")
            seconds[f"the example, {device}"] = child(
                "gpu:prepared", model=EXAMPLES / "reference", tokens=run.tokens, device=device,
                text=EXAMPLES / "calibration.jsonl", output=output,
            )  # fmt: skip
        yield _tables(ours, theirs)
        yield _codes(ours, theirs)
        shape = GEOMETRIES[run.geometry](layers=run.layers)
        note(f"writing {run.layers} layers of {run.geometry}")
        model = random_checkpoint(folder / "model", shape)
        text = random_text(folder / "ids.jsonl", run.tokens, shape.vocabulary)
        asked = {"model": model, "tokens": run.tokens, "text": text, "output": folder / "slice"}
        some = child("gpu:prepared", device=run.device, **asked)
        seconds[f"{run.layers} layers of {run.geometry}, {run.device}"] = some
        times = GEOMETRIES[run.geometry]().layers / run.layers
        whole = {stage: took * times for stage, took in some.items()}
        seconds[f"{run.geometry} whole, {run.device}, extrapolated"] = whole
    columns = {"": "{}", **dict.fromkeys((*STAGES, "all"), "{:.1f}")}
    lines = [[name, *(took.get(c) for c in (*STAGES, "all"))] for name, took in seconds.items()]
    yield Table("seconds", columns, lines, f"Seconds, {run.tokens} tokens")


def prepared(model: str, tokens: int, text: str, device: str, output: str) -> dict[str, float]:
    """Write a profile and calibrated experts below `output`; seconds by stage, and of all."""
    from smoe.prep.checkpoint.text import Calibration
    from smoe.prep.progress import Progress
    from smoe.prep.steps import pack_to, profile_to

    source, progress, out = Calibration(text, tokens), Progress(), Path(output)
    out.mkdir()
    with progress.stage("all"):
        profile_to(Path(model), out / "profile", source, progress, device)
        pack_to(Path(model), out / "experts", source, ENCODING, None, progress, device)
    return progress.seconds | {"all": sum(progress.seconds.values())}


def _tables(one: Path, other: Path) -> Table:
    """By name the largest difference of any layer, of the largest value there."""
    most: dict[str, list[float]] = defaultdict(list)
    equal: dict[str, list[float]] = defaultdict(list)
    for file in sorted((one / "profile").rglob("tables.safetensors")):
        ours, theirs = (
            safetensors_file.load(path) for path in (file, other / file.relative_to(one))
        )
        for key, value in ours.items():
            name = key.rpartition(".")[2]
            a, b = value.astype(np.float64), theirs[key].astype(np.float64)
            most[name].append(float(np.abs(a - b).max(initial=0) / (np.abs(a).max(initial=0) or 1)))
            equal[name].append(float(np.mean(a == b)) if a.size else 1.0)
    lines = [[name, max(found), min(equal[name])] for name, found in sorted(most.items())]
    columns = {"table": "{}", "largest difference": "{:.1e}", "equal values": "{:.1%}"}
    return Table("tables", columns, lines, "Profiles of the example, of the largest value")


def _codes(one: Path, other: Path) -> Table:
    """By level the share of codes that are the same in both."""
    encoding = nested.parse(ENCODING)
    levels = range(1, encoding.levels + 1)
    same: dict[int, list[float]] = defaultdict(list)
    for file in sorted((one / "experts").rglob("*.safetensors")):
        pairs = zip(_experts(file), _experts(other / file.relative_to(one)), strict=True)
        for ours, theirs in pairs:
            for name, level in itertools.product(MATRICES, levels):
                a, b = (_codes_at(encoding, name, tensors, level) for tensors in (ours, theirs))
                same[level].append(float(np.mean(a == b)))
    lines = [[level, np.mean(found), min(found)] for level, found in sorted(same.items())]
    columns = {"level": "{}", "same codes": "{:.2%}", "in the worst matrix": "{:.2%}"}
    return Table("codes", columns, lines, "Calibrated codes of the example")


def _codes_at(encoding: nested.Nested, name: str, tensors: Arrays, level: int) -> np.ndarray:
    tiles, blocks = tensors[f"{name}_plane0"].shape[:2]
    dims = (tiles * nested.ROWS, blocks * nested.COLUMNS)
    return nested.unpack_matrix(encoding, name, tensors, dims, level)[0]


def _experts(file: Path) -> Iterator[Arrays]:
    """Tensors of each expert of a shard, by name."""
    found: dict[str, Arrays] = defaultdict(dict)
    for key, tensor in safetensors_file.load(file).items():
        _, expert, name = key.split(".", 2)
        found[expert][name] = tensor
    yield from (found[expert] for expert in sorted(found))
