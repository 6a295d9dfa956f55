"""Routers of levels of random weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from smoe.artifacts import open_bundle
from smoe.artifacts.manifest import VERSION
from smoe.artifacts.tables import BITS_FILE, save_bits
from smoe.artifacts.validate import file_at


def add_routers(
    bundle: Path, out: Path, bias: float | None = None, hidden: int | None = None
) -> Path:
    """A copy of `bundle` at `out` with random routers of levels; every bias is `bias`, and their
    weights are for `hidden` channels, if that is given."""
    shutil.copytree(bundle, out)
    opened, random = open_bundle(out), np.random.default_rng(0)
    prices = np.linspace(-4, 4, 33)
    layers = []
    for layer in opened.manifest.layers:
        shape = layer.experts, opened.levels
        biases = random.standard_normal(shape) if bias is None else np.full(shape, bias)
        weights = random.standard_normal((*shape, hidden or layer.hidden)) * 0.1
        layers.append(
            {
                "bits_weight": weights.astype(np.float16),
                "bits_bias": biases.astype(np.float32),
                "bits_mixing": np.array([0.7], np.float32),
                "bits_curve": np.stack([prices, 6.5 - prices / 3], 1).astype(np.float32),
            }
        )
    file = out / BITS_FILE
    save_bits(file, layers, {})
    files = opened.manifest.files | {BITS_FILE: file_at(file)}
    manifest = dataclasses.replace(opened.manifest, version=VERSION, files=files)
    (out / "manifest.json").write_text(manifest.to_json())
    return out
