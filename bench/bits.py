"""What levels by slot lose at equal bits, token by token: by routers that were trained, by prices,
and by the controls, each slot at random at one of the two levels around the mean, or each layer.

A plane is as many bytes in every record, so that equal bits are equal bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.harness import Rows, Run, Table, bench, note, option, spread, timed
from smoe.artifacts import Bundle, open_bundle
from smoe.artifacts.tables import BITS_FILE
from smoe.runtime import Engine, Policies
from smoe.runtime.bits import by_bits
from smoe.runtime.evaluate import Exact, exact, log_softmax, read_documents, rows
from smoe.runtime.ledger import BitLedger
from smoe.runtime.routing import Available, Routed
from smoe.runtime.step import Phase, Sequence, Span, Step

CONTROLS = ("uniform", "by-layer")
CONTEXT, LENGTH, PROMPT = 512, 256, 32
PART = 0.7  # of what the better control loses


@dataclass(frozen=True)
class Losses:
    """Of every scored token: nats of the text and KL to the run in all bits, float64 `[n]`; the
    slots by layer and level int64 `[L, full + 1]`, and their mean bits."""

    nats: np.ndarray
    kl: np.ndarray
    levels: np.ndarray
    mean: float


@bench(
    options.BUNDLE, options.TEXT, options.tokens(32768),
    option("--averages", type=float, nargs="+", default=[2.6, 3.1, 3.6], help="bits of a weight"),
    option("--ways", nargs="+", default=[*CONTROLS, "priced", "trained"], help="of --bits"),
)  # fmt: skip
def bits(run: Run) -> Rows:
    """Quality against average bits: trained and priced levels beside both controls, token by token.

    ± is 1.96 standard errors; rises and differences are paired, token by token.
    """
    opened = open_bundle(run.bundle)
    lines: list[list[Any]] = []
    counts: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch:
        with Engine.open(run.bundle, context=CONTEXT) as engine:
            texts = rows(engine, read_documents(run.text), run.tokens, LENGTH)
            reference = exact(engine, texts, PROMPT, Path(scratch) / "exact")
        whole = _nats(reference, texts)
        for average in run.averages:
            losses = {}
            for way in run.ways:
                note(f"{way}:{average:g}")
                losses[way] = _losses(run.bundle, f"{way}:{average:g}", texts, reference)
                counts[f"{way}:{average:g}"] = losses[way].levels
            lines += _lines(average, losses, whole)
    columns = {
        "mean bits": "{:g}", "levels": "{}", "bits": "{:.3f}", "perplexity": "{:+.2f} % ± {:.2f}",
        "KL": "{:.4f} ± {:.4f}", "rise, of the better control's": "{:.2f}",
        f"rise less {PART} of it": "{:+.4f} ± {:.4f}", "KL, of it": "{:.2f}",
        f"KL less {PART} of it": "{:+.4f} ± {:.4f}",
    }  # fmt: skip
    title = f"{len(whole)} tokens of {run.text.name}, {opened.manifest.experts.encoding}"
    yield Table("bits", columns, lines, title)
    yield _histogram(opened, counts)
    yield _cost(opened, run.averages[0], [way for way in run.ways if way not in CONTROLS])


def _nats(reference: Exact, texts: SequenceOf[np.ndarray]) -> np.ndarray:
    """Of the texts' scored tokens in the reference run, float64 `[n]`."""
    nats, at = [], 0
    for row in texts:
        for position in range(min(PROMPT, len(row)), len(row) + 1):
            if position < len(row):
                nats.append(-float(reference[at][row[position]]))
            at += 1
    return np.array(nats)


def _losses(bundle: Path, text: str, texts: SequenceOf[np.ndarray], reference: Exact) -> Losses:
    nats, kl, at = [], [], 0
    with Engine.open(bundle, context=CONTEXT, policies=Policies(bits=text)) as engine:
        for row in texts:
            start = min(PROMPT, len(row))
            for position, logits in enumerate(engine.score(row, start), start):
                if position < len(row):
                    q, p = log_softmax(logits), reference[at].astype(np.float64)
                    nats.append(-float(q[row[position]]))
                    kl.append(float((np.exp(p) * (p - q)).sum()))
                at += 1
        ledger = engine.sequence.ledger
        assert isinstance(ledger, BitLedger)
        return Losses(np.array(nats), np.array(kl), ledger.levels, ledger.mean or 0.0)


def _lines(average: float, losses: dict[str, Losses], whole: np.ndarray) -> list[list[Any]]:
    """A line a way. The better control is told by KL, which is the surer of both."""
    better = min((losses[way] for way in CONTROLS), key=lambda each: each.kl.mean())
    lines = []
    for way, each in losses.items():
        rise, theirs = each.nats - whole, better.nats - whole
        mean, error = _mean(rise)
        lines.append([
            average, way, each.mean,
            [100 * np.expm1(mean), 100 * error], _mean(each.kl),
            mean / theirs.mean(), _mean(rise - PART * theirs),
            each.kl.mean() / better.kl.mean(), _mean(each.kl - PART * better.kl),
        ])  # fmt: skip
    return lines


def _mean(values: np.ndarray) -> list[float]:
    return [float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)]


def _histogram(bundle: Bundle, counts: dict[str, np.ndarray]) -> Table:
    """Which share of its slots each layer computed at each level."""
    columns = {"levels": "{}"}
    columns |= {f"layer {n}": "{}" for n in range(len(bundle.manifest.layers))}
    lines = []
    for way, levels in counts.items():
        shares = levels[:, 1:] / levels.sum(1, keepdims=True)
        lines.append([way, *(" / ".join(f"{100 * x:.0f}" for x in layer) for layer in shares)])
    return Table("levels", columns, lines, "Slots by level, from the lowest, in percent")


def _cost(bundle: Bundle, average: float, ways: SequenceOf[str]) -> Table:
    """What choosing takes, of a token that goes through all layers alone."""
    columns = {"levels": "{}", "bytes": "{:.0f}", "of the shards": "{:.2%}",
               "ms a token": "{:.3f} ({:.3f} to {:.3f})"}  # fmt: skip
    files = bundle.manifest.files
    shards = sum(files[bundle.manifest.shard(n)].size for n in range(len(bundle.layouts)))
    lines = []
    for way in ways:
        nbytes = files[BITS_FILE].size if way == "trained" else 0
        times = spread([1e3 * x for x in _seconds(bundle, f"{way}:{average:g}")])
        lines.append([way, nbytes, nbytes / shards, [times.median, times.low, times.high]])
    return Table("cost", columns, lines, "What choosing levels takes")


def _seconds(bundle: Bundle, text: str, tokens: int = 200) -> list[float]:
    """Of one token after another through the chooser of every layer."""
    choice = by_bits(text, bundle.manifest, bundle.tables, bundle.levels)
    random = np.random.default_rng(0)
    sequence = Sequence(None, choice.new_ledger(None))  # nothing here asks for its state
    step = Step((Span(sequence, np.array([1]), np.array([0]), Phase.DECODE),))
    layers = [
        (
            Routed(
                layer=number,
                step=step,
                hidden=random.standard_normal((1, layer.hidden), np.float32),
                ids=random.permutation(layer.experts)[None, : layer.top_k],
                weights=np.full((1, layer.top_k), 1 / layer.top_k, np.float32),
            ),
            Available(np.full(layer.experts, bundle.levels), bundle.levels),
        )
        for number, layer in enumerate(bundle.manifest.layers)
    ]

    def choose() -> None:
        for routed, available in layers:
            choice.chooser(routed, available)

    return [timed(choose) for _ in range(tokens)]
