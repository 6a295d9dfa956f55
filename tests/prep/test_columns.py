"""The quantiser's blocks against the same in NumPy without blocks, and its native code against
torch."""

import numpy as np
import pytest
import torch

from smoe.artifacts import nested
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.prep.pack.columns import (
    Grid,
    best_scales,
    best_scales_in_torch,
    choose_columns,
    choose_columns_in_torch,
)
from smoe.prep.pack.compiled import native
from smoe.prep.pack.quantise import BASE, CANDIDATES, DAMPING, FULL, PASSES, quantise


def _problem(experts, n_out=24, n_in=96, rank=20):
    random = torch.Generator().manual_seed(0)
    w = torch.randn(experts, n_out, n_in, generator=random) * 0.02
    basis = torch.randn(experts, rank, n_in, generator=random)
    noise = torch.randn(experts, 400, n_in, generator=random)
    x = torch.randn(experts, 400, rank, generator=random) @ basis + 0.5 * noise
    return w, x.mT @ x / 400


def _nearest_of_few(x, split, weights):
    """The code for `x` `[levels, rows]` that a level of its own would have, moved as little as
    another level asks, whichever is best for all."""
    levels = range(1, len(split.planes) + 1)
    values = [split.values(n).astype(np.float64) for n in levels]
    apart = [split.total - split.bits(n) for n in levels]
    chosen = []
    for wanted in x.T:
        own = [int(np.abs(v - t).argmin()) for v, t in zip(values, wanted, strict=True)]
        tried = [own[-1]] + [
            min(max(own[-1], o << a), ((o + 1) << a) - 1)
            for o, a in zip(own[:-1], apart[:-1], strict=True)
        ]
        costs = [
            sum(
                k * (t - v[c >> a]) ** 2
                for k, t, v, a in zip(weights, wanted, values, apart, strict=True)
            )
            for c in tried
        ]
        chosen.append(tried[int(np.argmin(costs))])
    return np.array(chosen)


