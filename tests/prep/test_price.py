"""Prices against brute force: autograd through transformers' own model, loops, and measured KL
divergence."""

import threading

import numpy as np
import pytest
import torch

from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import expert_outputs, experts_run_by, mixed_outputs
from smoe.prep.errors import PrepError
from smoe.prep.pack.pack import pack
from smoe.prep.prices.price import DRAWS, Packed, Prices, products
from smoe.prep.prices.sums import PRIOR, PriceSums
from smoe.prep.progress import Progress
from smoe.prep.sweep import gradients
from smoe.prep.sweep.forward import sweep
from smoe.prep.sweep.gradients import Backward

QUIET = Progress(quiet=True)
ROWS = np.random.default_rng(0).integers(3, 211, (3, 20))


class Watch:
    """Keeps what it is shown."""

    name = "watch"

    def __init__(self, do=lambda at: None):
        self.at, self._do = {}, do

    def visit(self, at):
        self._do(at)
        self.at[at.layer] = at
        return {}

    def resume(self, at, known):
        self.at[at.layer] = at

    def finish(self):
        return []


def _swept(checkpoint, rows, draws):
    watch = Watch()
    backward = Backward(checkpoint, rows, draws, 0, [watch])
    sweep(checkpoint, [], [], backward=backward)
    assert not backward.refusal
    return watch.at


def _prices(checkpoint, rows, seed, packed):
    prices = Prices(checkpoint, packed)
    backward = Backward(checkpoint, rows, DRAWS, seed, [prices])
    sweep(checkpoint, [], [], backward=backward)
    assert not backward.refusal
    return prices.sums


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "jamba"])
def test_gradients_are_those_of_transformers_own_model(make, checkpoints, family):
    checkpoint, model = open_checkpoint(checkpoints(family)), make(family)
    found = _swept(checkpoint, ROWS, 2)
    modules, outputs = dict(model.named_modules()), []
    for name, _ in checkpoint.layers:
        modules[name].register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(torch.from_numpy(ROWS), use_cache=False).logits
    assert list(found) == [1, 0][-len(outputs) :]
    for draw in range(2):
        random, total = torch.Generator().manual_seed(draw), 0
        for row in logits:
            labels = torch.multinomial(row.detach().softmax(-1), 1, generator=random)
            total = total + row.log_softmax(-1).gather(-1, labels).sum()
        for layer, wanted in enumerate(torch.autograd.grad(total, outputs, retain_graph=True)):
            assert torch.allclose(
                found[layer].gradients[draw],
                wanted.reshape(-1, 64),
                atol=1e-5 * float(wanted.abs().max()),
            )


def test_a_small_change_costs_what_the_gradients_say(checkpoints):
    """KL divergence of a real run against half the second moment: nothing of ours is on the
    measured side."""
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    rows, draws = ROWS[:2], 160
    found = _swept(checkpoint, rows, draws)
    ratios = []
    for layer in (0, 1):
        for seed in range(4):
            change = (
                torch.randn(rows.size, 64, generator=torch.Generator().manual_seed(seed)) * 2e-3
            )
            predicted = float(
                torch.einsum("dth,th->d", found[layer].gradients, change).square().mean() / 2
            )
            ratios.append(predicted / _kl(checkpoint, rows, layer, change))
    assert 0.8 < np.mean(ratios) < 1.25 and min(ratios) > 0.6 and max(ratios) < 1.6, ratios


@torch.no_grad()
def _kl(checkpoint, rows, changed, change):
    """KL divergence in nats, summed over all positions, when `change` is added to the output of
    layer `changed`."""

    def run(by):
        def experts(layer, module, hidden, ids, weights):
            with checkpoint.experts(layer) as loaded:
                mixed, _ = mixed_outputs(loaded, hidden.reshape(-1, hidden.shape[-1]), ids, weights)
            return (mixed + (by if layer == changed else 0)).reshape(hidden.shape)

        with experts_run_by(checkpoint.model, checkpoint.layers, experts):
            return (
                checkpoint.model(torch.from_numpy(rows), use_cache=False)
                .logits.double()
                .log_softmax(-1)
            )

    p, q = run(0), run(change)
    return float((p.exp() * (p - q)).sum())


