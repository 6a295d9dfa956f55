"""What a build takes in bytes, on disk and in memory, known from a config alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import torch
import transformers
from transformers.quantizers.base import HfQuantizer

from smoe.artifacts.encodings import encoding_named, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.tables import TABLES, nbytes
from smoe.artifacts.tables import TRACE as TRACE_TABLES
from smoe.prep.checkpoint.ends import LARGE as LARGE_END
from smoe.prep.checkpoint.few_bits import bytes_per_weight
from smoe.prep.checkpoint.seam import expert_geometry, experts_modules
from smoe.prep.learn import HELD_OUT
from smoe.prep.options import Recipe
from smoe.prep.pack.calibrated import AT_ONCE_CPU
from smoe.prep.pack.pack import PAGE
from smoe.prep.prices.price import DRAWS
from smoe.prep.state_kind import KEPT, LENGTHS
from smoe.prep.statistics.profile import TRACE, sampled_at_once
from smoe.prep.statistics.sums import MAX_RANKS
from smoe.prep.sweep.forward import PIECE, TOGETHER
from smoe.prep.sweep.gradients import IN_MEMORY
from smoe.runtime.allowance import usual_process
from smoe.runtime.execution import CODE, ONNX_CODE, SESSION
from smoe.runtime.kernels.blocks import GROUP, KINDS
from smoe.runtime.machine import memory_room

# Bytes of a weight of the backbone and of its two ends (backbone/quantise.py: blocks of 32, or 64
# with 4 bits, share a float32 scale; a vocabulary's tables have 8 bits at least).
BACKBONE = {"f32": (4.0, 4.0), "int8": (1 + 4 / 32, 1 + 4 / 32), "int4": (0.5 + 4 / 64, 1 + 4 / 32)}

# The same in a program: bfloat16 where a checkpoint has nothing else, scales in bfloat16.
PROGRAM = {"f32": (2.0, 2.0), "int8": (1 + 2 / 32, 1 + 2 / 32), "int4": (0.5 + 2 / 64, 1 + 2 / 32)}

# What `python -m bench large --geometry olmoe` measured (docs/log.md, 2026-11-27): bytes of Python,
# torch and transformers with what they leave behind, and of the exporter without any weights.
PROCESS, EXPORTER = 0.45e9, 0.4e9
MARGIN = 0.15e9  # bytes of small things
SAVED = 12  # hidden states per layer that lie on the disk for the way back
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # what configs call it


@dataclass(frozen=True)
class Work:
    """What is to be built: experts in `encoding` by `quantiser` (None: one way only), the backbone
    in `precision`; `tokens` of text, `own` of which the model writes itself, and so many for
    `prices`."""

    encoding: str
    quantiser: str | None
    precision: str
    tokens: int
    prices: int
    own: int = 0

    @classmethod
    def of(cls, recipe: Recipe, given: int, own: int) -> Work:
        """For a recipe in which nothing is left open."""
        return cls(
            encoding=recipe.encoding,
            quantiser=recipe.quantiser,
            precision=recipe.backbone,
            tokens=given + own,
            prices=recipe.prices or 0,
            own=own,
        )

    @property
    def priced(self) -> int:
        """Tokens that prices come from, in the end."""
        return min(self.prices, self.tokens * 3 // 4)


@dataclass(frozen=True)
class Sizes:
    """A model's: layers as (experts, hidden, width), counts of parameters. `ends` are those of
    embedding and head; `stored` the bytes of a layer's experts as they are read."""

    layers: list[tuple[int, int, int]]
    per_layer: list[int]
    top_k: int | None
    backbone: int
    ends: tuple[int, ...]
    products: dict[tuple[int, int], int]  # how many matrices of a shape the backbone multiplies by
    vocabulary: int
    heads: int  # numbers in the queries of a token
    depth: int  # layers with experts and without
    state: int  # bytes that attention remembers of a token, at most, in float32
    kept: tuple[int, int]  # a program's: heads of all layers' keys and values, numbers of one
    stored: int
    shape: ExpertShape  # but for its sizes

    @classmethod
    def of(cls, model: transformers.PreTrainedModel, quantiser: HfQuantizer | None) -> Sizes:
        modules = [module for _, module in experts_modules(model)]
        layers = [expert_geometry(module) for module in modules]
        per_layer = [sum(p.numel() for p in module.parameters()) for module in modules]
        config = model.config.get_text_config()
        expert = max(n // e for n, (e, _, _) in zip(per_layer, layers, strict=True))
        stored = 2 * max(per_layer)
        if quantiser is not None:  # of codes one expert at a time is decoded
            stored = int(bytes_per_weight(quantiser) * max(per_layer)) + 4 * 4 * expert
        first = modules[0]
        heads, (_, head) = _most(config, "num_attention_heads") or 1, _heads(config)
        return cls(
            layers=layers,
            per_layer=per_layer,
            top_k=next(filter(None, (getattr(config, name, None) for name in TOP_K)), None),
            backbone=_parameters(model) - sum(per_layer),
            ends=_ends(model),
            products=_products(model),
            vocabulary=config.vocab_size,
            heads=heads * head,
            depth=config.num_hidden_layers,
            state=2 * 4 * config.num_hidden_layers * math.prod(_heads(config)),
            kept=_kept(config),
            stored=stored,
            shape=ExpertShape(
                0, 0, bool(first.has_gate), bool(first.has_bias), bool(first.has_post_expert_norm)
            ),
        )

    @property
    def hidden(self) -> int:
        return max(hidden for _, hidden, _ in self.layers)

    @property
    def in_experts(self) -> int:
        return sum(self.per_layer)

    @property
    def active(self) -> int | None:
        """Parameters that a token uses."""
        if not self.top_k:
            return None
        pairs = zip(self.per_layer, self.layers, strict=True)
        return self.backbone + sum(n * self.top_k // e for n, (e, _, _) in pairs)

    def state_bytes(self, kind: str) -> int:
        """What a program remembers of a token, at most, in a kind of state."""
        heads, width = self.kept
        scales = 4 * -(-width // GROUP) if kind == "int8" else 0
        return heads * (width * KINDS[kind].itemsize + scales)

    def records(self, encoding: str) -> list[int]:
        """Bytes of an expert in every layer."""
        shapes = [
            dataclasses.replace(self.shape, hidden=hidden, width=width)
            for _, hidden, width in self.layers
        ]
        return [record_layout(shape, encoding, PAGE).nbytes for shape in shapes]


def _heads(config: transformers.PreTrainedConfig) -> tuple[int, int]:
    """The heads of a layer's keys, and the numbers of one, at most."""
    heads = _most(config, "num_attention_heads") or 1
    head = _most(config, "head_dim") or config.hidden_size // heads
    return _most(config, "num_key_value_heads") or heads, head


def _most(config: transformers.PreTrainedConfig, name: str) -> int | None:
    """The largest value of any layer: gemma4's have heads of two sizes."""
    values = (getattr(layer, name, None) for layer in config.per_layer_config)
    return max(filter(None, values), default=None)


def _kept(config: transformers.PreTrainedConfig) -> tuple[int, int]:
    """Heads of the keys and values of all layers, and the numbers of one: of latent attention the
    latent with its rotated part alone."""
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return config.num_hidden_layers, latent + (getattr(config, "qk_rope_head_dim", None) or 0)
    heads, head = _heads(config)
    return 2 * config.num_hidden_layers * heads, head


def _products(model: transformers.PreTrainedModel) -> dict[tuple[int, int], int]:
    inside = tuple(f"{name}." for name, _ in experts_modules(model))
    return dict(
        Counter(
            (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not name.startswith(inside)
        )
    )


def _parameters(model: transformers.PreTrainedModel) -> int:
    """Of experts too; where embedding and head are one, once."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    head = getattr(outputs, "weight", None) if _tied(model) else None
    twice = 0 if head is None or head is getattr(inputs, "weight", None) else head.numel()
    return sum(p.numel() for p in model.parameters()) - twice


def _tied(model: transformers.PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _ends(model: transformers.PreTrainedModel) -> tuple[int, ...]:
    """Numbers of the embedding and of the head, which may be one."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(module, "weight", None) for module in modules]
    return tuple(w.numel() for w in weights[: 1 if _tied(model) else 2] if w is not None)


# -- bytes -----------------------------------------------------------------------------------------


def bundle_bytes(sizes: Sizes, work: Work) -> int:
    """Of the finished bundle, with its backbone as graphs and as a program."""
    tables = sum(
        _table_bytes(experts, hidden, sizes.top_k or experts, min(work.tokens, TRACE))
        for experts, hidden, _ in sizes.layers
    )
    backbone = _backbone(sizes, BACKBONE[work.precision]) + _backbone(
        sizes, PROGRAM[work.precision]
    )
    return _shards(sizes, work) + backbone + tables + (32 << 20)


def _backbone(sizes: Sizes, per_weight: tuple[float, float]) -> int:
    ends, (inner, outer) = sum(sizes.ends), per_weight
    return int(inner * (sizes.backbone - ends) + outer * ends)


def _shards(sizes: Sizes, work: Work) -> int:
    records = zip(sizes.layers, sizes.records(work.encoding), strict=True)
    return sum(experts * record for (experts, _, _), record in records)


def _table_bytes(experts: int, hidden: int, top_k: int, traced: int) -> int:
    """Of one layer, with its part of the trace."""
    ranks, levels = min(MAX_RANKS, experts), 8  # of a nested encoding: small beside the rest
    sizes = {"E": experts, "P": experts, "H": hidden, "R": ranks, "J": levels}
    return nbytes(TABLES, sizes) + nbytes(TRACE_TABLES, {"T": traced, "K": top_k, "E": experts})


def disk_bytes(sizes: Sizes, work: Work) -> int:
    """At its largest: shards, and what a sweep keeps so that it can go on; or the bundle."""
    kept = sum((work.tokens + work.priced) * hidden * 4 for _, hidden, _ in sizes.layers)
    kept += 2 * work.tokens * sizes.hidden * 4  # what passes hold while they wait
    saved = SAVED * work.priced * sizes.hidden * 4 * (sizes.depth - 1)  # before experts: nothing
    logits = work.priced * sizes.vocabulary * 4
    return max(bundle_bytes(sizes, work), _shards(sizes, work) + kept + saved + logits)


def memory_bytes(sizes: Sizes, work: Work) -> dict[str, int]:
    """Of every stage, the most that it holds."""
    row = 4 * sizes.hidden
    ends = [4 * n for n in sizes.ends if 4 * n >= LARGE_END]
    backbone, largest = 4 * sizes.backbone, max((4 * n for n in sizes.ends), default=0)
    between = PROCESS + MARGIN + backbone - sum(ends)
    text = work.tokens * row  # what experts receive; all else of it is in files
    learned = 3 * (work.priced + HELD_OUT) * row if work.priced else 0  # centred, and once more
    back = (3 * DRAWS + 2) * work.priced * row
    observed = max(_quantising(sizes, work), 2 * _sampled(sizes))
    output = min(work.tokens, PIECE * TOGETHER) * row
    graph = 4 * work.priced * row
    stages = {
        "open": PROCESS + backbone + largest,
        "sweep": between + text + graph + sizes.stored + max(output, observed, learned),
        "export": 2 * PROCESS + EXPORTER + 2 * backbone,
    }
    if work.priced:
        stages["gradients"] = between + max(ends, default=0) + sizes.stored + back + IN_MEMORY
        stages["fit"] = PROCESS + device_bytes(sizes, work)[0]
    if work.precision != "f32" and work.tokens:
        logits = 3 * len(LENGTHS) * KEPT * 4 * sizes.vocabulary
        stages["state"] = PROCESS + device_bytes(sizes, work)[0] + logits
        stages["state"] += sizes.state_bytes("f32") * min(LENGTHS[-1], work.tokens)
    return {stage: int(size) for stage, size in stages.items()}


def short_of_memory(stages: dict[str, int]) -> str:
    """A sentence where this process may not hold the bytes that one of `stages` needs, "" where it
    may. Less text helps all but those that hold the backbone and no text."""
    room, stage = memory_room(), max(stages, key=stages.__getitem__)
    needed = stages[stage]
    if room is None or room.nbytes >= needed:
        return ""
    less = "" if stage in ("open", "export") else ", or less text (--tokens, --self)"
    return (
        f"{stage} needs about {needed / 1e9:.1f} GB of memory, and {room.keeper} leaves "
        f"{room.nbytes / 1e9:.1f} GB; give more{less}."
    )


def _quantising(sizes: Sizes, work: Work) -> int:
    """Of a few experts' moments and, at every level, what is left of their weights."""
    if work.quantiser != "calibrated":
        return 0
    _, hidden, width = max(sizes.layers, key=lambda layer: layer[1] * layer[2])
    square, levels = max(hidden, width) ** 2, encoding_named(work.encoding).levels
    at_once = max(1, AT_ONCE_CPU // (4 * square))
    return at_once * 4 * (2 * square + 2 * width * hidden * 3 * levels)


def _sampled(sizes: Sizes) -> int:
    experts = max(count for count, _, _ in sizes.layers)
    return sampled_at_once(experts, sizes.hidden) * experts * sizes.hidden * 4


def device_bytes(sizes: Sizes, work: Work) -> tuple[int, int]:
    """Of the runtime besides its KV cache, with all of the backbone in ONNX Runtime: at least, and
    with all experts resident."""
    stored = _backbone(sizes, BACKBONE[work.precision])
    copies = 1 if work.precision == "f32" else 2  # ONNX Runtime lays quantised weights out anew
    fixed = copies * stored + CODE + ONNX_CODE + SESSION * (len(sizes.layers) + 1)
    least = fixed + (sizes.top_k or 1) * max(sizes.records(work.encoding))
    return _device(least), _device(fixed + _shards(sizes, work))


def _device(engine: int) -> int:
    """Bytes of a process on the device with an engine of so many."""
    return engine + usual_process(engine)
