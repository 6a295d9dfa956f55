"""What a build takes, known from a config alone: bytes on disk and in memory, and seconds of every
stage on this machine.

Seconds are counts of what is to be done times how long that takes here (`probes`), which is
measured at the model's own shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers.quantizers.base import HfQuantizer

from smoe.artifacts.encodings import encoding_named, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.tables import DISTANCES, TABLES, nbytes
from smoe.artifacts.tables import TRACE as TRACE_TABLES
from smoe.prep import probes
from smoe.prep.checkpoint.ends import LARGE as LARGE_END
from smoe.prep.checkpoint.few_bits import bytes_per_weight
from smoe.prep.checkpoint.seam import ExpertsModule, expert_geometry, experts_modules
from smoe.prep.learn import HELD_OUT
from smoe.prep.pack.pack import AT_ONCE, PAGE
from smoe.prep.prices.calibrate import AT_RANDOM, SIZES
from smoe.prep.prices.calibrate import TOKENS as FIT_TOKENS
from smoe.prep.prices.price import DRAWS
from smoe.prep.statistics.profile import SAMPLE, TRACE, sampled_at_once
from smoe.prep.statistics.sums import MAX_RANKS
from smoe.prep.sweep.forward import TOGETHER
from smoe.prep.sweep.gradients import IN_MEMORY
from smoe.runtime.allowance import usual_process
from smoe.runtime.budget import CHUNK, RUNTIME, SESSION
from smoe.runtime.choose.prices import KINDS
from smoe.runtime.machine import memory_room

# Bytes of a weight of the backbone (backbone/quantise.py: blocks of 32 share a float32 scale).
BACKBONE = {"f32": 4.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}
LENGTH = 512  # tokens of a row of calibration text

# What `python -m bench large --geometry olmoe` measured (docs/log.md, 2026-11-27): bytes of Python,
# torch and transformers with what they leave behind, and of the exporter without any weights.
PROCESS, EXPORTER = 0.45e9, 0.4e9
MARGIN = 0.15e9  # bytes of small things
START = 8.0  # seconds of Python in which a process comes to have torch and transformers
TRACED = 4.0  # seconds of Python per layer that is exported and checked
ELEMENTS = 0.8e9  # float32 numbers per second that one thread sees in a long expression
HASHED, WIDENED = 0.9e9, 0.5e9  # bytes per second of SHA-256, and of a backbone that is loaded
BESIDES = 1.4  # how much longer a pass takes than its products
LOGITS = 6  # how often a number of the logits is seen
SAVED = 12  # hidden states per layer that lie on the disk for the way back


@dataclass(frozen=True)
class Work:
    """What is to be built: experts in `encoding` by `quantiser` (None: one way only), the backbone
    in `precision`; `tokens` of text, of which so many for `prices`."""

    encoding: str
    quantiser: str | None
    precision: str
    tokens: int
    prices: int

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
    vocabulary: int
    heads: int  # numbers in the queries of a token
    depth: int  # layers with experts and without
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
        first, hidden = modules[0], config.hidden_size
        heads = getattr(config, "num_attention_heads", None) or 1
        return cls(
            layers=layers,
            per_layer=per_layer,
            top_k=getattr(config, "num_experts_per_tok", None),
            backbone=sum(p.numel() for p in model.parameters()) - sum(per_layer),
            ends=_ends(model),
            vocabulary=config.vocab_size,
            heads=heads * (getattr(config, "head_dim", None) or hidden // heads),
            depth=config.num_hidden_layers,
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

    def records(self, encoding: str) -> list[int]:
        """Bytes of an expert in every layer."""
        shapes = [
            dataclasses.replace(self.shape, hidden=hidden, width=width)
            for _, hidden, width in self.layers
        ]
        return [record_layout(shape, encoding, PAGE).nbytes for shape in shapes]


def _ends(model: transformers.PreTrainedModel) -> tuple[int, ...]:
    """Numbers of the embedding and of the head, which may be one."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(module, "weight", None) for module in modules]
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return tuple(w.numel() for w in weights[: 1 if tied else 2] if w is not None)


# -- bytes -----------------------------------------------------------------------------------------