def test_the_sums_are_those_of_loops():
    random = np.random.default_rng(0)
    found, active = (
        random.standard_normal((3, 30, 4)).astype(np.float32),
        random.random((30, 4)) < 0.4,
    )
    sums = PriceSums.zeros(4, 2)
    sums.add(found[:, :11], active[:11])
    other = PriceSums.zeros(4, 2)
    other.add(found[:, 11:], active[11:])
    errors, packed = random.standard_normal((3, 5, 2)), random.standard_normal((3, 5))
    other.add_levels(1, errors, packed)
    sums = sums.merge(other)
    for e in range(4):
        tokens = np.flatnonzero(active[:, e])
        assert sums.sampled[e] == len(tokens)
        for s in range(4):
            cross = (
                sum(float(found[d, t, e]) * float(found[d, t, s]) for d in range(3) for t in tokens)
                / 3
            )
            square = sum(float(found[d, t, s]) ** 2 for d in range(3) for t in tokens) / 3
            assert np.isclose(sums.cross[e, s], cross) and np.isclose(sums.square[e, s], square)
    assert np.isclose(
        sums.level[1, 0], sum(errors[d, n, 0] ** 2 for d in range(3) for n in range(5)) / 3
    )
    assert np.isclose(sums.packed[1], np.square(packed).sum() / 3)


def test_tables_are_means_drawn_towards_the_layer():
    random = np.random.default_rng(1)
    found = (random.standard_normal((2, 4000, 3)) * [1, 2, 0.01]).astype(np.float32)
    active = np.stack([np.ones(4000, bool), random.random(4000) < 0.5, np.zeros(4000, bool)], 1)
    sums = PriceSums.zeros(3, 2)
    sums.add(found, active)
    for expert in (0, 1):
        n = int(active[:, expert].sum())
        sums.add_levels(expert, np.full((2, n, 2), [0.5 + expert, 0]), np.zeros((2, n)))
    tables = sums.tables()
    # No token reached the last one, which is silent where others work: its own moments are those of
    # the layer's slots.
    assert np.allclose(np.diag(tables["price_standin"]), [1, 4, 2], rtol=0.1)
    assert np.allclose(
        tables["price_level"],
        [[0.25, 0], [2.25, 0], [(0.25 * 4000 + 2.25 * 2000) / 6000, 0]],
        rtol=0.05,
    )
    assert tables["price_standin"][0, 2] < 0.01, "as a stand-in it is as silent as it was"
    assert np.array_equal(np.diag(tables["price_standin"]), np.diag(tables["price_cross"]))
    only = np.square(found[..., 0].astype(np.float64)).mean()
    assert np.isclose(tables["price_standin"][0, 0], only, rtol=2 * PRIOR / 4000)


@pytest.mark.parametrize(
    "family, encoding", [("qwen3_moe", "nested:2+1+1:32"), ("gpt_oss", "int8"), ("zaya", "f32")]
)
def test_prices_of_a_checkpoint_are_those_of_loops(checkpoints, tmp_path, family, encoding):
    checkpoint = open_checkpoint(checkpoints(family))
    packed = Packed(pack(checkpoint, tmp_path, encoding, QUIET), tmp_path)
    sums = _prices(checkpoint, ROWS, 0, packed)
    found = _swept(checkpoint, ROWS, 4)
    for layer, at in found.items():
        with checkpoint.experts(layer) as module, torch.no_grad():
            assert np.array_equal(products(at), products(at))
            for e in range(len(sums[layer].sampled)):
                routed = (at.ids == e).any(-1)
                g, x = at.gradients[:, routed].double(), at.hidden[routed]
                own = (g * expert_outputs(module, e, x)).sum(-1)
                for s in range(len(sums[layer].sampled)):
                    other = (g * expert_outputs(module, s, x)).sum(-1)
                    scale = float(other.square().sum() + own.square().sum()) + 1e-12
                    assert (
                        abs(sums[layer].cross[e, s] - float((own * other).sum()) / 4) < 1e-4 * scale
                    )
                    assert (
                        abs(sums[layer].square[e, s] - float(other.square().sum()) / 4)
                        < 1e-4 * scale
                    )
        size = np.diag(sums[layer].square).sum()
        share = sums[layer].level.sum(0) / size
        assert share[-1] == 0 and np.all(np.diff(share) <= 0)
        if encoding.startswith("nested"):
            assert 1 > share[0] > 2 * share[1] > 0
        assert (
            sums[layer].packed.sum() / size
            < {"f32": 1e-9, "int8": 1e-3, "nested:2+1+1:32": 0.05}[encoding]
        )


