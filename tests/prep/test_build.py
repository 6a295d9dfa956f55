"""Building: what is refused, that nothing is lost, and the commands as a user types them."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from smoe.artifacts import BundleError, open_bundle, safetensors_file
from smoe.artifacts.encodings import decode_expert, record_layout
from smoe.artifacts.shard import shard_start
from smoe.prep.build import build
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.pack.pack import pack
from smoe.prep.progress import Progress
from smoe.prep.statistics.profile import profile

QUIET = Progress(True)


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
    manifest = open_bundle(bundles("mixtral")).manifest
    layout = record_layout(manifest.expert_shape(1), experts.encoding, experts.page)
    fused = AutoModelForCausalLM.from_pretrained(checkpoint.path).model.layers[1].mlp.experts
    start = shard_start(tmp_path / manifest.shard(1), layout, experts.page, 6)
    records = np.fromfile(tmp_path / manifest.shard(1), np.uint8, offset=start).reshape(6, -1)
    for expert, record in enumerate(records):
        decoded = decode_expert(manifest.expert_shape(1), layout, encoding, record)
        wanted = (
            torch.cat([fused.gate_up_proj[expert].flatten(), fused.down_proj[expert].flatten()])
            .detach()
            .numpy()
        )
        found = np.concatenate([decoded[n].ravel() for n in ("gate", "up", "down")])
        assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


def test_a_bundle_from_a_profile_is_the_same_as_one_from_text(
    exports, smoe_prep, checkpoints, bundles, ids_file, tmp_path
):
    source = checkpoints("mixtral")
    assert (
        smoe_prep("profile", source, "--calibration", ids_file, "-o", tmp_path / "p").returncode
        == 0
    )
    exports.begin(source, tmp_path / "b", Recipe("f32"))
    done = smoe_prep(
        "build", source, "-o", tmp_path / "b", "--profile", tmp_path / "p", "--encoding", "f32"
    )
    assert done.returncode == 0, done.stderr
    ours = open_bundle(tmp_path / "b", hashes=True).manifest
    theirs = open_bundle(bundles("mixtral")).manifest
    for name in theirs.files:  # prices come from text, and so do predictors: this bundle has none
        assert name.endswith("tables.safetensors") or ours.files[name] == theirs.files[name]
    statistics = safetensors_file.load(tmp_path / "p" / "tables.safetensors")
    assert _same(safetensors_file.load(tmp_path / "b" / "tables.safetensors"), statistics)
    both = safetensors_file.load(bundles("mixtral") / "tables.safetensors")
    learned = ("price_", "predict_")
    assert _same(
        {name: of for name, of in both.items() if not any(word in name for word in learned)},
        statistics,
    )


def _same(ours, theirs) -> bool:
    return set(ours) == set(theirs) and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )


def test_profile_and_text_may_both_be_given_if_they_agree(checkpoints, ids_file, tmp_path):
    source, calibration = checkpoints("mixtral"), Calibration(str(ids_file), tokens=200)
    (tmp_path / "p").mkdir()
    profile(open_checkpoint(source), tmp_path / "p", calibration, QUIET)
    build(source, tmp_path / "b", calibration, Recipe("bf16", prices=0), tmp_path / "p", QUIET)
    assert (tmp_path / "b" / "tables.safetensors").read_bytes() == (
        tmp_path / "p" / "tables.safetensors"
    ).read_bytes()
    for other, said in (
        (Calibration("other.txt"), "made with source 'ids.jsonl', asked for is 'other.txt'"),
        (Calibration(str(ids_file), seed=3), "seed 0, asked for is 3"),
        (Calibration(str(ids_file), tokens=300), "tokens 200, asked for is 300"),
    ):
        with pytest.raises(PrepError, match=said):
            build(source, tmp_path / "c", other, Recipe("bf16"), tmp_path / "p", QUIET)


def test_steps_on_their_own(smoe_prep, checkpoints, tmp_path):
    source = checkpoints("mixtral")
    assert (
        smoe_prep("pack", source, "-o", tmp_path / "packed", "--encoding", "int8").returncode == 0
    )
    assert json.loads((tmp_path / "packed" / "experts.json").read_text())["encoding"] == "int8"
    done = smoe_prep("export", source, "-o", tmp_path / "exported", "--json")
    assert len(json.loads(done.stdout)["backbone"]["segments"]) == 4 and done.returncode == 0


def test_verify_finds_no_difference_in_f32_and_refuses_another_model(
    smoe_prep, checkpoints, bundles, ids_file
):
    done = smoe_prep(
        "verify",
        bundles("mixtral"),
        checkpoints("mixtral"),
        "--text",
        ids_file,
        "--tokens",
        200,
        "--json",
    )
    said = json.loads(done.stdout)
    assert (
        said["tokens"] == 200
        and said["top1_agreement"] == 1
        and abs(said["kl_nats_per_token"]) < 1e-8
    )
    assert said["perplexity_original"] == pytest.approx(said["perplexity_bundle"], rel=1e-5)
    done = smoe_prep(
        "verify", bundles("mixtral"), checkpoints("olmoe"), "--text", ids_file, "--tokens", 200
    )
    assert done.returncode == 1 and "fingerprints differ" in done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ("build", "/no/such", "-o", "{tmp}/b", "--calibration", "{ids}"),
            "/no/such is not a directory",
        ),
        (
            ("build", "{model}", "-o", "{tmp}/b", "--self", "0"),
            "no text to learn from; give --calibration FILE or --profile",
        ),
        (
            ("build", "{model}", "-o", "{tmp}/b", "--calibration", "{ids}", "--encoding", "int3"),
            "no encoding 'int3'",
        ),
        (
            ("build", "{model}", "-o", "{tmp}/b", "--calibration", "{ids}", "--backbone", "int3"),
            "no --backbone int3",
        ),
        (
            ("build", "{model}", "-o", "{tmp}/b", "--calibration", "{ids}", "--seed", "-1"),
            "seed -1",
        ),
        (
            ("build", "{model}", "-o", "{tmp}/no/b", "--calibration", "{ids}"),
            "is not a directory; make it first",
        ),
        (("build", "{model}", "-o", "{tmp}/b", "--profile", "{tmp}"), "has no tables.safetensors"),
        (
            ("profile", "{model}", "-o", "{tmp}/p", "--calibration", "{tmp}/none.txt"),
            "none.txt does not exist",
        ),
        (
            ("profile", "{model}", "-o", "{tmp}", "--calibration", "{ids}"),
            "exists; smoe does not overwrite",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_output(
    smoe_prep, checkpoints, ids_file, tmp_path, arguments, said
):
    (tmp_path / "t").mkdir()
    values = {"tmp": tmp_path / "t", "ids": ids_file, "model": checkpoints("mixtral")}
    done = smoe_prep(*(a.format(**values) for a in arguments))
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize(
    "recipe, source, said",
    [
        (Recipe("int3"), "ids", "no encoding 'int3'"),
        (Recipe("f32", "int3"), "ids", "no --backbone int3"),
        (Recipe("nested:2+2"), "ids", "base of 2 to 5 bits"),
        (Recipe(), "none.txt", "none.txt does not exist"),
    ],
)
def test_mistakes_are_found_before_the_long_part(
    checkpoints, ids_file, tmp_path, monkeypatch, recipe, source, said
):
    from smoe.prep import build as module

    def never(*_):
        raise AssertionError("the sweep began")

    monkeypatch.setattr(module, "learn", never)
    text = Calibration(str(ids_file) if source == "ids" else str(tmp_path / source))
    with pytest.raises((PrepError, BundleError), match=said):
        build(checkpoints("mixtral"), tmp_path / "b", text, recipe, progress=QUIET)
