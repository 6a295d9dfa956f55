"""What policies, prices and predictions buy: one text, teacher-forced token by token, against the
lossless run on it.

`policies` and its two companions compare at equal residency, at equal bytes and at equal loss;
`prices` and `prefetch` measure time past the page cache; `plan` holds what is expected against what
is measured.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.budgets import beside, budget_for_share
from bench.harness import Rows, Run, Table, bench, interleave, note, option, spread
from smoe.artifacts import open_bundle
from smoe.artifacts.tables import DISTANCES, PREDICTORS
from smoe.runtime import Engine, Policies
from smoe.runtime.evaluate import choose, exact, graded, items, measure, read_documents, rows

CONTEXT, LENGTH, PROMPT = 512, 256, 32
STEPS = {
    "lru": Policies("lru"),
    "+ eviction by score": Policies("score"),
    "+ substitution .35": Policies("score", substitution="smoe:0.35"),
    "+ prefetch": Policies("score", substitution="smoe:0.35", prefetch="smoe:0.35"),
    "our eviction alone": Policies(prefetch="none"),
    "our eviction, previous": Policies(prefetch="previous"),
    "our eviction, transition": Policies(prefetch="transition"),
}
ALPHAS = (0.1, 0.25, 0.35, 0.6, 1.0, 1.5)
# Smallest and largest number worth trying for a policy, and whether a larger one loads less.
NUMBERS = {
    "priced": (1e-5, 0.5, True),
    "smoe": (0, 4, True),
    "smoe as published": (0, 4, True),
    "cache-prior": (0, 1.5, True),
    "buddy": (0.3, 1, False),
    "live": (0, 1, True),
    "zero": (0, 1, True),
    "random": (0, 1, True),
    "similar": (0, 1, True),
}
GUESSES = ("none", "previous", "transition", "predicted:1", "predicted:2", "smoe:0.35")
PERCENT, SHARE, LOSS = "{:.0%}", "{:.1%}", "{:.4f} ± {:.4f}"
QUALITY = {"KL": LOSS, "same best": SHARE, "choice": SHARE, "answered alike": SHARE}
CHOICES = option("--choices", type=int, default=60, help="questions of the choice task")


def named(name: str, number: float) -> Policies:
    """The policy of that name in `NUMBERS`."""
    if name == "priced":
        return Policies(loss=number)
    if name == "smoe as published":
        return Policies("score", substitution=f"smoe:{number}")
    return Policies(substitution=f"{name}:{number}")


class Subject:
    """One bundle and text: runs policies on it at shares of its experts in memory."""

    def __init__(self, bundle: Path, text: Path, tokens: int, choices: int, scratch: Path):
        self.bundle = bundle
        documents = read_documents(text)
        with Engine.open(bundle, context=CONTEXT, **beside(self.budget(0.25))) as engine:
            self.texts = rows(engine, documents, tokens, LENGTH)
            self.short = self.texts[: max(1, len(self.texts) // 3)]
            self.questions = items(engine, documents, choices) if choices else []
            self.exact = exact(engine, self.texts, PROMPT, scratch / "exact")
            self.answers = choose(engine, self.questions)

    def budget(self, share: float) -> int:
        """Bytes of the engine for a share of the experts; tables of prices come off them."""
        return budget_for_share(self.bundle, share, CONTEXT)

    def _open(self, share: float, policies: Policies, io: str | None = None) -> Engine:
        how = beside(self.budget(share))
        return Engine.open(self.bundle, context=CONTEXT, policies=policies, io=io, **how)

    def run(self, policies: Policies, share: float, io: str | None = None) -> dict[str, Any]:
        """`measure` and the choice task, after one row to settle."""
        with self._open(share, policies, io) as e:
            measure(e, self.texts[:1], PROMPT)
            result = measure(e, self.texts, PROMPT, self.exact)
            if self.questions:
                result |= graded(choose(e, self.questions), self.answers)
            return result

    def short_run(self, policies: Policies, share: float) -> dict[str, Any]:
        """The same on a third of the text, and no questions."""
        with self._open(share, policies) as engine:
            measure(engine, self.texts[:1], PROMPT)
            return measure(engine, self.short, PROMPT, self.exact)

    def number_for(self, name: str, goal: float, share: float, quantity: str) -> float:
        """The policy's number at which `quantity` of a short run is `goal`, by bisection. With a
        larger number bytes fall and kl rises, or the other way round where `NUMBERS` says so."""
        low, high, falls = NUMBERS[name]
        for _ in range(7):
            middle = _middle(low, high)
            above = self.short_run(named(name, middle), share)[quantity] > goal
            up = above == (falls == (quantity == "bytes_read"))
            low, high = (middle, high) if up else (low, middle)
        return float(f"{_middle(low, high):.3g}")


def _middle(low: float, high: float) -> float:
    return (low * high) ** 0.5 if low else (low + high) / 2


@contextlib.contextmanager
def subject(run: Run, choices: int = 0) -> Iterator[Subject]:
    with tempfile.TemporaryDirectory() as scratch:
        yield Subject(run.bundle, run.text, run.tokens, choices, Path(scratch))


def _quality(result: dict[str, Any]) -> list[Any]:
    """The cells of `QUALITY`."""
    kl = [result["kl"], result["kl_error"]]
    return [kl, result["top1"], result.get("choice_accuracy"), result.get("choice_same")]


def _bytes(result: dict[str, Any]) -> float:
    """kB per token."""
    return float(result["bytes_read"] / result["tokens"] / 1e3)


# -- at equal residency, equal bytes, equal loss ---------------------------------------


@bench(
    options.BUNDLE, options.TEXT, options.tokens(1536),
    options.residency(0.25, 0.4, 0.6), options.rounds(1), options.io(None), CHOICES,
    option("--alphas", type=float, nargs="*", default=ALPHAS, help="of SMoE's substitution"),
)  # fmt: skip
def policies(run: Run) -> Rows:
    """SMoE's parts one by one on plain LRU, and its alpha: speed, hits and quality."""
    ways = STEPS | {
        f"our eviction, smoe:{a}": Policies(substitution=f"smoe:{a}") for a in run.alphas
    }
    columns = {
        "policies": "{}", "TPOT ms": "{:.1f}", "of lru": "{:.2f}", "stall": PERCENT,
        "hits before": SHARE, "hits after": SHARE, "substituted": SHARE, **QUALITY,
    }  # fmt: skip
    with subject(run, run.choices) as on:
        for share in run.residency:
            calls = {name: partial(on.run, p, share, run.io) for name, p in ways.items()}
            results = interleave(calls, run.rounds)
            times = {n: spread([r["tpot"] for r in rs]).median for n, rs in results.items()}
            lines = [
                [name, times[name] * 1e3, times[name] / times["lru"], r["stall_share"],
                 r["hit_rate_before"], r["hit_rate_after"], r["substituted_share"], *_quality(r)]
                for name, (r, *_) in results.items()
            ]  # fmt: skip
            yield Table(_name(share), columns, lines, _title(share))


