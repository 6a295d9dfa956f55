"""Codes for the nested encoding that keep the experts' outputs, at every level, on calibration
text.

What is minimised is |X (W - W_n)^T|^2 over the tokens routed to an expert, weighted by their mixing
weights, for every level n at once. Columns are decided one after another, and each column's error
is made up for by the columns that are still free (OBQ and GPTQ: arXiv 2208.11580 and 2210.17323);
then all are decided again, a few times, now that the others are known (coordinate descent, as
QuantEase: arXiv 2309.01885). Two things are new here: every level has an error of its own to make
up for, so each keeps its own running copy of W; and a code, which fixes a value at every level, is
chosen for all of them together. D2MoE's MWQ (Wang et al., MobiCom 2025) compensates per block and
fits each plane to what the planes before left over.

A group of columns that share a scale is a block: what all other columns want of it is one product,
and within it columns go one by one (columns.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from smoe.artifacts.nested import Split
from smoe.prep.pack.columns import Grid, best_scales, choose_columns

# Of the mean diagonal, added to it: what was not seen in calibration must not be thought free.
DAMPING = 0.1
# Tokens of the layer at large that every expert sees besides its own, however many those are.
OWN = 64
# How much more the base level and the full one weigh than those between (docs/log.md).
BASE, FULL = 4.0, 2.0
PASSES = 4  # over all columns, once each has a code
CANDIDATES = 9  # scales tried for a group
SHOWN = 256  # rows of a matrix that its loss is measured on


@dataclass(frozen=True)
class Quantised:
    """codes uint8 `[E, n_out, n_in]`, scale float32 `[E, n_out, groups]` (values of bfloat16);
    rest float32 `[levels, E, n_out, n_in]`, what each level leaves over, where the weights were;
    error float64 `[levels]`: the share of the output's second moment that is lost at each level,
    on the calibration tokens."""

    codes: np.ndarray
    scale: np.ndarray
    rest: torch.Tensor
    error: np.ndarray


def shares(weights: torch.Tensor, common: int) -> torch.Tensor:
    """How much each token counts in an expert's moments: its own, with mixing weights `[n]`, and
    `common` tokens of the layer at large, which count as `OWN` tokens of mean weight, so that an
    expert that few or no tokens reached still gets a moment of full rank. Roots, `[n + common]`:
    of tokens times these, the products sum up to a mean."""
    mean = weights.square().mean() if len(weights) else weights.new_ones(())
    of_layer = (mean * OWN / max(1, common)).expand(common)
    each = torch.cat([weights.square(), of_layer])
    return (each / each.sum()).sqrt()


def second_moment(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Of tokens `x` `[n, k]` with `shares` `[n]`: `[k, k]`."""
    own = x * share[:, None]
    return own.T @ own


