"""Drafts on real text: tokens per second with and without, by how much of the experts is in memory.

Requests are made to say a held-out text, token by token, so that guesses are right as often as they
are on such text, and all ways read the same. A text that repeats 32 tokens is thrown out. Every run
is a process of its own; with a share of the experts inside a memory cgroup, and with the bundle's
files dropped from the page cache before.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import cgroup, models, options
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
)
from smoe.artifacts import open_bundle
from smoe.runtime import Engine, Policies, StopWhen
from smoe.runtime.budget import memory_for
from smoe.runtime.draft.named import draft_bytes
from smoe.runtime.draft.ngrams import NGrams
from smoe.runtime.serve import Loop, Request
from smoe.runtime.text import Text

Answer = dict[str, Any]
REPEATED = 32
AHEAD = 8  # guesses
PROCESS = 64 << 20  # bytes of an interpreter that a plan is beside, at most


@bench(
    options.TEXT, options.rounds(3), options.residency(0.25, 0.4, 0.55, 1.0), options.io("direct"),
    option("--directory", type=Path, required=True, help="where models are, or are made"),
    option("--bundle", type=Path, help="instead of the padded example model"),
    option("--domains", nargs="+", default=["code", "prose"], help="of the text's lines"),
    option("--texts", type=int, default=3, help="of each domain"),
    option("--prompt", type=int, default=1024, help="tokens of each"),
    option("--new", type=int, default=256, help="tokens after them"),
    option("--drafts", nargs="+", default=["none", "ngram", "resident"]),
    option("--threads", type=int, default=2),
)  # fmt: skip
def drafts(run: Run) -> Rows:
    """Tokens per second with drafts on code and prose, as shares of the experts are in memory."""
    refusal = cgroup.unavailable()
    if refusal and min(run.residency) < 1:
        raise SystemExit(f"Shares of the experts need a memory cgroup: {refusal}")
    bundle = run.bundle or models.padded(run.directory)
    columns = {
        "in memory": "{:.0%}", "text": "{}", "draft": "{}",
        "tokens/s": "{:.1f} ({:.1f} to {:.1f})", "of none": "{:.2f}",
        "right": "{:.0%}", "tokens a step": "{:.2f}", "MB / token": "{:.2f}", "stall": "{:.0%}",
    }  # fmt: skip
    lines: list[list[Any]] = []
    for share in run.residency:
        for domain in run.domains:
            texts = list(_texts(run, bundle, domain))
            ways = {
                draft: partial(_measured, run, bundle, draft, share, texts)
                for draft in run.drafts
                if share < 1 or not draft.startswith("resident")
            }
            note(f"{share:.0%}, {domain}: {len(texts)} texts")
            results = interleave(ways, run.rounds)
            base = spread([a["rate"] for a in results[run.drafts[0]]]).median
            for draft, answers in results.items():
                rate = spread([a["rate"] for a in answers])
                middle = sorted(answers, key=lambda a: a["rate"])[len(answers) // 2]
                lines.append([
                    share, domain, draft, [rate.median, rate.low, rate.high], rate.median / base,
                    middle["right"], middle["step"], middle["bytes"] / 1e6, middle["stall"],
                ])  # fmt: skip
    title = f"{run.texts} texts, {run.prompt} tokens in and {run.new} out, {run.rounds} rounds"
    yield Table("drafts", columns, lines, title)


def _texts(run: Run, bundle: Path, domain: str) -> Iterator[list[int]]:
    """Ids of the first texts that repeat nothing long."""
    text, length = Text(bundle, open_bundle(bundle).manifest.files), run.prompt + run.new
    return itertools.islice(texts_of(text, run.text, domain, length), run.texts)


def texts_of(text: Text, file: Path, domain: str, length: int) -> Iterator[list[int]]:
    """The first `length` ids of every text of a domain that repeats nothing long. A `SystemExit`
    where there is none."""
    none = True
    for line in file.read_text().splitlines():
        document = json.loads(line)
        if document.get("domain", domain) != domain:
            continue
        ids = text.encode(document["text"])[:length]
        grams = {tuple(ids[at : at + REPEATED]) for at in range(len(ids) - REPEATED + 1)}
        if len(ids) == length and len(grams) == length - REPEATED + 1:
            none = False
            yield ids
    if none:
        raise SystemExit(f"There is no text of {length} tokens in domain {domain} of {file}.")


def _measured(run: Run, bundle: Path, draft: str, share: float, texts: list[list[int]]) -> Answer:
    settings = {
        "bundle": str(bundle), "draft": draft, "share": share, "texts": texts,
        "prompt": run.prompt, "io": run.io, "threads": run.threads,
    }  # fmt: skip
    if share >= 1:
        return child("drafts:say", **settings)
    limit = _beside(str(bundle), draft, share, len(texts[0])) + PROCESS
    within = limit + limit // 16
    return child_within(within, "drafts:say", **settings)


def _beside(bundle: str, draft: str, share: float, context: int) -> int:
    opened, policies = open_bundle(bundle), Policies(draft=draft)
    experts = int(share * sum(layer.experts for layer in opened.manifest.layers))
    return memory_for(opened, experts, context, tables=draft_bytes(policies, opened))


@bench(
    options.TEXT, options.BUNDLE,
    option("--domains", nargs="+", default=["code", "docs", "prose"], help="of the text's lines"),
    option("--from", dest="first", type=int, default=300, help="tokens of a text before the first"),
    option("--to", dest="last", type=int, default=1800, help="tokens of a text at most"),
)  # fmt: skip
def ngrams(run: Run) -> Rows:
    """How often the text goes on as it did after the last copy of its end, by the copy's length."""
    text = Text(run.bundle, open_bundle(run.bundle).manifest.files)
    runs: dict[tuple[str, int], list[int]] = defaultdict(list)
    for line in run.text.read_text().splitlines():
        document = json.loads(line)
        domain = document.get("domain", "all")
        if domain not in (*run.domains, "all"):
            continue
        ids, seen = text.encode(document["text"])[: run.last], NGrams()
        seen.push(ids[: run.first])
        for at in range(run.first, len(ids)):
            if length := seen.find():
                pairs = zip(seen.next(AHEAD), ids[at : at + AHEAD], strict=False)
                right = list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                runs[domain, length].append(len(right))
                runs["all of them", length].append(len(right))
            seen.push([ids[at]])
    columns = {
        "text": "{}", "tokens that were there": "{}", "times": "{}", "next one right": "{:.2f}",
        f"right of {AHEAD} in a row": "{:.2f}",
    }  # fmt: skip
    lines = [
        [domain, length, len(found), np.mean([one > 0 for one in found]), np.mean(found)]
        for (domain, length), found in sorted(runs.items())
    ]
    yield Table("ngrams", columns, lines)


