"""Building: what is refused, that nothing is lost, and the commands as a user types them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from smoe.artifacts import BundleError, open_bundle
from smoe.artifacts.encodings import decode_expert, record_layout
from smoe.prep.build import MARKER, Recipe, beside, build
from smoe.prep.calibration import Calibration
from smoe.prep.checkpoint import open_checkpoint
from smoe.prep.errors import PrepError
from smoe.prep.pack import pack
from smoe.prep.profile import profile
from smoe.prep.progress import Progress
from smoe.runtime.store import Shards

QUIET = Progress(True)


def smoe_prep(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "smoe.prep", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """damage(change) -> a copy of the mixtral checkpoint whose tensors `change` was given to edit."""

    def damage(change):
        source = checkpoints("mixtral")
        weights = load_file(source / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        return tmp_path

    return damage


def _nan(weights):
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan


def _missing(weights):
    del weights["model.norm.weight"]


def _cut(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize("change, said", [(_nan, "q_proj.weight holds values that are not finite"),
                                          (_missing, "1 weights are missing .*model.norm.weight"),
                                          (_cut, "model.norm.weight|cannot be loaded")])  # fmt: skip
def test_damaged_checkpoints_are_refused(damaged, change, said):
    with pytest.raises(PrepError, match=said):
        open_checkpoint(damaged(change))


def test_a_half_written_download_is_refused(checkpoints, tmp_path):
    for file in checkpoints("mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size // 2)
    with pytest.raises(PrepError, match="cannot be loaded"):
        open_checkpoint(tmp_path)


def test_a_dense_model_is_refused_by_name(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(PrepError, match="is a llama model without experts"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("make, said", [
    (lambda p: None, "is not a directory"),
    (lambda p: p.mkdir(), "has no config.json"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text("{")), "config.json is not one that transformers"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text('{"model_type": "warp"}')), "config.json is not one that"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text('{"model_type": "mixtral"}')), "has no .safetensors files"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text('{"model_type": "mixtral", "hidden_size": "abc"}')), "config.json is"),
])  # fmt: skip
def test_what_is_no_checkpoint_is_said(tmp_path, make, said):
    make(tmp_path / "m")
    with pytest.raises(PrepError, match=said):
        open_checkpoint(tmp_path / "m")


def test_an_existing_output_is_not_touched(checkpoints, ids_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(PrepError, match="exists; smoe does not overwrite"):
        build(checkpoints("mixtral"), tmp_path / "out", Calibration(str(ids_file)), progress=QUIET)
    assert (tmp_path / "out" / "precious").read_text() == "data"


@pytest.mark.parametrize("encoding, bound", [("f32", 0), ("bf16", 2**-8), ("int8", 0.02)])
def test_records_hold_the_checkpoints_weights(checkpoints, bundles, tmp_path, encoding, bound):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    experts = pack(checkpoint, tmp_path, encoding, QUIET)
    manifest = open_bundle(bundles("mixtral"))
    layout = record_layout(manifest.expert_shape(1), experts.encoding, experts.page)
    import dataclasses

    shards = Shards(tmp_path, dataclasses.replace(manifest, experts=experts))
    record = np.empty(layout.nbytes, np.uint8)
    for expert in range(6):
        shards.read(1, expert, record)
        decoded = decode_expert(layout, encoding, record)
        fused = checkpoint.model.model.layers[1].mlp.experts
        wanted = torch.cat([fused.gate_up_proj[expert].flatten(), fused.down_proj[expert].flatten()]).detach().numpy()
        found = np.concatenate([decoded[n].ravel() for n in ("gate", "up", "down")])
        assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()
    shards.close()


def test_a_bundle_from_a_profile_is_the_same_as_one_from_text(checkpoints, bundles, ids_file, tmp_path):
    source = checkpoints("mixtral")
    assert smoe_prep("profile", source, "--calibration", ids_file, "-o", tmp_path / "p").returncode == 0
    done = smoe_prep("build", source, "-o", tmp_path / "b", "--profile", tmp_path / "p", "--encoding", "f32")
    assert done.returncode == 0, done.stderr
    ours, theirs = open_bundle(tmp_path / "b", hashes=True), open_bundle(bundles("mixtral"))
    differ = {n for n in theirs.files if theirs.files[n] != ours.files.get(n)}
    assert differ <= {"profile.json"}  # it says how long profiling took


def test_profile_and_text_may_both_be_given_if_they_agree(checkpoints, ids_file, tmp_path):
    source, calibration = checkpoints("mixtral"), Calibration(str(ids_file), tokens=200)
    (tmp_path / "p").mkdir()
    profile(open_checkpoint(source), tmp_path / "p", calibration, QUIET)
    build(source, tmp_path / "b", calibration, Recipe("bf16"), tmp_path / "p", QUIET)
    assert (tmp_path / "b" / "tables.safetensors").read_bytes() == (tmp_path / "p" / "tables.safetensors").read_bytes()
    for other, said in ((Calibration("other.txt"), "made with source 'ids.jsonl', asked for is 'other.txt'"),
                        (Calibration(str(ids_file), seed=3), "seed 0, asked for is 3"),
                        (Calibration(str(ids_file), tokens=300), "tokens 200, asked for is 300")):  # fmt: skip
        with pytest.raises(PrepError, match=said):
            build(source, tmp_path / "c", other, Recipe("bf16"), tmp_path / "p", QUIET)


def test_what_lies_in_the_way_is_kept(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("data")
    with pytest.raises(PrepError, match=r"out.partial is in the way and not smoe's"), beside(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial" / "precious").read_text() == "data"


def test_two_builds_of_one_output_do_not_meet(tmp_path):
    with beside(tmp_path / "out") as first:
        (first / "half").write_text("done")
        with pytest.raises(PrepError, match="Another smoe-prep is writing"), beside(tmp_path / "out"):
            pass
        assert (first / "half").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["half"]


def test_what_a_killed_build_left_is_cleared(tmp_path):
    (tmp_path / "out.partial" / "experts").mkdir(parents=True)
    (tmp_path / "out.partial" / MARKER).touch()
    with beside(tmp_path / "out") as partial:
        assert [p.name for p in partial.iterdir()] == [MARKER]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_fingerprint_sees_the_last_byte(checkpoints, tmp_path):
    for file in checkpoints("mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = open_checkpoint(tmp_path).fingerprint()
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert open_checkpoint(tmp_path).fingerprint() != before


def test_steps_on_their_own(checkpoints, tmp_path):
    source = checkpoints("mixtral")
    assert smoe_prep("pack", source, "-o", tmp_path / "packed", "--encoding", "int8").returncode == 0
    assert json.loads((tmp_path / "packed" / "experts.json").read_text())["encoding"] == "int8"
    done = smoe_prep("export", source, "-o", tmp_path / "exported", "--json")
    assert len(json.loads(done.stdout)["backbone"]["segments"]) == 3 and done.returncode == 0


def test_verify_finds_no_difference_in_f32_and_refuses_another_model(checkpoints, bundles, ids_file):
    done = smoe_prep(
        "verify", bundles("mixtral"), checkpoints("mixtral"), "--text", ids_file, "--tokens", 200, "--json"
    )
    said = json.loads(done.stdout)
    assert said["tokens"] == 200 and said["top1_agreement"] == 1 and abs(said["kl_nats_per_token"]) < 1e-8
    assert said["perplexity_original"] == pytest.approx(said["perplexity_bundle"], rel=1e-5)
    done = smoe_prep("verify", bundles("mixtral"), checkpoints("olmoe"), "--text", ids_file, "--tokens", 200)
    assert done.returncode == 1 and "fingerprints differ" in done.stderr


@pytest.mark.parametrize("arguments, said", [
    (("build", "/no/such", "-o", "{tmp}/b", "--calibration", "{ids}"), "/no/such is not a directory"),
    (("build", "{model}", "-o", "{tmp}/b"), "no calibration text; give --calibration FILE, or --profile"),
    (("build", "{model}", "-o", "{tmp}/b", "--calibration", "{ids}", "--encoding", "int3"), "no encoding 'int3'"),
    (("build", "{model}", "-o", "{tmp}/b", "--calibration", "{ids}", "--backbone", "int4"), "--backbone int4 is not"),
    (("build", "{model}", "-o", "{tmp}/b", "--calibration", "{ids}", "--seed", "-1"), "seed -1"),
    (("build", "{model}", "-o", "{tmp}/no/b", "--calibration", "{ids}"), "is not a directory; make it first"),
    (("build", "{model}", "-o", "{tmp}/b", "--profile", "{tmp}"), "has no tables.safetensors"),
    (("profile", "{model}", "-o", "{tmp}/p", "--calibration", "{tmp}/none.txt"), "none.txt does not exist"),
    (("profile", "{model}", "-o", "{tmp}", "--calibration", "{ids}"), "exists; smoe does not overwrite"),
])  # fmt: skip
def test_mistakes_are_one_sentence_and_leave_no_output(checkpoints, ids_file, tmp_path, arguments, said):
    (tmp_path / "t").mkdir()
    values = {"tmp": tmp_path / "t", "ids": ids_file, "model": checkpoints("mixtral")}
    done = smoe_prep(*(a.format(**values) for a in arguments))
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize("recipe, source, said", [
    (Recipe("int3"), "ids", "no encoding 'int3'"), (Recipe("f32", "int4"), "ids", "--backbone int4"),
    (Recipe(), "none.txt", "none.txt does not exist"),
])  # fmt: skip
def test_mistakes_are_found_before_the_long_part(checkpoints, ids_file, tmp_path, monkeypatch, recipe, source, said):
    from smoe.prep import build as module

    def never(*_):
        raise AssertionError("profiling or packing began")

    monkeypatch.setattr(module, "profile", never)
    monkeypatch.setattr(module, "pack", never)
    text = Calibration(str(ids_file) if source == "ids" else str(tmp_path / source))
    with pytest.raises(PrepError if "encoding" not in said else BundleError, match=said):
        build(checkpoints("mixtral"), tmp_path / "b", text, recipe, progress=QUIET)


def test_an_unfinished_build_leaves_no_bundle_and_the_next_one_succeeds(checkpoints, ids_file, tmp_path, monkeypatch):
    from smoe.prep import build as module

    def fails(*_):
        raise PrepError("the disk is on fire")

    with monkeypatch.context() as patched, pytest.raises(PrepError, match="on fire"):
        patched.setattr(module, "export", fails)
        build(checkpoints("mixtral"), tmp_path / "b", Calibration(str(ids_file)), Recipe("bf16"), progress=QUIET)
    assert not (tmp_path / "b").exists()
    build(checkpoints("mixtral"), tmp_path / "b", Calibration(str(ids_file)), Recipe("bf16"), progress=QUIET)
    assert open_bundle(tmp_path / "b").experts.encoding == "bf16"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
