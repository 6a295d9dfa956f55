"""Many sequences at once, each slot at its own level: what planes, their order and a memory by
planes are worth, part after part as in D²MoE's ablation.

Levels are drawn for every slot, the same for all ways (the paper's capacities: .3, .4 and .3 of 2,
3 and 4 bits), so that all compute the same; the first way reads and computes whole records. Every
run is a process of its own inside a memory cgroup, with the bundle's files dropped from the page
cache before.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import cgroup, models, options
from bench.budgets import beside, budget_for_share
from bench.harness import (
    Rows,
    Run,
    Table,
    bench,
    child,
    child_within,
    note,
    option,
    spread,
)
from bench.outofcore import tokens_of
from smoe.runtime import Engine, Policies
from smoe.runtime.routing import Assignment, Available, Routed
from smoe.runtime.step import Phase, Sequence, Span, Step

# Eviction and order; and whether slots have levels of their own.
WAYS = {
    "whole records": ("lru", "expert", False),
    "+ planes": ("lru", "expert", True),
    "+ hottest first": ("lru", "hottest", True),
    "+ memory by planes": ("planes", "hottest", True),
    "our eviction, expert order": ("next-use", "expert", True),
    "our eviction, hottest first": ("next-use", "hottest", True),
}
# Bytes of the cgroup beyond what is stated: states aside, what tokens pass through.
SPARE = 64 << 20
COLUMNS = {
    "": "{}", "tokens/s": "{:.1f} ({:.1f} to {:.1f})", "of the first": "{:.2f}",
    "with prompts": "{:.1f}", "MB / token": "{:.2f}", "reads / token": "{:.1f}",
    "stall": "{:.0%}", "hits": "{:.1%}",
}  # fmt: skip


class Drawn:
    """A level for every slot, with probability `shares[j]` for level j + 1."""

    def __init__(self, shares: list[float], seed: int):
        self._shares, self._random = shares, np.random.default_rng(seed)

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        levels = self._random.choice(len(self._shares), routed.ids.shape, p=self._shares) + 1
        return Assignment(ids=routed.ids, weights=routed.weights, levels=levels)


@bench(
    options.TEXT, options.rounds(3), options.residency(0.2, 0.4, 0.6), options.io("direct"),
    option("--directory", type=Path, required=True, help="where models are, or are made"),
    option("--bundle", type=Path, help="instead of the padded example model"),
    option("--sequences", type=int, nargs="+", default=[4, 8, 16, 32], help="at once"),
    option("--prompt", type=int, default=128, help="tokens of each sequence read at once"),
    option("--tokens", type=int, default=128, help="of each sequence after that"),
    option("--warm", type=int, default=8, help="of those, before the clock starts"),
    option("--seconds", type=float, default=60.0, help="decoding ends after these"),
    option("--ways", nargs="+", choices=WAYS, default=list(WAYS)),
    option("--shares", type=float, nargs="+", default=[0.3, 0.4, 0.3], help="of slots, by level"),
    option("--threads", type=int, default=2),
    option("--seed", type=int, default=0),
)  # fmt: skip
def planes(run: Run) -> Rows:
    """Reading by planes, the hottest first, in a memory by planes: D²MoE's parts one by one."""
    if reason := cgroup.unavailable():
        raise SystemExit(f"Nothing can be shown here: {reason}")
    bundle, context = run.bundle or models.padded(run.directory), run.prompt + run.tokens
    ratios: list[list[Any]] = []
    for share in run.residency:
        room = child("planes:needs", bundle=bundle, share=share, context=context)
        for sequences in run.sequences:
            results: dict[str, list[dict[str, Any]]] = {way: [] for way in run.ways}
            for turn, way in _turns(run.rounds, run.ways):
                note(f"{share:.0%}, {sequences} sequences, round {turn + 1}: {way}")
                results[way].append(_measured(run, bundle, way, share, sequences, room))
            title = f"{sequences} sequences, {share:.0%} of the experts in memory"
            yield Table(f"{share:g}-{sequences}", COLUMNS, list(_lines(results)), title)
            ratios.append([share, sequences, *_gains(results)])
    columns = {"in memory": "{:.0%}", "sequences": "{}"} | {
        f"{way}, of the one before": "{:.2f}" for way in run.ways[1:]
    }
    yield Table("gains", columns, ratios, "What each part adds, in tokens per second")