class _Said:
    """Nothing but the text may come (`generation.Allowed`)."""

    def __init__(self, ids: list[int]):
        self._ids, self._at = ids, 0

    def allow(self, logits: np.ndarray) -> np.ndarray:
        only = np.full_like(logits, -np.inf)
        only[self._ids[self._at]] = 0
        return only

    def take(self, token: int) -> None:
        self._at += 1


def say(
    bundle: str, draft: str, share: float, texts: list[list[int]], prompt: int, io: str | None,
    threads: int,
) -> Answer:  # fmt: skip
    """One text after another."""
    context = len(texts[0])
    limited: dict[str, Any] = {}
    if share < 1:
        limited = {"beside": _beside(bundle, draft, share, context), "io": io}
    how = {"context": context, "threads": threads, "policies": Policies(draft=draft)}
    with Engine.open(bundle, **how, **limited) as engine, Loop(engine) as loop:
        stats, nbytes, stall = engine.stats, 0, 0.0
        for ids in texts:
            said = _Said(ids[prompt:])
            never = StopWhen(ids=())
            tokens = iter(
                loop.submit(Request(ids[:prompt], len(ids) - prompt, stop=never, allowed=said))
            )
            came = [next(tokens).id]
            nbytes, stall = nbytes - stats.bytes_read, stall - stats.stall_seconds
            came += [token.id for token in tokens]
            nbytes, stall = nbytes + stats.bytes_read, stall + stats.stall_seconds
            assert came == ids[prompt:]
        decoded, checked = stats.decoded, max(1, stats.guesses_checked)
        return {
            "rate": decoded / stats.decode_seconds, "right": stats.guesses_right / checked,
            "step": decoded / stats.decode_steps, "bytes": nbytes / decoded,
            "stall": stall / stats.decode_seconds,
        }  # fmt: skip
