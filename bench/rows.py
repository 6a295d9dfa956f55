"""What a step of several tokens of one sequence takes beside a step of one, with everything in
memory: what a draft's guesses cost, and what they may cost for them to pay."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.decoding import random_ids
from bench.drafts import texts_of
from bench.harness import Rows, Run, Table, bench, child, interleave, option
from smoe.runtime import Engine
from smoe.runtime.step import Phase, Span, Step

Answer = dict[str, Any]
PROMPT = 200  # tokens before the first step


@bench(
    options.BUNDLE, options.TEXT, options.rounds(3),
    option("--domain", default="code", help="of the text's lines"),
    option("--rows", type=int, nargs="+", default=[1, 2, 3, 5, 9], help="tokens of a step"),
    option("--steps", type=int, default=16, help="of each number of tokens"),
    option("--threads", type=int, nargs="+", default=[2]),
)  # fmt: skip
def rows(run: Run) -> Rows:
    """Milliseconds of steps of several tokens, and of how many experts each reads the weights."""
    ways = {
        str(threads): partial(
            child, "rows:steps", bundle=run.bundle, text=run.text, domain=run.domain,
            rows=run.rows, steps=run.steps, threads=threads,
        )
        for threads in run.threads
    }  # fmt: skip
    results = interleave(ways, run.rounds)
    columns = {"threads": "{}", "tokens": "{}", "ms": "{:.2f}", "of one": "{:.2f}",
               "experts a layer": "{:.1f}"}  # fmt: skip
    lines = []
    for threads in run.threads:
        answers = results[str(threads)]
        one = statistics.median(a[str(run.rows[0])][0] for a in answers)
        for count in run.rows:
            taken = statistics.median(a[str(count)][0] for a in answers)
            experts = statistics.median(a[str(count)][1] for a in answers)
            lines.append([threads, count, taken * 1e3, taken / one, experts])
    yield Table("rows", columns, lines, f"{run.rounds} rounds of {run.steps} steps")


def steps(
    bundle: str, text: str, domain: str, rows: list[int], steps: int, threads: int
) -> dict[str, list[float]]:
    """By tokens a step: median seconds, and experts of a layer that were used."""
    length, found = PROMPT + max(rows) * steps, {}
    with Engine.open(bundle, context=length, threads=threads) as engine:
        ids = np.array(_ids(engine, Path(text), domain, length), np.int64)
        layers = len(engine.manifest.layers)
        for count in rows:
            sequence, times = engine.new_sequence(), []
            engine.prefill(sequence, ids[:PROMPT]).finish()
            engine.reset_stats()
            for at in range(PROMPT, PROMPT + count * steps, count):
                started = time.perf_counter()
                span = Span(sequence, ids[at : at + count], np.arange(count), Phase.VERIFY)
                engine.step(Step((span,)))
                times.append(time.perf_counter() - started)
            used = (engine.stats.hits + engine.stats.misses) / steps / layers
            found[str(count)] = [statistics.median(times), used]
    return found


def _ids(engine: Engine, text: Path, domain: str, length: int) -> list[int]:
    """Of a text, or random ones where the bundle has no tokenizer."""
    if engine.text.tokenizer is None:
        return random_ids(length, engine.manifest.model.vocabulary)
    return next(texts_of(engine.text, text, domain, length))
