"""The seam: how experts are found, run and read without any code per model family.

`transformers` runs the experts of every supported family through `ALL_EXPERTS_FUNCTIONS`. A module on that seam says
of itself whether it is gated, biased, transposed or interleaved; everything below follows from those flags and from
probing its activation numerically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from smoe.artifacts.manifest import Gate
from smoe.prep.errors import PrepError
from smoe.runtime import reference

Run = Callable[[int, torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_NAME = "smoe"


def experts_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Every module on the seam with its name, in the order of the layers."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    return [(n, m) for n, m in model.named_modules() if all(hasattr(m, flag) for flag in flags)]


@contextmanager
def experts_run_by(model: torch.nn.Module, run: Run) -> Iterator[None]:
    """Within the block the model's experts are `run(layer, module, hidden, ids, weights)`.

    hidden float `[T, H]`, ids int64 `[T, k]`, weights float `[T, k]`; `run` returns the weighted sum, shaped as hidden.
    """
    layers = {id(module): layer for layer, (_, module) in enumerate(experts_modules(model))}

    def dispatch(module, hidden, ids, weights):
        return run(layers[id(module)], module, hidden, ids, weights)

    previous = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS.register(_NAME, dispatch)
    model.set_experts_implementation(_NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(previous)  # the registry has no way to unregister; the next block overwrites


def symbolic(layer, module, hidden, ids, weights):
    """The export's implementation: one custom node, where the graph will be cut."""
    return torch.onnx.ops.symbolic(
        "smoe::Experts", (hidden, ids, weights), {"layer": layer}, dtype=hidden.dtype, shape=hidden.shape, version=1
    )


def expert_outputs(module: torch.nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """The output of one expert on `x` `[n, H]`, before its mixing weight, as the module itself defines it."""

    def linear(x, name):
        w = getattr(module, name)[expert]
        y = x @ (w if module.is_transposed else w.T)
        return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y

    if module.has_gate:
        inner = module._apply_gate(linear(x, "gate_up_proj"))
    else:
        inner = module.act_fn(linear(x, "up_proj"))
    y = linear(inner, "down_proj")
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


def expert_weights(module: torch.nn.Module, expert: int) -> dict[str, np.ndarray]:
    """One expert's float32 matrices `[n_out, n_in]` and biases, named as in `artifacts.layout.ExpertShape`."""

    def rows(name: str) -> torch.Tensor:
        w = getattr(module, name)[expert]
        return w.T if module.is_transposed else w

    def halves(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(rows.chunk(2)) if module.is_concatenated else (rows[0::2], rows[1::2])

    tensors = {"down": rows("down_proj")}
    if module.has_gate:
        tensors["gate"], tensors["up"] = halves(rows("gate_up_proj"))
    else:
        tensors["up"] = rows("up_proj")
    if module.has_bias:
        tensors["down_bias"] = module.down_proj_bias[expert]
        if module.has_gate:
            tensors["gate_bias"], tensors["up_bias"] = halves(module.gate_up_proj_bias[expert])
        else:
            tensors["up_bias"] = module.up_proj_bias[expert]
    return {name: t.detach().float().contiguous().numpy() for name, t in tensors.items()}


def expert_geometry(module: torch.nn.Module) -> tuple[int, int, int]:
    """(number of experts, hidden, width) of a module on the seam, from its down projection."""
    down = module.down_proj
    experts, out, width = down.shape if not module.is_transposed else (down.shape[0], down.shape[2], down.shape[1])
    return int(experts), int(out), int(width)


@torch.no_grad()
def probe_gate(module: torch.nn.Module) -> Gate:
    """Which known function the module's gate is, found by comparing values; a `PrepError` if none fits.

    For gated modules `_apply_gate` receives gate and up in the module's own order; the known functions are those of
    `smoe.runtime.reference`, so what is recognised here can be run there.
    """
    # Far out too: a clamp that calibration never reaches is still part of the function.
    far = torch.tensor([-1e4, -300.0, -100.0, -20.0, 20.0, 100.0, 300.0, 1e4])
    gate = torch.cat([torch.linspace(-9, 9, 56), far]).repeat(3, 1)
    up = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)) * 4
    up[1], up[2] = gate[1].flip(0), 50 * up[2]
    if not module.has_gate:
        found = module.act_fn(up).numpy()
        candidates = [Gate("plain", name) for name in reference.ACTIVATIONS]
    else:
        pair = torch.cat([gate, up], -1) if module.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        found = module._apply_gate(pair).numpy()
        candidates = [Gate("gated", name) for name in reference.ACTIVATIONS] + _clamped_candidates(module)
    # 1 + tanh and the like cancel: what is lost is relative to the inputs, not to the result.
    rounding = 1e-6 * (1 + (gate * up if module.has_gate else up).abs().numpy())
    for candidate in candidates:
        with np.errstate(over="ignore"):
            wanted = reference.gate(candidate, gate.numpy(), up.numpy())
        if np.all(np.abs(wanted - found) <= 1e-5 * np.abs(found) + rounding):
            return candidate
    raise PrepError(
        f"The experts' activation in {type(module).__name__} is none of the {len(candidates)} functions that the "
        "runtime knows; this model cannot be prepared. Please report its name."
    )


def _clamped_candidates(module: torch.nn.Module) -> list[Gate]:
    """The clamped gate with its two numbers read off the function itself: with up = 0 it is g * sigmoid(alpha * g)
    below the limit, and limit * sigmoid(alpha * limit) far above it."""

    def at(g: float) -> float:
        pair = torch.tensor([[g, 0.0]])  # one pair reads the same concatenated and interleaved
        return float(module._apply_gate(pair))

    ratio = at(0.5) / 0.5
    if not 0 < ratio < 1:
        return []
    alpha = float(np.log(ratio / (1 - ratio)) / 0.5)
    ceiling = limit = at(1e4)  # limit * sigmoid(alpha * limit): solved for the limit by iteration, which contracts
    for _ in range(50):
        limit = ceiling * (1 + np.exp(-alpha * limit))
    return [Gate("clamped", "", round(alpha, 4), round(float(limit), 4))]
