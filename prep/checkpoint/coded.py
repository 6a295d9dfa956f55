"""One layer's experts in the bits that a checkpoint has, of which one at a time is decoded, by the
conversion that `transformers` would run on all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers.core_model_loading import WeightConverter, dot_natural_key

from smoe.prep.checkpoint.seam import ExpertsModule
from smoe.prep.checkpoint.weights import Weights, quiet
from smoe.prep.errors import PrepError


class Part(NamedTuple):
    """A stored tensor, with the pattern of the conversion that takes it, as `Weights.targets` has
    them."""

    name: str
    pattern: str | None


Tensors = dict[Part, torch.Tensor]


class Coded:
    """One parameter of a layer's experts `[E, ..]` in the bits of the checkpoint: `weight[e]` is
    expert e, decoded. The last one is kept, since who computes with it asks again."""

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        dtype: torch.dtype,
        experts: list[Tensors],
        decode: Callable[[Tensors], torch.Tensor],
    ):
        """`experts[e]` are the tensors of expert e, which `decode` makes one of `[1, ..]` of."""
        self.name, self.shape, self.dtype = name, shape, dtype
        self._experts, self._decode = experts, decode
        self._last: tuple[int, torch.Tensor] | None = None
        self._finite: set[int] = set()  # experts that were looked through

    def __getitem__(self, expert: int) -> torch.Tensor:
        if self._last is None or self._last[0] != expert:
            self._last = None  # two of them at once are not needed
            decoded = self._decode(self._experts[expert])[0]
            if expert not in self._finite and not torch.isfinite(decoded).all():
                raise PrepError(
                    f"{self.name} of expert {expert} holds values that are not finite; the "
                    "checkpoint is damaged. Download it again."
                )
            self._finite.add(expert)
            self._last = expert, decoded
        return self._last[1]


class CodedExperts:
    """A module on the seam whose matrices are `Coded`: all else is the module's own."""

    def __init__(self, module: ExpertsModule, coded: dict[str, Coded]):
        self._module, self._coded = module, coded

    def __getattr__(self, name: str) -> Any:
        coded = self.__dict__["_coded"]
        return coded[name] if name in coded else getattr(self.__dict__["_module"], name)


def read_coded(
    weights: Weights,
    model: transformers.PreTrainedModel,
    parameter: str,
    sources: dict[str, str | None],
    device: str,
) -> Coded:
    """The parameter `[E, ..]` of a layer's experts, read now in its stored bits, to be decoded on
    `device`; `sources` are its tensors with the patterns of `Weights.targets`."""
    w = model.get_parameter(parameter)
    names = sorted(sources, key=dot_natural_key)
    experts = _by_expert(weights, [Part(name, sources[name]) for name in names], len(w))
    if len({len(tensors) for tensors in experts}) != 1 or not experts[0]:
        raise PrepError(
            f"{weights.path}: {parameter} is not stored expert by expert; give the original "
            "checkpoint, in bf16 or f16."
        )
    converter = _converter(weights, model, set(sources.values()))

    def decode(tensors: Tensors) -> torch.Tensor:
        if converter is None:
            (tensor,) = tensors.values()
            return tensor.to(device)
        for part, tensor in tensors.items():
            assert part.pattern is not None
            here: Any = tensor.to(device)  # where it is annotated, tensors are still on their way
            converter.add_tensor(parameter, part.name, part.pattern, here)
        with quiet():
            made = converter.convert(
                parameter, model=model, config=model.config, hf_quantizer=weights.quantiser
            )[parameter]
        return (made[0] if isinstance(made, list) else made).detach()

    return Coded(parameter, w.shape, w.dtype, experts, decode)


def _by_expert(weights: Weights, parts: list[Part], experts: int) -> list[Tensors]:
    """The tensors of every expert: one of its own each, in order, or its row of one for all."""
    result: list[Tensors] = [{} for _ in range(experts)]
    seen: dict[str, int] = {}
    for part in parts:
        tensor = weights.read(part.name)
        if part.pattern is not None and "*." in part.pattern:
            expert = seen[part.pattern] = seen.get(part.pattern, -1) + 1
            if expert < experts:
                result[expert][part] = tensor
        elif tensor.ndim and len(tensor) == experts:
            for expert, row in enumerate(tensor.split(1)):
                result[expert][part] = row
    return result


def _converter(
    weights: Weights, model: transformers.PreTrainedModel, patterns: set[str | None]
) -> WeightConverter | None:
    """A copy of the conversion that takes these patterns; None where tensors are taken as they
    are."""
    for converter in weights.mapping(model)[1]:
        if patterns & set(converter.source_patterns):
            return copy.deepcopy(converter)
    return None
