"""What a model is, whether it can be prepared, and what that takes: from its config and the headers of its weights.

Nothing large is read or computed, so it works before the weights are downloaded.
"""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING

from smoe.artifacts.encodings import encoding_named, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.prep.checkpoint.checkpoint import read_config
from smoe.prep.checkpoint.families import empty_model, refuse_without_seam, text_class
from smoe.prep.checkpoint.seam import expert_geometry, experts_modules, probe_gate
from smoe.prep.checkpoint.weights import open_weights
from smoe.prep.errors import PrepError
from smoe.prep.options import PRICE_TOKENS
from smoe.prep.pack.pack import PAGE
from smoe.prep.prices.calibrate import AT_RANDOM, SIZES
from smoe.prep.prices.calibrate import TOKENS as FIT_TOKENS
from smoe.prep.prices.price import DRAWS, GRAPH
from smoe.prep.statistics.profile import SAMPLE, TRACE
from smoe.runtime.budget import RUNTIME, SESSION
from smoe.runtime.choose.prices import KINDS

# Measured with python -m bench large (docs/log.md, 2026-11-22); all of them are about, and say so where they are shown.
PROCESS = (
    1.0e9  # bytes: Python, torch and transformers, and what an export takes besides the weights
)
READ = 0.2e9  # bytes of experts per second: read, merged, checked
PACK = 0.11e9  # the same, encoded and written as well
QUANTISE = 0.35e6  # weights per second, where nested codes are calibrated (docs/log.md, 2026-11-25)
EXPORT = 5.5  # seconds per MoE layer
TABLES, PREDICTORS = (
    48,
    6,
)  # bytes by the format, of a pair of experts, and of a hidden value and an expert
SMALL = 2.0  # how much longer many small products on widened weights take than one large one


@dataclass(frozen=True)
class Inspection:
    """Sizes in bytes, counts of parameters, time in seconds. `refusal` says why the model cannot be prepared, `weights`
    what is wrong with its weights; both are empty if nothing is."""

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


def inspect(
    path: str | Path, encoding: str = "bf16", tokens: int = 65536, prices: int = PRICE_TOKENS
) -> Inspection:
    """Look at the checkpoint directory `path`, which needs a config.json and no more, for a build in `encoding` with so
    many calibration `tokens`, of which so many for `prices`. A config that cannot be read, or is of a family that cannot be
    run, is a `PrepError`."""
    path = Path(path)
    model = empty_model(read_config(path), path)
    refuse_without_seam(model, path)
    sizes = _Sizes.of(model, encoding, tokens, prices, _shape(model))
    download, wrong = _weights(path, model)
    config = model.config.get_text_config()
    return Inspection(
        model.config.model_type, type(model).__name__, _refusal(model), wrong,
        len(sizes.layers), max(count for count, _, _ in sizes.layers), sizes.top_k,
        config.hidden_size, sizes.layers[0][2],
        sizes.backbone + sizes.in_experts, sizes.in_experts, sizes.active,
        download, sizes.bundle, sizes.disk, sizes.memory, sizes.device, _seconds(sizes, encoding, tokens, prices),
    )  # fmt: skip


def disk_needed(model: transformers.PreTrainedModel, encoding: str, tokens: int) -> int:
    """About how many bytes a build has on disk at its largest: the bundle, or before it what profiling `tokens` keeps."""
    return _Sizes.of(model, encoding, tokens, 0, _shape(model)).disk


def families() -> list[dict[str, str]]:
    """Every family of the installed `transformers` that offers the experts interface: name, how its experts lie in
    memory, and the class that generates text, or what is missing."""
    root = Path(transformers.__file__).parent / "models"
    found = []
    for file in sorted(root.glob("*/modeling_*.py")):
        layouts = re.findall(
            r"^@use_experts_implementation(?:\(([^)]*)\))?$", file.read_text("utf-8"), re.MULTILINE
        )
        if layouts:
            name = file.parent.name
            found.append(
                {"family": name, "experts": _layout(layouts[0]), "text": _text_class(name)}
            )
    return found


def _layout(flags: str) -> str:
    said = {
        "is_transposed=True": "transposed",
        "is_concatenated=False": "interleaved",
        "has_bias=True": "biased",
        "has_gate=False": "not gated",
        "has_post_expert_norm=True": "normalised",
    }
    return ", ".join(word for flag, word in said.items() if flag in flags) or "gated"


def _text_class(family: str) -> str:
    """The class that generates text: of the text decoder, where a family has more parts than one."""
    for name in (f"{family}_text", family, f"{family}_mm_model"):
        found = text_class(CONFIG_MAPPING[name]) if name in CONFIG_MAPPING else None
        if found:
            return found.__name__
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


def _weights(path: Path, model: transformers.PreTrainedModel) -> tuple[int | None, str]:
    """Bytes of the weight files, and what is wrong with them."""
    try:
        weights = open_weights(path)
        total = sum(file.stat().st_size for file in weights.files)
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
        cls, model: torch.nn.Module, encoding: str, tokens: int, prices: int, shape: ExpertShape
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
            TABLES * count * count
            + PREDICTORS * hidden * count
            + min(tokens, TRACE) * (2 * count + 6 * (top_k or count))
            for count, hidden, _ in layers
        )
        fixed = 4 * backbone + RUNTIME + SESSION * (len(layers) + 1)
        activations = 3 * tokens * config.hidden_size * 4
        return cls(
            layers, top_k, backbone, sum(per_layer),
            backbone + sum(n * top_k // count for n, (count, _, _) in zip(per_layer, layers, strict=True)) if top_k else None,
            shards + 4 * backbone + tables + (32 << 20),
            sum(tokens * hidden * 4 for _, hidden, _ in layers),
            int(PROCESS + max(8 * backbone, 4 * backbone + (GRAPH if prices else 0)) + 2 * 2 * max(per_layer) + activations),
            (fixed + (top_k or 1) * max(records), fixed + shards),
        )  # fmt: skip


def _seconds(sizes: _Sizes, encoding: str, tokens: int, prices: int) -> float | None:
    """About how long a build takes on this machine: products at the speed that is measured now, the rest by rates."""
    if sizes.active is None:
        return None
    sampled = min(tokens, SAMPLE) * sizes.in_experts
    multiplied = sizes.active * tokens + sampled + _priced(sizes, min(prices, tokens * 3 // 4))
    products = SMALL * 2 * multiplied / _products_per_second()
    quantised = sizes.in_experts / QUANTISE if encoding_named(encoding).levels > 1 else 0
    return (
        products
        + quantised
        + 2 * sizes.in_experts * (1 / READ + 1 / PACK)
        + EXPORT * len(sizes.layers)
    )


def _priced(sizes: _Sizes, tokens: int) -> int:
    """Multiplications for prices: two sweeps, in each of them forward and, for every draw, back; all experts on every
    token; and the runs that prices are fitted to."""
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
