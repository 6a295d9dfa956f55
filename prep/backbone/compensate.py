"""Codes of 4 bits for a matrix of the backbone that keep its output on calibration text.

What is minimised is |X (W - W')^T|^2 over the tokens that the matrix received: columns are decided
one after another, and each column's error is made up for by the columns that are still free (GPTQ:
arXiv 2210.17323). Experts have nested planes, several levels and scales of their own
(pack/quantise.py); here there is one level, whose values are evenly spaced as MatMulNBits wants
them, so that a code is a rounded quotient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from smoe.prep.pack import quantise

# Of the mean diagonal, added to it: what was not seen in calibration must not be thought free.
DAMPING = 0.1
# Scales tried for a block, in units of that which gives its largest weight the lowest code; each
# with both signs, since the lowest code is one further from zero than the highest.
TRIED = tuple(float(sign * part) for sign in (1, -1) for part in np.linspace(0.65, 1.1, 10))
ROWS = 4096  # at once


@dataclass(frozen=True)
class Coded:
    """codes uint8 `[n, blocks, block]` and scale float32 `[n, blocks]`, whose numbers bfloat16
    holds, of rows `[n, k]`, zeros behind the last: value = (code - 2^(bits-1)) * scale."""

    codes: np.ndarray
    scale: np.ndarray
    bits: int

    def values(self, columns: int) -> np.ndarray:
        """What is stored, float32 `[n, columns]`."""
        middle = 1 << (self.bits - 1)
        whole = (self.codes.astype(np.float32) - middle) * self.scale[..., None]
        return whole.reshape(len(whole), -1)[:, :columns]


@torch.no_grad()
def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """`quantise.inverse_factor` of a second moment `[n_in, n_in]` once it is damped."""
    damped = moment.clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-12)
    return quantise.inverse_factor(damped)


@torch.no_grad()
def compensated(w: torch.Tensor, factor: torch.Tensor, bits: int, block: int) -> Coded:
    """Codes of `w` float32 `[n_out, n_in]` in blocks of `block` columns, for the second moment of
    its inputs that `factor` (`inverse_factor`) is of. Runs where its arguments are; a row's codes
    depend on no other row."""
    parts = [_rows(part, factor, 1 << (bits - 1), block) for part in w.float().split(ROWS)]
    codes, scale = (torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True))
    return Coded(codes, scale, bits)


def nearest(rows: np.ndarray, bits: int, block: int) -> Coded:
    """Codes of `rows` float32 `[n, k]` by plain rounding, `ROWS` at once: a vocabulary has 150,000.
    The largest magnitude of a block gets the lowest code, so that none is lost."""
    parts = [_nearest(rows[i : i + ROWS], bits, block) for i in range(0, len(rows), ROWS)]
    codes, scale = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Coded(codes, scale, bits)


def _nearest(rows: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 `[n, blocks, block]` and scales `[n, blocks]` of some rows."""
    n, k = rows.shape
    blocks = -(-k // block)
    padded = np.pad(rows, ((0, 0), (0, blocks * block - k))).reshape(n, blocks, block)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)
    middle = 1 << (bits - 1)
    scale = rounded_up((largest / -middle).astype(np.float32))
    codes = np.rint(padded / np.where(scale == 0, 1, scale)) + middle
    return np.clip(codes, 0, 2 * middle - 1).astype(np.uint8), scale[..., 0]


def _rows(
    w: torch.Tensor, factor: torch.Tensor, middle: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 `[n, blocks, block]` and scales `[n, blocks]` of some rows."""
    n_in = w.shape[1]
    blocks = -(-n_in // block)
    rest = w.T.contiguous()  # what is still to be represented: a column is one run of memory
    codes = torch.zeros(blocks * block, len(w), device=w.device)
    scales = torch.zeros(blocks, len(w), device=w.device)
    for number, first in enumerate(range(0, n_in, block)):
        last = min(first + block, n_in)
        own, mine = factor[first:last, first:last], rest[first:last]
        scale = _best_scale(mine, own.diagonal().square().reciprocal(), middle)
        inverse, errors = _inverse(scale), torch.empty_like(mine)
        for column in range(last - first):
            code = (mine[column] * inverse).round_().clamp_(-middle, middle - 1)
            errors[column] = (mine[column] - code * scale) / own[column, column]
            mine[column + 1 :] -= own[column, column + 1 :, None] * errors[column]
            codes[first + column] = code
        rest[last:] -= factor[first:last, last:].T @ errors
        scales[number] = scale
    whole = (codes + middle).to(torch.uint8).T.reshape(len(w), blocks, block)
    return whole.contiguous(), scales.T.contiguous()


def _best_scale(columns: torch.Tensor, importance: torch.Tensor, middle: int) -> torch.Tensor:
    """Of `TRIED`, the scales `[n]` of a block `[k, n]` with the least error, each column weighed by
    its `importance` `[k]`."""
    largest = columns.abs().amax(0) / middle
    best, cost = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for part in TRIED:
        scale = _rounded_up(largest * part)
        codes = (columns * _inverse(scale)).round_().clamp_(-middle, middle - 1)
        error = importance @ (columns - codes.mul_(scale)).square_()
        best = torch.where(error < cost, scale, best)
        cost = torch.minimum(error, cost)
    return best


def rounded_up(scale: np.ndarray) -> np.ndarray:
    """Float32 numbers to those of bfloat16, away from zero: no weight of a block is then beyond its
    codes."""
    return _rounded_up(torch.from_numpy(scale)).numpy()


def _rounded_up(scale: torch.Tensor) -> torch.Tensor:
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0, 1 / scale)
