"""A model that does not fit: tokens per second inside shrinking memory, beside llama.cpp and
accelerate's disk offload.

Every engine reads the same text one token at a time (`engines`), each run a fresh process that is
in a memory cgroup from its first instruction on; the limits are shares of the bundle's size, the
same bytes for everyone. Before each limited run the model's files and the engines' libraries are
dropped from the page cache, and what stayed is counted; before one without a limit the model is
read into it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import cgroup, models, options, page_cache
from bench.engines import Request
from bench.geometries import GEOMETRIES
from bench.harness import (
    Rows,
    Run,
    Table,
    bench,
    child,
    child_command,
    child_environment,
    child_result,
    note,
    option,
)
from bench.random_models import worded_ids

SHARES = (0, 100, 75, 55, 40, 25)  # per cent of the bundle; 0 is no limit
MODULES = {
    "smoe": ("smoe.runtime", "onnxruntime", "numpy", "tokenizers"),
    "llama.cpp": ("llama_cpp", "numpy"),
    "transformers": ("accelerate", "transformers", "torch", "safetensors", "numpy"),
}
UNIT = ", tokens per second"  # in the table that the documents show
LOOSE = 200  # per cent; for disk offload alone, which holds a whole layer's experts
SLOW = {"warm": 2, "seconds": 60.0}  # for transformers, which takes seconds for a token
GGUF_TYPES = {"f32": "f32", "int8": "q8_0", "int4": "q4_0"}  # nearest to a bundle's backbone
DETAILS = {
    "limit": "{}", "MB": "{:.0f}", "engine": "{}", "tokens/s": "{:.3g}", "x llama.cpp": "{:.2f}",
    "nats off": "{:.1g}", "opened": "{:.1f} s", "peak MB": "{:.0f}", "major faults": "{:.0f}",
    "MB a token": "{:.1f}", "prompt": "{:.1f} s",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run: what `engines.Run` says, or why there is none; and what the cgroup saw. `share` is 0
    without a limit; `cached` are the bytes of the model that were in the page cache before."""

    engine: str
    share: int
    limit: int | None
    cached: int
    run: dict[str, Any] | None
    failure: str
    peak: int
    full: int
    faults: int


@bench(
    options.TEXT, options.tokens(256), options.rounds(3),
    option("--directory", type=Path, required=True, help="where models are, or are made"),
    option("--geometry", choices=GEOMETRIES, help="random weights of this model's sizes, instead"),
    option("--layers", type=int, default=16, help="of that model"),
    option("--bundle", type=Path, help="instead of the padded example model"),
    option("--gguf", type=Path, help="for llama.cpp, instead of one made of the checkpoint"),
    option("--checkpoint", type=Path, help="for transformers, instead of the padded one"),
    option("--warm", type=int, default=32, help="tokens before the clock starts"),
    option("--seconds", type=float, default=30.0, help="a run ends after these"),
    option("--timeout", type=float, default=900.0, help="seconds after which a run is killed"),
    option("--threads", type=int, default=2),
    option("--context", type=int, default=512, help="tokens that an engine makes room for"),
    option("--shares", type=int, nargs="+", default=SHARES, help="per cent; 0: no limit"),
    option(
        "--of-experts", action="store_true",
        help="limits are what holds these shares of the experts, and all the rest",
    ),
    option("--prompt", type=int, default=1, help="tokens that are read at once, before others"),
    option("--engines", nargs="+", choices=MODULES, default=list(MODULES)),
)  # fmt: skip
def outofcore(run: Run) -> Rows:
    """Tokens per second in shrinking memory, beside llama.cpp and accelerate's disk offload.

    Makes what is missing in the directory: the example model padded to real sizes, its bundle, and
    a GGUF file with Q4_0 experts and the rest in the type that is nearest to the bundle's backbone.
    With --geometry a checkpoint of random weights instead, which is not kept, and random words, as
    frequent as those of a text.
    Needs memory cgroups and, for the other sides, pip install llama-cpp-python gguf accelerate.
    nats off: by how much the log-likelihood of any token differs from what the same engine gave
    without a limit, since a wrong answer is fast.
    """
    if reason := cgroup.unavailable():
        raise SystemExit(f"Nothing can be shown here: {reason}")
    offered = [engine for engine in run.engines if not (run.geometry and engine == "transformers")]
    engines = [engine for engine in offered if installed(engine)]
    paths = _models(run, engines)
    shares = {*run.shares, *([LOOSE] if "transformers" in engines else [])}
    limits = {share: _limit(run, paths["smoe"], share) for share in shares}
    ids = _text(paths["smoe"], run)
    rows: list[Row] = []
    for turn, share, engine in _order(run.rounds, run.shares, engines):
        rows.append(row := measure(engine, paths[engine], share, limits[share], ids, run))
        got = f"{row.run['rate']:.3g} tokens/s" if row.run else row.failure
        note(f"round {turn + 1}, {share or 'no limit'}, {engine}: {got}; {row.cached} bytes cached")
    sizes = [[engine, page_cache.size(paths[engine]) / 1e6] for engine in engines]
    yield Table("sizes", {"engine": "{}", "MB on disk": "{:.0f}"}, sizes, disk(paths["smoe"]))
    yield speeds(rows)
    yield details(rows)
    yield perplexities(rows)
    runs = [[json.dumps(asdict(row))] for row in rows]
    yield Table("runs", {"run": "{}"}, runs, "Every run", printed=False)


