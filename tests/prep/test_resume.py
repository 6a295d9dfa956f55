"""Interrupted work: what is finished stays, the same command gives the same bytes, and other
settings are refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from smoe.artifacts import open_bundle
from smoe.prep.build import build
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress
from smoe.prep.workdir import MARKER, FinishedLayers, beside

QUIET = Progress(True)


def test_what_lies_in_the_way_is_kept(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("data")
    with (
        pytest.raises(PrepError, match=r"is in the way and not smoe's"),
        beside(tmp_path / "out", {}, QUIET),
    ):
        pass
    assert (tmp_path / "out.partial" / "precious").read_text() == "data"


def test_two_builds_of_one_output_do_not_meet(tmp_path):
    with beside(tmp_path / "out", {}, QUIET) as first:
        (first / "half").write_text("done")
        with (
            pytest.raises(PrepError, match="Another smoe-prep is writing"),
            beside(tmp_path / "out", {}, QUIET),
        ):
            pass
        assert (first / "half").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["half"]


def _fail(tmp_path, settings, files=()):
    with contextlib.suppress(KeyError), beside(tmp_path / "out", settings, QUIET) as partial:
        for name in files:
            (partial / name).write_text(name)
        raise KeyError


def test_finished_files_stay_and_half_written_ones_go(tmp_path):
    _fail(tmp_path, {"--encoding": "bf16"}, ["whole", "half.part"])
    with beside(tmp_path / "out", {"--encoding": "bf16"}, QUIET) as partial:
        assert {p.name for p in partial.iterdir()} == {"whole", MARKER}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_failure_with_nothing_finished_leaves_nothing(tmp_path):
    _fail(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"--encoding": "int8", "--seed": "0"}, "begun with --encoding bf16, now it is int8"),
        ({"--encoding": "bf16"}, "begun with --seed 0, now it is None"),
        (
            {"--encoding": "bf16", "--seed": "0", "--tokens": "9"},
            "begun with --tokens None, now it is 9",
        ),
    ],
)
def test_other_settings_are_refused_with_both_named(tmp_path, settings, said):
    _fail(tmp_path, {"--encoding": "bf16", "--seed": "0"}, ["whole"])
    with pytest.raises(PrepError, match=said), beside(tmp_path / "out", settings, QUIET):
        pass
    assert (tmp_path / "out.partial" / "whole").exists()


@pytest.mark.parametrize("written", ["", '{"--enc'])
def test_a_kill_before_the_settings_were_written_is_no_obstacle(tmp_path, written):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / MARKER).write_text(written)
    with beside(tmp_path / "out", {"--seed": "0"}, QUIET) as partial:
        assert json.loads((partial / MARKER).read_text()) == {"--seed": "0"}


def test_a_finished_layer_comes_back_to_the_bit(tmp_path):
    known = {"statistics.scored": np.array(3), "predictors.bias": np.arange(4, dtype=np.float16)}
    # Less and more than is written at once.
    outputs = [torch.rand(3, 6), torch.rand(600, 5003), torch.rand(4, 6)]
    with FinishedLayers(tmp_path) as finished:
        assert finished.known(0) is None
        finished.keep_outputs(0, outputs)
        finished.keep(0, known)
        again = finished.known(0)
        assert {name: a.tolist() for name, a in again.items()} == {
            name: a.tolist() for name, a in known.items()
        }
        back = finished.outputs(0, [output.shape for output in outputs], "cpu")
        assert all(torch.equal(a, b) for a, b in zip(back, outputs, strict=True))


def test_a_layer_that_was_left_in_the_middle_is_not_finished(tmp_path):
    with FinishedLayers(tmp_path) as finished:
        finished.keep_outputs(0, [torch.rand(2, 6)])
    assert FinishedLayers(tmp_path).known(0) is None


def _files(bundle):
    return {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def test_builds_killed_at_every_stage_give_the_same_bytes(checkpoints, bundles, ids_file, tmp_path):
    """SIGKILL as soon as a stage leaves its first file (at random moments: python -m bench soak
    kills)."""
    command = [
        sys.executable,
        "-m",
        "smoe.prep",
        "build",
        str(checkpoints("olmoe")),
        "-o",
        str(tmp_path / "b"),
        "--calibration",
        str(ids_file),
        "--encoding",
        "f32",
    ]
    signs = ("experts/*.safetensors*", "finished/sweep/00.known", "tables.safetensors",
             "backbone/weights.data")  # fmt: skip
    for sign in signs:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "b.partial").glob(sign)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "b").exists(), sign
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "kept from an earlier run" in done.stderr, done.stderr
    assert _files(tmp_path / "b") == _files(bundles("olmoe"))


def test_a_kill_after_the_rename_leaves_a_bundle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).touch()
    with (
        pytest.raises(PrepError, match="exists; smoe does not overwrite"),
        beside(tmp_path / "out", {}, QUIET),
    ):
        pass
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def reads(monkeypatch):
    """The layers whose experts are read, in order."""
    layers, experts = [], Checkpoint.experts

    def counted(self, layer, *device):
        layers.append(layer)
        return experts(self, layer, *device)

    monkeypatch.setattr(Checkpoint, "experts", counted)
    return layers


@pytest.mark.parametrize("encoding", ["f32", "nested:2+1+1:32"])
def test_a_layers_experts_are_read_twice(exports, checkpoints, ids_file, tmp_path, reads, encoding):
    """Statistics, trace, predictors, packing and prices of one build: forward, and back."""
    text = Calibration(str(ids_file))
    recipe = Recipe(encoding, self_tokens=0)
    exports.begin(checkpoints("mixtral"), tmp_path / "b", recipe)
    reads.clear()
    build(checkpoints("mixtral"), tmp_path / "b", text, recipe, progress=QUIET)
    assert reads == [0, 1, 1, 0]
    tables = open_bundle(tmp_path / "b").tables.layers()
    assert {"counts", "predict_recall", "price_cross", "price_fit"} <= set(tables[1])


def test_what_was_finished_is_not_done_again(
    checkpoints, bundles, ids_file, tmp_path, monkeypatch, reads
):
    from smoe.prep import build as building
    from smoe.prep.prices.price import Prices
    from smoe.prep.statistics.predict import Predictors

    text, wanted = Calibration(str(ids_file)), _files(bundles("mixtral"))
    reads.clear()

    def build_until(owner, name, fails_at=0):
        original, calls = getattr(owner, name), iter(range(100))

        def fails(*arguments):
            if next(calls) == fails_at:
                raise PrepError("stop")
            return original(*arguments)

        reads.clear()
        with monkeypatch.context() as patched, pytest.raises(PrepError, match="stop"):
            patched.setattr(owner, name, fails)
            build(checkpoints("mixtral"), tmp_path / "b", text, Recipe("f32"), progress=QUIET)
        partial = tmp_path / "b.partial"
        return {str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file()}

    there = build_until(Predictors, "visit", fails_at=1)
    assert reads == [0, 1] and {"finished/sweep/00.known", "finished/sweep/00.outputs"} <= there
    assert "finished/sweep/01.known" not in there
    there = build_until(Prices, "visit")
    assert reads == [1, 1], "the layer that was not finished, and the first on the way back"
    assert "tables.safetensors" not in there
    there = build_until(building, "export_apart")
    assert reads == [1, 0] and {"finished/learned.json", "tables.safetensors"} <= there
    there = build_until(building, "add_fit")
    assert reads == [] and {"manifest.json", "finished/export.json"} <= there
    monkeypatch.setattr(building, "export_apart", None)  # not called again
    build(checkpoints("mixtral"), tmp_path / "b", text, Recipe("f32"), progress=QUIET)
    assert reads == []
    assert _files(tmp_path / "b") == wanted


def test_a_bundle_says_what_it_was_made_from(bundles, ids_file):
    provenance = open_bundle(bundles("mixtral")).manifest.provenance
    assert provenance["calibration"] == ids_file.name
    assert provenance["calibration_tokens"] == "480" and provenance["calibration_seed"] == "0"
    assert provenance["price_tokens"] == "360" and provenance["device"] == "cpu"


@pytest.fixture
def disk(tmp_path):
    """disk(size) mounts a file system of that size and gives its directory."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = []

    def mount(size):
        options = f"{'remount,' if mounted else ''}size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
        )
        if done.returncode:
            pytest.skip("a small file system cannot be mounted here (needs root)")
        mounted.append(size)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_a_sentence_before_anything_is_written(
    disk, smoe_prep, checkpoints, ids_file
):
    small = disk("1m")
    done = smoe_prep("build", checkpoints("mixtral"), "-o", small / "b", "--calibration", ids_file)
    assert (
        done.returncode == 1
        and "has 1 MB free, about" in done.stderr
        and "make room" in done.stderr
    )
    assert list(small.iterdir()) == []


