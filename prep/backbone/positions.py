"""How far a model's positions reach, and rotary modules that follow the length, held still for a
trace.

Some ways to stretch positions are the same at every length (`yarn`, `llama3`, `linear`). Two are
not: `longrope` takes other factors, and `dynamic` other frequencies, for all tokens as soon as a
sequence passes the length that the model was made for. What is cached by then was made with the
old ones, so that what comes out depends on how the tokens were cut into calls. A bundle's context
ends there instead, where the model is the same at every length and in any cut.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from smoe.prep.errors import PrepError

UNSTATED = 2048  # tokens, for a config that says nothing of its context
STRETCHED = ("yarn", "llama3")  # by a factor, at every length the same
LONGEST = 2**31 - 1  # tokens, of any bundle
TRIED = 256  # positions on which a rotary module is compared with what stands in for it
SAME = 1e-6  # of cosines and sines


@dataclass(frozen=True)
class Reach:
    """The longest context, in tokens, and why it is not what the config says ("" if it is)."""

    tokens: int
    why: str = ""


def reach(config: PreTrainedConfig) -> Reach:
    """Of the text decoder of `config`: as far as `transformers` would run it, and is the same
    however a sequence is cut into calls."""
    config = config.get_text_config()
    stated = int(getattr(config, "max_position_embeddings", None) or UNSTATED)
    reached = [_scaled(parameters, stated) for parameters in _rope_parameters(config)]
    ends = [r for r in reached if r.why and r.tokens <= stated]
    if ends:
        return min(ends, key=lambda r: r.tokens)
    return max(reached, key=lambda r: r.tokens, default=Reach(stated))


def original_length(config: PreTrainedConfig) -> int:
    """Tokens for which the text decoder of `config` was made before its positions were stretched,
    if they were."""
    config = config.get_text_config()
    stated = [p.get("original_max_position_embeddings") for p in _rope_parameters(config)]
    return max((int(length) for length in stated if length), default=0)


def _rope_parameters(config: PreTrainedConfig) -> list[dict]:
    """One for all layers, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [p for p in parameters.values() if isinstance(p, dict) and "rope_type" in p]


def _scaled(parameters: dict, stated: int) -> Reach:
    kind = parameters["rope_type"]
    original = int(parameters.get("original_max_position_embeddings") or stated)
    factor = parameters.get("factor") or 1.0
    if kind == "longrope" and original < stated and _changes(parameters):
        return Reach(original, f"longrope takes other factors beyond {original} of {stated} tokens")
    if "dynamic" in kind:
        return Reach(stated, f"dynamic rope takes other frequencies beyond {stated} tokens")
    if kind in STRETCHED and original * factor > stated:
        tokens = int(min(original * factor, LONGEST))
        why = f"{kind} stretches {original} tokens by {factor:g}"
        return Reach(tokens, f"{why}; max_position_embeddings says {stated}")
    return Reach(stated)


def _changes(parameters: dict) -> bool:
    pairs = (("short_factor", "long_factor"), ("short_mscale", "long_mscale"))
    return any(parameters.get(short) != parameters.get(long) for short, long in pairs)


class StillRotary(torch.nn.Module):
    """Cosines and sines of positions, float32 `[1, T, d]`, the same at every length."""

    def __init__(self, frequencies: torch.Tensor, scale: float):
        super().__init__()
        self.frequencies = torch.nn.Buffer(frequencies.clone(), persistent=False)
        self.scale = scale

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos() * self.scale, angles.sin() * self.scale
        return cosines.to(x.dtype), sines.to(x.dtype)


@contextlib.contextmanager
def held_still(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, a module whose positions follow the length is one that gives what it gives
    within `reach`; a `PrepError` if it is not like that. A graph has no way to change its mind."""
    following = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if _follows(getattr(module, "rope_type", None))
    ]
    still = {name: _still(module, name, reach(model.config).tokens) for name, module in following}
    try:
        for name, stand_in in still.items():
            model.set_submodule(name, stand_in)
        yield
    finally:
        for name, module in following:
            model.set_submodule(name, module)


def _follows(kind: object) -> bool:
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(k, str) and (k == "longrope" or "dynamic" in k) for k in kinds)


@torch.no_grad()
def _still(module: torch.nn.Module, name: str, tokens: int) -> torch.nn.Module:
    """What gives the same and does not look at the length: plain cosines and sines, or the module
    without what `transformers` wraps around it. (One that looks in its own code, too, is plain.)"""
    positions = torch.arange(min(TRIED, tokens))[None]
    given = _tables(module, positions)
    for make in (_plain, _unwrapped):
        try:
            stand_in = make(module, given)
            made = _tables(stand_in, positions)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # it is of another kind
            continue
        if len(made) == len(given) and all(map(_same, made, given)):
            return stand_in
    raise PrepError(
        f"{name} changes the positions of this model with its length in a way of its own "
        f"({type(module).__name__}), which no graph can hold; smoe cannot prepare it."
    )


def _plain(module: torch.nn.Module, given: list[torch.Tensor]) -> torch.nn.Module:
    frequencies = cast(torch.Tensor, module.original_inv_freq)
    return StillRotary(frequencies, float(given[0].flatten()[0]))


def _unwrapped(module: torch.nn.Module, given: list[torch.Tensor]) -> torch.nn.Module:
    copied: Any = copy.deepcopy(module)
    kinds = copied.rope_type
    copied.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    for name, buffer in module.named_buffers():
        if "original_inv_freq" in name:
            setattr(copied, name.replace("original_", ""), buffer.clone())
    return copied


def _tables(module: torch.nn.Module, positions: torch.Tensor) -> list[torch.Tensor]:
    """What a rotary module gives for `positions` int64 `[1, T]`, for each kind of layer."""
    kinds = getattr(module, "rope_type", None)
    layers = [{"layer_type": kind} for kind in kinds] if isinstance(kinds, dict) else [{}]
    given = [module(torch.zeros(1, 1, 1), positions, **layer) for layer in layers]
    return torch.utils._pytree.tree_leaves(given)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= SAME)
