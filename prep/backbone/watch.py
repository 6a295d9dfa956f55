"""What the backbone's matrices receive from calibration text, and codes that keep what they make of
it.

A sweep's observer: hooks on every linear module outside of the experts sum the second moments of
what it receives. Where all passes have met at a layer's experts, all that ran since the layer
before is done: its codes are found and kept, and the moments are dropped, so that one layer's are
in memory at a time. A sweep that goes on after an interruption runs the backbone again, and layers
whose codes are there are not watched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from smoe.artifacts import safetensors_file
from smoe.prep.backbone.compensate import Coded, compensated, inverse_factor
from smoe.prep.backbone.quantise import BLOCK, Known, block_of
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry
from smoe.prep.sweep.forward import Arrays, AtExperts
from smoe.prep.sweep.passes import Plain
from smoe.prep.workdir import FINISHED

TOKENS = 8192  # of the text, evenly spaced, in a moment; for wide inputs `PER_COLUMN` a column
PER_COLUMN = 2
FOLDER = Path(FINISHED) / "backbone"
WIDEST = 8192  # columns; what is wider is rounded: its moment's inverse would take gigabytes


def linears(checkpoint: Checkpoint) -> dict[str, torch.nn.Linear]:
    """The linear modules of the backbone whose weights are in memory, by name."""
    inside = tuple(f"{name}." for name, _ in checkpoint.layers)
    return {
        name: module
        for name, module in checkpoint.model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.startswith(inside)
        and not module.weight.is_meta
    }


def is_watched(sizes: Known, n_out: int, n_in: int) -> bool:
    """Whether the codes of a matrix `[n_out, n_in]` go by what it receives."""
    return sizes.bits(n_out, n_in, "int4") == 4 and BLOCK <= n_in <= WIDEST


class BackboneCodes:
    """An observer that finds the codes of a backbone in int4 and keeps them under `directory`, for
    `known` to read. `tokens` are those of the text."""

    name = "backbone"

    def __init__(self, checkpoint: Checkpoint, directory: Path, tokens: int):
        self._folder, self._tokens = directory / FOLDER, tokens
        self._folder.mkdir(parents=True, exist_ok=True)
        sizes = _sizes(checkpoint)
        self._modules = {
            name: module
            for name, module in linears(checkpoint).items()
            if is_watched(sizes, module.out_features, module.in_features)
        }
        self._moments: dict[str, torch.Tensor] = {}
        self._owner: dict[str, str] = {}  # which module's moment a module has
        self._last: tuple[torch.Tensor | None, str] = (None, "")
        self._layer, self._coded = 0, set[str]()
        self._hooks = [
            module.register_forward_pre_hook(partial(self._receive, name))
            for name, module in self._modules.items()
        ]

    def _receive(self, name: str, module: torch.nn.Module, given: tuple) -> None:
        """Before a module runs in a pass without autograd: observers may run it on something else.
        Modules that receive the very same tensor share a moment."""
        done = name in self._coded or self._file(self._layer).exists()
        if done or not given or not Plain.is_here():
            return
        x, owner = given[0], name
        if self._last[0] is x:
            owner = self._last[1]
        else:
            self._last = (x, name)
        if self._owner.setdefault(name, owner) != name:
            return
        width = x.shape[-1]
        step = max(1, self._tokens // max(TOKENS, PER_COLUMN * width))
        seen = x.detach().reshape(-1, width)[::step].float()
        if name not in self._moments:
            self._moments[name] = torch.zeros(width, width, device=x.device)
        self._moments[name].addmm_(seen.T, seen)

    def visit(self, at: AtExperts) -> Arrays:
        self._keep(at.layer)
        return {}

    def resume(self, at: AtExperts, known: Arrays) -> None:
        self._keep(at.layer)

    def finish(self) -> list[Arrays]:
        self._keep(self._layer)  # what ran after the last layer's experts
        for hook in self._hooks:
            hook.remove()
        return []

    def _keep(self, layer: int) -> None:
        """Find and keep the codes of all that ran before `layer`'s experts."""
        file, arrays = self._file(layer), Arrays()
        if not file.exists():
            owners = list(self._moments)
            factors = {name: inverse_factor(self._moments.pop(name)) for name in owners}
            for name, owner in self._owner.items():
                module = self._modules[name]
                block = block_of(4, module.in_features)
                coded = compensated(module.weight, factors[owner], 4, block)
                arrays |= {f"{name}.codes": coded.codes, f"{name}.scale": coded.scale}
            safetensors_file.save(file, arrays)
        self._coded |= _stems(safetensors_file.read_header(file).entries)
        self._owner.clear()
        self._moments.clear()
        self._last, self._layer = (None, ""), layer + 1

    def _file(self, layer: int) -> Path:
        return self._folder / f"{layer:02d}.safetensors"


def known(checkpoint: Checkpoint, directory: Path) -> Known:
    """What `quantise.reduce` goes by, with the codes that a sweep left under `directory`, if one
    did."""
    weights = {
        name: module.weight.detach().float().cpu().numpy()
        for name, module in linears(checkpoint).items()
    }
    codes = {}
    for file in sorted((directory / FOLDER).glob("*.safetensors")):
        arrays = safetensors_file.load(file)
        for name in _stems(arrays):
            codes[name] = Coded(arrays[f"{name}.codes"], arrays[f"{name}.scale"], 4)
    return dataclasses.replace(_sizes(checkpoint), weights=weights, codes=codes)


def _sizes(checkpoint: Checkpoint) -> Known:
    hidden = expert_geometry(checkpoint.layers[0][1])[1]
    return Known(vocabulary=int(checkpoint.config.vocab_size), hidden=hidden)


def _stems(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}
