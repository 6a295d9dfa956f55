"""Whether a bundle generates what transformers generates: token for token, up to where rounding may
decide."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smoe.artifacts import open_bundle
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.families import text_class
from smoe.runtime import Engine

NEW = 48
LENGTHS = (
    3,
    17,
    40,
    140,
)  # of the prompts; the last is longer than a chunk and than any pico window


@dataclass(frozen=True)
class Agreement:
    """Greedy continuations of random prompts.

    `error` is the largest difference between two logits of the same place; `scale` the largest
    logit. A continuation is compared up to the first place where transformers' two best logits are
    closer than 10 x `error`: `tokens` is how far that is on average, of `NEW`. `same` says that no
    token before differs.
    """

    same: bool
    tokens: float
    error: float
    scale: float

    @property
    def good(self) -> bool:
        return self.same and self.tokens >= NEW / 2 and bool(np.isfinite(self.error))

    def as_dict(self) -> dict:
        return asdict(self) | {"good": self.good}


@torch.no_grad()
def agreement(bundle: Path, checkpoint: Path, seed: int = 2) -> Agreement:
    """Compare `bundle` with what `transformers` loads from `checkpoint` in float32."""
    model = reference_model(checkpoint)
    random, vocabulary = np.random.default_rng(seed), model.config.get_text_config().vocab_size
    runs = []
    with open_exact(bundle) as engine:
        for length in LENGTHS:
            prompt = random.integers(3, vocabulary, length)
            wanted = model.generate(
                torch.from_numpy(prompt)[None], max_new_tokens=NEW, do_sample=False
            )[0].numpy()
            logits = model(input_ids=torch.from_numpy(wanted)[None]).logits[0].numpy()
            scored = np.stack(list(engine.score(wanted)))
            found = [token.id for token in engine.generate(prompt, max_new_tokens=NEW)]
            runs.append(
                (wanted[length:], logits[length - 1 : -1], np.abs(scored - logits).max(), found)
            )
    error = float(np.max([run[2] for run in runs]))  # not max(): that may lose a NaN
    counts, same = [], True
    for wanted, logits, _, found in runs:
        best = np.sort(logits, -1)[:, -2:]
        close = np.flatnonzero(best[:, 1] - best[:, 0] < 10 * error)
        upto = int(close[0]) if len(close) else len(wanted)
        counts.append(upto)
        same &= found[:upto] == wanted[:upto].tolist()
    return Agreement(
        same, float(np.mean(counts)), error, float(max(np.abs(run[1]).max() for run in runs))
    )


def open_exact(bundle: Path, **options: Any) -> Engine:
    """An engine whose keys and values are float32, whoever keeps them."""
    program = open_bundle(bundle).program
    state = "f32" if program and program.states else None
    return Engine.open(bundle, state=state, **options)


def reference_model(checkpoint: Path):
    """What transformers itself makes of the checkpoint, in float32."""
    config = open_checkpoint(
        checkpoint
    ).model.config  # the class is chosen as smoe does, the rest is transformers'
    return (
        text_class(type(config))
        .from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
        .eval()
    )
