"""A router of levels while it is trained, and what becomes of it in a bundle."""

from __future__ import annotations

import numpy as np
import torch

from smoe.runtime.choose.bits import LEAST

# What the logarithm of a mixing weight adds for a bit before training: what a level costs goes with
# the weight and with its square.
MIXING = 1.5


class LevelRouter(torch.nn.Module):
    """The routers of one layer's E experts: the logits of J levels, a linear function of what the
    layer's experts receive and of the logarithm of the slot's mixing weight, which says more than
    all that is learnt of the rest.

    Of the weights a part is the same for all experts: what it says of a token (does it matter
    here?) is learnt from all slots, and only the rest from each expert's own. They begin with
    no word of the hidden state, and at experts' `usual` weights `[E]` with the logits `bias` `[E,
    J]`; a level has `bits` `[J]`."""

    def __init__(self, bias: np.ndarray, usual: np.ndarray, bits: np.ndarray, hidden: int):
        super().__init__()
        experts, levels = bias.shape
        bias = bias - MIXING * np.log(np.maximum(usual, LEAST))[:, None] * bits
        self.bits: torch.Tensor
        self.register_buffer("bits", torch.from_numpy(bits.astype(np.float32)))
        self.mixing = torch.nn.Parameter(torch.tensor([MIXING]))
        self.shared = torch.nn.Parameter(torch.zeros(levels, hidden))
        self.own = torch.nn.Parameter(torch.zeros(experts, levels, hidden))
        self.bias = torch.nn.Parameter(torch.from_numpy(bias.astype(np.float32)))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Logits `[T, k, J]` for tokens `x` `[T, H]` with slots of `ids` int64 and `weights` `[T,
        k]`."""
        ids = ids.clamp(max=len(self.bias) - 1)  # no expert, like any
        _, levels, hidden = self.own.shape
        # An embedding's gradients are added up in one order, those of an index in that of threads.
        table = torch.cat([(self.own + self.shared).flatten(1), self.bias], 1)
        rows = torch.nn.functional.embedding(ids, table)
        weight, bias = rows.split([levels * hidden, levels], -1)
        logits = torch.einsum("tkjh,th->tkj", weight.unflatten(-1, (levels, hidden)), x)
        return logits + bias + self._mixed(weights)

    def of_expert(self, expert: int, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The same of one expert: `[n, J]` for tokens `x` `[n, H]` of `weights` `[n]`."""
        logits = x @ (self.own[expert] + self.shared).T + self.bias[expert]
        return logits + self._mixed(weights)

    def _mixed(self, weights: torch.Tensor) -> torch.Tensor:
        return self.mixing * weights.float().clamp(min=LEAST).log()[..., None] * self.bits

    def tables(self) -> dict[str, np.ndarray]:
        """Names and dtypes as in `artifacts.tables.BITS`. What all levels of an expert have in
        common decides nothing, and is taken away."""
        with torch.no_grad():
            weight = (self.own + self.shared).cpu().numpy()
            bias = self.bias.detach().cpu().numpy()
        return {
            "bits_weight": (weight - weight[:, :1]).astype(np.float16),
            "bits_bias": (bias - bias[:, :1]).astype(np.float32),
            "bits_mixing": self.mixing.detach().cpu().numpy(),
        }
