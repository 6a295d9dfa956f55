"""What the codes of a split stand for at every level, and codes for a block of columns, one column
after another: in native code where there is some, on a CPU, and in torch anywhere.

A code fixes a value at every level, so it is chosen for all of them together, weighed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from smoe.artifacts.nested import Split, level_weight
from smoe.prep.pack.compiled import native


@dataclass(frozen=True)
class Grid:
    """A split's values per level, rising, float32 `[2**bits]`, the edges between neighbours, the
    bits, and how much each level counts, float32 `[levels]`."""

    values: list[torch.Tensor]
    edges: list[torch.Tensor]
    bits: list[int]
    weights: torch.Tensor
    outermost: int

    @classmethod
    def of(cls, split: Split, device: torch.device, base: float, full: float) -> Grid:
        """The grid of `split`, on `device`. The base level and the full one weigh `base` and `full`
        times as much as those between."""
        levels = range(1, len(split.planes) + 1)
        values = [torch.from_numpy(split.values(n).astype(np.float32)).to(device) for n in levels]
        extra = {1: base, len(split.planes): full}
        weights = [level_weight(split, n) * extra.get(n, 1.0) for n in levels]
        edges = [(v[1:] + v[:-1]) / 2 for v in values]
        bits = [split.bits(n) for n in levels]
        return cls(values, edges, bits, torch.tensor(weights, device=device), split.outermost)

    def look_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Values at every level, `[levels, *codes.shape]`, of full codes."""
        shifted = (codes.int() >> (self.bits[-1] - bits) for bits in self.bits)
        return torch.stack(
            [values[code] for values, code in zip(self.values, shifted, strict=True)]
        )

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        """The best of a few full codes for `x` `[levels, ..]`, which wants each level somewhere
        else: the nearest at the full level, and the nearest to it among those that are right for a
        lower one."""
        nearest = [torch.bucketize(x[n].contiguous(), edges) for n, edges in enumerate(self.edges)]
        total, codes = self.bits[-1], [nearest[-1]]
        for bits, prefix in zip(self.bits[:-1], nearest[:-1], strict=True):
            cell = prefix << (total - bits)
            codes.append(torch.clamp(nearest[-1], cell, cell + (1 << (total - bits)) - 1))
        candidates = torch.stack(codes)
        off = (x[:, None] - self.look_up(candidates)).square()
        return candidates.gather(0, self.weighed(off).argmin(0, keepdim=True))[0]

    def weighed(self, of_levels: torch.Tensor) -> torch.Tensor:
        """The weighted sum over the levels of `[levels, ..]`."""
        return (of_levels * self.weights.reshape(-1, *[1] * (of_levels.dim() - 1))).sum(0)


def choose_columns(
    grid: Grid,
    target: torch.Tensor,
    before: torch.Tensor | None,
    along: torch.Tensor,
    scale: torch.Tensor,
    variant: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 `[E, n_out, k]` for k columns that should be `target` float32 `[levels, E, n_out,
    k]`, with `scale` `[E, n_out]`; and by how much each moves, shaped as the targets: what it was
    `before` (where there is nothing, its target) less its new value.

    What a column moves, times its row of `along` `[levels or 1, E, k, k]`, is added to the targets
    of the columns after it. `variant` names an instruction set of `native.variants()`, all of which
    give the same; "" is the best.
    """
    if native is None or target.device.type != "cpu":
        return choose_columns_in_torch(grid, target, before, along, scale)
    codes = torch.empty(target.shape[1:], dtype=torch.uint8)
    moved = target.clone(memory_format=torch.contiguous_format)
    native.choose_columns(
        variant,
        [v.numpy() for v in grid.values],
        [e.numpy() for e in grid.edges],
        grid.weights.tolist(),
        moved.numpy(),
        None if before is None else before.contiguous().numpy(),
        along.contiguous().numpy(),
        scale.contiguous().numpy(),
        codes.numpy(),
        torch.get_num_threads(),
    )
    return codes, moved


def choose_columns_in_torch(
    grid: Grid,
    target: torch.Tensor,
    before: torch.Tensor | None,
    along: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `choose_columns`, which native code follows bit by bit."""
    target, inverse = target.clone(), torch.where(scale > 0, 1 / scale, 0)
    codes = torch.empty(target.shape[1:], dtype=torch.uint8, device=target.device)
    moved = torch.empty_like(target)
    for c in range(target.shape[-1]):
        codes[..., c] = grid.choose(target[..., c] * inverse)
        was = (target if before is None else before)[..., c]
        moved[..., c] = was - grid.look_up(codes[..., c]) * scale
        target[..., c + 1 :] += moved[..., c, None] * along[..., c, None, c + 1 :]
    return codes, moved


def best_scales(
    grid: Grid,
    target: torch.Tensor,
    importance: torch.Tensor,
    tried: torch.Tensor,
    variant: str = "",
) -> torch.Tensor:
    """Of the scales `tried` `[n, E, n_out]` that with which a block of columns, `target` float32
    `[levels, E, n_out, k]`, loses least over all levels when each is rounded at the full one:
    squares that `importance` `[levels or 1, E, k]` weighs. `[E, n_out]`; `variant` as above."""
    if native is None or target.device.type != "cpu":
        return best_scales_in_torch(grid, target, importance, tried)
    best = torch.empty(tried.shape[1:])
    native.best_scales(
        variant,
        [v.numpy() for v in grid.values],
        [e.numpy() for e in grid.edges],
        grid.weights.tolist(),
        target.contiguous().numpy(),
        importance.contiguous().numpy(),
        tried.contiguous().numpy(),
        best.numpy(),
        torch.get_num_threads(),
    )
    return best


def best_scales_in_torch(
    grid: Grid, target: torch.Tensor, importance: torch.Tensor, tried: torch.Tensor
) -> torch.Tensor:
    """The specification of `best_scales`, which native code follows but for the order of sums."""
    best, cost = torch.zeros_like(tried[0]), torch.full_like(tried[0], torch.inf)
    for scale in tried:
        codes = torch.bucketize(target[-1] / scale.clamp(min=1e-38)[..., None], grid.edges[-1])
        off = target - grid.look_up(codes) * scale[..., None]
        total = grid.weighed((off.square() * importance[..., None, :]).sum(-1))
        best = torch.where(total < cost, scale, best)
        cost = torch.minimum(total, cost)
    return best
