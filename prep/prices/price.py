"""Prices: what leaving an expert out, standing in for it, or reading less of it costs in nats, as second moments.

A sample of the calibration text goes through the model forward and back (`fisher`); at every layer all its experts run
on all sampled tokens, and what is kept of them is their product with the gradients. Where the experts are packed
already, the errors of their levels are taken from the shards, computed by the kernels of the device. What the moments
leave out, `fit` measures once the bundle can run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts import safetensors_file
from smoe.artifacts.encodings import encoding_named, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import Experts, Manifest
from smoe.artifacts.shard import shard_start
from smoe.artifacts.tables import load_tables, save_tables
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry, expert_outputs
from smoe.prep.errors import PrepError
from smoe.prep.prices.sums import PriceSums
from smoe.prep.progress import Progress
from smoe.prep.statistics.sums import activity
from smoe.prep.sweep.gradients import AtExperts, row_bytes, sweep_gradients
from smoe.runtime import kernels

DRAWS = 4  # of labels per position: more draws are cheaper than more tokens, up to about here
TOGETHER = 4096  # tokens whose graph is in memory at once; a larger sample takes two sweeps for each so many,
GRAPH = 800_000_000  # or fewer, so that it takes no more bytes than this, if one row does not


@dataclass(frozen=True)
class Packed:
    """Shards that `pack` wrote: `experts` is what they have in common, `directory` holds experts/layer-NN.safetensors."""

    experts: Experts
    directory: Path

    @property
    def levels(self) -> int:
        return encoding_named(self.experts.encoding).levels


def sampled(rows: list[np.ndarray], tokens: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows `[n, length]` for the prices, drawn with `seed` until they have `tokens` tokens, at most three quarters of all
    there are, and all others."""
    whole = [i for i, row in enumerate(rows) if len(row) == len(rows[0])]
    wanted = max(1, min(-(-tokens // len(rows[0])), len(whole) * 3 // 4))
    drawn = np.sort(np.random.default_rng([seed, 1]).permutation(whole)[:wanted])
    return np.stack([rows[i] for i in drawn]), [
        row for i, row in enumerate(rows) if i not in set(drawn.tolist())
    ]


def add_prices(
    checkpoint: Checkpoint,
    directory: Path,
    rows: np.ndarray,
    seed: int,
    packed: Packed,
    progress: Progress,
) -> str:
    """Put the price tables of `rows` beside the others in `directory`, once. Returns "" or, where the model has none,
    why; a bundle does without."""
    file = directory / "tables.safetensors"
    experts = [expert_geometry(module)[0] for _, module in checkpoint.layers]
    tables = load_tables(file, experts)
    if all("price_cross" in of for of in tables):
        progress.say("price: kept from an earlier run")
        return ""
    try:
        sums = price(checkpoint, rows, seed, packed, progress)
    except PrepError as error:
        return str(error)
    merged = [of | found.tables() for of, found in zip(tables, sums, strict=True)]
    save_tables(file, merged, safetensors_file.read_header(file).metadata)
    return ""


def price(
    checkpoint: Checkpoint, rows: np.ndarray, seed: int, packed: Packed | None, progress: Progress
) -> list[PriceSums]:
    """The sums of every layer over `rows` of token ids int64 `[n, length]`."""
    levels = packed.levels if packed else 0
    sums = [PriceSums.zeros(expert_geometry(module)[0], levels) for _, module in checkpoint.layers]
    at_once = max(1, min(TOGETHER // rows.shape[1], GRAPH // row_bytes(checkpoint, rows[0], DRAWS)))
    groups = np.split(rows, range(at_once, len(rows), at_once))
    count = progress.counter("price", "layers", len(groups) * len(sums))
    done = 0

    def visit(layer: int, module: torch.nn.Module, at: AtExperts) -> None:
        nonlocal done
        active = activity(at.ids.numpy(), len(sums[layer].sampled))
        sums[layer].add(products(module, at), active)
        if packed is not None:
            _add_levels(sums[layer], packed, layer, module, at, active)
        done += 1
        count.done(done)

    for number, group in enumerate(groups):
        sweep_gradients(checkpoint, group, DRAWS, seed + number, visit)
    return sums


@torch.no_grad()
def products(module: torch.nn.Module, at: AtExperts) -> np.ndarray:
    """g times the output of every expert, for every draw and token: float32 `[draws, T, E]`."""
    experts = expert_geometry(module)[0]
    found = np.empty((*at.gradients.shape[:2], experts), np.float32)
    for expert in range(experts):
        y = expert_outputs(module, expert, at.tokens)
        for draw, g in enumerate(at.gradients):
            found[draw, :, expert] = (g * y).sum(-1).numpy()
    return found


@torch.no_grad()
def _add_levels(
    sums: PriceSums,
    packed: Packed,
    layer: int,
    module: torch.nn.Module,
    at: AtExperts,
    active: np.ndarray,
) -> None:
    """The errors of each level of each expert, on the tokens routed to it."""
    outputs = _PackedExperts(packed, layer, module)
    for expert in np.flatnonzero(active.any(0)):
        tokens = torch.from_numpy(np.flatnonzero(active[:, expert]))
        x, g = at.tokens[tokens], at.gradients[:, tokens].numpy()
        by_level = outputs(expert, x.numpy())
        exact = expert_outputs(module, int(expert), x).numpy()
        errors = np.einsum("dnh,jnh->dnj", g, by_level - by_level[-1])
        sums.add_levels(int(expert), errors, np.einsum("dnh,nh->dn", g, by_level[-1] - exact))


class _PackedExperts:
    """The experts of one layer as the device will compute them."""

    def __init__(self, packed: Packed, layer: int, module: torch.nn.Module):
        count, hidden, width = expert_geometry(module)
        common = packed.experts
        shape = ExpertShape(
            hidden, width, common.gate.kind != "plain", common.biased, common.normed
        )
        layout = record_layout(shape, common.encoding, common.page)
        file = packed.directory / Manifest.shard(layer)
        start = shard_start(file, layout, common.page, count)
        self._records = np.memmap(file, np.uint8, "r", start, (count, layout.nbytes))
        self._kernel = kernels.choose().layer(common.gate, shape, common.encoding, layout)
        self._levels = packed.levels

    def __call__(self, expert: int, x: np.ndarray) -> np.ndarray:
        """Outputs on `x` float32 `[n, H]` at every level: float32 `[J, n, H]`."""
        record, slots = np.array(self._records[expert : expert + 1]), np.arange(len(x))
        starts = np.array([0, len(x)])
        by_level = [
            self._kernel(
                record,
                kernels.Work(np.array([0]), np.array([level]), starts, slots),
                np.ascontiguousarray(x),
            )
            for level in range(1, self._levels + 1)
        ]
        return np.stack(by_level)
