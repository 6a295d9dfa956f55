"""Models that benches run: the example, the example padded to real sizes, and random ones.

Building takes minutes and is never timed, so whatever is there already is used as it is.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.geometries import GEOMETRIES
from bench.harness import EXAMPLES, Rows, Run, Table, bench, note, option
from bench.page_cache import size
from bench.random_models import Shape, random_checkpoint, random_text
from smoe.artifacts import open_bundle, safetensors_file, validate
from smoe.artifacts.manifest import File
from smoe.artifacts.tables import save_tables

EXAMPLE, CALIBRATION = EXAMPLES / "reference", EXAMPLES / "calibration.jsonl"
PADDED = ("--encoding", "nested:2+1+1:128", "--quantiser", "nearest", "--backbone", "int8")

# -- the example, and the example padded -----------------------------------------------


@bench(option("--directory", type=Path, required=True, help="where models are, or are made"))
def models(run: Run) -> Rows:
    """Build the bundles that other benches take: the example, and the padded one."""
    paths = {"example.smoe": example(run.directory), "padded.smoe": padded(run.directory)}
    lines = [[name, size(path) / 1e6] for name, path in paths.items()]
    yield Table("models", {"bundle": "{}", "MB": "{:.1f}"}, lines)


def example(directory: Path) -> Path:
    """The example model in nested planes, calibrated on the examples' text alone, with prices."""
    bundle = directory / "example.smoe"
    return build(EXAMPLE, bundle, CALIBRATION, "--encoding", "nested:2+1+1", "--self", "0")


def padded(directory: Path) -> Path:
    """The example model with hidden 2048 and experts of 4.9 MB in 4 bits, and what calibration says
    of the example.

    `inflate` keeps the function, so that statistics, prices and predictors of the example hold for
    it too; 65,536 tokens through the padded model would take hours and say the same. See `graft`.
    """
    bundle = directory / "padded.smoe"
    if bundle.exists():
        return bundle
    plain = build(
        padded_checkpoint(directory), directory / "padded-plain.smoe", CALIBRATION,
        "--tokens", "256", "--prices", "0", *PADDED,
    )  # fmt: skip
    small = build(EXAMPLE, directory / "example-128.smoe", CALIBRATION, *PADDED[:4])
    graft(plain, small)
    return plain.rename(bundle)


def padded_checkpoint(directory: Path) -> Path:
    from bench.inflate import inflate

    checkpoint = directory / "padded"
    if not checkpoint.exists():
        note(f"padding the example model into {checkpoint}", *inflate(EXAMPLE, checkpoint).lines())
    return checkpoint


def graft(bundle: Path, small: Path) -> None:
    """Give the padded `bundle` the tables and the trace of `small`, the example model in the same
    encoding.

    Both compute the same function with the same codes: an added channel carries zero wherever
    something reads it. So routing, outputs and gradients are those of the example, and a linear
    predictor is the example's with rows of zero for the added channels. Not the same are the
    backbones' bits: the example's statistics are of float32.
    """
    manifest, source = open_bundle(bundle).manifest, open_bundle(small)
    layers = source.tables.layers()
    for tables, layer in zip(layers, manifest.layers, strict=True):
        for name in ("predict_1", "predict_2", "predict_3"):
            if name in tables:
                added = layer.hidden - len(tables[name])
                tables[name] = np.pad(tables[name], ((0, added), (0, 0)))
    header = safetensors_file.read_header(small / "tables.safetensors")
    save_tables(bundle / "tables.safetensors", layers, header.metadata)
    if trace := source.study("trace.safetensors"):
        shutil.copyfile(trace, bundle / manifest.study / trace.name)
    changed = dataclasses.replace(manifest, files=manifest.files | _listed(bundle))
    (bundle / "manifest.json").write_text(changed.to_json(), "utf-8")
    open_bundle(bundle)


def _listed(bundle: Path) -> dict[str, File]:
    """Tables and traces as they are now, for the manifest."""
    paths = [*bundle.rglob("tables.safetensors"), *bundle.rglob("trace.safetensors")]
    return {
        str(path.relative_to(bundle)): File(size=path.stat().st_size, sha256=validate.sha256(path))
        for path in paths
    }


def build(model: Path, bundle: Path, text: Path, *options: str) -> Path:
    """`smoe-prep build`, where the bundle is not there yet."""
    if not bundle.exists():
        command = [sys.executable, "-m", "smoe.prep", "build", str(model), "-o", str(bundle)]
        command += ["--calibration", str(text), *options]
        note("building: " + " ".join(command[3:]))
        bundle.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, stdout=sys.stderr)
    return bundle


def random_bundle(bundle: Path, shape: Shape, tokens: int, *options: str) -> Path:
    """A bundle of a random model; the checkpoint is not kept."""
    if bundle.exists():
        return bundle
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as scratch:
        model = random_checkpoint(Path(scratch) / "model", shape)
        text = random_text(Path(scratch) / "ids.jsonl", tokens, shape.vocabulary)
        return build(model, bundle, text, "--tokens", str(tokens), *options)


def at_size(directory: Path, geometry: str, layers: int, gguf: bool) -> dict[str, Path]:
    """A bundle of random weights and, with `gguf`, the same for llama.cpp, in `directory`: made
    where they are missing. The checkpoint is there only until they are."""
    name = f"{geometry}-{layers}"
    paths = {"smoe": directory / f"{name}.smoe"}
    if gguf:
        paths["llama.cpp"] = directory / f"{name}.gguf"
    if all(path.exists() for path in paths.values()):
        return paths
    shape = GEOMETRIES[geometry](layers=layers)
    checkpoint = random_checkpoint(directory / name, shape)
    text = random_text(directory / f"{name}.jsonl", 256, shape.vocabulary)
    how = ("--tokens", "256", "--prices", "0", "--backbone", "int8", *shape.encoding)
    build(checkpoint, paths["smoe"], text, *how)
    if gguf and not paths["llama.cpp"].exists():
        from bench.to_gguf import to_gguf

        note(f"writing {paths['llama.cpp']}")
        to_gguf(checkpoint, paths["llama.cpp"], backbone="q8_0")
    shutil.rmtree(checkpoint)
    return paths
