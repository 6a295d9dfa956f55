"""Plain GPTQ, to compare with: one level, a symmetric uniform grid, no second pass."""

from __future__ import annotations

import torch

DAMPING = 0.01  # of the mean diagonal, as GPTQ's `percdamp`
SHRINKS = [1 - step / 50 for step in range(40)]  # of a group's largest magnitude


def gptq(w: torch.Tensor, moment: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The dequantised weights, float32, of `w` float32 `[E, n_out, n_in]` in `bits` bits with a
    float16 scale for every row and `group` columns, given second moments of the inputs `[E, n_in,
    n_in]`.

    Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1, with the choices of its authors' code
    (github.com/IST-DASLab/gptq, `gptq.py` and `quant.py`): columns in their order, a group's grid
    set when its first column is reached, `--sym`, and the scale searched for by the least error of
    rounding (`mse`), by squares here and with a norm of 2.4 there. A column that no input reaches
    is 0, as there.
    """
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)
    eye = torch.eye(w.shape[-1], device=w.device)
    dead = moment.diagonal(dim1=1, dim2=2) == 0
    damped = moment + eye * (DAMPING * mean)[:, None, None] + torch.diag_embed(dead.float())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    rest = torch.where(dead[:, None], 0, w)
    out = torch.empty_like(rest)
    for start in range(0, w.shape[-1], group):
        end = min(start + group, w.shape[-1])
        scale = _scale(rest[..., start:end], bits)
        errors = torch.empty_like(rest[..., start:end])
        for c in range(start, end):
            out[..., c] = _rounded(rest[..., c], scale, bits)
            error = (rest[..., c] - out[..., c]) / factor[:, c, c, None]
            errors[..., c - start] = error
            rest[..., c:end] -= error[..., None] * factor[:, None, c, c:end]
        rest[..., end:] -= errors @ factor[:, start:end, end:]
    return out


def _scale(of: torch.Tensor, bits: int) -> torch.Tensor:
    """The best of a few scales of a group `[E, n_out, k]`, float16 values `[E, n_out]`."""
    largest = of.abs().amax(-1) * (2 / ((1 << bits) - 1))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        scale = (largest * shrink).half().float()
        error = (of - _rounded(of, scale[..., None], bits)).square().sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _rounded(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    return (x / scale.clamp(min=1e-30)).round().clamp(-half, half - 1) * scale
