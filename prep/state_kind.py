"""What a bundle's program keeps keys and values in: the narrowest kind that costs next to nothing,
measured on the bundle itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smoe.artifacts import Bundle, open_bundle
from smoe.artifacts.manifest import STATE_KINDS
from smoe.prep.errors import PrepError
from smoe.prep.options import STATE_LIMIT as LIMIT
from smoe.prep.prices.shortcuts import Exact, few_experts
from smoe.prep.progress import Progress
from smoe.runtime import Engine
from smoe.runtime.execution import Execution

LENGTHS = (2048, 8192)  # tokens after which it is measured
KEPT = 256  # the last of them, whose logits are compared
# Products of weights that may be spent: an hour of two cores or so, where a build takes many.
WORK = 1e14


@dataclass(frozen=True)
class StateKind:
    """The `kind` that was chosen, "" where there is nothing to choose, and why; `nats` is what each
    kind cost after each number of tokens, beside f32."""

    kind: str
    reason: str
    nats: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """For people, and for provenance."""
        return f"{self.kind or 'none'} ({self.reason})"


def refuse_unknown_kind(asked: str | None) -> None:
    """A `PrepError` where there is no such kind."""
    if asked is not None and asked not in STATE_KINDS:
        raise PrepError(f"There is no state {asked!r}; there are {', '.join(STATE_KINDS)}.")


def choose(bundle: Path, ids: np.ndarray, asked: str | None, progress: Progress) -> StateKind:
    """For the whole bundle at `bundle`, whose manifest names no kind yet: what was `asked` for, or
    what is measured on `ids` int64, text of its tokens."""
    opened = open_bundle(bundle)
    program, precision = opened.program, opened.manifest.backbone.precision
    if program is None or not program.states:
        asked_for = f", and --state {asked} has no effect" if asked else ""
        return StateKind("", f"no program keeps a state{asked_for}")
    if asked is not None:
        return StateKind(asked, "asked for")
    if precision == "f32":
        return StateKind("f32", "as exact as the backbone")
    lengths = _lengths(opened, len(ids))
    if not lengths:
        few = min(LENGTHS[0], opened.manifest.model.context)
        return StateKind("", f"not measured: {few} tokens of text are too many for this one")
    return _measured(opened, ids, lengths, progress)


def _lengths(bundle: Bundle, tokens: int) -> list[int]:
    """Those that context, text and work allow, rising."""
    context, each = bundle.manifest.model.context, _products(bundle)
    able = sorted({min(n, context) for n in LENGTHS if min(n, context) <= tokens})
    while len(able) > 1 and len(STATE_KINDS) * able[-1] * each > WORK:
        able.pop()
    return able


def _products(bundle: Bundle) -> int:
    """Of weights with numbers, for a token."""
    assert bundle.program is not None
    shapes = {constant.name: constant.shape for constant in bundle.program.constants}
    products = [op for _, op in bundle.program.operations() if op.kind == "product"]
    backbone = sum(math.prod(shapes[op.weight]) for op in products)
    layers = bundle.manifest.layers
    return backbone + sum(3 * layer.top_k * layer.hidden * layer.width for layer in layers)


def _measured(bundle: Bundle, ids: np.ndarray, lengths: list[int], progress: Progress) -> StateKind:
    """The narrowest kind within the limit after every length."""
    exact = [Exact.of(logits) for logits in _logits(bundle, ids, lengths, "f32")]
    nats: dict[str, dict[int, float]] = {}
    said = ""
    for kind in STATE_KINDS[:-1]:
        others = _logits(bundle, ids, lengths, kind)
        pairs = zip(exact, others, strict=True)
        apart = [one.divergence(other) / len(other) for one, other in pairs]
        nats[kind] = {n: float(f"{max(0.0, d):.2g}") for n, d in zip(lengths, apart, strict=True)}
        said = ", ".join(f"{d:g} after {n} tokens" for n, d in nats[kind].items())
        progress.say(f"state: {kind} costs {said}, in nats per token beside f32")
        if max(nats[kind].values()) < LIMIT:
            return StateKind(kind, f"{said}, in nats per token; the limit is {LIMIT:g}", nats)
    why = f"{STATE_KINDS[-2]} costs {said}, in nats per token; the limit is {LIMIT:g}"
    return StateKind(STATE_KINDS[-1], why, nats)


def _logits(bundle: Bundle, ids: np.ndarray, lengths: list[int], kind: str) -> list[np.ndarray]:
    """Of the last tokens up to each length, float32 `[KEPT, vocabulary]`."""
    with Engine.open(
        bundle.path,
        beside=few_experts(bundle, lengths[-1], Execution(state=kind)),
        context=lengths[-1],
        io="buffered",
        state=kind,
    ) as engine:
        sequence, logits = engine.new_sequence(), []
        for start, end in zip([0, *lengths], lengths, strict=False):
            text = ids[start:end]
            keep = min(KEPT, len(text))
            logits.append(engine.prefill(sequence, text, keep).finish())
        return logits
