"""Bundles that are damaged, or shrink under a running engine: a sentence each, and no file stays
open."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.parts import prompted

from smoe.artifacts import BundleError, open_bundle
from smoe.artifacts.validate import sha256
from smoe.runtime import Engine, EngineError
from smoe.runtime.backbone import Backbone
from smoe.runtime.budget import memory_for, plan_memory
from smoe.runtime.step import Sequence, Step


@pytest.fixture(scope="module")
def budgets(golden):
    """Bytes that leave room for so many experts."""
    opened = open_bundle(golden)
    return lambda experts: memory_for(opened, experts, 300)


def test_experts_beyond_those_of_the_layer_are_a_sentence(golden):
    bundle = open_bundle(golden)
    first, *others = bundle.manifest.layers
    fewer = dataclasses.replace(first, experts=2, routing=None)
    manifest = dataclasses.replace(bundle.manifest, layers=(fewer, *others))
    backbone = Backbone(bundle.path, manifest)
    step = Step((prompted(Sequence(backbone.new_state(300)), np.arange(9)),))
    with pytest.raises(EngineError, match="not what layer 0 of the manifest takes, or experts"):
        backbone.route(0, backbone.begin(step))


def test_a_shard_that_shrinks_under_a_running_engine_is_a_sentence(copied, answer, budgets):
    shard = copied / "experts" / "layer-01.safetensors"
    whole = shard.read_bytes()
    with Engine.open(copied, beside=budgets(3)) as engine:
        os.truncate(shard, len(whole) // 3)
        with pytest.raises(EngineError, match="ends inside expert"):
            list(engine.generate(answer["prompt"], max_new_tokens=4))
        with open(shard, "r+b") as file:
            file.write(whole)
        tokens = [t.id for t in engine.generate(answer["prompt"], max_new_tokens=24)]
        assert tokens == answer["greedy"].tolist()


def test_a_damaged_segment_is_a_sentence(copied):
    segment = copied / "backbone" / "segment-01.onnx"
    segment.write_bytes(b"\x00" * segment.stat().st_size)
    with pytest.raises(EngineError, match=r"segment-01.onnx does not load in ONNX Runtime"):
        Engine.open(copied)


def test_what_cannot_be_opened_keeps_no_file_open(copied):
    def opened():
        return sum(
            str(copied) in os.path.realpath(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
        )

    shard = copied / "experts" / "layer-01.safetensors"
    bundle = open_bundle(copied)
    shard.unlink()
    with pytest.raises(EngineError, match=r"layer-01.safetensors cannot be opened"):
        Engine(bundle, plan_memory(bundle, None))
    assert opened() == 0


def test_a_graph_that_names_weights_of_its_own_is_refused(copied):
    """ONNX Runtime would map the file behind our back."""
    text = json.loads((copied / "manifest.json").read_text())
    text["backbone"]["segments"][0]["weights"] = []
    (copied / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(EngineError, match=r"segment-00.onnx does not load"):
        Engine.open(copied)


@pytest.mark.parametrize(
    "wire, value", [("hidden", "input_ids"), ("ids", "past_length"), ("weights", "input_ids")]
)
def test_wires_to_values_of_another_kind_are_a_sentence(copied, wire, value):
    text = json.loads((copied / "manifest.json").read_text())
    text["layers"][0]["wires"][wire] = value
    (copied / "manifest.json").write_text(json.dumps(text))
    with (
        Engine.open(copied) as engine,
        pytest.raises(EngineError, match="not what layer 0 of the manifest takes"),
    ):
        list(engine.generate([1, 2, 3], max_new_tokens=2))


@pytest.mark.parametrize("name", ["gate_scale", "down_scale", "up_bias"])
@pytest.mark.parametrize("value", [0x7FC0, 0x7F80, 0xFF80])  # NaN and infinities, in bfloat16
def test_scales_and_biases_that_are_not_finite_are_refused_when_they_are_read(
    goldens, tmp_path, name, value
):
    planes = Path(shutil.copytree(goldens[2], tmp_path / "planes.smoe"))
    bundle = open_bundle(planes)
    layout, shard = bundle.layouts[1], bundle.shard(1)
    field = next(f for f in layout.fields if f.name == name)
    with open(shard, "r+b") as file:
        file.seek(
            bundle.starts[1] + 3 * layout.nbytes + field.offset + (2 if field.dtype == "F32" else 0)
        )
        file.write(value.to_bytes(2, "little"))
    said = f"layer-01.safetensors: {name} of expert 3 holds values that are not finite"
    with pytest.raises(EngineError, match=said):
        Engine.open(planes)
    manifest = json.loads((planes / "manifest.json").read_text())
    manifest["files"][str(shard.relative_to(planes))]["sha256"] = sha256(shard)
    (planes / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=said):
        open_bundle(planes, hashes=True)
