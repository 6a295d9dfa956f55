"""Price tables of random moments."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from smoe.artifacts import open_bundle, safetensors_file
from smoe.artifacts.tables import load_tables, save_tables


def price_tables(
    random: np.random.Generator, experts: int, levels: int, size: float = 1e-2
) -> dict[str, np.ndarray]:
    """Those of one layer, whose moments are those of random products, so that every quadratic form
    is one."""
    products = random.standard_normal((experts, 30, experts)) * np.sqrt(size)
    cross = np.stack([(products[e, :, [e]].T * products[e]).mean(0) for e in range(experts)])
    level = np.sort(random.random((experts, levels)), 1)[:, ::-1] * size
    level[:, -1] = 0
    fit = np.array([[1.1, 0.002], [0.9, 0.003], [1.0, 0.001]])
    tables = {"cross": cross, "standin": np.square(products).mean(1), "level": level, "fit": fit}
    return {f"price_{name}": table.astype(np.float32) for name, table in tables.items()}


def add_prices(bundle: Path, out: Path) -> Path:
    """A copy of `bundle` at `out`, with prices."""
    shutil.copytree(bundle, out)
    opened, file = open_bundle(out), out / "tables.safetensors"
    manifest, random = opened.manifest, np.random.default_rng(0)
    experts = [layer.experts for layer in manifest.layers]
    save_tables(
        file,
        [
            tables | price_tables(random, count, opened.levels)
            for count, tables in zip(experts, load_tables(file, experts), strict=True)
        ],
        safetensors_file.read_header(file).metadata,
    )
    entry = dataclasses.replace(manifest.files["tables.safetensors"], size=file.stat().st_size)
    files = manifest.files | {"tables.safetensors": entry}
    (out / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    return out
