"""The seam: how experts are found, run and read without any code per model family.

`transformers` runs the experts of every supported family through `ALL_EXPERTS_FUNCTIONS`. A module
on that seam says of itself whether it is gated, biased, transposed or interleaved; everything below
follows from those flags and from probing its activation numerically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from smoe.artifacts.manifest import ExpertActivation
from smoe.prep.errors import PrepError
from smoe.runtime.kernels import activations, reference


class ExpertsModule(torch.nn.Module):
    """What a module on the seam has, whatever its class: for annotations only. The flags are always
    there; the rest is where they say so."""

    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    down_proj: torch.Tensor
    down_proj_bias: torch.Tensor
    up_proj_bias: torch.Tensor
    gate_up_proj_bias: torch.Tensor


Run = Callable[[int, ExpertsModule, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ExpertsLayer = tuple[str, ExpertsModule]
_NAME = "smoe"


def experts_modules(model: torch.nn.Module) -> list[ExpertsLayer]:
    """Every module on the seam with its name, as they are listed in the model."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    return [
        (name, cast(ExpertsModule, module))
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in flags)
    ]


@torch.no_grad()
def layers_used(model: PreTrainedModel) -> list[ExpertsLayer]:
    """The modules on the seam that text reaches, in the order in which they run: seen by running a
    few tokens.

    A multimodal model may have experts for pictures besides. The experts themselves are left out.
    """
    modules = experts_modules(model)
    seen: list[int] = []

    def note(layer, module, hidden, ids, weights):
        seen.append(layer)
        return torch.zeros_like(hidden)

    with experts_run_by(model, modules, note):
        try:
            model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
        except (
            Exception
        ) as error:  # a family's own code: whatever it raises means the same to the user
            raise PrepError(
                f"{type(model).__name__} does not run on text alone ({type(error).__name__}: "
                f"{error}); it cannot be prepared."
            ) from error
    return [modules[layer] for layer in seen]


