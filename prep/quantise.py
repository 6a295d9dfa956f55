"""Codes for the nested encoding that keep the experts' outputs, at every level, on calibration text.

What is minimised is |X (W - W_n)^T|^2 over the tokens routed to an expert, weighted by their mixing weights, for every
level n at once. Columns are decided one after another, and each column's error is made up for by the columns that are
still free (OBQ and GPTQ: arXiv 2208.11580 and 2210.17323). Two things are new here: every level has an error of its own
to make up for, so each keeps its own running copy of W; and a code, which fixes a value at every level, is chosen for
all of them together, weighing the levels by `LEVELS`. D2MoE's MWQ (FIELD 2.2) compensates per block and fits each plane
to what the planes before left over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from smoe.artifacts.nested import Split, level_weight

DAMPING = 0.03  # of the mean diagonal, added to it: what was not seen in calibration must not be thought free
BASE = 2.0  # how much more the base level weighs than each of the others
OWN = 64  # tokens of the layer at large that every expert sees besides its own, however many those are
CANDIDATES = 9  # scales tried for a group
BLOCK = 128  # columns after which what they left is passed on to all others


@dataclass(frozen=True)
class Quantised:
    """codes uint8 `[E, n_out, n_in]`, scale float32 `[E, n_out, groups]` (values of bfloat16), error float `[levels]`:
    the share of the output's second moment that is lost at each level, on the calibration tokens."""

    codes: np.ndarray
    scale: np.ndarray
    error: np.ndarray


def second_moment(x: torch.Tensor, weights: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """E[w^2 x x^T] over an expert's tokens `x` `[n, k]` with mixing weights `[n]`, blended with `common` `[m, k]`, tokens
    of the layer at large that count as `OWN` tokens of mean weight: an expert that few or no tokens reached still gets
    a moment of full rank. Float32 `[k, k]`."""
    own = x * weights[:, None]
    mean = weights.square().mean() if len(weights) else torch.ones((), device=x.device)
    total = own.T @ own + common.T @ common * (mean * OWN / max(1, len(common)))
    return total / (len(x) * mean + OWN * mean)


def quantise(w: torch.Tensor, moment: torch.Tensor, split: Split, group: int) -> Quantised:
    """Codes and scales of `w` float32 `[E, n_out, n_in]` for second moments of its inputs `[E, n_in, n_in]`.

    Runs where its arguments are. E matrices are done at once, so that short loops in Python do not dominate.
    """
    levels, (experts, n_out, n_in), grid = len(split.planes), w.shape, _Grid.of(split, w.device)
    moment = moment + _damping(moment)
    # Columns with the largest inputs first, while most others are still free; one order for all experts at once.
    share = moment.diagonal(dim1=1, dim2=2) / moment.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    order = share.argsort(1, descending=True)
    sorted_moment = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None].expand_as(moment))
    factor = _inverse_factor(sorted_moment)
    scale = torch.stack([_best_scale(grid, part, weigh) for part, weigh in zip(
        w.split(group, -1), share[:, None].split(group, -1), strict=True)], -1)  # fmt: skip
    along = order[:, None].expand_as(w)
    scales = scale.repeat_interleave(group, -1)[..., :n_in].gather(2, along)
    rest = w.gather(2, along).expand(levels, *w.shape).clone()  # what each level still has to represent
    codes = torch.zeros(w.shape, dtype=torch.int64, device=w.device)
    for first in range(0, n_in, BLOCK):
        last = min(first + BLOCK, n_in)
        errors = torch.empty(levels, experts, n_out, last - first, device=w.device)
        for column in range(first, last):
            wanted, step = rest[..., column], scales[..., column]
            code = grid.choose(wanted * torch.where(step > 0, 1 / step, 0))
            codes[..., column] = code
            error = (wanted - grid.look_up(code) * step) / factor[:, column, column, None]
            errors[..., column - first] = error
            rest[..., column + 1 : last] -= error[..., None] * factor[:, None, column, column + 1 : last]
        rest[..., last:] -= errors @ factor[:, first:last, last:]
    codes = torch.zeros_like(codes).scatter(2, along, codes)
    lost = _lost(grid, w, codes, scale, moment, group)
    return Quantised(codes.to(torch.uint8).cpu().numpy(), scale.cpu().numpy(), lost)


