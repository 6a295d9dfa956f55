"""What preparing gives and costs: quality by encoding and level, time of a profile and of
prices."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.harness import (
    Rows,
    Run,
    Table,
    bench,
    interleave,
    option,
    spread,
    timed,
)
from bench.models import CALIBRATION, EXAMPLE, build
from bench.page_cache import size
from smoe.artifacts import nested
from smoe.artifacts.encodings import ENCODINGS

NESTED = ("nested:2+1+1:128", "nested:5+1+1+1:128")


def smoe_prep(*arguments: object) -> dict[str, Any]:
    """What a command of smoe-prep says as JSON."""
    command = [sys.executable, "-m", "smoe.prep", *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


@bench(options.TEXT, options.tokens(4096))
def encodings(run: Run) -> Rows:
    """The example model in every encoding: bytes, and how far it is from the original."""
    columns = {
        "encoding": "{}", "bundle": "{:.1f} MB", "perplexity": "{:.3f}",
        "KL, nats per token": "{:.1g}", "same best token": "{:.2%}",
    }  # fmt: skip
    lines: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        profiled = Path(scratch) / "profile"
        smoe_prep("profile", EXAMPLE, "--calibration", CALIBRATION, "-o", profiled)
        for encoding in ENCODINGS:
            bundle = Path(scratch) / f"{encoding}.smoe"
            smoe_prep("build", EXAMPLE, "-o", bundle, "--profile", profiled, "--encoding", encoding)
            verified = smoe_prep(
                "verify", bundle, EXAMPLE, "--text", run.text, "--tokens", run.tokens
            )
            if not lines:
                lines.append(["original", None, verified["perplexity_original"], None, None])
            lines.append([encoding, size(bundle) / 1e6, verified["perplexity_bundle"],
                          verified["kl_nats_per_token"], verified["top1_agreement"]])  # fmt: skip
    yield Table("encodings", columns, lines, f"{run.tokens} tokens of {run.text.name}")


@bench(
    options.TEXT, options.tokens(8192),
    option("--encodings", nargs="+", default=NESTED, help="nested encodings"),
    option("--calibration-tokens", type=int, default=65536),
)  # fmt: skip
def levels(run: Run) -> Rows:
    """What each level of nested planes costs, with calibrated codes and with plain rounding.

    The rise of perplexity has the 95 % interval of the paired difference. Bits count codes and
    scales.
    """
    columns = {
        "encoding": "{}", "level": "{}", "bits per weight, with scales": "{:.3f}",
        "calibrated": "{:+.2f} % ± {:.2f}", "KL, calibrated": "{:.4f}",
        "rounded": "{:+.2f} % ± {:.2f}", "KL, rounded": "{:.4f}",
    }  # fmt: skip
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(run.encodings):
            encoding = nested.parse(name)
            bundles = [
                build(
                    EXAMPLE, Path(scratch) / f"{quantiser}-{number}.smoe", CALIBRATION,
                    "--tokens", str(run.calibration_tokens), "--encoding", name,
                    "--quantiser", quantiser, "--prices", "0", "--self", "0",
                )
                for quantiser in ("calibrated", "nearest")
            ]  # fmt: skip
            for level in range(1, encoding.levels + 1):
                bits = encoding.split.bits(level) + 16 / encoding.group
                line: list[Any] = [name, level, bits]
                for bundle in bundles:
                    verified = smoe_prep("verify", bundle, EXAMPLE, "--text", run.text,
                                  "--tokens", run.tokens, "--level", level)  # fmt: skip
                    rise = [
                        verified["perplexity_rise_percent"],
                        verified["perplexity_rise_interval"],
                    ]
                    line += [rise, verified["kl_nats_per_token"]]
                lines.append(line)
    yield Table("nested", columns, lines, f"{run.tokens} tokens of {run.text.name}")


@bench(
    options.rounds(3), options.tokens(65536),
    option("--model", type=Path, default=EXAMPLE, help="a checkpoint"),
    option("--calibration", type=Path, default=CALIBRATION),
    option("--prices", type=int, default=8192, help="tokens that prices are from"),
    option("--encoding", default="nested:2+1+1:128"),
)  # fmt: skip
def costs(run: Run) -> Rows:
    """What a profile and prices cost beside a plain pass of transformers over the same text.

    The plain pass runs in batches of as many tokens. Prices, predictors and their fit are a build
    with them less one without.
    """
    import torch
    import transformers

    from smoe.prep.build import build as make
    from smoe.prep.checkpoint.checkpoint import open_checkpoint
    from smoe.prep.checkpoint.text import Calibration
    from smoe.prep.options import Recipe
    from smoe.prep.progress import Progress
    from smoe.prep.statistics.profile import profile

    quiet, checkpoint = Progress(quiet=True), open_checkpoint(run.model)
    text = Calibration(str(run.calibration), run.tokens)
    rows = text.rows(checkpoint)
    classes = transformers.AutoModelForCausalLM
    model = classes.from_pretrained(run.model, dtype=torch.float32).eval()

    def plain() -> float:
        with torch.no_grad():
            return timed(lambda: [model(batch, use_cache=False) for batch in _batches(rows)])

    def profiled() -> float:
        with tempfile.TemporaryDirectory() as directory:
            return timed(lambda: profile(checkpoint, Path(directory), text, quiet))

    def built(prices: int) -> float:
        recipe = Recipe(run.encoding, quantiser="nearest", prices=prices)
        with tempfile.TemporaryDirectory() as directory:
            return timed(lambda: make(run.model, f"{directory}/b", text, recipe, None, quiet))

    ways = {"plain": plain, "profile": profiled,
            "build": lambda: built(0), "build with prices": lambda: built(run.prices)}  # fmt: skip
    spreads = {name: spread(values) for name, values in interleave(ways, run.rounds).items()}
    base = spreads["plain"].median
    lines = [[name, [s.median, s.low, s.high], s.median / base] for name, s in spreads.items()]
    extra = spreads["build with prices"].median - spreads["build"].median
    lines.append(["prices, predictors, fit", f"{extra:.1f} s", extra / base])
    columns = {"": "{}", "seconds": "{:.1f} s ({:.1f} to {:.1f})", "of a plain pass": "{:.2f}"}
    yield Table("costs", columns, lines, f"{sum(map(len, rows))} tokens, prices of {run.prices}")


def _batches(rows: list[np.ndarray], tokens: int = 8192) -> list[Any]:
    """Rows of equal length stacked, so many tokens at once."""
    import torch

    lengths = sorted({len(row) for row in rows})
    groups = [[row for row in rows if len(row) == length] for length in lengths]
    return [
        torch.from_numpy(np.stack(group[i : i + max(1, tokens // len(group[0]))]))
        for group in groups
        for i in range(0, len(group), max(1, tokens // len(group[0])))
    ]
