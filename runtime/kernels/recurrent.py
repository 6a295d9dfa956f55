"""What a sequence carries from token to token: the specification of native/recurrent.h in NumPy,
bit for bit. Both take rows of one sequence and replace its state."""

from __future__ import annotations

import numpy as np

_F = np.float32


def delta_rule(
    state: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
    beta: np.ndarray,
) -> np.ndarray:
    """The gated delta rule (arXiv:2412.06464): `state` `[h, d, e]`, q and k `[rows, h, d]`, v
    `[rows, h, e]`, decay `[rows, h]` or `[rows, h, d]` and beta `[rows, h]`, all float32, to what
    queries find, `[rows, h, e]`.

    Of every row, in turn: S *= decay; c = (v - sum of k[i] S[i]) * beta; S[i] += k[i] c; y = sum of
    q[i] S[i]. Sums begin with 0 and go over i, rising."""
    y = np.empty_like(v)
    factors = decay.reshape(*decay.shape[:2], -1, 1)
    for r in range(len(q)):
        state *= factors[r]
        change = (v[r] - _sum(state, k[r])) * beta[r][:, None]
        state += k[r][:, :, None] * change[:, None]
        y[r] = _sum(state, q[r])
    return y


def _sum(state: np.ndarray, x: np.ndarray) -> np.ndarray:
    total = np.zeros((state.shape[0], state.shape[2]), _F)
    for i in range(state.shape[1]):
        total += state[:, i] * x[:, i, None]
    return total


def convolution(
    state: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """A convolution along the tokens, each number for itself: `state` `[tokens, c]` has the last x
    of before, oldest first; x `[rows, c]`, weight `[n, c]` whose last is that of the row itself,
    bias `[c]`, all float32, to `[rows, c]`.

    Products add up from the oldest to the newest, then the bias."""
    taps, rows = len(weight), len(x)
    all_ = np.concatenate([state, x])
    first = len(state) + 1 - taps
    y = all_[first : first + rows] * weight[0]
    for tap in range(1, taps):
        y = y + all_[first + tap : first + tap + rows] * weight[tap]
    state[...] = all_[rows:]
    return y if bias is None else y + bias