@contextmanager
def experts_run_by(model: PreTrainedModel, modules: list[ExpertsLayer], run: Run) -> Iterator[None]:
    """Within the block the model's experts are `run(layer, module, hidden, ids, weights)`, layer
    being the place in `modules`.

    hidden float `[T, H]`, ids int64 `[T, k]`, weights float `[T, k]`; `run` returns the weighted
    sum, shaped as hidden.
    """
    layers = {id(module): layer for layer, (_, module) in enumerate(modules)}

    def dispatch(module, hidden, ids, weights):
        return run(layers[id(module)], module, hidden, ids, weights)

    previous, outer = model.get_experts_implementation(), ALL_EXPERTS_FUNCTIONS.get(_NAME)
    ALL_EXPERTS_FUNCTIONS.register(_NAME, dispatch)
    model.set_experts_implementation(_NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(
            previous
        )  # the registry has no way to unregister; the next block overwrites
        if outer is not None:  # perhaps we are inside of one
            ALL_EXPERTS_FUNCTIONS.register(_NAME, outer)


def symbolic(layer, module, hidden, ids, weights):
    """The export's implementation: one custom node, where the graph will be cut."""
    return torch.onnx.ops.symbolic(
        "smoe::Experts",
        (hidden, ids, weights),
        {"layer": layer},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )


def zeros(layer, module, hidden, ids, weights):
    """An implementation that leaves the experts out, for what does not depend on them."""
    return torch.zeros_like(hidden)


def expert_outputs(
    module: ExpertsModule,
    expert: int,
    x: torch.Tensor,
    first: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of one expert on `x` `[n, H]`, before its mixing weight, as the module itself
    defines it; with `first` float `[matrices, width, H]` and `down` `[H, width]` in the place of
    its matrices, if they are given."""
    y = _linear(module, "down_proj", expert, expert_inner(module, expert, x, first), down)
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


def expert_inner(
    module: ExpertsModule, expert: int, x: torch.Tensor, first: torch.Tensor | None = None
) -> torch.Tensor:
    """What the last matrix of an expert receives, `[n, width]`; with `first` float `[matrices,
    width, H]` in the place of its gate and up, or of up alone, if they are given."""
    return _gated(module, _first_products(module, expert, x, first))


def felt_in_output(
    module: ExpertsModule, expert: int, x: torch.Tensor, down: torch.Tensor
) -> list[torch.Tensor]:
    """How much an error in the products of gate, and of up, is felt in the output of each token `x`
    `[n, H]`, whose last matrix is `down` `[H, width]`: `[n]` each, the norm of the output's change
    per error of one in all rows, errors of different rows being independent."""
    with torch.enable_grad():
        products = _first_products(module, expert, x).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(_gated(module, products).sum(), products)
    parts = _halves(module, slopes.mT) if module.has_gate else (slopes.mT,)
    return [(down.square().sum(0) @ part.square()).sqrt() for part in parts]


def _gated(module: ExpertsModule, products: torch.Tensor) -> torch.Tensor:
    return module._apply_gate(products) if module.has_gate else module.act_fn(products)


def _first_products(
    module: ExpertsModule, expert: int, x: torch.Tensor, first: torch.Tensor | None = None
) -> torch.Tensor:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    rows = None if first is None else _joined(module, first)
    return _linear(module, name, expert, x, rows)


def _joined(module: ExpertsModule, first: torch.Tensor) -> torch.Tensor:
    """The rows of gate and up, or of up alone, in the order of the module's one matrix."""
    return (first if module.is_concatenated else first.transpose(0, 1)).flatten(0, 1)


def _halves(module: ExpertsModule, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: the rows of gate, and of up."""
    first, second = rows.chunk(2) if module.is_concatenated else (rows[0::2], rows[1::2])
    return first, second


def _linear(
    module: ExpertsModule,
    name: str,
    expert: int,
    x: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product with a matrix of an expert, or with `rows` `[n_out, n_in]` in its place."""
    w = getattr(module, name)[expert].float()  # stored in half precision, perhaps
    y = x @ rows.T if rows is not None else x @ (w if module.is_transposed else w.T)
    return y + getattr(module, f"{name}_bias")[expert].float() if module.has_bias else y


def mixed_outputs(
    module: ExpertsModule,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    parts: Sequence[slice] = (slice(None),),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the chosen experts' outputs `[T, H]`, and the norm of each output `[T,
    k]`, of one part of the tokens at a time.

    On the seam an id that is the number of experts means no expert.
    """
    mixed, norms = torch.zeros_like(x), torch.zeros_like(weights)
    experts = expert_geometry(module)[0]
    chosen = [{e: slots for e, *slots in slots_of(ids[part], experts)} for part in parts]
    for expert in range(experts):  # outermost: an expert may have to be decoded
        for part, slots_by_expert in zip(parts, chosen, strict=True):
            if expert in slots_by_expert:
                tokens, slots = slots_by_expert[expert]
                y = expert_outputs(module, expert, x[part][tokens])
                norms[part].view(-1)[slots] = y.norm(dim=-1)
                mixed[part].index_add_(0, tokens, y * weights[part].reshape(-1)[slots, None])
    return mixed, norms


def slots_of(ids: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Every expert that `ids` int64 `[T, k]` name, with its tokens and its places in the flattened
    ids, in order."""
    flat = ids.reshape(-1)
    slots_by_expert = flat.argsort(stable=True).split(flat.bincount(minlength=experts + 1).tolist())
    for expert, slots in enumerate(slots_by_expert[:experts]):
        if len(slots):
            yield expert, slots // ids.shape[1], slots


def expert_weights(module: ExpertsModule, expert: int) -> dict[str, np.ndarray]:
    """One expert's float32 matrices `[n_out, n_in]` and biases, named as in
    `artifacts.layout.ExpertShape`."""

    def rows(name: str) -> torch.Tensor:
        w = getattr(module, name)[expert]
        return w.T if module.is_transposed else w

    tensors = {"down": rows("down_proj")}
    if module.has_gate:
        tensors["gate"], tensors["up"] = _halves(module, rows("gate_up_proj"))
    else:
        tensors["up"] = rows("up_proj")
    if module.has_bias:
        tensors["down_bias"] = module.down_proj_bias[expert]
        if module.has_gate:
            tensors["gate_bias"], tensors["up_bias"] = _halves(
                module, module.gate_up_proj_bias[expert]
            )
        else:
            tensors["up_bias"] = module.up_proj_bias[expert]
    if module.has_post_expert_norm:
        tensors["norm"] = probe_norm(module)
    return {name: torch.empty(t.shape).copy_(t.detach()).numpy() for name, t in tensors.items()}


def expert_geometry(module: ExpertsModule) -> tuple[int, int, int]:
    """(number of experts, hidden, width) of a module on the seam, from its down projection."""
    experts, hidden, width = module.down_proj.shape
    if module.is_transposed:
        hidden, width = width, hidden
    return experts, hidden, width


@torch.no_grad()
def probe_gate(module: ExpertsModule) -> ExpertActivation:
    """Which known function the module's gate is, found by comparing values; a `PrepError` if none
    fits.

    For gated modules `_apply_gate` receives gate and up in the module's own order; the known
    functions are those of `smoe.runtime.kernels.activations`, so what is recognised here can be run
    there.
    """
    # Far out too: a clamp that calibration never reaches is still part of the function.
    far = torch.tensor([-1e4, -300.0, -100.0, -20.0, 20.0, 100.0, 300.0, 1e4])
    gate = torch.cat([torch.linspace(-9, 9, 56), far]).repeat(3, 1)
    up = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)) * 4
    up[1], up[2] = gate[1].flip(0), 50 * up[2]
    if not module.has_gate:
        actual = module.act_fn(up).numpy()
        candidates = [ExpertActivation("plain", name) for name in activations.ACTIVATIONS]
    else:
        pair = (
            torch.cat([gate, up], -1)
            if module.is_concatenated
            else torch.stack([gate, up], -1).flatten(-2)
        )
        actual = module._apply_gate(pair).numpy()
        candidates = [
            ExpertActivation("gated", name) for name in activations.ACTIVATIONS
        ] + _limited_candidates(module)
    # 1 + tanh and the like cancel: what is lost is relative to the inputs, not to the result.
    rounding = 1e-6 * (1 + (gate * up if module.has_gate else up).abs().numpy())
    for candidate in candidates:
        with np.errstate(over="ignore"):
            expected = activations.gate(candidate, gate.numpy(), up.numpy())
        if np.all(np.abs(expected - actual) <= 1e-5 * np.abs(actual) + rounding):
            return candidate
    raise PrepError(
        f"The experts' activation in {type(module).__name__} is none of the {len(candidates)} "
        "functions that the "
        "runtime knows; this model cannot be prepared. Please report its name."
    )


def _limited_candidates(module: ExpertsModule) -> list[ExpertActivation]:
    """Gates with limits, the limits read off the function itself.

    With up = 0 the clamped gate is g * sigmoid(alpha * g) below its limit, and limit *
    sigmoid(alpha * limit) far above. The others are 0 there. Far out in gate and up the bounded one
    is limit^2 (for an activation that becomes the identity), the softcapped one limit * alpha; with
    one of them far out and the other small the limits come apart.
    """

    def at(g: float, u: float) -> float:
        pair = torch.tensor([[g, u]])  # one pair reads the same concatenated and interleaved
        return float(module._apply_gate(pair))

    candidates = []
    ratio = at(0.5, 0) / 0.5
    if 0 < ratio < 1:
        alpha = float(np.log(ratio / (1 - ratio)) / 0.5)
        ceiling = limit = at(
            1e4, 0
        )  # limit * sigmoid(alpha * limit): solved by iteration, which contracts
        for _ in range(50):
            limit = ceiling * (1 + np.exp(-alpha * limit))
        candidates.append(ExpertActivation("clamped", "", round(alpha, 4), round(float(limit), 4)))
    highest, small = at(1e4, 1e4), 2.0**-10
    if 0 < highest < 1e6:
        bound = at(1e4, small) / small  # act(limit), or the gate's cap
        candidates += [
            ExpertActivation("bounded", name, 0.0, round(highest / bound, 4))
            for name in activations.ACTIVATIONS
        ]
        for up_cap in (highest / bound, round(highest / bound)):
            candidates.append(ExpertActivation("softcapped", "", round(up_cap, 4), round(bound, 4)))
    return candidates


@torch.no_grad()
def probe_norm(module: ExpertsModule) -> torch.Tensor:
    """The scale `[H]` with which `reference.normalise` is the module's norm of an expert's output,
    found by comparing values; a `PrepError` if there is none.

    On a large constant the norm is the scale divided by its root mean square; on a tiny one its
    epsilon shows.
    """
    hidden = expert_geometry(module)[1]
    shape = module.post_expert_norm(torch.full((1, hidden), 1e4))[0]
    tiny = module.post_expert_norm(torch.full((1, hidden), 1e-6))[0]
    largest = shape.abs().argmax()
    epsilon = (1e-6 * shape[largest] / tiny[largest]) ** 2 - 1e-12  # of shape's own size
    scale = shape * (reference.NORM_EPSILON / epsilon.clamp(min=1e-20)) ** 0.5
    y = (
        torch.randn(16, hidden, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-4, 2, 16)[:, None]
    )
    expected = module.post_expert_norm(y)
    if not torch.allclose(
        torch.from_numpy(reference.normalise(y.numpy(), scale.numpy())), expected, 1e-4, 1e-6
    ):
        raise PrepError(
            f"The norm of the experts' outputs in {type(module).__name__} is not one that the "
            "runtime knows (a scale, "
            "then a root mean square); this model cannot be prepared. Please report its name."
        )
    return scale
