"""A padded model is the same function, and what need not be zero is noise."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import inflate, models
from bench.budgets import budget_for_share
from smoe.artifacts import nested, open_bundle
from smoe.runtime import Engine, EngineError, Policies

HIDDEN, WIDTH = 96, 56  # pico has 64 and 40
ENCODING = nested.parse("nested:2+1+1:128")
IDS = torch.from_numpy(np.random.default_rng(0).integers(3, 211, (2, 40)))


def _model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def _answer(model):
    """Logits, and the ids of every layer's routing."""
    got = model(IDS, output_router_logits=True)
    return got.logits, torch.stack([scores.topk(3, -1).indices for scores in got.router_logits])


def _nearest(model):
    """Experts replaced by what plain rounding to nested planes makes of them."""
    for module in model.modules():
        for name in ("gate_up_proj", "down_proj"):
            if hasattr(getattr(module, name, None), "data") and getattr(module, name).dim() == 3:
                stored = getattr(module, name).data
                for expert in stored:
                    codes, scale = nested.round_matrix(ENCODING, name, expert.numpy())
                    wide = np.repeat(scale, ENCODING.group, 1)[:, : expert.shape[1]]
                    expert.copy_(torch.from_numpy(ENCODING.split.values(3)[codes] * wide))
    return model


@pytest.fixture(scope="module")
def pico(tmp_path_factory, make):
    """A checkpoint in bfloat16, so that storing it loses nothing."""
    path = tmp_path_factory.mktemp("pico") / "small"
    make("qwen3_moe", head_dim=24).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def large(pico):
    inflate.inflate(pico, pico.with_name("large"), HIDDEN, WIDTH)
    return pico.with_name("large")


def test_the_same_function_and_the_same_routing(pico, large):
    (wanted, routed), (found, rerouted) = _answer(_model(pico)), _answer(_model(large))
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch.equal(routed, rerouted)
    config = _model(large).config
    assert (config.hidden_size, config.moe_intermediate_size) == (HIDDEN, WIDTH)


def test_codes_without_a_zero_do_not_wake_what_sleeps(pico, tmp_path):
    """With real channels that fill whole groups, the quantised model is padded too."""
    inflate.inflate(pico, tmp_path / "wide", 128, 128)
    inflate.inflate(tmp_path / "wide", tmp_path / "wider", 384, 256, seed=1)
    (wanted, routed), (found, rerouted) = (
        _answer(_nearest(_model(tmp_path / name))) for name in ("wide", "wider")
    )
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch.equal(routed, rerouted)


def test_groups_that_are_partly_real_stay_silent(pico, large):
    """64 of 96 channels are real: what was added gives exactly zero, quantised or not."""
    for model in (_model(large), _nearest(_model(large))):
        seen = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        _answer(model)
        assert len(seen) == 2
        assert not any(states[..., 64:].any() for states in seen)


def test_no_weight_is_zero_that_need_not_be(pico, tmp_path):
    done = inflate.inflate(pico, tmp_path / "out", 384, 256)
    state = _model(tmp_path / "out").state_dict()
    zeros = [
        sum(int((t == 0).sum()) for t in s.values()) for s in (_model(pico).state_dict(), state)
    ]
    assert zeros[1] - zeros[0] == sum(share.zero for share in done.shares.values())
    silent = {name for name, share in done.shares.items() if share.zero}
    assert silent == {"embed_tokens", "self_attn.o_proj", "up_proj", "down_proj"}
    assert sum(share.weights for share in done.shares.values()) == sum(
        t.numel() for t in state.values()
    )


def test_the_noise_has_the_scale_of_its_tensor(pico, large):
    small, padded = _model(pico).state_dict(), _model(large).state_dict()
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "lm_head.weight",
    ):
        assert padded[name][:, 64:].std() == pytest.approx(float(small[name].std()), rel=0.15), name
        assert torch.equal(padded[name][:, :64], small[name])


def test_what_cannot_be_done_is_said(pico, large, checkpoints):
    with pytest.raises(ValueError, match="can only grow"):
        inflate.inflate(pico, pico.with_name("x"), 32, WIDTH)
    with pytest.raises(ValueError, match="exists"):
        inflate.inflate(pico, large, HIDDEN, WIDTH)
    with pytest.raises(ValueError, match="only qwen3_moe"):
        inflate.inflate(checkpoints("mixtral"), pico.with_name("x"), HIDDEN, WIDTH)


def test_a_padded_bundle_takes_what_calibration_said_of_the_small_one(pico, large, ids_file):
    """Prices, predictors and trace: the padded bundle spends a loss budget, and its predictors see
    in its wider hidden states what the small one's see in theirs."""
    text = ("--tokens", "256", *models.PADDED[:4])
    small = models.build(pico, pico.with_name("small.smoe"), ids_file, *text)
    padded = models.build(large, pico.with_name("large.smoe"), ids_file, *text, "--prices", "0")
    with pytest.raises(EngineError, match="no prices"):
        _score(padded, Policies(loss=0.05))
    models.graft(padded, small)
    open_bundle(padded, hashes=True)
    tables, wide = (open_bundle(path).tables.layers() for path in (small, padded))
    for mine, its in zip(wide, tables, strict=True):
        assert mine.keys() == its.keys()
        assert all(len(mine[f"predict_{d}"]) == HIDDEN for d in (1, 2, 3) if f"predict_{d}" in mine)
    for policies in (Policies(loss=0.05), Policies(prefetch="predicted:1")):
        assert np.isfinite(_score(padded, policies)).all()


def _score(bundle, policies):
    budget = budget_for_share(bundle, 0.5, 64)
    with Engine.open(bundle, beside=budget, context=64, policies=policies) as engine:
        return np.stack(list(engine.score(np.arange(3, 43))))
