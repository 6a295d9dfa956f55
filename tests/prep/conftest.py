"""Pico models made on the spot (tests/support/pico.py), saved and built once. Needs torch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "torch", reason="prep needs its extra; the lean environment does not run these tests"
)

os.environ["HF_HUB_OFFLINE"] = "1"

from support import pico
from transformers import AutoModelForCausalLM

from smoe.prep.__main__ import main


@pytest.fixture(scope="session")
def smoe_prep():
    """smoe_prep(*arguments) -> what the command does as a user types it: exit status, stdout,
    stderr. It runs in this process, since loading torch takes longer than what most tests ask for;
    an exception that the command lets out fails the test."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["smoe-prep", *map(str, arguments)])
            try:
                main()
                status = 0
            except SystemExit as done:
                status = int(done.code or 0)
        return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())

    return run


def write_ids(
    path: Path, rows: int = 12, length: int = 40, vocabulary: int = 211, seed: int = 0
) -> Path:
    """Calibration of random token ids, one .jsonl record a row."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (rows, length)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return path


@pytest.fixture(scope="session")
def make():
    return pico.make_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """family -> directory of its pico checkpoint, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            pico.make_model(family).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(scope="session")
def ids_file(tmp_path_factory) -> Path:
    return write_ids(tmp_path_factory.mktemp("text") / "ids.jsonl")


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Builds that share exports, with all processes of the run."""
    from support.exports import Exports

    own = tmp_path_factory.getbasetemp()
    return Exports((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exports")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory, checkpoints, ids_file, exports):
    """family -> its pico bundle in f32, built once."""
    from smoe.prep.checkpoint.text import Calibration
    from smoe.prep.options import Recipe

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("bundles") / f"{family}.smoe"
            text = Calibration(str(ids_file))
            exports.build(checkpoints(family), made[family], text, Recipe("f32"))
        return made[family]

    return get


@pytest.fixture(scope="session")
def reference_model(root):
    return AutoModelForCausalLM.from_pretrained(
        root / "examples" / "reference", dtype="float32"
    ).eval()


@pytest.fixture(scope="session")
def reference_bundle(root, tmp_path_factory, exports) -> Path:
    """The example model in f32."""
    from smoe.prep.checkpoint.text import Calibration
    from smoe.prep.options import Recipe

    out = tmp_path_factory.mktemp("reference") / "reference.smoe"
    text = Calibration(str(root / "examples" / "calibration.jsonl"), tokens=2048)
    exports.build(root / "examples" / "reference", out, text, Recipe("f32"))
    return out
