"""A model that does not fit: tokens per second inside shrinking memory, beside llama.cpp and accelerate's disk offload.

    python bench/outofcore.py DIR [--bundle B.smoe] [--gguf F.gguf] [--checkpoint C] [--svg docs/outofcore.svg]

DIR gets what is missing: the example model padded to real sizes (inflate.py), its bundle, and a GGUF file with Q4_0
experts and the rest in the type that is nearest to the bundle's backbone (f32, or q8_0 for int8). Then every engine
reads the same text one token at a time (engines.py), each run a fresh process that is in a memory cgroup from its first
instruction on; the limits are shares of the bundle's size, the same bytes for everyone. Before each limited run the
model's files and the engines' libraries are dropped from the page cache, and what stayed is counted; before one without
a limit the model is read into it. Rounds are interleaved; medians are printed. `nats off` is by how much the log-likelihood of any token differs from what the same engine gave
without a limit, since a wrong answer is fast.

Needs root (for the cgroup), `pip install llama-cpp-python gguf accelerate` for the other sides, and time: an hour.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cgroup
import picture
from engines import Request

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARES = (None, 100, 75, 55, 40, 25)  # per cent of the bundle; None is no limit
MODULES = {
    "smoe": ("smoe.runtime", "onnxruntime", "numpy", "tokenizers"),
    "llama.cpp": ("llama_cpp", "numpy"),
    "transformers": ("accelerate", "transformers", "torch", "safetensors", "numpy"),
}
LOOSE = 200  # per cent; for disk offload alone, which holds a whole layer's experts
SLOW = {"warm": 2, "seconds": 60.0}  # for transformers, which takes seconds for a token


@dataclass(frozen=True)
class Row:
    """One run: what engines.Run says, or why there is none; and what the cgroup saw."""

    engine: str
    share: int | None
    limit: int | None
    cached: int  # bytes of the model that were in the page cache before
    run: dict | None
    failure: str
    peak: int
    full: int
    faults: int


def prepare(directory: Path, chosen: argparse.Namespace) -> dict[str, Path]:
    """engine -> its model; whatever is missing is made."""
    checkpoint = chosen.checkpoint or directory / "inflated"
    bundle, gguf = (
        chosen.bundle or directory / "inflated.smoe",
        chosen.gguf or directory / "inflated.gguf",
    )
    directory.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    if not checkpoint.exists():
        _make(str(here / "inflate.py"), str(checkpoint))
    if not bundle.exists():
        text = ("--calibration", str(EXAMPLES / "calibration.jsonl"), "--tokens", "256")
        encoding = (
            "--encoding",
            "nested:2+1+1:128",
            "--quantiser",
            "nearest",
            "--backbone",
            "int8",
        )
        _make("-m", "smoe.prep", "build", str(checkpoint), "-o", str(bundle), *text, *encoding)
    if "llama.cpp" in chosen.engines and not gguf.exists():
        manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
        nearest = {"f32": "f32", "int8": "q8_0", "int4": "q4_0"}[manifest["backbone"]["precision"]]
        _make(str(here / "to_gguf.py"), str(checkpoint), str(gguf), "--backbone", nearest)
    return {"smoe": bundle, "llama.cpp": gguf, "transformers": checkpoint}


def _make(*arguments: str) -> None:
    print("making:", *arguments, file=sys.stderr)
    subprocess.run([sys.executable, *arguments], check=True, stdout=sys.stderr)


def measure(
    engine: str,
    model: Path,
    share: int | None,
    whole: int,
    ids: list[int],
    chosen: argparse.Namespace,
) -> Row:
    """One run in a fresh process and a fresh cgroup."""
    limit = None if share is None else whole * share // 100
    how = SLOW if engine == "transformers" else {"warm": chosen.warm, "seconds": chosen.seconds}
    with (
        tempfile.TemporaryDirectory(dir=chosen.directory) as scratch,
        cgroup.Group("outofcore", limit) as group,
    ):
        ask = Request(
            engine, str(model), ids, limit=limit, threads=chosen.threads, scratch=scratch, **how
        )
        command = [
            sys.executable,
            str(Path(__file__).with_name("engines.py")),
            json.dumps(asdict(ask)),
        ]
        cgroup.drop(cgroup.libraries(*MODULES[engine]))
        cached = cgroup.fetch(model) if limit is None else cgroup.drop(cgroup.files_of(model))
        done = group.run(command, timeout=chosen.timeout)
    run = json.loads(done.out.splitlines()[-1]) if done.code == 0 else None
    return Row(
        engine,
        share,
        limit,
        cached,
        run,
        "" if run else _why(done),
        done.peak,
        done.full,
        done.faults,
    )


def _why(done: cgroup.Outcome) -> str:
    if done.killed:
        return f"killed after {done.seconds:.0f} s: the limit is too small for it"
    if done.code == -9:
        return f"not done in {done.seconds:.0f} s"
    return (done.err.strip().splitlines() or [f"ended with {done.code}"])[-1][:200]


def table(rows: list[Row]) -> str:
    """Medians as Markdown."""
    columns = (
        "limit",
        "MB",
        "engine",
        "tokens/s",
        "x llama.cpp",
        "nats off",
        "opened",
        "peak MB",
        "major faults",
    )
    out = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for engine, share in dict.fromkeys((row.engine, row.share) for row in sorted(rows, key=_order)):
        same = [row for row in rows if (row.engine, row.share) == (engine, share)]
        size = "" if share is None else f"{same[0].limit / 1e6:.0f}"
        first = f"| {'none' if share is None else f'{share} %'} | {size} | {engine} |"
        ran = [row for row in same if row.run]
        if not ran:
            out.append(f"{first} {same[0].failure} | | | | | |")
            continue
        rate, other = _rate(rows, engine, share), _rate(rows, "llama.cpp", share)
        off = _off(rows, ran)
        failed = f" ({len(same) - len(ran)} of {len(same)} failed)" if len(ran) < len(same) else ""
        out.append(
            f"{first} {rate:.3g}{failed} | {f'{rate / other:.2f}' if other else ''} | {'' if off is None else f'{off:.1g}'} | "
            f"{statistics.median(row.run['opened'] for row in ran):.1f} s | "
            f"{statistics.median(row.peak for row in ran) / 1e6:.0f} | "
            f"{statistics.median(row.faults for row in ran):.0f} |"
        )
    return "\n".join(out)


def _off(rows: list[Row], some: list[Row]) -> float | None:
    """The largest difference of `some` runs' log-likelihoods from those of the same engine without a limit."""
    free = [
        row.run["nats"]
        for row in rows
        if row.run and row.engine == some[0].engine and row.share is None
    ]
    pairs = (zip(free[0], row.run["nats"], strict=False) for row in some if free)
    return max((abs(a - b) for pair in pairs for a, b in pair), default=None)