def _damping(moment: torch.Tensor) -> torch.Tensor:
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)
    return torch.eye(moment.shape[1], device=moment.device) * (DAMPING * mean + 1e-12)[:, None, None]


def _inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse, U^T U: row j says how column j's error is made up for by later ones."""
    lower = torch.linalg.cholesky(moment.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


@dataclass(frozen=True)
class _Grid:
    """A split's values per level, and how much each level counts."""

    values: list[torch.Tensor]
    edges: list[torch.Tensor]  # between neighbours
    bits: list[int]
    weights: list[float]

    @classmethod
    def of(cls, split: Split, device: torch.device) -> _Grid:
        levels = range(1, len(split.planes) + 1)
        values = [torch.from_numpy(split.values(n).astype(np.float32)).to(device) for n in levels]
        weights = [level_weight(split, n) * (BASE if n == 1 else 1) for n in levels]
        return cls(values, [(v[1:] + v[:-1]) / 2 for v in values], [split.bits(n) for n in levels], weights)

    def look_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Values at every level, `[levels, *codes.shape]`."""
        shifted = (codes.int() >> (self.bits[-1] - bits) for bits in self.bits)
        return torch.stack([values[code] for values, code in zip(self.values, shifted, strict=True)])

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        """The best of a few full codes for `x` `[levels, ..]`, which wants each level somewhere else: the nearest at the
        full level, and the nearest to it among those that are right for a lower one."""
        nearest = [torch.bucketize(x[n].contiguous(), edges) for n, edges in enumerate(self.edges)]
        total, codes = self.bits[-1], [nearest[-1]]
        for bits, prefix in zip(self.bits[:-1], nearest[:-1], strict=True):
            cell = prefix << (total - bits)
            codes.append(torch.clamp(nearest[-1], cell, cell + (1 << (total - bits)) - 1))
        candidates = torch.stack(codes)
        return candidates.gather(0, self._cost(x[:, None], candidates).argmin(0, keepdim=True))[0]

    def _cost(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights, device=x.device).reshape(-1, *[1] * codes.dim())
        return ((x - self.look_up(codes)).square() * weights).sum(0)


def _best_scale(grid: _Grid, full: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Scales `[E, n_out]` of a group `full` `[E, n_out, k]`: of a few, that with the least cost at all levels."""
    if grid.bits[-1] <= 4:
        middle, around = full.square().mean(-1).sqrt(), np.linspace(1.8, 3.0, CANDIDATES)
    else:
        middle, around = full.abs().amax(-1), np.linspace(0.7, 1.1, CANDIDATES)
    best, cost = torch.zeros_like(middle), torch.full_like(middle, torch.inf)
    for k in around:
        scale = (middle * (k / 127)).bfloat16().float()
        codes = torch.bucketize(full / scale.clamp(min=1e-38)[..., None], grid.edges[-1])
        error = (full - grid.look_up(codes) * scale[..., None]).square() * importance
        found = (error.sum(-1) * torch.tensor(grid.weights, device=full.device)[:, None, None]).sum(0)
        best, cost = torch.where(found < cost, scale, best), torch.minimum(found, cost)
    return best


def _lost(
    grid: _Grid, w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor, group: int
) -> np.ndarray:
    """Per level, the second moment of the output's error over that of the output: float64 `[levels]`."""
    wide = scale.repeat_interleave(group, -1)[..., : w.shape[-1]]

    def energy(v: torch.Tensor) -> float:
        return float(((v @ moment) * v).sum(dtype=torch.float64))

    whole = energy(w) or 1.0
    return np.array([energy(w - values * wide) / whole for values in grid.look_up(codes)])
