"""Fixtures for all tests. Nothing here imports torch: the tests of artifacts and runtime also run
without it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

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


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    """The golden bundle, to be damaged."""
    return Path(shutil.copytree(golden, tmp_path / "copied.smoe"))
