"""Random schedules of requests that join, leave and are cancelled, and what each gets alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, Policies, StopWhen
from smoe.runtime.budget import Requests, memory_for
from smoe.runtime.draft.named import draft_bytes
from smoe.runtime.options import DEFAULT, tables_bytes
from smoe.runtime.sampling import Sampling
from smoe.runtime.serve import Generation, Loop, Request

CONTEXT, AT_ONCE = 256, 4
PROMPTS, LONGEST, NEW = 12, 150, 12  # of a schedule; tokens of a prompt, and new ones


@dataclass
class Asked:
    """A request and the ids that it gets when nobody else is there."""

    request: Request
    alone: list[int]


def opened(bundle: Path, experts: int | None = None, policies: Policies = DEFAULT) -> Engine:
    """An engine for several requests, with room for so many experts (None: all)."""
    beside = None
    if experts is not None:
        there, together = open_bundle(bundle), Requests(AT_ONCE)
        tables = tables_bytes(policies, there) + draft_bytes(policies, there)
        beside = memory_for(there, experts, CONTEXT, tables=tables, requests=together)
    how = {"context": CONTEXT, "requests": AT_ONCE, "policies": policies}
    return Engine.open(bundle, beside=beside, **how)


def asked(engine: Engine, random: np.random.Generator) -> Asked:
    """Anything: some prompts begin alike, some end early, some are drawn, some greedy."""
    vocabulary = engine.manifest.model.vocabulary
    ids = random.integers(0, vocabulary, random.integers(1, LONGEST))
    if random.random() < 0.4:
        shared = np.random.default_rng(int(random.integers(2))).integers(0, vocabulary, 90)
        ids = np.concatenate([shared[: random.integers(20, 90)], ids[:40]])
    seed = int(random.integers(100))
    how = Sampling() if random.random() < 0.3 else Sampling(1.0, seed=seed)
    stop = StopWhen(ids=tuple(random.integers(0, vocabulary, 2).tolist()))
    count = int(random.integers(1, NEW))
    draws = {"temperature": how.temperature, "seed": how.seed}
    alone = [token.id for token in engine.generate(ids, count, stop=stop, **draws)]
    return Asked(Request(ids, count, how, stop), alone)


def schedule(engine: Engine, known: list[Asked], random: np.random.Generator) -> list[str]:
    """All of `known` through a loop, in a random order, joining at random steps; some are cancelled
    at random moments. What is wrong with any of them."""
    wrong: list[str] = []
    with Loop(engine) as loop:
        left = [known[n] for n in random.permutation(len(known))]
        there: list[tuple[Asked, Generation]] = []
        more = True
        while left or more:
            for _ in range(int(random.integers(0, 4)) if left else 0):
                if left:
                    one = left.pop()
                    there.append((one, loop.submit(one.request)))
            if there and random.random() < 0.05:
                there[int(random.integers(len(there)))][1].cancel()
            more = loop.step()
        for one, generation in there:
            ids = [token.id for token in generation]
            whole = generation.finish in ("end", "length", "stop")
            if ids != (one.alone if whole else one.alone[: len(ids)]):
                wrong.append(f"{generation.finish}: {ids} instead of {one.alone}")
            elif not whole and not (generation.cancelled and generation.finish == "cancelled"):
                wrong.append(f"ended {generation.finish!r}")
        counts = loop.counts
    if any(counts.values()):
        wrong.append(f"left over: {counts}")
    return wrong


def many(
    bundle: Path, count: int, seed: int, experts: int | None = None, policies: Policies = DEFAULT
) -> tuple[Counter[str], list[str]]:
    """`count` schedules on an engine with room for so many `experts` (None: all)."""
    random = np.random.default_rng(seed)
    done: Counter[str] = Counter()
    wrong: list[str] = []
    with opened(bundle, experts) as alone, opened(bundle, experts, policies) as engine:
        for number in range(count):
            known = [asked(alone, random) for _ in range(PROMPTS)]
            done["schedules"] += 1
            done["requests"] += len(known)
            wrong += [f"schedule {number}: {text}" for text in schedule(engine, known, random)]
    return done, wrong