def bundle_bytes(sizes: Sizes, work: Work) -> int:
    """Of the finished bundle."""
    tables = sum(
        _table_bytes(experts, hidden, sizes.top_k or experts, min(work.tokens, TRACE))
        for experts, hidden, _ in sizes.layers
    )
    return (
        _shards(sizes, work) + int(BACKBONE[work.precision] * sizes.backbone) + tables + (32 << 20)
    )


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
    saved = SAVED * work.priced * sizes.hidden * 4 * sizes.depth
    logits = work.priced * sizes.vocabulary * 4
    return max(bundle_bytes(sizes, work), _shards(sizes, work) + kept + saved + logits)


def memory_bytes(sizes: Sizes, work: Work) -> dict[str, int]:
    """Of every stage, the most that it holds."""
    row = 4 * sizes.hidden
    ends = [4 * n for n in sizes.ends if 4 * n >= LARGE_END]
    backbone, largest = 4 * sizes.backbone, max((4 * n for n in sizes.ends), default=0)
    between = PROCESS + MARGIN + backbone - sum(ends)
    text = 2 * work.tokens * row  # residual, and what experts receive
    reading = sizes.stored + sizes.stored * 2 // 3  # a parameter, and what it is made of
    moments = 3 * AT_ONCE if work.quantiser == "calibrated" else 0
    learned = len(DISTANCES) * (work.priced + HELD_OUT) * row if work.priced else 0
    back = (3 * DRAWS + 2) * work.priced * row
    observed = sizes.stored + learned + max(moments, 2 * _sampled(sizes))
    stages = {
        "open": PROCESS + backbone + largest,
        "sweep": between + text + max(reading, sizes.stored + work.tokens * row, observed),
        "export": 2 * PROCESS + EXPORTER + 2 * backbone,
    }
    if work.priced:
        stages["gradients"] = between + max(ends, default=0) + sizes.stored + back + IN_MEMORY
        stages["fit"] = PROCESS + device_bytes(sizes, work)[0]
    return {stage: int(size) for stage, size in stages.items()}


def short_of_memory(needed: int) -> str:
    """A sentence where this process may not hold `needed` bytes, "" where it may."""
    room = memory_room()
    if room is None or room.nbytes >= needed:
        return ""
    return (
        f"about {needed / 1e9:.1f} GB of memory are needed, and {room.keeper} leaves "
        f"{room.nbytes / 1e9:.1f} GB; give more, or fewer --tokens."
    )


def _sampled(sizes: Sizes) -> int:
    experts = max(count for count, _, _ in sizes.layers)
    return sampled_at_once(experts, sizes.hidden) * experts * sizes.hidden * 4


def device_bytes(sizes: Sizes, work: Work) -> tuple[int, int]:
    """Of the runtime besides its KV cache: at least, and with all experts resident."""
    stored = int(BACKBONE[work.precision] * sizes.backbone)
    copies = 1 if work.precision == "f32" else 2  # ONNX Runtime lays quantised weights out anew
    fixed = copies * stored + RUNTIME + SESSION * (len(sizes.layers) + 1)
    least = fixed + (sizes.top_k or 1) * max(sizes.records(work.encoding))
    return _device(least), _device(fixed + _shards(sizes, work))


def _device(engine: int) -> int:
    """Bytes of a process on the device with an engine of so many."""
    return engine + usual_process(engine)


