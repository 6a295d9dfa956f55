"""What a model is, whether it can be prepared, and what that takes: from its config and the headers
of its weights.

Nothing large is read or computed, so it works before the weights are downloaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING

from smoe.artifacts.manifest import STATE_KINDS
from smoe.prep.backbone.quantise import check_precision
from smoe.prep.checkpoint.checkpoint import read_config
from smoe.prep.checkpoint.families import empty_model, refuse_without_seam, text_class
from smoe.prep.checkpoint.few_bits import kept_encoding, quantiser_of
from smoe.prep.checkpoint.hub import Remote
from smoe.prep.checkpoint.seam import experts_modules, probe_gate
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.checkpoint.weights import Weights, open_weights
from smoe.prep.errors import PrepError
from smoe.prep.estimate import (
    Sizes,
    Work,
    bundle_bytes,
    device_bytes,
    disk_bytes,
    memory_bytes,
)
from smoe.prep.options import PRICE_TOKENS, STORED, Recipe
from smoe.prep.progress import duration
from smoe.prep.timing import stage_seconds


@dataclass(frozen=True)
class Inspection:
    """Sizes in bytes, counts of parameters, time in seconds. `refusal` says why the model cannot be
    prepared, `weights` what is wrong with its weights; both are empty if nothing is."""

    family: str
    architecture: str
    refusal: str
    weights: str
    layers: int
    experts: int  # of the largest layer
    top_k: int | None
    hidden: int
    width: int
    parameters: int
    expert_parameters: int
    active_parameters: int | None
    download: int | None  # of the weights, if they or their index are there
    bundle: int
    disk: int
    memory: int
    device: tuple[
        int, int
    ]  # memory of the runtime besides its KV cache: at least, and with all experts resident
    state: dict[str, int]  # bytes of a token in the KV cache, at most, by the kind of a state
    seconds: float | None
    stage_seconds: dict[str, float]  # of those that `Progress.seconds` will have; {}: not known
    stage_memory: dict[str, int]
    encoding: str
    backbone: str  # its precision
    tokens: int

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        used = "" if self.top_k is None else f", {self.top_k} used per token"
        active = ""
        if self.active_parameters is not None:
            active = f", {_count(self.active_parameters)} used per token"
        hours = ""
        if self.seconds is not None:
            hours = f"; about {duration(self.seconds)} on this machine"
        verdict = f"cannot be prepared: {self.refusal}" if self.refusal else "can be prepared"
        return [
            f"{self.family} ({self.architecture}): {verdict}",
            f"{self.layers} MoE layers of {self.experts} experts{used}; hidden {self.hidden}, "
            f"width {self.width}",
            f"{_count(self.parameters)} parameters, {_count(self.expert_parameters)} in experts"
            f"{active}",
            f"weights: {self.weights or f'all there, {_size(self.download)}'}",
            f"bundle: about {_size(self.bundle)} with experts in {self.encoding}, backbone in "
            f"{self.backbone}",
            f"device: from {_size(self.device[0])} to {_size(self.device[1])} with all experts in "
            "memory, and the KV cache",
            f"state: {self._state()}",
            f"build: about {_size(self.disk)} of disk, {_size(self.memory)} of memory for "
            f"{self.tokens} tokens{hours}",
            *self._stage_lines(),
        ]

    def _state(self) -> str:
        """What the KV cache takes."""
        kinds = ", ".join(f"{n / 1e3:.1f} kB in {kind}" for kind, n in self.state.items())
        how = "f32 beside this backbone" if self.backbone == "f32" else "a measurement chooses"
        return f"up to {kinds} a token; {how}"

    def _stage_lines(self) -> list[str]:
        """The stages that take a twentieth and more."""
        known = self.stage_seconds.items()
        long = [(s, name) for name, s in known if s >= (self.seconds or 0) / 20]
        said = ", ".join(f"{name} {duration(s)}" for s, name in sorted(long, reverse=True))
        return [f"  of which {said}"] if said else []


@dataclass(frozen=True)
class Families:
    """Every family of the installed `transformers` that offers the experts interface: name, how its
    experts lie in memory, and the class that generates text, or "" if there is none."""

    transformers: str
    families: list[dict[str, str]]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        lines = [
            f"{len(self.families)} families of transformers {self.transformers} offer the experts "
            "interface:"
        ]
        for family in self.families:
            text = family["text"] or "no model generates text"
            lines.append(f"  {family['family']:22} {family['experts']:24} {text}")
        return lines


def _count(parameters: int) -> str:
    if parameters < 1e8:
        return f"{parameters / 1e6:.2f} million"
    return f"{parameters / 1e9:.2f} billion"


def _size(nbytes: int | None) -> str:
    size = nbytes or 0
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def inspect(
    path: str | Path,
    encoding: str = STORED,
    tokens: int = 65536,
    prices: int = PRICE_TOKENS,
    backbone: str = "f32",
    quantiser: str | None = None,
    own: int | None = None,
) -> Inspection:
    """Look at the checkpoint at `path`, a directory that needs a config.json and no more, or the
    name ORG/NAME[@REVISION] of a repository, of which its config and headers are fetched, for a
    build in `encoding` with a `backbone` of that precision and so many calibration `tokens` (0:
    without such text), of which so many for `prices`, with the `quantiser` of that name, and as
    many `own` tokens besides, which the model writes itself (None: what a build would have). A
    config that cannot be read, or is of a family that cannot be run, is a `PrepError`."""
    check_precision(backbone)
    remote = Remote.of(path)
    path = remote.path if remote else Path(path)
    config = read_config(path)
    decoder = quantiser_of(config, path)
    if encoding == STORED:
        half = config.get_text_config().dtype == torch.float16
        encoding = kept_encoding(decoder) or ("f16" if half else "bf16")
    model = empty_model(config, path)
    refuse_without_seam(model, path)
    sizes = Sizes.of(model, decoder)
    work = _work(Recipe(encoding, backbone, quantiser, prices, self_tokens=own), tokens)
    opened = remote.headers if remote else partial(open_weights, path)
    download, wrong, files = _weights(partial(opened, decoder), model)
    refusal = _refusal(model)
    seconds = {} if refusal else stage_seconds(sizes, work, model, () if remote else files)
    memory = memory_bytes(sizes, work)
    return Inspection(
        family=model.config.model_type,
        architecture=type(model).__name__,
        refusal=refusal,
        weights=wrong,
        layers=len(sizes.layers),
        experts=max(count for count, _, _ in sizes.layers),
        top_k=sizes.top_k,
        hidden=model.config.get_text_config().hidden_size,
        width=sizes.layers[0][2],
        parameters=sizes.backbone + sizes.in_experts,
        expert_parameters=sizes.in_experts,
        active_parameters=sizes.active,
        download=download,
        bundle=bundle_bytes(sizes, work),
        disk=disk_bytes(sizes, work),
        memory=max(memory.values()),
        device=device_bytes(sizes, work),
        state={kind: sizes.state_bytes(kind) for kind in STATE_KINDS},
        seconds=sum(seconds.values()) if seconds else None,
        stage_seconds={stage: round(s, 3) for stage, s in seconds.items()},
        stage_memory=memory,
        encoding=encoding,
        backbone=backbone,
        tokens=work.tokens,
    )


def _work(recipe: Recipe, tokens: int) -> Work:
    """What is to be built with so many calibration tokens; a `PrepError` where that cannot be."""
    if tokens:
        Calibration("", tokens).refuse_wrong()
    recipe.refuse_wrong_self(calibration=tokens > 0, profiled=False)
    recipe = recipe.resolved(recipe.encoding, calibration=tokens > 0, profiled=False)
    return Work.of(recipe, tokens, recipe.self_tokens or 0)


def families() -> Families:
    """The families that can be prepared, and those that offer no text."""
    root = Path(transformers.__file__).parent / "models"
    rows = []
    for file in sorted(root.glob("*/modeling_*.py")):
        layouts = re.findall(
            r"^@use_experts_implementation(?:\(([^)]*)\))?$", file.read_text("utf-8"), re.MULTILINE
        )
        if layouts:
            name = file.parent.name
            layout, text = _layout(layouts[0]), _text_class(name)
            rows.append({"family": name, "experts": layout, "text": text})
    return Families(transformers=transformers.__version__, families=rows)


def _layout(flags: str) -> str:
    words = {
        "is_transposed=True": "transposed",
        "is_concatenated=False": "interleaved",
        "has_bias=True": "biased",
        "has_gate=False": "not gated",
        "has_post_expert_norm=True": "normalised",
    }
    return ", ".join(word for flag, word in words.items() if flag in flags) or "gated"


def _text_class(family: str) -> str:
    """The class that generates text: of the text decoder, where a family has more parts than "
    "one."""
    for name in (f"{family}_text", family, f"{family}_mm_model"):
        model_class = text_class(CONFIG_MAPPING[name]) if name in CONFIG_MAPPING else None
        if model_class:
            return model_class.__name__
    return ""


def _refusal(model: torch.nn.Module) -> str:
    """Why the experts cannot be run on a device, '' if they can."""
    try:
        probe_gate(experts_modules(model)[0][1])
    except PrepError as error:
        return str(error)
    return ""


def _weights(
    opened: Callable[[], Weights], model: transformers.PreTrainedModel
) -> tuple[int | None, str, list[Path]]:
    """Bytes of the weights, what is wrong with them, and their files."""
    try:
        weights = opened()
        total = weights.nbytes(weights.stored)
        missing = weights.check(model).missing_keys - model.all_tied_weights_keys.keys()
    except PrepError as error:
        return None, str(error), []
    if missing:
        lost = f"{len(missing)} are missing, {min(missing)} first; download the checkpoint again"
        return total, lost, weights.files
    return total, "", weights.files