@bench(
    options.BUNDLE, options.TEXT, options.tokens(1536),
    options.residency(0.25, 0.4, 0.6), CHOICES,
    option("--policies", nargs="+", choices=NUMBERS, default=list(NUMBERS), help="to compare"),
    option("--parts", type=float, nargs="+", default=[0.75, 0.5], help="of the lossless bytes"),
)  # fmt: skip
def equalbytes(run: Run) -> Rows:
    """Every substitution, its number set by bisection so that all read the same bytes per token."""
    columns = {
        "bytes, of lossless": PERCENT, "policy": "{}", "number": "{:g}", "kB / token": "{:.0f}",
        "loaded": SHARE, "substituted": SHARE, **QUALITY,
    }  # fmt: skip
    kls: dict[float, list[float]] = {}
    with subject(run, run.choices) as on:
        for share in run.residency:
            lossless = on.short_run(Policies(prefetch="none"), share)["bytes_read"]
            lines = []
            for part in run.parts:
                for name in run.policies:
                    note(f"{share:.0%} in memory, {part:.0%} of the bytes: {name}")
                    number = on.number_for(name, part * lossless, share, "bytes_read")
                    r = on.run(named(name, number), share)
                    lines.append([part, name, number, _bytes(r), r["loaded_share"],
                                  r["substituted_share"], *_quality(r)])  # fmt: skip
            yield Table(_name(share), columns, lines, _title(share))
            kls[share] = [line[6][0] for line in lines]
    yield _kl_at_equal_bytes(run, kls)