# -- seconds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What the seconds of a build are proportional to: `alike` layers as large as the largest one,
    of E experts, k of which a token uses; T tokens of text and P for prices."""

    alike: float
    experts: int
    k: int
    tokens: int
    priced: int
    row: int  # numbers of a hidden state
    body: int  # multiplications of a token between the two ends, but for experts
    head: int

    @classmethod
    def of(cls, sizes: Sizes, work: Work) -> Counts:
        return cls(
            alike=sizes.in_experts / max(sizes.per_layer),
            experts=max(count for count, _, _ in sizes.layers),
            k=sizes.top_k or 1,
            tokens=work.tokens,
            priced=work.priced,
            row=sizes.hidden,
            body=sizes.backbone - sum(sizes.ends) + 2 * sizes.depth * LENGTH * sizes.heads,
            head=sizes.vocabulary * sizes.hidden,
        )

    def per_expert(self, tokens: int) -> int:
        """How many of so many tokens an expert gets."""
        return max(1, tokens * self.k // self.experts)


def stage_seconds(
    sizes: Sizes, work: Work, model: transformers.PreTrainedModel, files: Sequence[Path]
) -> dict[str, float]:
    """Of every stage of `progress.Progress.seconds`, on this machine now; {} where the config does
    not say how many experts a token uses. `files` are those of the weights that are there."""
    if sizes.top_k is None:
        return {}
    counts = Counts.of(sizes, work)
    modules = [module for _, module in experts_modules(model)]
    one = probes.one_expert(modules[sizes.per_layer.index(max(sizes.per_layer))])
    rates = _Rates(
        product=probes.product_rate(counts.row),
        single=probes.single_rate(counts.row),
        write=probes.write_rate(),
        slow=probes.slowness(),
    )
    seconds = _forward_seconds(sizes, counts, one, rates)
    seconds["read"] = (
        (2 if work.priced else 1) * counts.alike * sizes.stored / probes.read_rate(files)
    )
    seconds["packing"] = _packing_seconds(counts, work, one, rates)
    if work.priced:
        seconds |= _priced_seconds(sizes, work, counts, one, rates)
    weights = 4 * sizes.backbone
    seconds["export"] = (
        rates.slow * (START + TRACED * len(sizes.layers)) + 3 * weights / rates.write
    )
    seconds["rest"] = rates.slow * START + weights / WIDENED + bundle_bytes(sizes, work) / HASHED
    return dict(sorted(seconds.items()))


@dataclass(frozen=True)
class _Rates:
    """Multiplications per second of torch, and of NumPy in a sweep; bytes written per second; and
    how slow Python is."""

    product: float
    single: float
    write: float
    slow: float


def _forward_seconds(
    sizes: Sizes, counts: Counts, one: ExpertsModule, rates: _Rates
) -> dict[str, float]:
    expert = probes.expert_seconds(one, counts.per_expert(TOGETHER))
    text = counts.tokens + counts.priced
    sweep = counts.alike * text * counts.k * expert + BESIDES * text * counts.body / rates.product
    sweep += counts.priced * counts.head / rates.product
    sweep += 2 * len(sizes.layers) * text * 4 * counts.row / rates.write
    few = probes.expert_seconds(one, sampled_at_once(counts.experts, counts.row))
    sampled = min(SAMPLE, counts.tokens)
    pairs = counts.experts**2 * (sampled * counts.row + counts.tokens)  # in float64
    statistics = counts.experts * sampled * few + 2 * pairs / rates.single
    return {"sweep": sweep, "statistics": counts.alike * statistics}


def _packing_seconds(counts: Counts, work: Work, one: ExpertsModule, rates: _Rates) -> float:
    seconds = counts.experts * probes.packing_seconds(one, work.encoding, work.quantiser)
    if work.quantiser == "calibrated":
        _, hidden, width = expert_geometry(one)
        own = counts.per_expert(counts.tokens)
        inner = probes.expert_seconds(one, own) * 2 / 3
        moments = own * (hidden**2 + width**2) / probes.moment_rate(hidden)
        seconds += counts.experts * (moments + own * inner)
    return counts.alike * seconds


def _priced_seconds(
    sizes: Sizes, work: Work, counts: Counts, one: ExpertsModule, rates: _Rates
) -> dict[str, float]:
    """Predictors, the way back, prices, and the runs that they are fitted to."""
    priced, k, row = counts.priced, counts.k, counts.row
    slots = counts.alike * priced * k
    expert = probes.expert_seconds(one, counts.per_expert(priced))
    all_tokens = probes.expert_seconds(one, priced)
    levels = encoding_named(work.encoding).levels
    kernel = probes.kernel_seconds(one, work.encoding, counts.per_expert(priced))
    regressions = sum(min(layer, len(DISTANCES)) for layer in range(len(sizes.layers)))
    products = DRAWS * priced * (BESIDES * counts.body + counts.head) / rates.product
    seen = DRAWS * counts.alike * priced * counts.experts * row  # g times every output
    runs = 1 + len(KINDS) * (len(SIZES) + len(AT_RANDOM))
    chunk = probes.kernel_seconds(one, work.encoding, counts.per_expert(CHUNK))
    token = (counts.body + counts.head) / rates.product + counts.alike * k * chunk
    return {
        "predictors": regressions * (priced * row**2 + row**3 / 3) / rates.single,
        "gradients": products
        + slots * expert * (1 + DRAWS)
        + DRAWS * priced * LOGITS * counts.head / row / ELEMENTS,
        "prices": counts.alike * counts.experts * priced * all_tokens
        + seen / ELEMENTS
        + slots * (expert + levels * kernel),
        "fit": runs * FIT_TOKENS * (token + LOGITS * counts.head / row / ELEMENTS),
    }
