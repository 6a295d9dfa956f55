"""One layer's experts as a bundle has them, at every level: what a router of levels chooses
between."""

from __future__ import annotations

import numpy as np
import torch

from smoe.artifacts import Bundle
from smoe.artifacts.encodings import decode_expert
from smoe.prep.checkpoint.seam import ExpertsModule, expert_outputs

Matrices = list[tuple[torch.Tensor, torch.Tensor]]  # first and down (`expert_outputs`), by level


class CoarseExperts:
    """The experts of MoE layer `layer`, decoded to float32 on `device`; biases, norm and activation
    are those of `module`. With `kept` all stay in memory, else each is decoded when it is asked
    for."""

    def __init__(self, bundle: Bundle, layer: int, module: ExpertsModule, device: str, kept: bool):
        self._shape = bundle.manifest.expert_shape(layer)
        self._layout, self._encoding = bundle.layouts[layer], bundle.manifest.experts.encoding
        self._levels, self._module, self._device = bundle.levels, module, device
        count = bundle.manifest.layers[layer].experts
        shape = count, self._layout.nbytes
        self._records = np.memmap(bundle.shard(layer), np.uint8, "r", bundle.starts[layer], shape)
        self._matrices = [self._decoded(expert) for expert in range(count)] if kept else None

    def __call__(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Outputs on `x` float32 `[n, H]` at every level, before mixing weights: `[J, n, H]`."""
        matrices = self._matrices[expert] if self._matrices else self._decoded(expert)
        return torch.stack([expert_outputs(self._module, expert, x, *each) for each in matrices])

    def _decoded(self, expert: int) -> Matrices:
        record, levels = np.array(self._records[expert]), range(1, self._levels + 1)
        each = [
            decode_expert(self._shape, self._layout, self._encoding, record, level)
            for level in levels
        ]
        return [(self._tensor(w, "gate", "up"), self._tensor(w, "down")[0]) for w in each]

    def _tensor(self, weights: dict[str, np.ndarray], *names: str) -> torch.Tensor:
        """Those that there are, `[n, rows, columns]`."""
        stacked = np.stack([weights[name] for name in names if name in weights])
        return torch.from_numpy(stacked).to(self._device)
