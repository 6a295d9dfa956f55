"""Prices: what leaving an expert out, standing in for it, or reading less of it costs in nats, as
second moments.

A sample of the calibration text goes through the model forward and back (`sweep.gradients`); at
every layer all its experts run on all sampled tokens, and what is kept of them is their product
with the gradients. The errors of levels are taken from the shards, computed by the kernels of the
device. What the moments leave out, `calibrate` measures once the bundle can run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts.encodings import encoding_named, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import Experts, Manifest
from smoe.artifacts.shard import shard_start
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import ExpertsModule, expert_geometry, expert_outputs
from smoe.prep.prices.sums import PriceSums
from smoe.prep.statistics.sums import activity
from smoe.prep.sweep.forward import Arrays, AtExperts
from smoe.runtime import kernels

DRAWS = 4  # of labels per position: more draws are cheaper than more tokens, up to about here


@dataclass(frozen=True)
class Packed:
    """Shards that `pack` wrote: `experts` is what they have in common, `directory` holds
    experts/layer-NN.safetensors."""

    experts: Experts
    directory: Path

    @property
    def levels(self) -> int:
        return encoding_named(self.experts.encoding).levels


def sampled(
    rows: list[np.ndarray], tokens: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Which tokens of a text, whose rows lie one after another, prices come from, and which are
    left to be measured on: int64 positions, one array for each row.

    Whole rows are drawn with `seed` until they have `tokens` tokens, at most three quarters of all
    there are. Where the text has one whole row, its first three quarters are drawn.
    """
    ends = np.cumsum([len(row) for row in rows])
    positions = [np.arange(end - len(row), end) for row, end in zip(rows, ends, strict=True)]
    whole = [i for i, row in enumerate(rows) if len(row) == len(rows[0])]
    if len(whole) == 1:
        cut = len(rows[0]) * 3 // 4
        return [positions[0][:cut]], [positions[0][cut:], *positions[1:]]
    count = max(1, min(-(-tokens // len(rows[0])), len(whole) * 3 // 4))
    drawn = set(np.random.default_rng([seed, 1]).permutation(whole)[:count].tolist())
    return (
        [part for i, part in enumerate(positions) if i in drawn],
        [part for i, part in enumerate(positions) if i not in drawn],
    )


class Prices:
    """A visitor of the way back: adds up the moments that prices are made of."""

    name = "prices"

    def __init__(self, checkpoint: Checkpoint, packed: Packed | None):
        """With `packed` the errors of its levels too: a layer's shard must be there by then."""
        levels = packed.levels if packed else 0
        sizes = [expert_geometry(module)[0] for _, module in checkpoint.layers]
        self.sums = [PriceSums.zeros(experts, levels) for experts in sizes]
        self._packed = packed

    def visit(self, at: AtExperts) -> Arrays:
        sums = self.sums[at.layer]
        active = activity(at.ids.cpu().numpy(), len(sums.sampled))
        sums.add(products(at), active)
        if self._packed is not None:
            _add_levels(sums, self._packed, at, active)
        return {}

    def finish(self) -> list[Arrays]:
        return [sums.tables() for sums in self.sums]


@torch.no_grad()
def products(at: AtExperts) -> np.ndarray:
    """g times the output of every expert, for every draw and token: float32 `[draws, T, E]`."""
    assert at.gradients is not None
    experts = expert_geometry(at.module)[0]
    result = np.empty((*at.gradients.shape[:2], experts), np.float32)
    for expert in range(experts):
        y = expert_outputs(at.module, expert, at.hidden)
        for draw, g in enumerate(at.gradients):
            result[draw, :, expert] = (g * y).sum(-1).cpu().numpy()
    return result


@torch.no_grad()
def _add_levels(sums: PriceSums, packed: Packed, at: AtExperts, active: np.ndarray) -> None:
    """The errors of each level of each expert, on the tokens routed to it."""
    assert at.gradients is not None
    outputs = _PackedExperts(packed, at.layer, at.module)
    for expert in np.flatnonzero(active.any(0)).tolist():
        tokens = torch.from_numpy(np.flatnonzero(active[:, expert]))
        x = at.hidden[tokens.to(at.hidden.device)]
        g = at.gradients[:, tokens.to(at.gradients.device)].cpu().numpy()
        by_level = outputs(expert, x.cpu().numpy())
        exact = expert_outputs(at.module, expert, x).cpu().numpy()
        errors = np.einsum("dnh,jnh->dnj", g, by_level - by_level[-1])
        sums.add_levels(expert, errors, np.einsum("dnh,nh->dn", g, by_level[-1] - exact))


class _PackedExperts:
    """The experts of one layer as the device will compute them."""

    def __init__(self, packed: Packed, layer: int, module: ExpertsModule):
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