def made_up_for(w: torch.Tensor, moment: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The weights that do with damaged inputs what `w` `[.., n_out, n_in]` does with the right
    ones, best in the least squares: `moment` `[.., n_in, n_in]` is of the damaged inputs, `wanted`
    that of the right ones with them, E[right damaged^T]."""
    damping = _damping(moment)
    lower = torch.linalg.cholesky(moment + damping)
    return torch.cholesky_solve((w @ (wanted + damping)).mT, lower).mT


def quantise(
    w: torch.Tensor,
    moment: torch.Tensor,
    split: Split,
    group: int,
    base: float = BASE,
    full: float = FULL,
) -> Quantised:
    """Codes and scales of `w` float32 `[levels, E, n_out, n_in]`, what each level should come to,
    for second moments of its inputs `[levels, E, n_in, n_in]`; of either there may be one for all
    levels. `base` and `full` weigh those levels.

    Runs where its arguments are, and takes about three times the memory of `w` per level.
    """
    grid, damped = Grid.of(split, w.device, base, full), moment + _damping(moment)
    found = _forecast(grid, w, damped, group)
    for _ in range(PASSES):
        _again(grid, w, damped, group, found)
    lost = _lost(w, moment, found.rest)
    return Quantised(found.codes.cpu().numpy(), found.scale.cpu().numpy(), found.rest, lost)


@dataclass(frozen=True)
class _Found:
    """What there is so far: codes, scales, and what every level leaves over of the weights."""

    codes: torch.Tensor
    scale: torch.Tensor
    rest: torch.Tensor  # [levels, E, n_out, n_in]

    @classmethod
    def nothing(cls, grid: Grid, w: torch.Tensor, group: int) -> _Found:
        return cls(
            torch.zeros(w.shape[1:], dtype=torch.uint8, device=w.device),
            torch.zeros(*w.shape[1:3], -(-w.shape[3] // group), device=w.device),
            torch.zeros(len(grid.bits), *w.shape[1:], device=w.device),
        )


def _forecast(grid: Grid, w: torch.Tensor, moment: torch.Tensor, group: int) -> _Found:
    """A code for every column: what it misses, the columns after it will make up for."""
    found = _Found.nothing(grid, w, group)
    missed = torch.zeros_like(found.rest)
    factor = inverse_factor(moment)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    along = -factor / diagonal[..., None]
    for g, (start, end) in enumerate(_groups(w, group)):
        here = slice(start, end)
        target = w[..., here] + missed[..., :start] @ along[..., :start, here]
        importance = diagonal[..., here].square().reciprocal()
        scale = best_scales(grid, target, importance, _tried(grid, target[-1]))
        codes, missed[..., here] = choose_columns(grid, target, None, along[..., here, here], scale)
        found.rest[..., here] = w[..., here] - grid.look_up(codes) * scale[..., None]
        found.codes[..., here], found.scale[..., g] = codes, scale
    return found


def _again(grid: Grid, w: torch.Tensor, moment: torch.Tensor, group: int, found: _Found) -> None:
    """Every group's scale and codes once more, in place, now that all the others are known: what it
    has to make up for is then exact and not a forecast."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)[..., None, :]
    for g, (start, end) in enumerate(_groups(w, group)):
        here = slice(start, end)
        inner, own = moment[..., here, here], diagonal[..., here]
        before = w[..., here] - found.rest[..., here]
        pull = found.rest @ moment[..., here]  # how each level's error acts on these columns
        acted = before @ inner
        scale = _fitted(grid, found.scale[..., g], before, pull, acted)
        more = torch.where(scale > 0, scale / found.scale[..., g] - 1, 0)[..., None]
        before += before * more
        target = before + (pull - acted * more) / own
        codes, moved = choose_columns(grid, target, before, inner / own, scale)
        found.codes[..., here], found.scale[..., g] = codes, scale
        found.rest[..., here] = w[..., here] - before + moved


def _fitted(
    grid: Grid, scale: torch.Tensor, values: torch.Tensor, pull: torch.Tensor, acted: torch.Tensor
) -> torch.Tensor:
    """The scales `[E, n_out]` with the least cost for a group's codes: `values` act as `acted` says
    and are pulled by what is left over. Values of bfloat16."""
    fitted = scale * (
        1 + grid.weighed((values * pull).sum(-1)) / grid.weighed((values * acted).sum(-1))
    )
    usable = fitted.isfinite() & (fitted > 0.5 * scale) & (fitted < 2 * scale)
    return torch.where(usable, fitted, scale).bfloat16().float()


def _groups(w: torch.Tensor, group: int) -> Iterator[tuple[int, int]]:
    """The first column of each group, and the one after its last."""
    for start in range(0, w.shape[-1], group):
        yield start, min(start + group, w.shape[-1])


def _damping(moment: torch.Tensor) -> torch.Tensor:
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(moment.shape[-1], device=moment.device)
    return eye * (DAMPING * mean + 1e-12)[..., None, None]


def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse of moments `[.., n_in, n_in]`, U^T U: row j says
    how column j's error is made up for by later ones. It is the inverse of the factor that the
    moment has when its columns are counted from the last."""
    upper = torch.linalg.cholesky(moment.flip(-1, -2)).flip(-1, -2)
    eye = torch.eye(moment.shape[-1], device=moment.device)
    return torch.linalg.solve_triangular(upper, eye.expand_as(moment), upper=True)


def _tried(grid: Grid, full: torch.Tensor) -> torch.Tensor:
    """Scales to try for a group that should be `full` `[E, n_out, k]` at the full level: `[n, E,
    n_out]`, values of bfloat16."""
    if grid.bits[-1] <= 4:
        middle, around = full.square().mean(-1).sqrt(), np.linspace(1.8, 3.0, CANDIDATES)
    else:
        middle, around = full.abs().amax(-1), np.linspace(0.7, 1.1, CANDIDATES)
    tried = torch.stack([middle * (k / grid.outermost) for k in around.tolist()])
    return tried.bfloat16().float()


def _lost(w: torch.Tensor, moment: torch.Tensor, rest: torch.Tensor) -> np.ndarray:
    """Per level, the second moment of the output's error over that of the output, of so many rows
    that people can go by it: float64 `[levels]`."""
    apart = max(1, w.shape[-2] // SHOWN)

    def energy(v: torch.Tensor) -> torch.Tensor:
        rows = v[..., ::apart, :]
        return ((rows @ moment) * rows).sum((-1, -2, -3), dtype=torch.float64)

    return (energy(rest) / energy(w).clamp(min=1e-300)).cpu().numpy()
