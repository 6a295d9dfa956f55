"""Interrupted work: what is finished stays, the same command gives the same bytes, and other settings are refused."""

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
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress
from smoe.prep.statistics.sums import LayerSums
from smoe.prep.workdir import MARKER, Finished, beside

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


@pytest.mark.parametrize("settings, said", [
    ({"--encoding": "int8", "--seed": "0"}, "begun with --encoding bf16, now it is int8"),
    ({"--encoding": "bf16"}, "begun with --seed 0, now it is None"),
    ({"--encoding": "bf16", "--seed": "0", "--tokens": "9"}, "begun with --tokens None, now it is 9"),
])  # fmt: skip
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
    random = np.random.default_rng(0)
    sums = LayerSums.zeros(5, 4)
    sums.add_routing(
        random.integers(0, 5, (7, 1)), random.random((7, 1)), random.random((7, 1)), None
    )
    sums.add_scores(random.random((7, 5)))
    outputs = [
        torch.rand(1, 3, 6),
        torch.rand(2, 300, 5003),
        torch.rand(2, 2, 6),
    ]  # less and more than is written at once
    finished = Finished(tmp_path)
    assert finished.sums(0, sums) is None
    kept = list(finished.keeping(0, iter(outputs), sums))
    again = finished.sums(0, LayerSums.zeros(5, 4))
    assert all(a is b for a, b in zip(kept, outputs, strict=True))
    for name, value in vars(sums).items():
        assert np.array_equal(value, getattr(again, name)) and type(value) is type(
            getattr(again, name)
        ), name
    assert all(
        torch.equal(a, b) for a, b in zip(finished.outputs(0, outputs), outputs, strict=True)
    )


def test_a_layer_that_was_left_in_the_middle_is_not_finished(tmp_path):
    sums = LayerSums.zeros(5, 4)
    next(Finished(tmp_path).keeping(0, iter([torch.rand(2, 6), torch.rand(2, 6)]), sums))
    assert Finished(tmp_path).sums(0, sums) is None


def _files(bundle):
    return {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def test_builds_killed_at_every_stage_give_the_same_bytes(checkpoints, bundles, ids_file, tmp_path):
    """SIGKILL as soon as a stage leaves its first file (at random moments: bench/kills.py)."""
    command = [sys.executable, "-m", "smoe.prep", "build", str(checkpoints("olmoe")), "-o", str(tmp_path / "b"),
               "--calibration", str(ids_file), "--encoding", "f32"]  # fmt: skip
    for sign in ("finished/profile/*.outputs", "experts/*.safetensors*", "backbone/weights.data"):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "b.partial").glob(sign)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "b").exists(), sign
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "of an earlier run kept" in done.stderr, done.stderr
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


def test_what_was_finished_is_not_done_again(checkpoints, bundles, ids_file, tmp_path, monkeypatch):
    from smoe.prep import build as module
    from smoe.prep.pack import pack as packing
    from smoe.prep.statistics import profile as profiling

    text, wanted = Calibration(str(ids_file)), _files(bundles("mixtral"))

    def build_until(stage):
        def fails(*_):
            raise PrepError("stop")

        with monkeypatch.context() as patched, pytest.raises(PrepError, match="stop"):
            patched.setattr(*stage, fails)
            build(checkpoints("mixtral"), tmp_path / "b", text, Recipe("f32"), progress=QUIET)
        return {
            str(p.relative_to(tmp_path / "b.partial"))
            for p in (tmp_path / "b.partial").rglob("*")
            if p.is_file()
        }

    # After the first layer of profiling, then after the first shard, then before the export.
    layers = iter([1, None])
    original = profiling._Observer._observed

    def one_layer(self, layer, arrived):
        if next(layers) is None:
            raise PrepError("stop")
        return original(self, layer, arrived)

    with monkeypatch.context() as patched, pytest.raises(PrepError, match="stop"):
        patched.setattr(profiling._Observer, "_observed", one_layer)
        build(checkpoints("mixtral"), tmp_path / "b", text, Recipe("f32"), progress=QUIET)
    left = {p.name for p in (tmp_path / "b.partial" / "finished" / "profile").iterdir()}
    assert left == {"00.sums", "00.outputs"}
    read = []
    from smoe.prep.checkpoint.checkpoint import Checkpoint

    with_experts = Checkpoint.experts

    def counted(self, layer):
        read.append(layer)
        return with_experts(self, layer)

    monkeypatch.setattr(Checkpoint, "experts", counted)
    there = build_until((module, "pack"))
    assert read == [1] and "study/profile.json" in there
    read.clear()
    there = build_until((module, "export_checked"))
    assert read == [0, 1, 0, 1, 1, 0, 0, 1], (
        "packed, forward and back for the prices, forward for the predictors"
    )
    assert "experts/layer-01.safetensors" in there
    read.clear()
    there = build_until((module, "open_bundle"))
    assert read == [] and {"manifest.json", "finished/export.json"} <= there
    monkeypatch.setattr(module, "export_checked", None)  # not called again
    build(checkpoints("mixtral"), tmp_path / "b", text, Recipe("f32"), progress=QUIET)
    assert read == []
    assert _files(tmp_path / "b") == wanted
    assert open_bundle(tmp_path / "b").manifest.experts.page == packing.PAGE


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