def _turns(rounds: int, ways: list[str]) -> Iterator[tuple[int, str]]:
    """Every round begins with another way."""
    for turn in range(rounds):
        first = turn % len(ways)
        yield from ((turn, way) for way in ways[first:] + ways[:first])


def _measured(
    run: Run, bundle: Path, way: str, share: float, sequences: int, room: dict[str, int]
) -> dict[str, Any]:
    """One run in a process and a cgroup of its own."""
    ids = tokens_of(bundle, run.text, run.prompt + run.tokens + 997)
    asked = {
        "bundle": str(bundle), "way": way, "sequences": sequences, "ids": ids,
        "share": share, "prompt": run.prompt, "tokens": run.tokens, "warm": run.warm,
        "seconds": run.seconds, "shares": run.shares, "threads": run.threads, "io": run.io,
        "seed": run.seed,
    }  # fmt: skip
    limit = room["memory"] + sequences * room["state"] + SPARE
    return child_within(limit, "planes:run_way", **asked)


def needs(bundle: str, share: float, context: int) -> dict[str, int]:
    """Bytes of a process in which that share of the experts stays, and of a sequence's state."""
    from smoe.artifacts import open_bundle
    from smoe.runtime import allowance
    from smoe.runtime.budget import memory_for, plan_memory

    opened = open_bundle(bundle)
    alone = plan_memory(opened, None, context)
    process = allowance.process(alone)
    memory = memory_for(opened, int(share * alone.experts), context, process=process)
    return {"memory": memory, "state": alone.state}


def run_way(
    bundle: str, way: str, sequences: int, ids: list[int], share: float, prompt: int, tokens: int,
    warm: int, seconds: float, shares: list[float], threads: int, io: str | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Prompts one after another, then steps of one token of every sequence."""
    eviction, order, levels = WAYS[way]
    chooser = {"substitution": Drawn(shares, seed)} if levels else {}
    policies = Policies(eviction, order=order, prefetch="none", **chooser)
    context = prompt + tokens
    how = {"context": context, "threads": threads, "io": io}
    how |= beside(budget_for_share(bundle, share, context))
    with Engine.open(bundle, policies=policies, **how) as engine:
        texts = [np.roll(ids, -number * 61)[:context] for number in range(sequences)]
        started = time.perf_counter()
        rows = [(engine.new_sequence(), text) for text in texts]
        for sequence, text in rows:
            engine.prefill(sequence, text[:prompt]).finish()
        prompts = time.perf_counter() - started
        for at in range(prompt, prompt + warm):
            _advance(engine, rows, at)
        engine.reset_stats()
        started, steps = time.perf_counter(), 0
        for at in range(prompt + warm, prompt + tokens):
            _advance(engine, rows, at)
            steps += 1
            if time.perf_counter() - started > seconds:
                break
        taken, stats = time.perf_counter() - started, engine.stats
        decoded = steps * sequences
        rate = decoded / taken
        whole = sequences * (prompt + tokens) / (prompts + sequences * tokens / rate)
        return {
            "rate": rate, "whole": whole, "bytes": stats.bytes_read / decoded,
            "loads": stats.loads / decoded, "stall": stats.stall_seconds / taken,
            "hits": stats.hit_rate, "steps": steps,
        }  # fmt: skip


def _advance(engine: Engine, rows: list[tuple[Sequence, np.ndarray]], at: int) -> None:
    """Every sequence by the token at that place of its text."""
    kept = np.zeros(1, np.int64)
    spans = [Span(sequence, text[at : at + 1], kept, Phase.DECODE) for sequence, text in rows]
    engine.step(Step(tuple(spans)))


def _lines(results: dict[str, list[dict[str, Any]]]) -> Iterator[list[Any]]:
    """Medians, and the spread of the rate."""
    first = spread([r["rate"] for r in next(iter(results.values()))]).median
    for way, runs in results.items():
        rate = spread([r["rate"] for r in runs])
        whole, nbytes, loads, stall, hits = (
            spread([r[name] for r in runs]).median
            for name in ("whole", "bytes", "loads", "stall", "hits")
        )
        rates = [rate.median, rate.low, rate.high]
        yield [way, rates, rate.median / first, whole, nbytes / 1e6, loads, stall, hits]


def _gains(results: dict[str, list[dict[str, Any]]]) -> list[float]:
    rates = [spread([r["rate"] for r in runs]).median for runs in results.values()]
    return [rate / before for before, rate in itertools.pairwise(rates)]
