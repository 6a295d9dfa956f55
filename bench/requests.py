"""Many requests at once: tokens per second by how many there are and by how much of the experts is
in memory, and how long anybody waits while a long prompt comes in.

Every run is a process of its own; with a share of the experts it is inside a memory cgroup of what
was stated and the interpreter, with the files dropped from the page cache, so that reads are
reads."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import cgroup, options
from bench.decoding import per_token, random_ids, reads
from bench.harness import (
    Rows,
    Run,
    Table,
    bench,
    child,
    child_within,
    interleave,
    note,
    option,
    spread,
)  # fmt: skip
from smoe.artifacts import open_bundle
from smoe.runtime import Engine, Policies, StopWhen
from smoe.runtime.budget import Requests, memory_for
from smoe.runtime.generation import Token
from smoe.runtime.sampling import Sampling
from smoe.runtime.serve import Loop, Request
from smoe.runtime.serve.measure import measure_requests

Answer = dict[str, Any]
NEVER = StopWhen(ids=())
PROCESS = 64 << 20  # bytes of an interpreter that a plan is beside, at most
USUAL = 50  # tokens of each request before a long prompt comes
COUNTS = option("--requests", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="at once")
NEW = option("--new", type=int, default=128, help="tokens that each request makes")
POLICIES = {
    "lossless": {},
    "loss .01": {"loss": 0.01},
}


@bench(
    options.BUNDLE, options.TEXT, options.rounds(3), options.io("direct"), COUNTS, NEW,
    option("--prompt", type=int, default=128, help="tokens of each prompt"),
    option("--shares", type=float, nargs="+", default=[1.0, 0.6, 0.4, 0.2], help="of the experts"),
    option("--policies", nargs="+", choices=POLICIES, default=["lossless"]),
)  # fmt: skip
def requests(run: Run) -> Rows:
    """Tokens per second of 1 to 32 requests at once, with shares of the experts in memory."""
    refusal = cgroup.unavailable()
    if refusal and min(run.shares) < 1:
        raise SystemExit(f"Shares of the experts need a memory cgroup: {refusal}")
    ways = {
        f"{share:g} {count} {policy}": partial(_limited, run, share, count, policy)
        for share in run.shares for count in run.requests for policy in run.policies
    }  # fmt: skip
    results = interleave(ways, run.rounds)
    columns = {
        "experts in memory": "{:.0%}", "requests": "{}", "policy": "{}", "tok/s": "{:.1f}",
        "x one": "{:.2f}", "MB read a token": "{:.2f}", "hits": "{:.1%}", "waiting": "{:.0%}",
        "between tokens, ms": "{:.1f}", "first token, s": "{:.2f}",
    }  # fmt: skip
    lines = []
    for share in run.shares:
        for policy in run.policies:
            alone = results.get(f"{share:g} 1 {policy}", [])
            one = spread([a["tokens_per_second"] for a in alone]).median if alone else None
            for count in run.requests:
                answers = results[f"{share:g} {count} {policy}"]
                middle = sorted(answers, key=lambda a: a["tokens_per_second"])[len(answers) // 2]
                lines.append([
                    share, count, policy, middle["tokens_per_second"],
                    one and middle["tokens_per_second"] / one,
                    middle["bytes_read"] / middle["new_tokens"] / 1e6, middle["hit_rate_after"],
                    middle["stall_share"], middle["tpot"] * 1e3, middle["ttft"],
                ])  # fmt: skip
    title = f"{run.rounds} rounds, {run.prompt} tokens in and {run.new} out"
    yield Table("requests", columns, lines, title)


def _limited(run: Run, share: float, count: int, policy: str) -> Answer:
    settings = {
        "bundle": str(run.bundle), "text": str(run.text), "count": count, "prompt": run.prompt,
        "new": run.new, "share": share, "policy": policy, "io": run.io,
    }  # fmt: skip
    if share >= 1:
        return child("requests:once", **settings)
    bundle, context = open_bundle(run.bundle), run.prompt + run.new
    limit = _budget(bundle, share, context, count) + PROCESS
    within = limit + limit // 16
    return child_within(within, "requests:once", **settings)


def _budget(bundle: Any, share: float, context: int, count: int) -> int:
    experts = int(share * sum(layer.experts for layer in bundle.manifest.layers))
    return memory_for(bundle, experts, context, requests=Requests(count))


def once(
    bundle: str, text: str, count: int, prompt: int, new: int, share: float, policy: str,
    io: str | None,
) -> Answer:  # fmt: skip
    """As many requests as there may be at once, all there from the start."""
    context, limited = prompt + new, share < 1
    beside = _budget(open_bundle(bundle), share, context, count) if limited else None
    policies = Policies(**POLICIES[policy]) if limited else Policies()
    engine = Engine.open(
        bundle, beside=beside, context=context, requests=count, policies=policies,
        io=io if limited else None,
    )  # fmt: skip
    with engine, Loop(engine) as loop:
        note("\n".join(engine.mode_lines()))
        return measure_requests(loop, _rows(engine, Path(text), count, prompt + new), prompt)


def _rows(engine: Engine, text: Path, count: int, length: int) -> list[np.ndarray]:
    """So many rows of real text, one behind the other, or of random ids where the bundle has no
    tokenizer."""
    if engine.text.tokenizer is None:
        vocabulary = engine.manifest.model.vocabulary
        return np.array_split(np.array(random_ids(count * length, vocabulary)), count)
    texts = (json.loads(line)["text"] for line in text.read_text("utf-8").splitlines())
    ids = np.concatenate([engine.text.encode(one) for one in texts])
    return np.array_split(np.resize(ids, count * length), count)


@bench(
    options.BUNDLE, options.rounds(3), COUNTS,
    option("--new", type=int, default=64, help="tokens that each request makes"),
    option("--threads", type=int, default=2),
)  # fmt: skip
def together(run: Run) -> Rows:
    """What a step of many requests takes, beside what its bytes allow, with everything in memory.

    The bytes are those of the backbone, and of every expert that somebody wants, once."""
    results = _by_count(run, "requests:steps", threads=run.threads, new=run.new)
    columns = {
        "requests": "{}", "tok/s": "{:.1f}", "ms a step": "{:.2f}", "MB a step": "{:.0f}",
        "GB/s of the memory": "{:.1f}", "of it": "{:.2f}",
    }  # fmt: skip
    lines = []
    for count in run.requests:
        answers = results[str(count)]
        seconds, nbytes, memory = (
            statistics.median(answer[key] for answer in answers)
            for key in ("seconds", "bytes", "memory")
        )
        share = statistics.median(a["bytes"] / a["seconds"] / a["memory"] for a in answers)
        row = [count, count / seconds, seconds * 1e3, nbytes / 1e6, memory / 1e9, share]
        lines.append(row)
    yield Table("together", columns, lines, f"{run.rounds} rounds, {run.new} tokens each")


def _by_count(run: Run, function: str, **settings: Any) -> dict[str, list[Answer]]:
    """What processes of so many requests answer, in turns."""
    ways = {
        str(count): partial(child, function, bundle=run.bundle, count=count, **settings)
        for count in run.requests
    }
    return interleave(ways, run.rounds)


def steps(bundle: str, count: int, new: int, threads: int) -> Answer:
    """The median step while all generate."""
    opened, warm = open_bundle(bundle), 8
    with Engine.open(bundle, context=256, requests=count, threads=threads) as engine:
        ids = random_ids(count, engine.manifest.model.vocabulary)
        before = reads(threads)
        times: list[float] = []
        with Loop(engine) as loop:
            for seed, token in enumerate(ids):
                how = Sampling(1.0, seed=seed)
                loop.submit(Request([token], warm + new, how, NEVER))
            while loop.counts["generating"] < count:
                loop.step()
            engine.reset_stats()
            while loop.counts["generating"] == count:
                started = time.perf_counter()
                loop.step()
                times.append(time.perf_counter() - started)
        stats, record = engine.stats, engine.plan.record
        experts = (stats.hits + stats.misses) / len(times) * record
        layers = zip(opened.manifest.layers, opened.layouts, strict=True)
        one = sum(layer.top_k * layout.levels[-1] for layer, layout in layers)
        memory = max(before, reads(threads))
    backbone = per_token(opened) - one
    return {"seconds": statistics.median(times), "bytes": backbone + experts, "memory": memory}


@bench(
    options.BUNDLE, options.rounds(3), COUNTS,
    option("--prompt", type=int, default=1500, help="tokens of the prompt that comes in"),
    option("--share", type=float, default=1.0, help="of the experts that is in memory"),
)  # fmt: skip
def waits(run: Run) -> Rows:
    """How long a token of those who generate takes while a long prompt comes in.

    In tokens of theirs, as they usually are."""
    results = _by_count(run, "requests:waiting", prompt=run.prompt, share=run.share)
    columns = {
        "requests": "{}", "usual, ms": "{:.2f}", "longest before": "{:.2f} x",
        "median meanwhile": "{:.2f} x", "longest meanwhile": "{:.2f} x",
        "prompt, s": "{:.2f}", "alone, s": "{:.2f}",
    }  # fmt: skip
    lines = []
    for count in run.requests:
        names = ("usual", "before", "median", "longest", "prompt", "alone")
        middle = [statistics.median(a[name] for a in results[str(count)]) for name in names]
        lines.append([count, middle[0] * 1e3, *middle[1:]])
    title = f"{run.rounds} rounds, a prompt of {run.prompt} tokens, {run.share:.0%} in memory"
    yield Table("waits", columns, lines, title)


def waiting(bundle: str, count: int, prompt: int, share: float) -> Answer:
    """Times of tokens before and while the prompt is read."""
    context = prompt + 8
    opened, more = open_bundle(bundle), Requests(count + 1)
    beside = None
    if share < 1:
        experts = int(share * sum(layer.experts for layer in opened.manifest.layers))
        beside = memory_for(opened, experts, context, requests=more)
    how = {"context": context, "requests": count + 1, "beside": beside}
    with Engine.open(bundle, **how) as engine, Loop(engine) as loop:
        ids = random_ids(prompt + count, engine.manifest.model.vocabulary)
        started = time.perf_counter()
        list(loop.submit(Request(ids[:prompt], 1, stop=NEVER)))
        alone = time.perf_counter() - started
        clocks: list[list[float]] = [[] for _ in range(count)]
        for seed, token in enumerate(ids[prompt:]):
            request = Request([token], context - 2, Sampling(1.0, seed=seed), NEVER)
            loop.submit(request, partial(_note, clocks[seed]))
        while min(map(len, clocks)) < USUAL:
            loop.step()
        at = len(clocks[0])
        started = time.perf_counter()
        long = loop.submit(Request(ids[1:prompt] + ids[:1], 1, stop=NEVER))
        while not long.finish:
            loop.step()
        seconds = time.perf_counter() - started
    before = np.concatenate([np.diff(clock[USUAL // 5 : at]) for clock in clocks])
    meanwhile = np.concatenate([np.diff(clock[at - 1 :]) for clock in clocks])
    usual = float(np.median(before))
    return {
        "usual": usual, "before": before.max() / usual, "median": np.median(meanwhile) / usual,
        "longest": meanwhile.max() / usual, "prompt": seconds, "alone": alone,
    }  # fmt: skip


def _note(times: list[float], token: Token | None) -> None:
    if token is not None:
        times.append(time.perf_counter())


@bench(
    option("--count", type=int, default=200, help="schedules"),
    option("--seed", type=int, default=0), soak=True,
)  # fmt: skip
def schedules(run: Run) -> Rows:
    """Requests that join, leave and are cancelled at random get what they get alone."""
    from tests.support import program_bundle
    from tests.support import requests as random_requests

    columns = {"experts": "{}", "schedules": "{}", "requests": "{}", "other tokens": "{}"}
    lines, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        bundle = program_bundle.write(Path(folder) / "pico.smoe")
        for experts in (None, 3):
            done, bad = random_requests.many(bundle, run.count // 2, run.seed, experts)
            lines.append([experts or "all", done["schedules"], done["requests"], len(bad)])
            wrong += bad
    yield Table("schedules", columns, lines, f"Seed {run.seed}")
    if wrong:
        yield Table("wrong", {"where": "{}"}, [[text] for text in wrong])


@bench(option("--count", type=int, default=10_000, help="requests"), soak=True)
def served(run: Run) -> Rows:
    """What a process holds after many requests: memory and open files."""
    answer = child("requests:served_once", count=run.count)
    columns = {"requests": "{}", "MiB": "{:.1f}", "open files": "{}"}
    yield Table("served", columns, answer["held"], f"{run.count} requests, 8 at once")


def served_once(count: int) -> Answer:
    """Looked at ten times on the way."""
    from tests.support import program_bundle

    held: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = program_bundle.write(Path(folder) / "pico.smoe")
        with Engine.open(bundle, context=256, requests=8) as engine, Loop(engine) as loop:
            random = np.random.default_rng(0)
            for number in range(1, count + 1):
                ids = random.integers(0, 37, random.integers(1, 100))
                one = loop.submit(Request(ids, int(random.integers(1, 6)), stop=NEVER))
                if random.random() < 0.1:
                    one.cancel()
                while sum(loop.counts.values()) >= 8:
                    loop.step()
                if number % max(1, count // 10) == 0:
                    held.append([number, _resident() / 2**20, len(os.listdir("/proc/self/fd"))])
            while loop.step():
                pass
    return {"held": held}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