def test_gradients_are_the_same_when_what_is_saved_for_them_lies_in_a_file(
    checkpoints, tmp_path, monkeypatch
):
    in_memory = _swept(open_checkpoint(checkpoints("mixtral")), ROWS, 2)
    monkeypatch.setattr(gradients, "IN_MEMORY", 0)
    monkeypatch.setattr(gradients, "SMALL", 0)
    in_file = _swept(open_checkpoint(checkpoints("mixtral")), ROWS, 2)
    for layer, at in in_memory.items():
        assert torch.equal(at.gradients, in_file[layer].gradients)
        assert torch.equal(at.hidden, in_file[layer].hidden)


def test_experts_are_let_go_on_the_way_back(checkpoints):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    _prices(checkpoint, ROWS, 3, None)
    assert all(weight.is_meta for _, module in checkpoint.layers for weight in module.parameters())


def test_what_fails_on_the_way_back_is_raised_and_no_thread_stays(checkpoints):
    def fails(at):
        raise KeyError("stop")

    before = threading.active_count()
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    with pytest.raises(KeyError, match="stop"):
        sweep(checkpoint, [], [], backward=Backward(checkpoint, ROWS, 3, 0, [Watch(fails)]))
    with pytest.raises(KeyError, match="stop"):
        sweep(checkpoint, list(ROWS), [Watch(fails)])
    assert threading.active_count() == before


def test_a_model_that_cannot_be_differentiated_is_swept_without_gradients(checkpoints):
    """A block under no_grad: autograd's RuntimeError is a reason for no prices, not a traceback."""
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    block = checkpoint.model.model.layers[1]
    plain = block.forward
    block.forward = lambda *args, **kwargs: torch.no_grad()(plain)(*args, **kwargs)
    backward, watch = Backward(checkpoint, ROWS, 2, 0, [Watch()]), Watch()
    sweep(checkpoint, list(ROWS), [watch], backward=backward)
    assert backward.refusal and list(watch.at) == [0, 1]


@pytest.mark.parametrize("under_autograd", [False, True])
def test_too_little_memory_is_no_reason_for_a_bundle_without_prices(checkpoints, under_autograd):
    """An accelerator that is full half-way is a sentence, under autograd too."""
    checkpoint = open_checkpoint(checkpoints("mixtral"))

    def full(module, given):
        if torch.is_grad_enabled() == under_autograd:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    checkpoint.model.lm_head.register_forward_pre_hook(full)
    backward = Backward(checkpoint, ROWS, 2, 0, [Watch()])
    with pytest.raises(PrepError, match="--device cpu has too little memory .CUDA out.*GiB.."):
        sweep(checkpoint, list(ROWS), [], backward=backward)


def test_an_unreadable_weight_is_no_reason_for_a_bundle_without_prices(checkpoints):
    """Only a model without gradients is built without prices; whatever else fails, fails."""
    checkpoint = open_checkpoint(checkpoints("mixtral"))

    def fails(at):
        raise PrepError("model.safetensors became unreadable")

    with pytest.raises(PrepError, match="became unreadable"):
        sweep(checkpoint, [], [], backward=Backward(checkpoint, ROWS, 2, 0, [Watch(fails)]))


def test_neither_grad_mode_nor_experts_implementation_leaks_out_of_a_sweep(checkpoints):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    before = checkpoint.model.get_experts_implementation()
    topk, method = torch.topk, torch.Tensor.topk
    seen = []

    def stop(at):
        seen.append((torch.topk is topk, torch.Tensor.topk is method))
        raise KeyError("stop")

    with pytest.raises(KeyError):
        sweep(checkpoint, list(ROWS), [Watch(stop)])
    assert seen == [(True, True)], "no function of torch is replaced, not even meanwhile"
    assert torch.is_grad_enabled() and checkpoint.model.get_experts_implementation() == before
