"""Bundle against original on held-out text, token by token through the runtime's decode path.

Wide batches hide what a cache or a shortcut does to one token, so the runtime side reads one token at a time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from smoe.prep.checkpoint.checkpoint import Checkpoint, open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress
from smoe.prep.sweep.forward import as_trained, lockstep
from smoe.runtime import Engine


def verify(
    bundle: Path,
    model: Path,
    text: Calibration,
    memory: str | None,
    progress: Progress,
    level: int | None = None,
) -> dict[str, float | int]:
    """Perplexities, by how many percent the bundle's is higher with half the width of the 95 % interval of that (paired,
    token by token), mean KL divergence (nats per token, original to bundle) with its standard error, top-1 agreement
    and the largest relative logit error of `bundle` with experts at `level` against the float32 checkpoint at `model`,
    on `text`."""
    checkpoint = open_checkpoint(model)
    rows = text.rows(checkpoint)
    kl, agree, nats, wanted_nats, worst = [], [], [], [], 0.0
    context = max(len(row) for row in rows)
    with Engine.open(bundle, memory, context, level=level) as engine, torch.no_grad():
        if engine.manifest.provenance.get("source_fingerprint") != checkpoint.fingerprint():
            raise PrepError(f"{bundle} was not built from {model}: their fingerprints differ.")
        passes = [partial(_logits, checkpoint, row) for row in rows]
        originals = lockstep(checkpoint, passes, as_trained(checkpoint))
        for row, wanted in progress.over(
            zip(rows, originals, strict=True), "verify", "rows", len(rows)
        ):
            for position, logits in enumerate(engine.score(row)):
                found = torch.from_numpy(logits).double()
                p, q = wanted[position].log_softmax(-1), found.log_softmax(-1)
                kl.append(float((p.exp() * (p - q)).sum()))
                agree.append(bool(p.argmax() == q.argmax()))
                worst = max(
                    worst,
                    float((wanted[position] - found).abs().max() / wanted[position].abs().max()),
                )
                if position + 1 < len(row):
                    nats.append(-float(q[row[position + 1]]))
                    wanted_nats.append(-float(p[row[position + 1]]))
    rise = np.array(nats) - np.array(wanted_nats)
    return {
        "tokens": len(kl),
        "perplexity_original": round(float(np.exp(np.mean(wanted_nats))), 4),
        "perplexity_bundle": round(float(np.exp(np.mean(nats))), 4),
        "perplexity_rise_percent": round(float(np.expm1(rise.mean()) * 100), 4),
        "perplexity_rise_interval": round(float(1.96 * rise.std() / len(rise) ** 0.5 * 100), 4),
        "kl_nats_per_token": float(f"{np.mean(kl):.3g}"),
        "kl_standard_error": float(f"{np.std(kl) / len(kl) ** 0.5:.2g}"),
        "top1_agreement": round(float(np.mean(agree)), 5),
        "largest_logit_error": float(f"{worst:.2g}"),
    }


def _logits(checkpoint: Checkpoint, row: np.ndarray) -> torch.Tensor:
    """What the original says of a row: float64 `[T, vocabulary]`."""
    return (
        checkpoint.model(input_ids=torch.from_numpy(row)[None], use_cache=False).logits[0].double()
    )