def _models(run: Run, engines: list[str]) -> dict[str, Path]:
    """engine -> its model; whatever is missing is made."""
    if run.geometry:
        return models.at_size(run.directory, run.geometry, run.layers, "llama.cpp" in engines)
    bundle = run.bundle or models.padded(run.directory)
    paths = {"smoe": bundle}
    if "transformers" in engines or ("llama.cpp" in engines and not run.gguf):
        paths["transformers"] = run.checkpoint or models.padded_checkpoint(run.directory)
    if "llama.cpp" in engines:
        paths["llama.cpp"] = run.gguf or run.directory / "padded.gguf"
        if not paths["llama.cpp"].exists():
            from bench.to_gguf import to_gguf

            manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
            backbone = GGUF_TYPES[manifest["backbone"]["precision"]]
            to_gguf(paths["transformers"], paths["llama.cpp"], backbone=backbone)
    return paths


def _limit(run: Run, bundle: Path, share: int) -> int | None:
    """Bytes of a process for a share in per cent."""
    if not share:
        return None
    if not run.of_experts:
        return page_cache.size(bundle) * share // 100
    return int(child("outofcore:holding", bundle=bundle, share=share, context=run.context))


def holding(bundle: str, share: int, context: int) -> int:
    """The least bytes of a process like this one in which so many per cent of the experts stay."""
    from smoe.artifacts import open_bundle
    from smoe.runtime import allowance
    from smoe.runtime.budget import memory_for, plan_memory

    opened = open_bundle(bundle)
    alone = plan_memory(opened, None, context)
    count, process = min(share, 100) * alone.experts // 100, allowance.process(alone)
    return memory_for(opened, count, context, process=process)


def _text(bundle: Path, run: Run) -> list[int]:
    """What is read: a prompt, and so many tokens."""
    if not run.geometry:
        return tokens_of(bundle, run.text, run.prompt - 1 + run.tokens)
    return worded_ids(run.prompt - 1 + run.tokens, GEOMETRIES[run.geometry](layers=1).vocabulary)


def measure(
    engine: str, model: Path, share: int, limit: int | None, ids: list[int], run: Run
) -> Row:
    """One run in a fresh process and a fresh cgroup."""
    pace = SLOW if engine == "transformers" else {"warm": run.warm, "seconds": run.seconds}
    page_cache.drop(page_cache.libraries(*MODULES[engine]))
    cached = (
        page_cache.fetch(model) if limit is None else page_cache.drop(page_cache.files_under(model))
    )
    with (
        tempfile.TemporaryDirectory(dir=run.directory) as scratch,
        cgroup.Group("outofcore", limit) as group,
    ):
        request = Request(
            engine, str(model), ids, prompt=run.prompt, limit=limit, context=run.context,
            threads=run.threads, scratch=scratch, **pace,
        )  # fmt: skip
        command = child_command("engines:run_request", asdict(request))
        done = group.run(command, timeout=run.timeout, env=child_environment())
    return Row(
        engine=engine,
        share=share,
        limit=limit,
        cached=cached,
        run=child_result(done.out) if done.code == 0 else None,
        failure="" if done.code == 0 else _why(done),
        peak=done.peak,
        full=done.full,
        faults=done.faults,
    )


def _why(done: cgroup.Outcome) -> str:
    if done.killed:
        return f"killed after {done.seconds:.0f} s: the limit is too small for it"
    if done.code == -9:
        return f"not done in {done.seconds:.0f} s"
    return (done.err.strip().splitlines() or [f"ended with {done.code}"])[-1][:200]


def installed(engine: str) -> bool:
    """Whether an engine is installed; says so if not."""
    missing = [module for module in MODULES[engine] if importlib.util.find_spec(module) is None]
    if missing:
        note(f"{engine} is left out: {', '.join(missing)} is not installed.")
    return not missing


def _order(
    rounds: int, shares: tuple[int, ...], engines: list[str]
) -> Iterator[tuple[int, int, str]]:
    """(round, share, engine) of every run. Disk offload has one round, which will do."""
    for turn in range(rounds):
        for share in shares:
            yield from ((turn, share, e) for e in engines if e != "transformers" or turn == 0)
    if "transformers" in engines:
        yield 0, LOOSE, "transformers"


