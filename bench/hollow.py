"""A bundle of the geometry of a model of 30 billion parameters, whose files are holes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from bench.harness import ROOT
from smoe.artifacts import safetensors_file
from smoe.artifacts.bundle import layouts_of
from smoe.artifacts.manifest import File, Initializer, Manifest
from smoe.artifacts.safetensors_file import TensorSpec
from smoe.artifacts.tables import TABLES, key

GOLDEN = ROOT / "tests" / "golden"
HIDDEN, WIDTH, TOP_K, WEIGHTS = 2048, 768, 8, 12  # weights of a segment
SIZES = {"H": HIDDEN, "J": 3, "R": 8}


def hollow(path: Path, layers: int, experts: int) -> None:
    """Write a bundle of this geometry whose data are holes."""
    draft = Manifest.parse((GOLDEN / "v3.smoe" / "manifest.json").read_text(), "v3")
    layer = dataclasses.replace(
        draft.layers[0], experts=experts, top_k=TOP_K, hidden=HIDDEN, width=WIDTH
    )
    first, last = draft.backbone.segments[0], draft.backbone.segments[-1]
    weights = [
        Initializer(f"w{n}", "F32", (512, 1024), n * (512 * 1024 * 4), 512 * 1024 * 4)
        for n in range(WEIGHTS * (layers + 1))
    ]
    segments = [
        dataclasses.replace(
            last if n == layers else first,
            file=f"backbone/segment-{n:02d}.onnx",
            inputs=("input_ids",),
            weights=tuple(w.name for w in weights[n * WEIGHTS : (n + 1) * WEIGHTS]),
        )
        for n in range(layers + 1)
    ]
    backbone = dataclasses.replace(
        draft.backbone, segments=tuple(segments), initializers=tuple(weights), state=()
    )
    stored = dataclasses.replace(draft.experts, encoding="nested:2+1+1:128", biased=False)
    manifest = dataclasses.replace(
        draft, layers=(layer,) * layers, backbone=backbone, experts=stored, files={}
    )
    _write(path, manifest)


def _write(path: Path, manifest: Manifest) -> None:
    for folder in ("backbone", "experts"):
        (path / folder).mkdir(parents=True)
    for n, layout in enumerate(layouts_of(manifest)):
        count = manifest.layers[n].experts
        tensors = [t for expert in range(count) for t in layout.tensors(expert)]
        _hole(path / manifest.shard(n), tensors, {"format": "smoe-shard"}, manifest.experts.page)
    _hole(path / "tables.safetensors", _table_specs(manifest), {}, 64)
    for segment in manifest.backbone.segments:
        (path / segment.file).touch()
    last = manifest.backbone.initializers[-1]
    (path / manifest.backbone.weights).touch()
    os.truncate(path / manifest.backbone.weights, last.offset + last.nbytes)
    files = {
        str(file.relative_to(path)): File(file.stat().st_size, "")
        for file in path.rglob("*")
        if file.is_file()
    }
    (path / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())


def _table_specs(manifest: Manifest) -> list[TensorSpec]:
    specs = []
    for n, layer in enumerate(manifest.layers):
        sizes = SIZES | {"E": layer.experts, "P": layer.experts}
        for name, table in TABLES.items():
            if name != "transition" or n:
                shape = (sizes.get(letter) or int(letter) for letter in table.shape.split(","))
                specs.append(TensorSpec(key(n, name), table.dtype, tuple(shape)))
    return specs


def _hole(file: Path, tensors: list[TensorSpec], metadata: dict[str, str], align: int) -> None:
    text, nbytes = safetensors_file.header_text(tensors, metadata)
    text += b" " * (-(8 + len(text)) % align)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + nbytes)
