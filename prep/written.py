"""Text that the model writes itself: what calibration learns from where no other text is given.

The first token of a text is drawn uniformly, every further one as the model says (temperature 1,
nothing cut off), so that all that the model knows comes up as often as the model thinks it does. A
token that ends a text is followed by a fresh one. Many texts are written at once, the experts by
the runtime's own kernels from shards that are rounded, since only so a step reads them once for all
texts; what is between the experts runs as `transformers` has it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

from smoe.artifacts import safetensors_file
from smoe.artifacts.bundle import Bundle, layouts_of
from smoe.artifacts.manifest import (
    FORMAT,
    VERSION,
    Backbone,
    Experts,
    Layer,
    Manifest,
    Model,
    Wires,
)
from smoe.artifacts.shard import shard_start
from smoe.artifacts.tables import Tables
from smoe.prep.backbone.positions import reach
from smoe.prep.bundle_experts import run_by
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import ExpertsLayer, expert_geometry, experts_run_by
from smoe.prep.checkpoint.text import Origin
from smoe.prep.errors import PrepError
from smoe.prep.pack.pack import pack
from smoe.prep.progress import Progress
from smoe.prep.sweep.passes import fewest_logits
from smoe.prep.workdir import FINISHED
from smoe.runtime.alone import ExpertsAlone
from smoe.runtime.machine import held_memory, memory_room

LENGTH = 512  # tokens of a text, at most
SHORTEST = 128  # tokens: texts are not made shorter than that, so that more fit into `STATE`
TOGETHER = 64  # texts at once, at most
WIDE = 32  # texts at once that shorter texts are taken for
STATE = 1 << 30  # bytes of attention state of all texts at once
TRIED = 8  # tokens by which a model's state is measured
STREAM = 2  # of the seed: what else is drawn with it has other numbers


@dataclass(frozen=True)
class Shape:
    """How a text of so many tokens is written: `texts` of `length` tokens, `together` at once. It
    follows from the model alone, since it decides the bits."""

    texts: int
    length: int
    together: int

    @classmethod
    def of(cls, tokens: int, state: int, longest: int) -> Shape:
        """For a model with `state` bytes per token of a text, which goes up to `longest` tokens."""
        length = max(SHORTEST, min(LENGTH, STATE // (WIDE * max(1, state))))
        length = min(length, longest, tokens)
        texts = -(-tokens // length)
        together = max(1, min(TOGETHER, texts, STATE // (length * max(1, state))))
        return cls(texts=texts, length=length, together=together)

    @property
    def steps(self) -> int:
        """How often the experts are read, nearly all of them each time."""
        return -(-self.texts // self.together) * self.length


def write(
    checkpoint: Checkpoint,
    directory: Path,
    origin: Origin,
    experts: Experts,
    quantiser: str | None,
    device: str,
    progress: Progress,
) -> np.ndarray:
    """What `origin` says that the model at `checkpoint` writes itself: token ids int64 `[own]`.

    The shards that it is written from are those that a build with this `quantiser` wants in
    `directory`, or, where they take text to make, others that are rounded for the while. Texts that
    an interrupted run finished are kept. A `PrepError` if the model does not give numbers.
    """
    tokens = origin.own
    checkpoint.move_backbone(device)
    state, top_k = measured(checkpoint.model, checkpoint.layers, device)
    shape = Shape.of(tokens, state, reach(checkpoint.config).tokens)
    folder, rounded = directory / FINISHED / "written", directory / FINISHED / "rounded"
    folder.mkdir(parents=True, exist_ok=True)
    batches = range(0, shape.texts, shape.together)
    files = [folder / f"{first:05d}.safetensors" for first in batches]
    missing = [first for first, file in zip(batches, files, strict=True) if not file.exists()]
    if missing:
        calibrated = quantiser == "calibrated"
        shards = rounded if calibrated else directory
        pack(checkpoint, shards, experts.encoding, progress, None if calibrated else quantiser)
        bundle = _bundle(checkpoint, shards, experts, top_k)
        progress.say(
            f"text: the model writes {tokens} tokens itself, {shape.together} texts of "
            f"{shape.length} at once"
        )
        count = progress.counter("text", "steps", shape.steps)
        with _Writer(checkpoint, bundle, state * shape.together * shape.length, device) as writer:
            for number, (first, file) in enumerate(zip(batches, files, strict=True)):
                if first in missing:
                    rows = range(first, min(first + shape.together, shape.texts))
                    drawn = np.stack([draws(origin.seed, row, shape.length) for row in rows])
                    steps = []
                    for ids in writer.texts(drawn):
                        steps.append(ids)
                        count.done(number * shape.length + len(steps))
                    safetensors_file.save(file, {"ids": np.stack(steps, 1).astype(np.int32)})
                else:
                    count.done((number + 1) * shape.length, worked=False)
    shutil.rmtree(rounded, ignore_errors=True)
    texts = [safetensors_file.load(file)["ids"].reshape(-1) for file in files]
    return np.concatenate(texts)[:tokens].astype(np.int64)


def draws(seed: int, row: int, length: int) -> np.ndarray:
    """float64 `[length]` from 0 to 1: what decides the tokens of a text, whatever others there
    are."""
    return np.random.default_rng([seed, STREAM, row]).random(length)


class _Writer:
    """A model with its experts in `bundle`, in a `with`."""

    def __init__(self, checkpoint: Checkpoint, bundle: Bundle, state: int, device: str):
        self._checkpoint, self._device = checkpoint, device
        there, begins = vocabulary(checkpoint)
        self._there = torch.from_numpy(there).to(device)
        self._begins, self._ends = np.flatnonzero(begins), list(checkpoint.end_ids)
        self._options = fewest_logits(checkpoint.model)
        checkpoint.move_backbone(device)
        self._experts = ExpertsAlone(bundle, _memory(state))

    def __enter__(self) -> _Writer:
        self._experts.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._experts.__exit__()

    @torch.no_grad()
    def texts(self, drawn: np.ndarray) -> Iterator[np.ndarray]:
        """Of texts that `drawn` float64 `[n, length]` decide, one token each after another: int64
        `[n]`."""
        model, cache = self._checkpoint.model, None
        ids = self._fresh(drawn[:, 0])
        yield ids
        with experts_run_by(model, self._checkpoint.layers, run_by(self._experts)):
            for draw in drawn.T[1:]:
                given = torch.from_numpy(ids)[:, None].to(self._device)
                result = model(
                    input_ids=given, past_key_values=cache, use_cache=True, **self._options
                )
                cache = result.past_key_values
                said = self._said(result.logits[:, -1], draw)
                ids = np.where(np.isin(ids, self._ends), self._fresh(draw), said)
                yield ids

    def _fresh(self, draws: np.ndarray) -> np.ndarray:
        """Tokens that begin a text, int64 `[n]`."""
        return self._begins[(draws * len(self._begins)).astype(np.int64)]

    def _said(self, logits: torch.Tensor, draws: np.ndarray) -> np.ndarray:
        """Tokens by float `[n, V]` logits, int64 `[n]`."""
        likely = logits.double().masked_fill(~self._there, -torch.inf).softmax(-1).cumsum(-1)
        if not torch.isfinite(likely[:, -1]).all():
            raise PrepError(
                f"{self._checkpoint.path}: the model gives logits that are not finite when it "
                "writes text itself; give --calibration FILE and --self 0 if its weights are right."
            )
        where = torch.from_numpy(draws)[:, None].to(self._device) * likely[:, -1:]
        said = torch.searchsorted(likely, where, right=True)[:, 0]
        return said.clamp(max=int(self._there.nonzero()[-1])).cpu().numpy()


def vocabulary(checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Which token ids there are, and which of them may begin a text: bool `[V]` each. Rows of the
    embedding that the tokenizer does not know, as vocabularies are padded with, are none; special
    tokens and those that end a text begin none."""
    size = int(checkpoint.config.vocab_size)
    there, special = np.ones(size, bool), list(checkpoint.end_ids)
    written = checkpoint.text_files.get("tokenizer.json")
    if written is not None:
        tokenizer = tokenizers.Tokenizer.from_buffer(written)
        known = np.array([*tokenizer.get_vocab(with_added_tokens=True).values()], np.int64)
        there = np.isin(np.arange(size), known)
        added = tokenizer.get_added_tokens_decoder().items()
        special += [i for i, token in added if token.special and i < size]
    begins = there.copy()
    begins[special] = False
    return (there, begins) if begins.any() else (np.ones(size, bool), np.ones(size, bool))


