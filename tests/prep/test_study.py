"""What only people and `plan` read: where a build puts it, and what is said where it did not
travel."""

import shutil

import pytest

from smoe.artifacts import open_bundle
from smoe.prep.errors import PrepError
from smoe.prep.replay.routing_trace import read_trace


def test_a_replay_says_that_the_study_is_missing(goldens, tmp_path):
    assert read_trace(goldens[-1]).steps
    alone = shutil.copytree(goldens[-1], tmp_path / "alone.smoe", ignore=lambda *_: ["study"])
    with pytest.raises(PrepError, match="copied without its folder study/"):
        read_trace(alone)


def test_a_build_puts_what_a_device_reads_apart(bundles):
    built = open_bundle(bundles("mixtral"))
    names = {name for name in built.manifest.files if name.startswith("study/")}
    assert names == {
        f"study/{name}" for name in ("tables.safetensors", "trace.safetensors", "profile.json")
    }
    assert built.study("trace.safetensors").is_file()