def test_a_disk_that_fills_up_is_a_sentence_and_loses_nothing(disk, smoe_prep, checkpoints):
    small = disk("160k")
    done = smoe_prep("pack", checkpoints("mixtral"), "-o", small / "p", "--encoding", "int8")
    assert (
        done.returncode == 1
        and "No space left on device" in done.stderr
        and "Traceback" not in done.stderr
    )
    disk("4m")
    assert (
        smoe_prep(
            "pack", checkpoints("mixtral"), "-o", small / "p", "--encoding", "int8"
        ).returncode
        == 0
    )
    assert os.listdir(small) == ["p"]


def test_no_file_is_hashed_twice_but_the_tables(
    exports, checkpoints, ids_file, tmp_path, monkeypatch
):
    from smoe.prep import build as building

    hashed, file_at = [], building.file_at
    monkeypatch.setattr(building, "file_at", lambda path: hashed.append(path.name) or file_at(path))
    text = Calibration(str(ids_file))
    exports.build(checkpoints("mixtral"), tmp_path / "b", text, Recipe("f32"))
    assert {n for n in hashed if hashed.count(n) > 1} == {"tables.safetensors"}


def test_one_moe_layer_is_not_taken_for_finished_predictors(
    checkpoints, ids_file, tmp_path, capsys
):
    """A model with one MoE layer has no table of predictors to tell a finished stage by."""
    text = Calibration(str(ids_file))
    built = build(checkpoints("jamba"), tmp_path / "b", text, Recipe("f32"), progress=Progress())
    assert len(built.manifest.layers) == 1
    assert "kept from an earlier run" not in capsys.readouterr().err


def test_the_device_is_said_and_an_interrupted_build_goes_on_with_the_same_only(
    smoe_prep, checkpoints, ids_file, tmp_path
):
    common = ("profile", checkpoints("mixtral"), "-o", tmp_path / "p", "--calibration", ids_file)
    done = smoe_prep(*common)
    assert done.returncode == 0 and "480 tokens on cpu" in done.stderr
    done = smoe_prep(*common[:3], tmp_path / "q", *common[4:], "--device", "nowhere")
    assert done.returncode == 1 and "--device nowhere cannot be used" in done.stderr
    _fail(tmp_path, {"--device": "cuda"}, ["whole"])
    with (
        pytest.raises(PrepError, match="begun with --device cuda, now it is cpu"),
        beside(tmp_path / "out", {"--device": "cpu"}, QUIET),
    ):
        pass