@torch.no_grad()
def measured(model: PreTrainedModel, layers: list[ExpertsLayer], device: str) -> tuple[int, int]:
    """Bytes that `model`, which is on `device`, remembers per token of a text, and how many experts
    of one of `layers` a token uses at most."""
    top_k = 1
    register_cache_pytrees_for_model(model)

    def zeros(layer, module, hidden, ids, weights):
        nonlocal top_k
        top_k = max(top_k, ids.shape[-1])
        return torch.zeros_like(hidden)

    def remembered(tokens: int) -> int:
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        leaves = torch.utils._pytree.tree_leaves(
            model(input_ids=ids, use_cache=True).past_key_values
        )
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))

    with experts_run_by(model, layers, zeros):
        return (remembered(2 * TRIED) - remembered(TRIED)) // TRIED, top_k


def _bundle(checkpoint: Checkpoint, directory: Path, experts: Experts, top_k: int) -> Bundle:
    """The shards in `directory` as a bundle without a backbone."""
    layers = []
    for name, module in checkpoint.layers:
        count, hidden, width = expert_geometry(module)
        layers.append(Layer(name, count, top_k, hidden, width, Wires(*[""] * 6), None, ""))
    model = Model("", "", int(checkpoint.config.vocab_size), 0, ())
    nothing = Backbone("f32", 1, "", (), (), ())
    manifest = Manifest(FORMAT, VERSION, model, tuple(layers), experts, nothing, {}, {})
    layouts = layouts_of(manifest)
    starts = [
        shard_start(directory / manifest.shard(i), layout, experts.page, layer.experts)
        for i, (layer, layout) in enumerate(zip(layers, layouts, strict=True))
    ]
    counts = [layer.experts for layer in layers]
    return Bundle(directory, manifest, layouts, tuple(starts), Tables({}, counts))


def _memory(state: int) -> int:
    """Bytes of experts to hold: what the machine leaves beside the texts' state, which exists twice
    for a moment where it grows, with a reserve."""
    room = memory_room()
    if room is None:
        return 1 << 60
    return room.nbytes * 9 // 10 - (held_memory() or 0) - 2 * state