def _kl_at_equal_bytes(run: Run, kls: dict[float, list[float]]) -> Table:
    """Policies by residency and part of the bytes."""
    columns = {"in memory: bytes, of lossless": "{}"}
    columns |= {f"{s:.0%}: {part:.0%}": "{:.4f}" for s in run.residency for part in run.parts}
    step = len(run.policies)  # `kls` go through the policies once a part
    lines = [
        [name, *(kl for column in kls.values() for kl in column[i::step])]
        for i, name in enumerate(run.policies)
    ]
    return Table("bytes", columns, lines, "KL at equal bytes")


@bench(
    options.BUNDLE, options.TEXT, options.tokens(1536),
    options.residency(0.25, 0.4, 0.6),
    option("--alphas", type=float, nargs="+", default=[0.35, 1.0], help="of SMoE's substitution"),
)  # fmt: skip
def equalloss(run: Run) -> Rows:
    """The loss budget that gives SMoE's KL, and how many bytes fewer it reads."""
    columns = {
        "SMoE": "{}", "KL": "{:.4f}", "kB / token": "{:.0f}", "--loss": "{:g}",
        "KL at --loss": "{:.4f}",
        "kB / token at --loss": "{:.0f}", "fewer bytes": PERCENT,
    }  # fmt: skip
    with subject(run) as on:
        for share in run.residency:
            lines = []
            for alpha in run.alphas:
                goal = on.short_run(named("smoe", alpha), share)["kl"]
                loss = on.number_for("priced", goal, share, "kl")
                theirs, ours = (
                    on.run(named("smoe", alpha), share),
                    on.run(Policies(loss=loss), share),
                )
                lines.append([alpha, theirs["kl"], _bytes(theirs), loss, ours["kl"], _bytes(ours),
                              1 - _bytes(ours) / _bytes(theirs)])  # fmt: skip
            yield Table(_name(share), columns, lines, _title(share))


# -- in wall time ----------------------------------------------------------------------


@bench(
    options.BUNDLE, options.TEXT, options.tokens(256),
    options.residency(0.4), options.rounds(3), options.io("direct"),
    option("--losses", type=float, nargs="+", default=[0, 0.003, 0.01, 0.03], help="in nats"),
)  # fmt: skip
def prices(run: Run) -> Rows:
    """What a loss budget buys in time, and whether what is spent is what is lost."""
    tables = []
    for table in _speeds(run, {f"--loss {loss:g}": Policies(loss=loss) for loss in run.losses}):
        tables.append(table)
        yield table
    yield _by_loss(run, "loss", tables, "KL", "{:.4f}")
    yield _by_loss(run, "speed", tables, "tok/s", "{:.1f}")


def _by_loss(run: Run, name: str, tables: list[Table], column: str, template: str) -> Table:
    """The first number of one column of `_speeds`, by residency and loss."""
    columns = {"`--loss`, nats per token": "{}"} | {f"{loss:g}": template for loss in run.losses}
    at = list(tables[0].columns).index(column)
    lines = [
        [f"{column}, {share:.0%} in memory", *(row[at][0] for row in table.rows)]
        for share, table in zip(run.residency, tables, strict=True)
    ]
    return Table(name, columns, lines, f"{column} by loss")


