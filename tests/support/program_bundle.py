"""A pico bundle that is run by its program whole, made of `artifacts` alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from smoe.artifacts.bundle import layouts_of
from smoe.artifacts.encodings import encode_expert
from smoe.artifacts.manifest import File, Manifest
from smoe.artifacts.program import PROGRAM, PROGRAM_WEIGHTS, Part, Program
from smoe.artifacts.shard import write_shard
from smoe.artifacts.validate import sha256

from .tables import pico


def write(path: Path, unknown: dict[int, str] | None = None) -> Path:
    """`unknown`: segments that the program does not know, and why. Their graphs are empty files."""
    program, weights, manifest = pico()
    if unknown:
        program = without(program, unknown)
    manifest = wired(manifest)
    files = {segment.file: b"" for segment in manifest.backbone.segments}
    files |= {manifest.backbone.weights: b"", PROGRAM: program.to_json().encode()}
    files[PROGRAM_WEIGHTS] = weights
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    _write_experts(path, manifest)
    names = [*files, *(manifest.shard(layer) for layer in range(len(manifest.layers)))]
    listed = {name: File((path / name).stat().st_size, sha256(path / name)) for name in names}
    written = dataclasses.replace(manifest, files=listed)
    (path / "manifest.json").write_text(written.to_json())
    return path


def without(program: Program, unknown: dict[int, str]) -> Program:
    """The same program, which does not know some of its segments."""
    parts = enumerate(program.parts)
    known = tuple(Part(None, unknown[n]) if n in unknown else part for n, part in parts)
    return dataclasses.replace(program, parts=known)


def wired(manifest: Manifest) -> Manifest:
    """With what its segments take and give, as their graphs would have it."""
    backbone, layers = manifest.backbone, len(manifest.layers)
    takes = [["input_ids", "past_length"]]
    gives = [["residual.0", "cos", "sin"]]
    for n, layer in enumerate(manifest.layers):
        before = [f"total.{n - 1}", f"output.{n - 1}"] if n else ["residual.0"]
        states = [state for state in backbone.state if state.segment == n + 1]
        takes.append([*before, "cos", "sin", *(state.input for state in states)])
        wires = [name for name in dataclasses.astuple(layer.wires) if name != layer.wires.output]
        gives.append([*wires, f"total.{n}", *(state.output for state in states)])
    takes.append([f"total.{layers - 1}", f"output.{layers - 1}", "logits_to_keep"])
    gives.append(["logits"])
    segments = [
        dataclasses.replace(segment, inputs=tuple(takes[n]), outputs=tuple(gives[n]))
        for n, segment in enumerate(backbone.segments)
    ]
    backbone = dataclasses.replace(backbone, segments=tuple(segments))
    return dataclasses.replace(manifest, backbone=backbone)


def _write_experts(path: Path, manifest: Manifest) -> None:
    random, experts = np.random.default_rng(5), manifest.experts
    for number, (layer, layout) in enumerate(
        zip(manifest.layers, layouts_of(manifest), strict=True)
    ):
        shape, records = manifest.expert_shape(number), []
        for _ in range(layer.experts):
            weights = {
                name: random.normal(0, 0.2, size).astype(np.float32)
                for name, size in shape.matrices().items()
            }
            records.append(encode_expert(layout, experts.encoding, weights))
        shard = path / manifest.shard(number)
        shard.parent.mkdir(exist_ok=True)
        write_shard(shard, layout, experts.page, records, layer.experts)
