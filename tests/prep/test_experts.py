"""The seam: activations are recognised by their values, weights come out in one order whatever the
layout."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from smoe.artifacts.manifest import ExpertActivation
from smoe.prep.checkpoint.seam import (
    expert_geometry,
    expert_outputs,
    expert_weights,
    experts_modules,
    probe_gate,
    probe_norm,
)
from smoe.prep.errors import PrepError
from smoe.runtime.kernels import activations, reference


class _Experts(nn.Module):
    """A stand-in that says of itself what modules on the seam say."""

    def __init__(self, act, has_gate=True, is_concatenated=True, apply_gate=None):
        super().__init__()
        self.act_fn, self.has_gate, self.is_concatenated = act, has_gate, is_concatenated
        self._apply_gate = apply_gate or self._default

    def _default(self, pair):
        gate, up = pair.chunk(2, -1) if self.is_concatenated else (pair[..., 0::2], pair[..., 1::2])
        return self.act_fn(gate) * up


@pytest.mark.parametrize(
    "hf, name",
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("sigmoid", "sigmoid"),
        ("tanh", "tanh"),
        ("linear", "identity"),
    ],
)
@pytest.mark.parametrize("concatenated", [True, False])
def test_activations_are_recognised(hf, name, concatenated):
    act = ACT2FN[hf]
    assert probe_gate(_Experts(act, is_concatenated=concatenated)) == ExpertActivation(
        "gated", name
    )
    assert probe_gate(_Experts(act, has_gate=False)) == ExpertActivation("plain", name)


@pytest.mark.parametrize("alpha, limit", [(1.702, 7.0), (1.0, 3.0)])
def test_a_clamped_gate_is_recognised_with_its_numbers(alpha, limit):
    def clamped(pair):
        gate, up = pair[..., 0::2].clamp(max=limit), pair[..., 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)

    assert probe_gate(
        _Experts(None, is_concatenated=False, apply_gate=clamped)
    ) == ExpertActivation("clamped", "", alpha, limit)


@pytest.mark.parametrize("act, name", [(torch.nn.functional.silu, "silu"), (torch.relu, "relu")])
@pytest.mark.parametrize("limit", [150.0, 7.0, 0.5])
def test_a_bounded_gate_is_recognised_with_its_limit(act, name, limit):
    """However far out: a limit that calibration never reaches is still part of the function."""

    def bounded(pair):
        gate, up = pair.chunk(2, -1)
        return act(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    assert probe_gate(_Experts(None, apply_gate=bounded)) == ExpertActivation(
        "bounded", name, 0.0, limit
    )


def test_a_softcapped_gate_is_recognised_with_its_caps():
    def softcapped(pair):
        gate, up = pair.chunk(2, -1)
        return 9 * torch.tanh(gate / 9) * torch.sigmoid(gate) * 5 * torch.tanh(up / 5)

    assert probe_gate(_Experts(None, apply_gate=softcapped)) == ExpertActivation(
        "softcapped", "", 5.0, 9.0
    )


def test_two_limits_that_differ_are_no_bounded_gate():
    def other(pair):
        gate, up = pair.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=7)) * up.clamp(-5, 5)

    with pytest.raises(PrepError, match="none of the"):
        probe_gate(_Experts(None, apply_gate=other))


class _Normed(nn.Module):
    """A module on the seam as far as `probe_norm` looks at it."""

    def __init__(self, norm):
        super().__init__()
        self.down_proj, self.is_transposed, self.post_expert_norm = (
            torch.empty(2, 12, 5),
            False,
            norm,
        )


def _rms(x, epsilon):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-6, 1e-5])
def test_a_norm_that_scales_first_is_recognised(epsilon):
    scale = torch.linspace(0.3, 1.9, 12)
    found = probe_norm(_Normed(lambda x: _rms(x * scale, epsilon)))
    y = torch.randn(50, 12) * torch.logspace(-5, 3, 50)[:, None]
    assert np.allclose(
        reference.normalise(y.numpy(), found.numpy()),
        _rms(y * scale, epsilon),
        rtol=1e-3,
        atol=1e-6,
    )


def test_a_norm_that_scales_last_is_refused():
    scale = torch.linspace(0.3, 1.9, 12)
    with pytest.raises(PrepError, match="norm of the experts' outputs in _Normed is not one"):
        probe_norm(_Normed(lambda x: _rms(x, 1e-6) * scale))


def test_an_unknown_activation_is_refused():
    with pytest.raises(PrepError, match="activation in _Experts is none of the"):
        probe_gate(_Experts(torch.sin))


@pytest.mark.parametrize(
    "family", ["mixtral", "gpt_oss", "deepseek_v3", "aria_text", "nemotron_h", "hy_v4"]
)
def test_weights_and_outputs_are_the_modules_own(make, family):
    _, module = experts_modules(make(family))[0]
    count, hidden, width = expert_geometry(module)
    assert (count, hidden) == (6, 64) and width in (40, 72)
    gate = probe_gate(module)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    for expert in range(count):
        with torch.no_grad():
            wanted = module(x, torch.full((9, 1), expert), torch.ones(9, 1)).numpy()
            direct = expert_outputs(module, expert, x).numpy()
        assert np.allclose(direct, wanted, atol=1e-5)
        w = {
            name: array.astype(np.float64) for name, array in expert_weights(module, expert).items()
        }
        assert w["up"].shape == (width, hidden) and w["down"].shape == (hidden, width)
        assert ("gate" in w) == (family != "nemotron_h")
        g = x.numpy() @ w["gate"].T + w.get("gate_bias", 0) if "gate" in w else None
        u = x.numpy() @ w["up"].T + w.get("up_bias", 0)
        inner = activations.gate(
            gate, None if g is None else g.astype(np.float32), u.astype(np.float32)
        )
        found = inner @ w["down"].T + w.get("down_bias", 0)
        assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4)
        assert ("up_bias" in w) == (family == "gpt_oss")
