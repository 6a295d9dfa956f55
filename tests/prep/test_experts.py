"""The seam: activations are recognised by their values, weights come out in one order whatever the layout."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from smoe.artifacts.manifest import Gate
from smoe.prep.errors import PrepError
from smoe.prep.experts import expert_geometry, expert_outputs, expert_weights, experts_modules, probe_gate
from smoe.runtime import reference


class _Experts(nn.Module):
    """A stand-in that says of itself what modules on the seam say."""

    def __init__(self, act, has_gate=True, is_concatenated=True, apply_gate=None):
        super().__init__()
        self.act_fn, self.has_gate, self.is_concatenated = act, has_gate, is_concatenated
        self._apply_gate = apply_gate or self._default

    def _default(self, pair):
        gate, up = pair.chunk(2, -1) if self.is_concatenated else (pair[..., 0::2], pair[..., 1::2])
        return self.act_fn(gate) * up


@pytest.mark.parametrize("hf, name", [
    ("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh"), ("relu", "relu"),
    ("relu2", "relu2"), ("sigmoid", "sigmoid"), ("tanh", "tanh"), ("linear", "identity"),
])  # fmt: skip
@pytest.mark.parametrize("concatenated", [True, False])
def test_activations_are_recognised(hf, name, concatenated):
    act = ACT2FN[hf]
    assert probe_gate(_Experts(act, is_concatenated=concatenated)) == Gate("gated", name)
    assert probe_gate(_Experts(act, has_gate=False)) == Gate("plain", name)


@pytest.mark.parametrize("alpha, limit", [(1.702, 7.0), (1.0, 3.0)])
def test_a_clamped_gate_is_recognised_with_its_numbers(alpha, limit):
    def clamped(pair):
        gate, up = pair[..., 0::2].clamp(max=limit), pair[..., 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)

    assert probe_gate(_Experts(None, is_concatenated=False, apply_gate=clamped)) == Gate("clamped", "", alpha, limit)


def test_a_clamp_far_out_is_not_overlooked():
    def clamped(pair):
        gate, up = pair.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=150)) * up.clamp(-150, 150)

    with pytest.raises(PrepError, match="none of the"):
        probe_gate(_Experts(None, apply_gate=clamped))


def test_an_unknown_activation_is_refused():
    with pytest.raises(PrepError, match="activation in _Experts is none of the"):
        probe_gate(_Experts(torch.sin))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "olmoe"])
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
        w = {name: array.astype(np.float64) for name, array in expert_weights(module, expert).items()}
        assert w["gate"].shape == w["up"].shape == (width, hidden) and w["down"].shape == (hidden, width)
        g = x.numpy() @ w["gate"].T + w.get("gate_bias", 0)
        u = x.numpy() @ w["up"].T + w.get("up_bias", 0)
        found = reference.gate(gate, g, u) @ w["down"].T + w.get("down_bias", 0)
        assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4)
        assert ("up_bias" in w) == (family == "gpt_oss")