def tokens_of(bundle: Path, text: Path, count: int) -> list[int]:
    """The first `count` tokens of the text's documents, end to end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    documents = (json.loads(line)["text"] for line in text.read_text("utf-8").splitlines())
    ids: list[int] = []
    while len(ids) < count:
        ids += tokenizer.encode(next(documents)).ids
    return ids[:count]


def disk(bundle: Path) -> str:
    """What the disk gives to one reader that asks it directly, and what the kernel reads around a
    page fault."""
    file = max(page_cache.files_under(bundle), key=lambda f: f.stat().st_size)
    piece, buffer = 4 << 20, mmap.mmap(-1, 4 << 20)
    pieces = max(1, file.stat().st_size // piece)
    places = random.Random(0).sample(range(pieces), min(32, pieces))
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        started = time.perf_counter()
        done = sum(os.preadv(descriptor, [buffer], place * piece) for place in places)
        rate = done / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
    ahead = page_cache.read_ahead(file) >> 10
    return f"disk: {rate / 1e6:.0f} MB/s in direct reads of 4 MiB, read-ahead {ahead} KiB"


# -- what the runs say -----------------------------------------------------------------


def speeds(rows: list[Row]) -> Table:
    """Median tokens per second of each engine at each limit, and smoe's over llama.cpp's."""
    engines = [engine for engine in MODULES if any(row.engine == engine for row in rows)]
    columns = {"memory of the process": "{}"}
    columns |= {f"{engine}{UNIT if engine == 'smoe' else ''}": "{:.3g}" for engine in engines}
    columns |= {"ratio": "{:.2g}"}
    lines: list[list[Any]] = []
    for share in dict.fromkeys(row.share for row in sorted(rows, key=_place)):
        limit = next(row.limit for row in rows if row.share == share)
        place = f"{limit / 1e6:.0f} MB ({share} %)" if limit else "no limit"
        smoe, other = _rate(rows, "smoe", share), _rate(rows, "llama.cpp", share)
        ratio = smoe / other if smoe and other else None
        lines.append([place, *(_rate(rows, engine, share) for engine in engines), ratio])
    return Table("outofcore", columns, lines, "Tokens per second")


def details(rows: list[Row]) -> Table:
    """Medians over the rounds, and why a run gave none."""
    lines: list[list[Any]] = []
    keys = dict.fromkeys((row.engine, row.share) for row in sorted(rows, key=_place))
    for engine, share in keys:
        same = [row for row in rows if (row.engine, row.share) == (engine, share)]
        limit = same[0].limit
        first = [f"{share} %" if share else "none", limit / 1e6 if limit else None, engine]
        ran = [row for row in same if row.run]
        if not ran:
            lines.append([*first, same[0].failure, *[None] * 7])
            continue
        rate, other = _rate(rows, engine, share), _rate(rows, "llama.cpp", share)
        failed = len(same) - len(ran)
        text = f"{rate:.3g} ({failed} of {len(same)} failed)" if failed else rate
        lines.append([
            *first, text, rate / other if rate and other else None, _off(rows, ran),
            statistics.median(row.run["opened"] for row in ran if row.run),
            statistics.median(row.peak for row in ran) / 1e6,
            statistics.median(row.faults for row in ran),
            *_prompts([row.run for row in ran if row.run]),
        ])  # fmt: skip
    return Table("details", DETAILS, lines, "Medians")


def _prompts(runs: list[dict[str, Any]]) -> list[float | None]:
    """Megabytes from the disk for a token, and seconds from the first id to the first logits."""
    read = [run["bytes"] / run["tokens"] / 1e6 for run in runs if run.get("bytes") is not None]
    took = [run["prompt"] for run in runs if "prompt" in run]
    return [statistics.median(values) if values else None for values in (read, took)]


def perplexities(rows: list[Row]) -> Table:
    """Of the engines without a limit, over the tokens that all of them read."""
    read = {row.engine: row.run["nats"] for row in rows if row.run and not row.share}
    count = min(map(len, read.values()), default=0)
    lines = [[engine, math.exp(statistics.fmean(nats[:count]))] for engine, nats in read.items()]
    columns = {"engine": "{}", "perplexity": "{:.3f}"}
    return Table("perplexity", columns, lines if count else [], f"Over the first {count} tokens")


def _off(rows: list[Row], some: list[Row]) -> float | None:
    """The largest difference of `some` runs' log-likelihoods from those of the same engine without
    a limit."""
    engine = some[0].engine
    free = [row.run["nats"] for row in rows if row.run and (row.engine, row.share) == (engine, 0)]
    pairs = [zip(free[0], row.run["nats"], strict=False) for row in some if row.run and free]
    return max((abs(a - b) for pair in pairs for a, b in pair), default=None)


def _place(row: Row) -> tuple[int, int]:
    return -(row.share or 1000), list(MODULES).index(row.engine)


def _rate(rows: list[Row], engine: str, share: int) -> float | None:
    """The median of all rounds that ran."""
    rates = [
        row.run["rate"] for row in rows if row.run and (row.engine, row.share) == (engine, share)
    ]
    return statistics.median(rates) if rates else None
