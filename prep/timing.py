"""How long every stage of a build takes on this machine, known from a config alone.

Seconds are counts of what is to be done times how long that takes here (`probes`), which is
measured at the model's own shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers

from smoe.artifacts.encodings import encoding_named
from smoe.artifacts.tables import DISTANCES
from smoe.prep import probes
from smoe.prep.backbone.quantise import Known
from smoe.prep.backbone.watch import is_watched
from smoe.prep.checkpoint.seam import ExpertsModule, expert_geometry, experts_modules
from smoe.prep.checkpoint.text import LENGTH
from smoe.prep.estimate import Sizes, Work, bundle_bytes
from smoe.prep.pack.calibrated import LEARNT, LEARNT_PER_COLUMN
from smoe.prep.prices.calibrate import AT_RANDOM, SIZES
from smoe.prep.prices.calibrate import TOKENS as FIT_TOKENS
from smoe.prep.prices.price import DRAWS
from smoe.prep.state_kind import LENGTHS
from smoe.prep.statistics.profile import SAMPLE, sampled_at_once
from smoe.prep.sweep.forward import TOGETHER
from smoe.prep.written import Shape
from smoe.runtime.budget import CHUNK
from smoe.runtime.choose.prices import KINDS

# Measured beside one layer of OLMoE-1B-7B, in seconds of one processor (docs/log.md, 2026-11-27).
START = 14.0  # seconds of Python in which an export begins
TRACED = 6.0  # seconds of Python per layer that is exported and checked
ELEMENTS = 0.8e9  # float32 numbers per second that one thread sees in a long expression
HASHED, WIDENED = 0.9e9, 0.5e9  # bytes per second of SHA-256, and of a backbone that is loaded
READ = 2.5  # how much longer experts take than their bytes: they are merged one by one
BESIDES = 1.4  # how much longer a pass takes than its products
COPIED = 4e9  # bytes per second in memory
STEPPED = 1e-3  # seconds of Python per layer and step in which a model writes text
TEXTS = 2.5  # go through the bundle with another state: three, or two where int8 will do
DRAWN, COMPARED = 10, 2.5  # how often a logit is seen, where labels are drawn and where compared


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
    times = 2 if work.priced else 1
    seconds["read"] = READ * times * counts.alike * sizes.stored / probes.read_rate(files)
    seconds["packing"] = _packing_seconds(counts, work, one, rates)
    if work.priced:
        seconds |= _priced_seconds(sizes, work, counts, one, rates)
    measured = 0 if work.precision == "f32" else min(LENGTHS[-1], work.tokens)
    seconds["state"] = TEXTS * measured * _run_seconds(sizes, work, counts, one, rates)
    if work.precision == "int4" and work.tokens:
        seconds["backbone"] = _backbone_seconds(sizes)
    seconds["text"] = _written_seconds(sizes, work, counts, one, rates) if work.own else 0.0
    weights = 4 * sizes.backbone
    seconds["export"] = (
        rates.slow * (START + TRACED * len(sizes.layers)) + 3 * weights / rates.write
    )
    seconds["rest"] = weights / WIDENED + bundle_bytes(sizes, work) / HASHED
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


def _backbone_seconds(sizes: Sizes) -> float:
    known = Known(sizes.vocabulary, sizes.hidden)
    return sum(
        count * probes.backbone_seconds(*shape)
        for shape, count in sizes.products.items()
        if is_watched(known, *shape)
    )


def _written_seconds(
    sizes: Sizes, work: Work, counts: Counts, one: ExpertsModule, rates: _Rates
) -> float:
    """Of the text that the model writes itself: its experts rounded, and one step after another."""
    shape = Shape.of(work.own, sizes.state, 1 << 30)
    rounded = None if work.quantiser == "calibrated" else work.quantiser
    packing = counts.alike * counts.experts * probes.packing_seconds(one, work.encoding, rounded)
    slots = max(1, shape.together * counts.k // counts.experts)
    experts = probes.kernel_seconds(one, work.encoding, slots) * shape.together * counts.k
    few = probes.product_rate(counts.row, shape.together)
    backbone = shape.together * (counts.body + counts.head) / few
    state = 3 * shape.together * shape.length / 2 * sizes.state / COPIED
    python = rates.slow * STEPPED * sizes.depth
    return packing + shape.steps * (counts.alike * experts + backbone + state + python)


def _packing_seconds(counts: Counts, work: Work, one: ExpertsModule, rates: _Rates) -> float:
    seconds = counts.experts * probes.packing_seconds(one, work.encoding, work.quantiser)
    if work.quantiser == "calibrated":
        _, hidden, width = expert_geometry(one)
        own = counts.per_expert(counts.tokens)
        levels = encoding_named(work.encoding).levels
        learnt = min(own, max(LEARNT, LEARNT_PER_COLUMN * width))
        inner = (1 + levels) * probes.expert_seconds(one, learnt) * 2 / 3
        moments = own * hidden**2 + learnt * 2 * levels * width**2
        seconds += counts.experts * (moments / probes.moment_rate(hidden) + learnt * inner)
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
    back = (BESIDES * counts.body + counts.head) / rates.product
    drawn = DRAWN * sizes.vocabulary / ELEMENTS  # labels, and their gradient
    seen = counts.alike * counts.experts * (all_tokens + DRAWS * row / ELEMENTS)
    fitted = min(FIT_TOKENS, max(1, work.tokens - priced))
    runs = 1 + len(KINDS) * (len(SIZES) + len(AT_RANDOM))
    run = _run_seconds(sizes, work, counts, one, rates)
    return {
        "predictors": regressions * (priced * row**2 + row**3 / 3) / rates.single,
        "gradients": DRAWS * priced * (back + drawn) + slots * expert * (1 + DRAWS),
        "prices": priced * seen + slots * (expert + levels * kernel),
        "fit": runs * fitted * run,
    }


def _run_seconds(
    sizes: Sizes, work: Work, counts: Counts, one: ExpertsModule, rates: _Rates
) -> float:
    """Of a token through the bundle, whose logits are compared."""
    slots = counts.per_expert(CHUNK)
    chunk = counts.alike * counts.k * probes.kernel_seconds(one, work.encoding, slots)
    compared = COMPARED * sizes.vocabulary / ELEMENTS
    return (counts.body + counts.head) / rates.product + chunk + compared
