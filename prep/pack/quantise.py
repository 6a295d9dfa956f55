"""Codes for the nested encoding that keep the experts' outputs, at every level, on calibration
text.

What is minimised is |X (W - W_n)^T|^2 over the tokens routed to an expert, weighted by their mixing
weights, for every level n at once. Columns are decided one after another, and each column's error
is made up for by the columns that are still free (OBQ and GPTQ: arXiv 2208.11580 and 2210.17323).
Two things are new here: every level has an error of its own to make up for, so each keeps its own
running copy of W; and a code, which fixes a value at every level, is chosen for all of them
together, weighing the levels by `BASE` and `FULL`. D2MoE's MWQ (Wang et al., MobiCom 2025)
compensates per block and fits each plane to what the planes before left over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from smoe.artifacts.nested import Split, level_weight

# Of the mean diagonal, added to it: what was not seen in calibration must not be thought free.
DAMPING = 0.1
BASE, FULL = (
    4.0,
    2.0,
)  # how much more the base level and the full one weigh than those between (docs/log.md)
# Tokens of the layer at large that every expert sees besides its own, however many those are.
OWN = 64
PASSES = 4  # over all columns, once each has a code
CANDIDATES = 9  # scales tried for a group


@dataclass(frozen=True)
class Quantised:
    """codes uint8 `[E, n_out, n_in]`, scale float32 `[E, n_out, groups]` (values of bfloat16),
    error float `[levels]`: the share of the output's second moment that is lost at each level, on
    the calibration tokens."""

    codes: np.ndarray
    scale: np.ndarray
    error: np.ndarray


def second_moment(x: torch.Tensor, weights: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """E[w^2 x x^T] over an expert's tokens `x` `[n, k]` with mixing weights `[n]`, blended with
    `common` `[m, k]`, tokens of the layer at large that count as `OWN` tokens of mean weight: an
    expert that few or no tokens reached still gets a moment of full rank. Float32 `[k, k]`."""
    own = x * weights[:, None]
    mean = weights.square().mean() if len(weights) else torch.ones((), device=x.device)
    total = own.T @ own + common.T @ common * (mean * OWN / max(1, len(common)))
    return total / (len(x) * mean + OWN * mean)


def quantise(w: torch.Tensor, moment: torch.Tensor, split: Split, group: int) -> Quantised:
    """Codes and scales of `w` float32 `[E, n_out, n_in]` for second moments of its inputs `[E,
    n_in, n_in]`.

    Runs where its arguments are. E matrices are done at once, so that short loops in Python do not
    dominate.
    """
    levels, (experts, n_out, n_in) = len(split.planes), w.shape
    seen, moment = moment, moment + _damping(moment)
    factor = _inverse_factor(moment)
    rest = w.expand(levels, *w.shape).clone()  # what each level still has to represent
    codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    scales, grid = [], _Grid.of(split, w.device)
    for first in range(0, n_in, group):
        last = min(first + group, n_in)
        importance = factor.diagonal(dim1=1, dim2=2)[:, None, first:last].square().reciprocal()
        scale = _best_scale(grid, rest[..., first:last], importance)
        scales.append(scale)
        errors = torch.empty(levels, experts, n_out, last - first, device=w.device)
        inverse = torch.where(scale > 0, 1 / scale, 0)
        for column in range(first, last):
            target = rest[..., column]
            code = grid.choose(target * inverse)
            codes[..., column] = code
            error = (target - grid.look_up(code) * scale) / factor[:, column, column, None]
            errors[..., column - first] = error
            rest[..., column + 1 : last] -= (
                error[..., None] * factor[:, None, column, column + 1 : last]
            )
        rest[..., last:] -= errors @ factor[:, first:last, last:]
    scale = torch.stack(scales, -1)
    for _ in range(PASSES):
        scale = _fitted_scale(grid, w, moment, codes, scale, group)
        _again(grid, w, moment, codes, scale, group)
    return Quantised(
        codes.cpu().numpy(), scale.cpu().numpy(), _lost(grid, w, codes, scale, seen, group)
    )


def _again(
    grid: _Grid,
    w: torch.Tensor,
    moment: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    group: int,
) -> None:
    """Choose every column's codes again, in place, now that all the others are known (coordinate
    descent, as QuantEase: arXiv 2309.01885): what a column has to make up for is then exact and not
    a forecast."""
    wide = scale.repeat_interleave(group, -1)[..., : w.shape[-1]]
    pull = (
        w - grid.look_up(codes) * wide
    ) @ moment  # how the error of each level acts on every column
    for column in range(w.shape[-1]):
        step, own = wide[..., column], moment[:, column, column, None]
        before = grid.look_up(codes[..., column]) * step
        code = grid.choose((before + pull[..., column] / own) * torch.where(step > 0, 1 / step, 0))
        codes[..., column] = code
        pull -= (grid.look_up(code) * step - before)[..., None] * moment[:, None, column]


def _fitted_scale(
    grid: _Grid,
    w: torch.Tensor,
    moment: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """The scales with the least cost for these codes, all groups of a row together: least squares,
    values of bfloat16."""
    values = grid.look_up(codes)  # [levels, E, n_out, n_in]
    weights = torch.tensor(grid.weights, device=w.device)[:, None, None, None]
    groups = scale.shape[-1]
    matrix = torch.zeros(*scale.shape, groups, device=w.device)
    for g, columns in enumerate(torch.arange(w.shape[-1], device=w.device).split(group)):
        acted = weights * (
            values[..., columns] @ moment[:, columns]
        )  # what one unit of this scale does to the output
        for other, rest in enumerate(torch.arange(w.shape[-1], device=w.device).split(group)):
            matrix[..., g, other] = (acted[..., rest] * values[..., rest]).sum((0, -1))
    target = (weights * values * (w @ moment)).sum(0)
    target = torch.stack([part.sum(-1) for part in target.split(group, -1)], -1)
    tiny = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * 1e-6 + 1e-30
    fitted = torch.linalg.solve(
        matrix + tiny * torch.eye(groups, device=w.device), target[..., None]
    )[..., 0]
    usable = fitted.isfinite() & (fitted > 0.5 * scale) & (fitted < 2 * scale)
    return torch.where(usable, fitted, scale).bfloat16().float()


def _damping(moment: torch.Tensor) -> torch.Tensor:
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)
    return (
        torch.eye(moment.shape[1], device=moment.device) * (DAMPING * mean + 1e-12)[:, None, None]
    )


def _inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse, U^T U: row j says how column j's error is made up
    for by later ones."""
    lower = torch.linalg.cholesky(moment.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


@dataclass(frozen=True)
class _Grid:
    """A split's values per level, and how much each level counts."""

    values: list[torch.Tensor]
    edges: list[torch.Tensor]  # between neighbours
    bits: list[int]
    weights: list[float]
    outermost: int

    @classmethod
    def of(cls, split: Split, device: torch.device) -> _Grid:
        levels = range(1, len(split.planes) + 1)
        values = [torch.from_numpy(split.values(n).astype(np.float32)).to(device) for n in levels]
        extra = {1: BASE, len(split.planes): FULL}
        weights = [level_weight(split, n) * extra.get(n, 1.0) for n in levels]
        edges = [(v[1:] + v[:-1]) / 2 for v in values]
        bits = [split.bits(n) for n in levels]
        return cls(values, edges, bits, weights, split.outermost)

    def look_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Values at every level, `[levels, *codes.shape]`."""
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
        return candidates.gather(0, self._cost(x[:, None], candidates).argmin(0, keepdim=True))[0]

    def _cost(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights, device=x.device).reshape(-1, *[1] * codes.dim())
        return ((x - self.look_up(codes)).square() * weights).sum(0)


def _best_scale(grid: _Grid, rest: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Scales `[E, n_out]` of a group `rest` `[levels, E, n_out, k]`: of a few, that with the least
    cost at all levels."""
    full, total = rest[-1], grid.bits[-1]
    if total <= 4:
        middle, around = full.square().mean(-1).sqrt(), np.linspace(1.8, 3.0, CANDIDATES)
    else:
        middle, around = full.abs().amax(-1), np.linspace(0.7, 1.1, CANDIDATES)
    best, cost = torch.zeros_like(middle), torch.full_like(middle, torch.inf)
    for k in around:
        scale = (middle * (k / grid.outermost)).bfloat16().float()
        codes = torch.bucketize(full / scale.clamp(min=1e-38)[..., None], grid.edges[-1])
        error = (rest - grid.look_up(codes) * scale[..., None]).square() * importance
        candidate_cost = (
            error.sum(-1) * torch.tensor(grid.weights, device=rest.device)[:, None, None]
        ).sum(0)
        best = torch.where(candidate_cost < cost, scale, best)
        cost = torch.minimum(candidate_cost, cost)
    return best


def _lost(
    grid: _Grid,
    w: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    moment: torch.Tensor,
    group: int,
) -> np.ndarray:
    """Per level, the second moment of the output's error over that of the output: float64
    `[levels]`."""
    wide = scale.repeat_interleave(group, -1)[..., : w.shape[-1]]

    def energy(v: torch.Tensor) -> float:
        return float(((v @ moment) * v).sum(dtype=torch.float64))

    whole = energy(w) or 1.0
    return np.array([energy(w - values * wide) / whole for values in grid.look_up(codes)])