def perplexities(rows: list[Row]) -> str:
    """Of the engines without a limit, over the tokens that all of them read."""
    read = {row.engine: row.run["nats"] for row in rows if row.run and row.share is None}
    count = min(map(len, read.values()), default=0)
    found = ", ".join(
        f"{engine} {math.exp(statistics.fmean(nats[:count])):.3f}" for engine, nats in read.items()
    )
    return (
        f"perplexity over the first {count} tokens: {found}"
        if count
        else "perplexity: no run without a limit"
    )


def _order(row: Row) -> tuple:
    return -(row.share or 1000), list(MODULES).index(row.engine)


def _rate(rows: list[Row], engine: str, share: int | None) -> float | None:
    """The median of all rounds that ran."""
    rates = [
        row.run["rate"] for row in rows if row.run and (row.engine, row.share) == (engine, share)
    ]
    return statistics.median(rates) if rates else None


def drawn(rows: list[Row]) -> str:
    shares = list(dict.fromkeys(row.share for row in sorted(rows, key=_order)))
    places = ["no limit" if share is None else f"{share} %" for share in shares]
    engines = [engine for engine in MODULES if any(row.engine == engine for row in rows)]
    series = {engine: [_rate(rows, engine, share) for share in shares] for engine in engines}
    return picture.lines(
        "Tokens per second", places, "memory of the whole process, of the bundle's size", series
    )


