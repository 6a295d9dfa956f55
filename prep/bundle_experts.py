"""A bundle's experts in the place of a `transformers` model's own."""

from __future__ import annotations

import numpy as np
import torch

from smoe.prep.checkpoint.seam import ExpertsModule, Run
from smoe.runtime.alone import ExpertsAlone


def run_by(experts: ExpertsAlone) -> Run:
    """What the seam calls, on whatever device and in whatever dtype the rest of the model is."""

    def mixed(
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        tokens = hidden.detach().reshape(-1, hidden.shape[-1]).float().contiguous().cpu().numpy()
        outputs = experts(
            layer,
            tokens,
            ids.cpu().numpy().astype(np.int64),
            weights.detach().float().cpu().numpy(),
        )
        return torch.from_numpy(outputs).to(hidden).reshape(hidden.shape)

    return mixed
