"""Bundle against original on held-out text, token by token through the runtime's decode path.

Wide batches hide what a cache or a shortcut does to one token, so the runtime side reads one token
at a time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress
from smoe.prep.sweep.forward import sweep
from smoe.runtime import Engine


@dataclass(frozen=True)
class Verification:
    """A bundle against its checkpoint, on `tokens`, its state in that kind ("": as its graphs say):
    perplexities; by how many percent the bundle's is higher, with half the width of the 95 %
    interval of that (paired, token by token); mean KL divergence (nats per token, original to
    bundle) with its standard error; the share of tokens with the same likeliest successor; the
    largest logit error relative to the row's largest."""

    tokens: int
    state: str
    perplexity_original: float
    perplexity_bundle: float
    perplexity_rise_percent: float
    perplexity_rise_interval: float
    kl_nats_per_token: float
    kl_standard_error: float
    top1_agreement: float
    largest_logit_error: float

    def as_dict(self) -> dict[str, float | int | str]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        return [f"{name.replace('_', ' '):28} {value}" for name, value in self.as_dict().items()]


def verify(
    bundle: Path,
    model: Path,
    text: Calibration,
    memory: str | None,
    progress: Progress,
    level: int | None = None,
) -> Verification:
    """Compare `bundle`, experts at `level`, with the float32 checkpoint at `model` on `text`, its
    engine within `memory` beside what this process holds of the checkpoint. A
    `PrepError` if the bundle was not built from it."""
    checkpoint = open_checkpoint(model, progress)
    rows = text.rows(checkpoint, progress.say)
    context = max(len(row) for row in rows)
    compared, left = _Compared(), list(rows)
    count = progress.counter("verify", "rows", len(rows))
    with Engine.open(bundle, beside=memory, context=context, level=level) as engine:
        if engine.manifest.provenance.get("source_fingerprint") != checkpoint.fingerprint():
            raise PrepError(f"{bundle} was not built from {model}: their fingerprints differ.")

        def compare(logits: torch.Tensor) -> None:
            row = left.pop(0)
            compared.add(row, logits.double(), engine.score(row))
            count.done(len(rows) - len(left))

        sweep(checkpoint, rows, [], logits=compare)
        return compared.result(engine.division.kind if engine.division.program else "")


@dataclass
class _Compared:
    """Per token, over all rows."""

    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    nats_original: list[float] = field(default_factory=list)
    nats_bundle: list[float] = field(default_factory=list)
    worst: float = 0.0

    def add(self, row: np.ndarray, originals: torch.Tensor, bundles) -> None:
        """A row's tokens: logits `[length, V]` of the original, and one after another those of the
        bundle."""
        for position, logits in enumerate(bundles):
            original, bundle = originals[position], torch.from_numpy(logits).double()
            p, q = original.log_softmax(-1), bundle.log_softmax(-1)
            self.kl.append(float((p.exp() * (p - q)).sum()))
            self.agree.append(bool(p.argmax() == q.argmax()))
            error = float((original - bundle).abs().max() / original.abs().max())
            self.worst = max(self.worst, error)
            if position + 1 < len(row):
                self.nats_original.append(-float(p[row[position + 1]]))
                self.nats_bundle.append(-float(q[row[position + 1]]))

    def result(self, state: str) -> Verification:
        rise = np.array(self.nats_bundle) - np.array(self.nats_original)
        interval = 1.96 * rise.std() / len(rise) ** 0.5 * 100
        return Verification(
            tokens=len(self.kl),
            state=state,
            perplexity_original=round(float(np.exp(np.mean(self.nats_original))), 4),
            perplexity_bundle=round(float(np.exp(np.mean(self.nats_bundle))), 4),
            perplexity_rise_percent=round(float(np.expm1(rise.mean()) * 100), 4),
            perplexity_rise_interval=round(float(interval), 4),
            kl_nats_per_token=float(f"{np.mean(self.kl):.3g}"),
            kl_standard_error=float(f"{np.std(self.kl) / len(self.kl) ** 0.5:.2g}"),
            top1_agreement=round(float(np.mean(self.agree)), 5),
            largest_logit_error=float(f"{self.worst:.2g}"),
        )
