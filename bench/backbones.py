"""What a backbone in fewer bits costs: bytes, perplexity, KL divergence, beside the same in
float32."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.harness import Rows, Run, Table, bench, note, option
from bench.models import CALIBRATION, EXAMPLE
from bench.page_cache import size
from smoe.runtime import Engine
from smoe.runtime.evaluate import log_softmax, read_documents, rows

LENGTH = 512  # tokens of a row
WAYS = {  # by name: precision, and whether text is calibrated on
    "f32": ("f32", False),
    "int8": ("int8", False),
    "int4, calibrated": ("int4", True),
    "int4, rounded": ("int4", False),
}


@bench(
    options.TEXT, options.tokens(32768),
    option("--calibration", type=Path, default=CALIBRATION),
    option("--calibration-tokens", type=int, default=65536),
    option("--keep", type=Path, help="a folder for the bundles; those that are there are used"),
)  # fmt: skip
def backbones(run: Run) -> Rows:
    """The example model with its backbone in float32, int8 and int4, experts in float32.

    The rise of perplexity has the 95 % interval of the paired difference, token by token; KL is
    from the float32 backbone, in nats per token, with its standard error.
    """
    columns = {
        "backbone": "{}", "MB": "{:.2f}", "perplexity": "{:+.3f} % ± {:.3f}",
        "KL": "{:.5f} ± {:.5f}", "same best token": "{:.2%}",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = run.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        bundles = {name: _built(folder, name, run) for name in WAYS}
        losses = _losses(list(bundles.values()), run)
        lines = [
            [name, size(bundle / "backbone") / 1e6, *loss]
            for (name, bundle), loss in zip(bundles.items(), losses, strict=True)
        ]
    yield Table("backbones", columns, lines, f"{run.tokens} tokens of {run.text.name}")


def _built(folder: Path, name: str, run: Run) -> Path:
    """The bundle of one of `WAYS`: from one profile, and with text where it is calibrated."""
    precision, calibrated = WAYS[name]
    profile, bundle = folder / "profile", folder / f"{name.replace(', ', '-')}.smoe"
    text = ["--calibration", run.calibration, "--tokens", run.calibration_tokens]
    if not profile.exists():
        _prep("profile", EXAMPLE, "-o", profile, *text)
    if not bundle.exists():
        how = ["--encoding", "f32", "--backbone", precision, "--profile", profile]
        _prep("build", EXAMPLE, "-o", bundle, *how, *(text if calibrated else []), "--prices", 0)
    return bundle


def _prep(*arguments: object) -> None:
    command = [sys.executable, "-m", "smoe.prep", *map(str, arguments)]
    note("running: " + " ".join(command[3:]))
    subprocess.run(command, check=True, stdout=sys.stderr)


def _losses(bundles: list[Path], run: Run) -> list[list[Any]]:
    """Of each bundle against the first: the rise of perplexity in percent with its interval, KL
    with its error, and the share of tokens with the same likeliest successor."""
    seen: list[list[np.ndarray]] = [[] for _ in bundles]  # per row: rise, KL, same
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(Engine.open(b, context=LENGTH)) for b in bundles]
        for row in rows(engines[0], read_documents(run.text), run.tokens, LENGTH):
            exact = log_softmax(engines[0].logits(row))
            for engine, found in zip(engines, seen, strict=True):
                q = log_softmax(engine.logits(row))
                following = np.arange(len(row) - 1), row[1:]
                rise = np.append((exact - q)[:-1][following], np.nan)
                kl = (np.exp(exact) * (exact - q)).sum(-1)
                found.append(np.stack([rise, kl, exact.argmax(-1) == q.argmax(-1)]))
    return [_summary(np.concatenate(found, 1)) for found in seen]


def _summary(seen: np.ndarray) -> list[Any]:
    rise, kl, same = seen
    rise = rise[~np.isnan(rise)]
    interval = 196 * rise.std() / len(rise) ** 0.5
    error = kl.std() / len(kl) ** 0.5
    return [[100 * np.expm1(rise.mean()), interval], [kl.mean(), error], same.mean()]