@bench(
    options.BUNDLE, options.TEXT, options.tokens(256),
    options.residency(0.25, 0.4, 0.55), options.rounds(3), options.io("direct"),
    option("--guesses", nargs="+", default=GUESSES, help="predictors, as --prefetch takes them"),
)  # fmt: skip
def prefetch(run: Run) -> Rows:
    """Reading on a guess against not reading ahead, in wall time; and how good the guesses are."""
    recalls = open_bundle(run.bundle).tables.column("predict_recall")
    if recalls:
        recall = np.nanmean(recalls, 0).tolist()
        columns = {"predictor": "{}"} | {f"{d} ahead": "{:.3f}" for d in DISTANCES}
        lines = [[name, *row] for name, row in zip(PREDICTORS, recall, strict=True)]
        yield Table("recall", columns, lines, "Recall, with as many guesses as experts are used")
    yield from _speeds(run, {f"--prefetch {way}": Policies(prefetch=way) for way in run.guesses})


def _speeds(run: Run, ways: dict[str, Policies]) -> Rows:
    """One row a way: its median speed beside that of the first, and what it read, spent and
    lost."""
    columns = {
        "": "{}", "tok/s": "{:.1f} ({:.1f} to {:.1f})", "of the first": "{:.2f}",
        "MB / token": "{:.2f}",
        "stall": PERCENT, "guesses used / read": "{} / {}", "spent": "{:.4f}", "KL": LOSS,
        "same best": SHARE,
    }  # fmt: skip
    with subject(run) as on:
        for share in run.residency:
            calls = {name: partial(on.run, p, share, run.io) for name, p in ways.items()}
            results = interleave(calls, run.rounds)
            speeds = {n: spread([r["tokens_per_second"] for r in rs]) for n, rs in results.items()}
            base = next(iter(speeds.values())).median
            lines = [
                [name, [s.median, s.low, s.high], s.median / base, _bytes(r) / 1e3,
                 r["stall_share"], [r["guesses_used"], r["guesses_read"]], r["nats_spent"],
                 *_quality(r)[:2]]
                for (name, (r, *_)), s in zip(results.items(), speeds.values(), strict=True)
            ]  # fmt: skip
            title = f"{_title(share)}, {run.io} reads"
            yield Table(_name(share), columns, lines, title)


@bench(
    options.BUNDLE,
    options.TEXT,
    options.tokens(256),
    options.residency(0.25, 0.4, 0.55, 0.7, 0.85),
    options.io("direct"),
)
def plan(run: Run) -> Rows:
    """What smoe-prep plan expects of a budget beside what is measured there."""
    from smoe.prep.replay.plan import plan as expected
    from smoe.runtime.device_profile import measure_device

    device = measure_device(run.bundle, run.io)
    columns = {
        "resident": PERCENT, "options": "{}", "tok/s expected": "{:.1f}", "measured": "{:.1f}",
        "ratio": "{:.2f}", "loss expected": "{:.4f}", "loss measured": "{:.4f}",
        "loss ratio": "{:.2f}",
    }  # fmt: skip
    with subject(run) as on:
        lines = []
        for share in run.residency:
            for way in expected(run.bundle, device, [on.budget(share)], CONTEXT):
                if way.level:
                    continue  # another engine: a subject runs all levels
                result = on.run(way.policies, share, run.io)
                speed = result["tokens_per_second"]
                ratio = way.loss / result["kl"] if way.policies.loss else None
                lines.append([share, way.options or "lossless", way.tokens_per_second, speed,
                              way.tokens_per_second / speed, way.loss, result["kl"],
                              ratio])  # fmt: skip
    yield Table("plan", columns, lines, "Expected and measured")


def _name(share: float) -> str:
    return f"resident-{share * 100:.0f}"


def _title(share: float) -> str:
    return f"{share:.0%} of the experts in memory"
