"""What preparing gives and costs: quality by encoding and level, time of a profile and of prices,
memory of a build."""

from __future__ import annotations

import json
import os
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
    note,
    option,
    spread,
    timed,
)
from bench.models import CALIBRATION, EXAMPLE, build
from bench.page_cache import size
from bench.random_models import Mxfp4Shape, Shape, random_checkpoint, random_text
from smoe.artifacts import nested
from smoe.artifacts.encodings import ENCODINGS

GIGABYTE = 1e9
NESTED = ("nested:2+1+1:128", "nested:5+1+1+1:128")


def _prep(*arguments: object) -> dict[str, Any]:
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
        _prep("profile", EXAMPLE, "--calibration", CALIBRATION, "-o", profiled)
        for encoding in ENCODINGS:
            bundle = Path(scratch) / f"{encoding}.smoe"
            _prep("build", EXAMPLE, "-o", bundle, "--profile", profiled, "--encoding", encoding)
            verified = _prep("verify", bundle, EXAMPLE, "--text", run.text, "--tokens", run.tokens)
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
                    "--quantiser", quantiser, "--prices", "0",
                )
                for quantiser in ("calibrated", "nearest")
            ]  # fmt: skip
            for level in range(1, encoding.levels + 1):
                bits = encoding.split.bits(level) + 16 / encoding.group
                line: list[Any] = [name, level, bits]
                for bundle in bundles:
                    verified = _prep("verify", bundle, EXAMPLE, "--text", run.text,
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


# -- models larger than memory may be --------------------------------------------------


@bench(
    options.tokens(4096),
    option("--gigabytes", type=float, default=4.0, help="of experts"),
    option("--stored", choices=["bf16", "mxfp4"], default="bf16", help="what experts are in"),
    option("--encoding", default="stored"),
    option("--prices", type=int, default=8192, help="tokens that prices are from; 0: none"),
    option("--keep", type=Path, help="a folder for the checkpoint and the bundle"),
)
def large(run: Run) -> Rows:
    """Memory and time of building a large checkpoint, beside what inspect said before.

    Memory is the peak of all resident pages, mapped files included.
    """
    kind, bits = (Shape, 16) if run.stored == "bf16" else (Mxfp4Shape, 4.25)
    layers, experts, hidden = 16, 64, 1024
    each = run.gigabytes * GIGABYTE / (layers * experts * 3 * hidden * bits / 8)
    width = int(each / 32 + 1) * 32
    shape = kind(layers=layers, experts=experts, top_k=4, hidden=hidden, width=width)
    with tempfile.TemporaryDirectory() as scratch:
        folder = run.keep or Path(scratch)
        model = random_checkpoint(folder / "model", shape)
        note(f"experts: {shape.expert_bytes / GIGABYTE:.2f} GB in {run.stored}")
        text = random_text(folder / "ids.jsonl", run.tokens, shape.vocabulary)
        about = [model, "--tokens", run.tokens, "--encoding", run.encoding, "--prices", run.prices]
        inspected, output = _prep("inspect", *about), folder / "model.smoe"
        peak, seconds = _peak(
            [sys.executable, "-m", "smoe.prep", "build", *map(str, about),
             "--calibration", str(text), "-o", str(output)]
        )  # fmt: skip
        lines = [
            ["memory, GB", inspected["memory"] / GIGABYTE, peak / GIGABYTE],
            ["bundle, GB", inspected["bundle"] / GIGABYTE, size(output) / GIGABYTE],
            ["seconds", inspected["seconds"], seconds],
        ]
    columns = {"": "{}", "said before": "{:.2f}", "measured": "{:.2f}"}
    yield Table("large", columns, lines, f"{shape.expert_bytes / GIGABYTE:.2f} GB of experts")


def _peak(command: list[str]) -> tuple[int, float]:
    """The peak of resident memory of a command in bytes, and its seconds."""
    status: list[int] = []

    def wait() -> None:
        process = subprocess.Popen(command, stdout=sys.stderr)
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        status[:] = process.returncode, usage.ru_maxrss * 1024

    seconds = timed(wait)
    if status[0]:
        raise SystemExit(f"{' '.join(command)} ended with {status[0]}.")
    return status[1], seconds
