"""The two ends of a model, its embedding and its head, out of memory while no text is there.

Over a vocabulary of 50,000 and more they are most of the backbone, and a sweep stays between them
nearly all of its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.few_bits import is_code

LARGE = 32 << 20  # bytes of a weight that is worth reading again


class Ends:
    """A context in which `leave` lets the weights of both ends go; whoever runs one of them has its
    weight read again, the same to the bit. Ends that are small, not in main memory, or not stored
    as they are run, stay."""

    def __init__(self, checkpoint: Checkpoint):
        self._weights = checkpoint.weights
        self._ends = list(_ends(checkpoint))
        self._away: set[str] = set()  # names of what is stored
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Ends:
        self._hooks = [
            module.register_forward_pre_hook(lambda module, _, name=name: self._come(name, module))
            for name, module in self._ends
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for name, module in self._ends:
            self._come(name, module)
        for hook in self._hooks:
            hook.remove()

    def leave(self) -> None:
        """Until they are run again, both ends are without weights."""
        for name, module in self._ends:
            module.weight.data = module.weight.new_empty(0)
            self._away.add(name)

    def _come(self, name: str, module: Any) -> None:
        if name in self._away:
            module.weight.data = self._weights.read(name).to(module.weight.dtype)
            self._away.remove(name)


def _ends(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """The modules with the names of what their weights are stored as."""
    model, weights = checkpoint.model, checkpoint.weights
    sources: dict[int, list[str]] = {}  # by parameter: tied ones are one
    for source, target in weights.targets(model).items():
        plain = target.pattern is None and not is_code(weights.stored[source].dtype)
        if plain and "." in target.name:
            owner, _, last = target.name.rpartition(".")
            parameter = getattr(model.get_submodule(owner), last, None)
            sources.setdefault(id(parameter), []).append(source)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if weight is None or weight.device.type != "cpu" or weight.nbytes < LARGE:
            continue
        names = sources.get(id(weight), [])
        if len(names) == 1 and weights.stored[names[0]].shape == tuple(weight.shape):
            yield names[0], module
