"""Tracing the backbone with `transformers`' exporter: what to trace it with, and the graph that
comes out.

The model is traced in the middle of a sequence: with a cache, and a few tokens after it. What its
cache is made of is read off a real run, so no kind of state needs to be known.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from smoe.prep.backbone.positions import held_still
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import Run, experts_run_by, symbolic, zeros
from smoe.prep.errors import PrepError

# Two lengths that no other dimension of a sample has a reason to follow.
PAST, NEW = 5, 3
# Of the largest logit: what two orders of the same arithmetic may differ by, with a margin.
CLOSE = 1e-3


@dataclass
class Sample:
    """Inputs to trace with: a cache of `PAST` tokens and some after it. `leaves` are the cache's
    tensors, and `growing` says along which axis each grows (-1: it does not)."""

    inputs: dict[str, Any]
    shapes: dict[str, object]
    leaves: list[torch.Tensor]
    growing: list[int]


@torch.no_grad()
def sample(checkpoint: Checkpoint, one_at_a_time: bool) -> Sample:
    """Run the model on a few tokens, without its experts, and read off what its cache is made of.

    With `one_at_a_time` the graph will take exactly one token.
    """
    model = checkpoint.model
    register_cache_pytrees_for_model(model)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, PAST + NEW), generator=torch.Generator().manual_seed(0))
    with experts_run_by(model, checkpoint.layers, zeros):
        cache = model(input_ids=ids[:, :PAST], use_cache=True).past_key_values
        longer = torch.utils._pytree.tree_leaves(
            model(input_ids=ids, use_cache=True).past_key_values
        )
    leaves = torch.utils._pytree.tree_leaves(cache)
    new = ids[:, PAST : PAST + 1] if one_at_a_time else ids[:, PAST:]
    inputs = {"input_ids": new, "past_key_values": cache, "use_cache": True}
    growing = [_growing(a.shape, b.shape) for a, b in zip(leaves, longer, strict=True)]
    auto = torch.export.Dim.AUTO
    shapes: dict[str, object] = {
        "input_ids": {} if one_at_a_time else {1: auto},
        "past_key_values": [{} if axis < 0 else {axis: auto} for axis in growing],
    }
    return Sample(inputs, shapes, leaves, growing)


def _growing(short: torch.Size, long: torch.Size) -> int:
    axes = [axis for axis, (a, b) in enumerate(zip(short, long, strict=True)) if a != b]
    if len(axes) > 1 or any(long[axis] - short[axis] != NEW for axis in axes):
        raise PrepError(
            f"The model's state goes from {tuple(short)} to {tuple(long)} in {NEW} tokens; this "
            "version "
            "keeps state that grows along one axis by one per token, or not at all."
        )
    return axes[0] if axes else -1


def trace(checkpoint: Checkpoint, sample: Sample) -> ir.Graph:
    """The graph of the backbone, one `smoe::Experts` node per layer; a `PrepError` if the exporter
    cannot make it."""
    config = OnnxConfig(dynamic_shapes=sample.shapes, ort_fusions="cpu")
    model, layers = checkpoint.model, checkpoint.layers
    with held_still(model), experts_run_by(model, layers, symbolic), _quiet():
        try:
            model_ir = OnnxExporter().export(model, sample.inputs, config=config).program
        except (
            Exception
        ) as error:  # the exporter is experimental: whatever it raises means the same to the user
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise PrepError(
                f"{checkpoint.path}: transformers' exporter does not trace this family: "
                f"{type(error).__name__}: {reason}"
            ) from error
        LiftConstantsToInitializersPass()(model_ir)
        ShapeInferencePass()(model_ir)  # the exporter's fusions leave values without a type
    return model_ir.graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress, its warnings about optional packages and what its passes leave
    undone say nothing to our user: what matters is raised, or found by `check.py`."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@torch.no_grad()
def continues(checkpoint: Checkpoint, run: Run = zeros) -> bool:
    """Whether the model goes on from its cache with several tokens at once as it would with all of
    them.

    Many models with recurrent state do not: they start afresh unless a single token comes. Theirs
    is traced for one.
    """
    model = checkpoint.model
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(
        0, vocabulary, (1, 2 * NEW + PAST), generator=torch.Generator().manual_seed(1)
    )
    with experts_run_by(model, checkpoint.layers, run):
        whole = model(input_ids=ids, use_cache=False).logits[:, PAST:]
        cache = model(input_ids=ids[:, :PAST], use_cache=True).past_key_values
        try:
            parts = [
                model(input_ids=ids[:, at : at + NEW], past_key_values=cache, use_cache=True).logits
                for at in (PAST, PAST + NEW)
            ]
        except (RuntimeError, ValueError, IndexError):  # some do not even run
            return False
    return bool((torch.cat(parts, 1) - whole).abs().max() <= CLOSE * whole.abs().max())
