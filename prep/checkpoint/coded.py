"""One layer's experts as a checkpoint stores them, of which one at a time is decoded, by the
conversion that `transformers` would run on all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)

from smoe.prep.checkpoint.seam import ExpertsModule
from smoe.prep.checkpoint.weights import Weights, quiet
from smoe.prep.errors import PrepError


class Part(NamedTuple):
    """A stored tensor, with the pattern of the conversion that takes it, as `Weights.targets` has
    them."""

    name: str
    pattern: str | None


Tensors = dict[Part, torch.Tensor]
Place = dict[Part, int | None]  # of one expert: its row of a tensor for all, None: a whole tensor
Decode = Callable[[Tensors], torch.Tensor]
BY_EXPERT = (MergeModulelist, Concatenate, Transpose)  # do to one expert what they do to all


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether all of it is: the smallest and the largest show it, NaN too, at the speed of memory,
    which `isfinite` is far from."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


class Coded:
    """One parameter of a layer's experts `[E, ..]` as the checkpoint stores it: `weight[e]` is
    expert e, decoded. The last one is kept, since who computes with it asks again."""

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        dtype: torch.dtype,
        stored: Callable[[int], Tensors],
        decode: Decode,
    ):
        """`stored(e)` are the tensors of expert e, which `decode` makes one of `[1, ..]` of."""
        self.name, self.shape, self.dtype = name, shape, dtype
        self._stored, self._decode = stored, decode
        self._last: tuple[int, torch.Tensor] | None = None
        self._finite: set[int] = set()  # experts that were looked through

    def __getitem__(self, expert: int) -> torch.Tensor:
        if self._last is None or self._last[0] != expert:
            self._last = None  # two of them at once are not needed
            decoded = self._decode(self._stored(expert))[0].to(self.dtype)
            if expert not in self._finite and not all_finite(decoded):
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
    places = _by_expert(weights, sources, len(w))
    if places is None:
        raise PrepError(
            f"{weights.path}: {parameter} is not stored expert by expert; give the original "
            "checkpoint, in bf16 or f16."
        )
    experts = [_read(weights, place) for place in places]
    decode = _decoding(weights, model, parameter, sources, device)
    return Coded(parameter, w.shape, w.dtype, experts.__getitem__, decode)


def coded_apart(
    weights: Weights,
    model: transformers.PreTrainedModel,
    parameter: str,
    sources: dict[str, str | None],
    device: str,
) -> Coded | None:
    """The same, of which an expert is read when it is asked for; None where experts are not stored,
    or not converted, each alone."""
    w = model.get_parameter(parameter)
    places = _by_expert(weights, sources, len(w))
    converter = _converter(weights, model, set(sources.values()))
    operations = converter.operations if converter is not None else []
    known = weights.coded(sources) or all(type(o) in BY_EXPERT for o in operations)
    if places is None or not known or (converter is None and len(places[0]) > 1):
        return None
    first = {part: _empty(weights, part.name, row) for part, row in places[0].items()}
    shape = _decoding(weights, model, parameter, sources, "meta")(first).shape
    if shape != (1, *w.shape[1:]):
        return None
    decode = _decoding(weights, model, parameter, sources, device)
    return Coded(parameter, w.shape, w.dtype, lambda e: _read(weights, places[e]), decode)


def _decoding(
    weights: Weights,
    model: transformers.PreTrainedModel,
    parameter: str,
    sources: dict[str, str | None],
    device: str,
) -> Decode:
    """The conversion of one expert's tensors to `[1, ..]` on `device`."""
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

    return decode


def _by_expert(
    weights: Weights, sources: dict[str, str | None], experts: int
) -> list[Place] | None:
    """Where every expert's tensors lie: one of its own each, in order, or its row of one for all.
    None if they do not."""
    result: list[Place] = [{} for _ in range(experts)]
    seen: dict[str, int] = {}
    for name in sorted(sources, key=dot_natural_key):
        part, shape = Part(name, sources[name]), weights.stored[name].shape
        if part.pattern is not None and "*." in part.pattern:
            expert = seen[part.pattern] = seen.get(part.pattern, -1) + 1
            if expert < experts:
                result[expert][part] = None
        elif shape and shape[0] == experts:
            for expert in range(experts):
                result[expert][part] = expert
    whole = result[0] and len({len(place) for place in result}) == 1
    return result if whole else None


def _read(weights: Weights, place: Place) -> Tensors:
    return {part: weights.read(part.name, row) for part, row in place.items()}


def _empty(weights: Weights, name: str, row: int | None) -> torch.Tensor:
    stored = weights.stored[name]
    shape = stored.shape if row is None else (1, *stored.shape[1:])
    return torch.empty(shape, dtype=stored.dtype, device="meta")


def _converter(
    weights: Weights, model: transformers.PreTrainedModel, patterns: set[str | None]
) -> WeightConverter | None:
    """A copy of the conversion that takes these patterns; None where tensors are taken as they
    are."""
    for converter in weights.mapping(model)[1]:
        if patterns & set(converter.source_patterns):
            return copy.deepcopy(converter)
    return None
