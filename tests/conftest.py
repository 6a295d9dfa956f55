"""Fixtures for all tests. Nothing here imports torch: the tests of artifacts and runtime also run
without it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from support import program_bundle

from smoe.artifacts import safetensors_file

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the benches run from there
GOLDENS = sorted((Path(__file__).parent / "golden").glob("v*.smoe"))
GOLDEN = GOLDENS[0]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """A checked-in bundle of format version 1: a pico model with a tokenizer. Read only."""
    return GOLDEN


@pytest.fixture(scope="session")
def goldens() -> list[Path]:
    """One checked-in bundle of every format version, first to last. Read only."""
    return GOLDENS


@pytest.fixture(scope="session")
def answer() -> dict[str, np.ndarray]:
    """What `transformers` said of the golden model: prompt, logits at every position, 24 greedy
    tokens."""
    return safetensors_file.load(GOLDEN.with_suffix(".answer.safetensors"))


@pytest.fixture(scope="session")
def programmed(tmp_path_factory) -> Path:
    """A pico bundle whose program runs all of its backbone; its graphs are empty. Read only."""
    return program_bundle.write(tmp_path_factory.mktemp("programmed") / "programmed.smoe")


@pytest.fixture(scope="session")
def compiled(golden: Path, tmp_path_factory) -> Path:
    """The golden bundle with a program. Read only."""
    pytest.importorskip("onnx", reason="a program is compiled by prep, which needs its extra")
    from smoe.prep.add import add_program
    from smoe.prep.progress import Progress

    bundle = Path(shutil.copytree(golden, tmp_path_factory.mktemp("compiled") / "compiled.smoe"))
    add_program(bundle, Progress(True))
    return bundle


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    """The golden bundle, to be damaged."""
    return Path(shutil.copytree(golden, tmp_path / "copied.smoe"))