def _column_by_column(w, moment, split, group, weights):
    """The quantiser of one matrix without blocks, in float64: after every column, all others."""
    levels = len(split.planes)
    n = len(moment)
    moment = moment + np.eye(n) * (DAMPING * moment.diagonal().mean() + 1e-12)
    factor = np.linalg.cholesky(np.linalg.inv(moment)).T
    wanted, rest = np.stack([w] * levels), np.stack([w] * levels)
    codes, scale = np.zeros(w.shape, int), np.zeros((len(w), n // group))

    def values(columns):
        stand_for = [
            split.values(k + 1)[codes[:, columns] >> (split.total - split.bits(k + 1))]
            for k in range(levels)
        ]
        return np.stack(stand_for) * scale[:, columns // group]

    def search(block, importance):
        spread = np.sqrt(np.square(block[-1]).mean(-1))
        full, best, least = split.values(levels).astype(float), None, np.inf
        for k in np.linspace(1.8, 3.0, CANDIDATES):
            tried = from_bf16(to_bf16((spread * k / split.outermost).astype(np.float32)))[:, None]
            near = np.abs(block[-1] / tried - full[:, None, None]).argmin(0)
            cost = sum(
                weights[n - 1]
                * np.square(
                    block[n - 1] - tried * split.values(n)[near >> (split.total - split.bits(n))]
                )
                @ importance
                for n in range(1, levels + 1)
            )
            best = tried[:, 0] if best is None else np.where(cost < least, tried[:, 0], best)
            least = np.minimum(cost, least)
        return best

    for c in range(n):
        if c % group == 0:
            importance = 1 / np.square(factor.diagonal()[c : c + group])
            scale[:, c // group] = search(wanted[..., c : c + group], importance)
        codes[:, c] = _nearest_of_few(wanted[..., c] / scale[:, c // group], split, weights)
        rest[..., c] = w[:, c] - values(c)
        missed = (wanted[..., c] - values(c)) / factor[c, c]
        wanted[..., c + 1 :] -= missed[..., None] * factor[c, c + 1 :]
    for _ in range(PASSES):
        for start in range(0, n, group):
            columns = np.arange(start, start + group)
            here = np.stack([values(c) for c in columns], -1)
            pull, acted = (rest @ moment)[..., columns], here @ moment[np.ix_(columns, columns)]
            gain, stiff = (np.tensordot(weights, (here * by).sum(-1), 1) for by in (pull, acted))
            fitted = (scale[:, start // group] * (1 + gain / stiff)).astype(np.float32)
            scale[:, start // group] = from_bf16(to_bf16(fitted))
            rest[..., columns] = w[:, columns] - np.stack([values(c) for c in columns], -1)
            for c in columns:
                target = values(c) + rest @ moment[:, c] / moment[c, c]
                codes[:, c] = _nearest_of_few(target / scale[:, start // group], split, weights)
                rest[..., c] = w[:, c] - values(c)
    return codes, scale


@pytest.mark.parametrize("name", ["nested:2+1+1:32", "nested:3+1:32"])
def test_blocks_choose_what_one_column_after_another_would(name):
    encoding = nested.parse(name)
    w, moment = _problem(2)
    found = quantise(w[None], moment[None], encoding.split, encoding.group)
    weights = Grid.of(encoding.split, w.device, BASE, FULL).weights.double().numpy()
    for expert in range(2):
        codes, scale = _column_by_column(
            w[expert].double().numpy(), moment[expert].double().numpy(), encoding.split, 32, weights
        )
        same = found.codes[expert] == codes  # but where two are as good to the last digit
        assert same.mean() > 0.97 and same.all(1).mean() > 0.9
        assert (found.scale[expert] == scale).mean() > 0.9


def _columns(split, seed=0, experts=2, n_out=37, k=40):
    random = torch.Generator().manual_seed(seed)
    target = torch.randn(len(split.planes), experts, n_out, k, generator=random)
    before = target + 0.1 * torch.randn(target.shape, generator=random)
    along = 0.05 * torch.randn(len(split.planes), experts, k, k, generator=random)
    scale = 0.01 + 0.01 * torch.rand(experts, n_out, generator=random)
    scale[0, 3] = 0
    return target, before, along, scale


@pytest.mark.parametrize("variant", native.variants() if native else [])
@pytest.mark.parametrize("split", [(2, 1, 1), (5, 1, 1, 1), (4,), (2, 1, 1, 1, 1, 1, 1)])
def test_native_columns_are_those_of_torch_bit_by_bit(variant, split):
    grid = Grid.of(nested.Split(split), torch.device("cpu"), BASE, FULL)
    target, before, along, scale = _columns(nested.Split(split))
    for was in (before, None):
        for by, given in ((along, target), (along[:1], target.mT.contiguous().mT)):
            codes, moved = choose_columns(grid, given, was, by, scale, variant)
            wanted, wanted_moved = choose_columns_in_torch(grid, target, was, by, scale)
            assert torch.equal(codes, wanted) and torch.equal(moved, wanted_moved)
    assert not codes[0, 3].sum() or not scale[0, 3]


@pytest.mark.parametrize("variant", native.variants() if native else [])
@pytest.mark.parametrize("split", [(2, 1, 1), (5, 1, 1, 1), (4,)])
def test_native_scales_are_those_of_torch(variant, split):
    grid = Grid.of(nested.Split(split), torch.device("cpu"), BASE, FULL)
    random = torch.Generator().manual_seed(2)
    levels = len(split)
    target = torch.randn(levels, 3, 37, 50, generator=random) * 0.1 + 0.02
    target[:, 1, 5] = 0
    importance = torch.rand(levels, 3, 50, generator=random) + 0.1
    spread = target[-1].square().mean(-1).sqrt() * 3 / grid.outermost
    tried = torch.stack([spread * k for k in (1.3, 0.7, 1.0, 0.8, 0.9)])
    for weighed in (importance, importance[1:2] if levels > 1 else importance):
        wanted = best_scales_in_torch(grid, target, weighed, tried)
        assert torch.equal(best_scales(grid, target, weighed, tried, variant), wanted)
        assert len({int((tried[:, 0, row] == wanted[0, row]).nonzero()) for row in range(37)}) > 1
    nothing = best_scales(grid, target, torch.full_like(importance, torch.nan), tried, variant)
    assert not nothing.any()
