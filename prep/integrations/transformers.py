"""A bundle's experts inside a `transformers` model, at any level and within a budget of memory: the
rest of the model is its own.

    model = load("MODEL", "model.smoe", memory="2GiB", level=2)
    model.generate(...)

or, beside experts that are in memory already:

    with attach(model, "model.smoe", memory="2GiB"):
        model.generate(...)
        model.set_experts_implementation("eager")  # its own again
        model.set_experts_implementation("smoe")
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from smoe.artifacts import Bundle, open_bundle
from smoe.prep.bundle_experts import run_by
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import ExpertsLayer, ExpertsModule, Run, expert_geometry, layers_used
from smoe.prep.errors import PrepError
from smoe.runtime.alone import ExpertsAlone
from smoe.runtime.sizes import parse_size

NAME = "smoe"
_attached: weakref.WeakKeyDictionary[ExpertsModule, tuple[int, Run]] = weakref.WeakKeyDictionary()


def load(
    checkpoint: str | Path,
    bundle: str | Path,
    memory: int | str | None = None,
    level: int | None = None,
) -> PreTrainedModel:
    """The model at `checkpoint` in float32 on the processor, whose own experts are never read:
    those of `bundle`, which was built from it, run in their place as by `attach`.

    A bundle of another checkpoint is a `PrepError`."""
    source, opened = open_checkpoint(checkpoint), open_bundle(bundle)
    if opened.manifest.provenance.get("source_fingerprint") != source.fingerprint():
        raise PrepError(f"{bundle} was not built from {checkpoint}: their fingerprints differ.")
    source.move_backbone("cpu")
    model = source.model
    with contextlib.suppress(OSError):  # where there is none, the config's own stays
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    _attach(model, opened, memory, level)
    return model


def attach(
    model: PreTrainedModel,
    bundle: str | Path,
    memory: int | str | None = None,
    level: int | None = None,
) -> Attached:
    """Register the experts of `bundle` as the implementation "smoe" for `model`, and choose it. No
    gradient goes through them.

    They are read up to `level` (None: whole); `memory`, bytes or like "2GiB", is what may stay of
    them (None: all). A bundle of other experts is a `PrepError`, a level that it lacks a
    `BundleError`."""
    return _attach(model, open_bundle(bundle), memory, level)


def _attach(
    model: PreTrainedModel, bundle: Bundle, memory: int | str | None, level: int | None
) -> Attached:
    modules = layers_used(model)
    _refuse_others(bundle, modules)
    counts = [layer.experts for layer in bundle.manifest.layers]
    most = sum(counts) * max(layout.nbytes for layout in bundle.layouts)
    experts = ExpertsAlone(bundle, most if memory is None else parse_size(memory), level)
    return Attached(model, [module for _, module in modules], experts)


class Attached:
    """Experts that run in the place of a model's own until the end of a `with`, or of the model."""

    def __init__(
        self, model: PreTrainedModel, modules: Sequence[ExpertsModule], experts: ExpertsAlone
    ):
        self._model, self._modules = weakref.ref(model), weakref.WeakSet(modules)
        self._before = model.get_experts_implementation()
        self._release = weakref.finalize(model, experts.close)
        run = run_by(experts)
        for layer, module in enumerate(modules):
            _attached[module] = layer, run
        ALL_EXPERTS_FUNCTIONS.register(NAME, _run)
        model.set_experts_implementation(NAME)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The model's own experts again."""
        for module in self._modules:
            _attached.pop(module, None)
        model = self._model()
        if model is not None:
            model.set_experts_implementation(self._before)
        self._release()


def _run(
    module: ExpertsModule, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    if module not in _attached:
        raise PrepError(
            'The experts of this model are to be run by "smoe", and no bundle is attached to it; '
            "attach one, or choose another implementation."
        )
    layer, run = _attached[module]
    return run(layer, module, hidden, ids, weights)


def _refuse_others(bundle: Bundle, modules: list[ExpertsLayer]) -> None:
    theirs = [expert_geometry(module) for _, module in modules]
    ours = [(a.experts, a.hidden, a.width) for a in bundle.manifest.layers]
    if theirs != ours:
        raise PrepError(
            f"{bundle.path} has {_said(ours)}, and this model {_said(theirs)}; attach the bundle "
            "that was built from it."
        )


def _said(layers: list[tuple[int, int, int]]) -> str:
    if not layers:
        return "no MoE layers"
    experts, hidden, width = layers[0]
    return f"{len(layers)} MoE layers, the first of {experts} experts of {width} x {hidden}"
