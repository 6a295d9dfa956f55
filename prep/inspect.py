"""What a model is, whether it can be prepared, and what that takes: from its config and the headers
of its weights.

Nothing large is read or computed, so it works before the weights are downloaded.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer

from smoe.artifacts.encodings import record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.tables import TABLES, nbytes
from smoe.artifacts.tables import TRACE as TRACE_TABLES
from smoe.prep.backbone.quantise import check_precision
from smoe.prep.checkpoint.checkpoint import read_config
from smoe.prep.checkpoint.families import empty_model, refuse_without_seam, text_class
from smoe.prep.checkpoint.few_bits import bytes_per_weight, kept_encoding, quantiser_of
from smoe.prep.checkpoint.hub import Remote
from smoe.prep.checkpoint.seam import expert_geometry, experts_modules, probe_gate
from smoe.prep.checkpoint.weights import Weights, open_weights
from smoe.prep.errors import PrepError
from smoe.prep.options import PRICE_TOKENS, STORED, default_quantiser
from smoe.prep.pack.pack import PAGE
from smoe.prep.prices.calibrate import AT_RANDOM, SIZES
from smoe.prep.prices.calibrate import TOKENS as FIT_TOKENS
from smoe.prep.prices.price import DRAWS
from smoe.prep.progress import duration
from smoe.prep.statistics.profile import SAMPLE, TRACE
from smoe.prep.statistics.sums import MAX_RANKS
from smoe.prep.sweep.gradients import IN_MEMORY
from smoe.runtime.allowance import usual_process
from smoe.runtime.budget import RUNTIME, SESSION
from smoe.runtime.choose.prices import KINDS

# Measured with bench/large.py (docs/log.md, 2026-11-22); all of them are about, and say so where
# they are shown.
PROCESS = (
    1.0e9  # bytes: Python, torch and transformers, and what an export takes besides the weights
)
READ = 0.2e9  # bytes of experts per second: read, merged, checked
PACK = 0.11e9  # the same, encoded and written as well
QUANTISE = 0.35e6  # weights per second, where nested codes are calibrated (docs/log.md, 2026-11-25)
EXPORT = 5.5  # seconds per MoE layer
# Bytes of a weight of the backbone (backbone/quantise.py: blocks of 32 share a float32 scale).
BACKBONE = {"f32": 4.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}
SMALL = 2.0  # how much longer many small products on widened weights take than one large one


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
    seconds: float | None
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
            f"build: about {_size(self.disk)} of disk, {_size(self.memory)} of memory for "
            f"{self.tokens} tokens{hours}",
        ]


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
) -> Inspection:
    """Look at the checkpoint at `path`, a directory that needs a config.json and no more, or the
    name ORG/NAME[@REVISION] of a repository, of which its config and headers are fetched, for a
    build in `encoding` with a `backbone` of that precision and so many calibration `tokens`, of
    which so many for `prices`. A config that cannot be read, or is of a family that cannot be run,
    is a `PrepError`."""
    check_precision(backbone)
    remote = Remote.of(path)
    path = remote.path if remote else Path(path)
    config = read_config(path)
    quantiser = quantiser_of(config, path)
    if encoding == STORED:
        half = config.get_text_config().dtype == torch.float16
        encoding = kept_encoding(quantiser) or ("f16" if half else "bf16")
    model = empty_model(config, path)
    refuse_without_seam(model, path)
    sizes = _Sizes.of(model, encoding, tokens, prices, _shape(model), quantiser, backbone)
    opened = remote.headers if remote else partial(open_weights, path)
    download, wrong = _weights(partial(opened, quantiser), model)
    return Inspection(
        family=model.config.model_type,
        architecture=type(model).__name__,
        refusal=_refusal(model),
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
        bundle=sizes.bundle,
        disk=sizes.disk,
        memory=sizes.memory,
        device=sizes.device,
        seconds=_seconds(sizes, encoding, tokens, prices),
        encoding=encoding,
        backbone=backbone,
        tokens=tokens,
    )


def disk_needed(model: transformers.PreTrainedModel, encoding: str, tokens: int) -> int:
    """About how many bytes a build has on disk at its largest: the bundle, or before it what
    profiling `tokens` keeps."""
    return _Sizes.of(model, encoding, tokens, 0, _shape(model)).disk


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


def _shape(model: torch.nn.Module) -> ExpertShape:
    """The shape of an expert but for its sizes."""
    module = experts_modules(model)[0][1]
    return ExpertShape(
        0, 0, bool(module.has_gate), bool(module.has_bias), bool(module.has_post_expert_norm)
    )


def _refusal(model: torch.nn.Module) -> str:
    """Why the experts cannot be run on a device, '' if they can."""
    try:
        probe_gate(experts_modules(model)[0][1])
    except PrepError as error:
        return str(error)
    return ""


def _weights(
    opened: Callable[[], Weights], model: transformers.PreTrainedModel
) -> tuple[int | None, str]:
    """Bytes of the weights, and what is wrong with them."""
    try:
        weights = opened()
        total = weights.nbytes(weights.stored)
        missing = weights.check(model).missing_keys - model.all_tied_weights_keys.keys()
    except PrepError as error:
        return None, str(error)
    return (
        total,
        f"{len(missing)} are missing, {min(missing)} first; download the checkpoint again"
        if missing
        else "",
    )


@dataclass(frozen=True)
class _Sizes:
    layers: list[tuple[int, int, int]]  # experts, hidden, width
    top_k: int | None
    backbone: int  # parameters
    in_experts: int
    active: int | None
    bundle: int
    outputs: int
    memory: int
    device: tuple[int, int]

    @property
    def disk(self) -> int:
        return max(self.bundle, self.outputs)

    @classmethod
    def of(
        cls,
        model: transformers.PreTrainedModel,
        encoding: str,
        tokens: int,
        prices: int,
        shape: ExpertShape,
        quantiser: HfQuantizer | None = None,
        precision: str = "f32",
    ) -> _Sizes:
        modules = [module for _, module in experts_modules(model)]
        layers = [expert_geometry(module) for module in modules]
        per_layer = [sum(p.numel() for p in module.parameters()) for module in modules]
        backbone = sum(p.numel() for p in model.parameters()) - sum(per_layer)
        records = [
            record_layout(
                dataclasses.replace(shape, hidden=hidden, width=width), encoding, PAGE
            ).nbytes
            for _, hidden, width in layers
        ]
        config = model.config.get_text_config()
        top_k = getattr(config, "num_experts_per_tok", None)
        shards = sum(count * record for (count, _, _), record in zip(layers, records, strict=True))
        tables = sum(
            _table_bytes(experts, hidden, top_k or experts, min(tokens, TRACE))
            for experts, hidden, _ in layers
        )
        stored = int(BACKBONE[precision] * backbone)
        copies = 1 if precision == "f32" else 2  # ONNX Runtime lays quantised weights out anew
        fixed = copies * stored + RUNTIME + SESSION * (len(layers) + 1)
        expert = max(n // e for n, (e, _, _) in zip(per_layer, layers, strict=True))
        # In 16 bits what is read and what is made of it exist at once; of codes one expert at a
        # time is decoded.
        layer = 2 * 2 * max(per_layer)
        if quantiser is not None:
            layer = int(bytes_per_weight(quantiser) * max(per_layer)) + 4 * 4 * expert
        activations = 4 * tokens * config.hidden_size * 4  # residual, received, all of it, outputs
        held = max(4 * backbone, IN_MEMORY if prices else 0)  # by the export, or for the way back
        active = None
        if top_k:
            used = (n * top_k // e for n, (e, _, _) in zip(per_layer, layers, strict=True))
            active = backbone + sum(used)
        return cls(
            layers=layers,
            top_k=top_k,
            backbone=backbone,
            in_experts=sum(per_layer),
            active=active,
            bundle=shards + stored + tables + (32 << 20),
            outputs=sum(tokens * hidden * 4 for _, hidden, _ in layers),
            memory=int(PROCESS + 4 * backbone + held + layer + activations),
            device=(_device(fixed + (top_k or 1) * max(records)), _device(fixed + shards)),
        )


def _device(engine: int) -> int:
    """Bytes of a process on the device with an engine of so many."""
    return engine + usual_process(engine)


def _table_bytes(experts: int, hidden: int, top_k: int, traced: int) -> int:
    """Of one layer, with its part of the trace."""
    ranks, levels = min(MAX_RANKS, experts), 8  # of a nested encoding: small beside the rest
    sizes = {"E": experts, "P": experts, "H": hidden, "R": ranks, "J": levels}
    return nbytes(TABLES, sizes) + nbytes(TRACE_TABLES, {"T": traced, "K": top_k, "E": experts})


def _seconds(sizes: _Sizes, encoding: str, tokens: int, prices: int) -> float | None:
    """About how long a build takes on this machine: products at the speed that is measured now, the
    rest by rates."""
    if sizes.active is None:
        return None
    sampled = min(tokens, SAMPLE) * sizes.in_experts
    multiplied = sizes.active * tokens + sampled + _priced(sizes, min(prices, tokens * 3 // 4))
    products = SMALL * 2 * multiplied / _products_per_second()
    quantised = sizes.in_experts / QUANTISE if default_quantiser(encoding) == "calibrated" else 0
    return (
        products
        + quantised
        + 2 * sizes.in_experts * (1 / READ + 1 / PACK)
        + EXPORT * len(sizes.layers)
    )


def _priced(sizes: _Sizes, tokens: int) -> int:
    """Multiplications for prices: two sweeps, in each of them forward and, for every draw, back;
    all experts on every token; and the runs that prices are fitted to."""
    assert sizes.active is not None
    if not tokens:
        return 0
    runs = 1 + len(KINDS) * (len(SIZES) + len(AT_RANDOM))
    return (
        tokens * (2 * (1 + DRAWS) * sizes.active + sizes.in_experts)
        + runs * FIT_TOKENS * sizes.active
    )


def _products_per_second() -> float:
    """Floating-point operations per second in float32 products of the size that profiling has."""
    x, w = torch.randn(256, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        x @ w
        best = min(best, time.perf_counter() - started)
    return 2 * 256 * 1024 * 1024 / best