def tokens_of(bundle: Path, text: Path, count: int) -> list[int]:
    """The first `count` tokens of the first long enough documents, end to end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    documents = (json.loads(line)["text"] for line in text.read_text("utf-8").splitlines())
    ids: list[int] = []
    while len(ids) < count:
        ids += tokenizer.encode(next(documents)).ids
    return ids[:count]


def order(
    chosen: argparse.Namespace, shares: tuple[int | None, ...]
) -> Iterator[tuple[int, int | None, str]]:
    """(round, share, engine) of every run. Disk offload has one round, which will do."""
    for turn in range(chosen.rounds):
        for share in shares:
            yield from (
                (turn, share, e) for e in chosen.engines if e != "transformers" or turn == 0
            )
    if "transformers" in chosen.engines:
        yield 0, LOOSE, "transformers"


def disk(bundle: Path) -> str:
    """What the disk gives to one reader that asks it directly, and what the kernel reads around a page fault."""
    file = max(cgroup.files_of(bundle), key=lambda f: f.stat().st_size)
    piece, buffer = 4 << 20, mmap.mmap(-1, 4 << 20)
    places = random.Random(0).sample(range(file.stat().st_size // piece), 32)
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        started = time.perf_counter()
        done = sum(os.preadv(descriptor, [buffer], place * piece) for place in places)
        rate = done / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
    return f"disk: {rate / 1e6:.0f} MB/s in direct reads of 4 MiB, read-ahead {cgroup.read_ahead(file) >> 10} KiB"


def available(engine: str) -> bool:
    """Whether an engine is installed; says so if not."""
    missing = [module for module in MODULES[engine] if importlib.util.find_spec(module) is None]
    if missing:
        print(f"{engine} is left out: {', '.join(missing)} is not installed.", file=sys.stderr)
    return not missing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where models are, or are made")
    for name in ("bundle", "gguf", "checkpoint", "json", "svg"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--text", type=Path, default=EXAMPLES / "heldout.jsonl")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--warm", type=int, default=32, help="tokens before the clock starts")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="a run ends after these, whatever it has read"
    )
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--shares", type=int, nargs="*", help="per cent of the bundle; 0 is no limit"
    )
    parser.add_argument("--engines", nargs="+", choices=MODULES, default=list(MODULES))
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    chosen.engines = [engine for engine in chosen.engines if available(engine)]
    models = prepare(chosen.directory, chosen)
    whole = cgroup.size(models["smoe"])
    shares = SHARES if chosen.shares is None else tuple(share or None for share in chosen.shares)
    why = cgroup.unavailable()
    if why:
        raise SystemExit(f"Nothing can be shown here: {why}")
    ids = tokens_of(models["smoe"], chosen.text, chosen.tokens)
    rows: list[Row] = []
    for turn, share, engine in order(chosen, shares):
        rows.append(row := measure(engine, models[engine], share, whole, ids, chosen))
        got = f"{row.run['rate']:.3g} tokens/s" if row.run else row.failure
        print(
            f"round {turn + 1}, {share or 'no limit'}, {engine}: {got}; {row.cached} bytes cached",
            file=sys.stderr,
        )
        if chosen.json:
            chosen.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    print(
        f"on disk: {', '.join(f'{e} {cgroup.size(models[e]) / 1e6:.0f} MB' for e in chosen.engines)}"
    )
    print(f"{disk(models['smoe'])}\n{perplexities(rows)}\n\n{table(rows)}")
    if chosen.svg:
        chosen.svg.write_text(drawn(rows), "utf-8")


if __name__ == "__main__":
    main()
