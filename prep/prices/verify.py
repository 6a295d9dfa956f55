"""Whether the bundle's prices can be trusted: predicted against measured, on text that nothing was fitted to.

Random sets of shortcuts, several groups of which have the same number of slots: there a price has to rank by more than
how many there are. Sets differ in kinds, layers, experts and in how large the slots' mixing weights are.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from smoe.artifacts import open_bundle
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.prices.shortcuts import LENGTH, Outcome, Perturbation, at_random, outcomes
from smoe.prep.progress import Progress
from smoe.runtime.choose.prices import KINDS, Prices

SHARES = (0.002, 0.006, 0.02)  # of all slots, one for each group
SETS = 24  # of a group


def verify_prices(
    bundle: Path, checkpoint: Checkpoint, text: Calibration, progress: Progress
) -> dict:
    """Per set what was predicted and measured in nats per token; per group Spearman's rank correlation with the measured
    of the price, and of the sum of squared mixing weights beside it; over all sets that of the slot count; per kind the
    sum of predicted over the sum of measured. An `EngineError` if the bundle has no prices."""
    opened = open_bundle(bundle)
    tables = opened.tables.layers()
    fit = Prices.of(tables).layers[0].fit
    prices = Prices.of(tables, fitted=False)
    kinds = [kind for kind in KINDS if kind != "level" or prices.layers[0].level.shape[1] > 1]
    named = _sets(kinds, text.seed)
    rows = [
        row[i : i + LENGTH] for row in text.rows(checkpoint) for i in range(0, len(row), LENGTH)
    ]
    rows = [row for row in rows if len(row) > 1]
    found = outcomes(
        bundle, prices, rows, [plan for _, _, plan in named], text.seed,
        lambda over: progress.over(over, "verify prices", "rows", len(rows)),
    )  # fmt: skip
    sets = [
        _about(share, kind, outcome, fit)
        for (share, kind, _), outcome in zip(named, found, strict=True)
    ]
    return {
        "tokens": found[0].tokens,
        "fit": {kind: [float(x) for x in fit[KINDS.index(kind)]] for kind in kinds},
        "groups": [_group(share, [of for of in sets if of["share"] == share]) for share in SHARES],
        "slot_count_spearman": _rank([of["slots"] for of in sets], [of["measured"] for of in sets]),
        "predicted_over_measured": {
            kind: round(sum(of["predicted"] for of in sets if of["kind"] == kind)
                        / sum(of["measured"] for of in sets if of["kind"] == kind), 3)
            for kind in sorted({of["kind"] for of in sets})
        },
        "sets": sets,
    }  # fmt: skip


def _sets(kinds: list[str], seed: int) -> list[tuple[float, str, Perturbation]]:
    """(share, kind, plan) of every set."""
    random = np.random.default_rng([seed, 2])
    found = []
    for share in SHARES:
        for number in range(SETS):
            which = number % (len(kinds) + 1)
            used = kinds if which == len(kinds) else [kinds[which]]
            tilt, prefer = float(random.normal() * 2), str(random.choice(["weights", "experts"]))
            plan = at_random(
                used,
                share,
                tilt,
                float(random.choice([0.34, 0.67, 1.0])),
                prefer,
                int(random.integers(2**31)),
            )
            found.append((share, used[0] if len(used) == 1 else "mixed", plan))
    return found


def _about(share: float, kind: str, of: Outcome, fit: np.ndarray) -> dict:
    return {
        "share": share,
        "kind": kind,
        "slots": of.slots,
        "predicted": float(f"{of.predicted(fit):.4g}"),
        "measured": float(f"{of.measured:.4g}"),
        "square": float(f"{of.square / max(1, of.tokens):.4g}"),
    }


def _group(share: float, sets: list[dict]) -> dict:
    measured = [of["measured"] for of in sets]
    return {
        "share": share,
        "slots": [min(of["slots"] for of in sets), max(of["slots"] for of in sets)],
        "measured": [min(measured), max(measured)],
        "price_spearman": _rank([of["predicted"] for of in sets], measured),
        "square_spearman": _rank([of["square"] for of in sets], measured),
    }


def _rank(a: list[float], b: list[float]) -> float:
    return round(float(spearmanr(a, b).statistic), 3)


def text_of(found: dict) -> str:
    """For people: the figures, and a drawing."""
    lines = [f"prices, on {found['tokens']} tokens, {len(found['sets'])} random sets of shortcuts"]
    for group in found["groups"]:
        low, high = group["measured"]
        lines.append(
            f"  {group['slots'][0]} slots each, {low:.2g} to {high:.2g} nats per token: rank correlation {group['price_spearman']} "
            f"(sum of squared weights: {group['square_spearman']})"
        )
    lines.append(f"  slot count over all sets: {found['slot_count_spearman']}")
    ratios = ", ".join(
        f"{kind} {ratio}" for kind, ratio in found["predicted_over_measured"].items()
    )
    return "\n".join([*lines, f"  predicted / measured: {ratios}", "", *_drawing(found["sets"])])


def _drawing(sets: list[dict], width: int = 64, height: int = 20) -> list[str]:
    """Predicted (across) against measured (up), both logarithmic; where they agree is dotted."""
    marks = {"skip": "o", "standin": "s", "level": "l", "mixed": "m"}
    values = [max(of[name], 1e-9) for of in sets for name in ("predicted", "measured")]
    low, high = math.log10(min(values)), math.log10(max(values))
    span = max(high - low, 1e-9)
    canvas = [[" "] * width for _ in range(height)]
    for x in range(width):
        canvas[round(x / (width - 1) * (height - 1))][x] = "."
    for of in sets:
        x, y = (
            (math.log10(max(of[name], 1e-9)) - low) / span for name in ("predicted", "measured")
        )
        canvas[round(y * (height - 1))][round(x * (width - 1))] = marks[of["kind"]]
    legend = ", ".join(
        f"{mark} {kind}" for kind, mark in marks.items() if any(of["kind"] == kind for of in sets)
    )
    return [
        f"  measured (up) against predicted (across), {10**low:.1e} to {10**high:.1e} nats per token; {legend}",
        *("  |" + "".join(row).rstrip() for row in reversed(canvas)),
        "  +" + "-" * width,
    ]
