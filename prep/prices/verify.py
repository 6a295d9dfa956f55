"""Whether the bundle's prices can be trusted: predicted against measured, on text that nothing was
fitted to.

Random sets of shortcuts, several groups of which have the same number of slots: there a price has
to rank by more than how many there are. Sets differ in kinds, layers, experts and in how large the
slots' mixing weights are.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class PriceCheck:
    """What was predicted and measured, in nats per token.

    `groups` are of sets with the same number of slots: Spearman's rank correlation with the
    measured of the price, and of the sum of squared mixing weights beside it. `slot_count_spearman`
    is that of the slot count over all sets, `predicted_over_measured` per kind the ratio of the
    sums.
    """

    tokens: int
    fit: dict[str, list[float]]
    groups: list[dict]
    slot_count_spearman: float
    predicted_over_measured: dict[str, float]
    sets: list[dict]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        lines = [f"prices, on {self.tokens} tokens, {len(self.sets)} random sets of shortcuts"]
        for group in self.groups:
            low, high = group["measured"]
            lines.append(
                f"  {group['slots'][0]} slots each, {low:.2g} to {high:.2g} nats per token: rank "
                f"correlation {group['price_spearman']} (sum of squared weights: "
                f"{group['square_spearman']})"
            )
        lines.append(f"  slot count over all sets: {self.slot_count_spearman}")
        ratios = self.predicted_over_measured.items()
        shown = ", ".join(f"{kind} {ratio}" for kind, ratio in ratios)
        return [*lines, f"  predicted / measured: {shown}", "", *_drawing(self.sets)]


def verify_prices(
    bundle: Path, checkpoint: Checkpoint, text: Calibration, progress: Progress
) -> PriceCheck:
    """Run random sets of shortcuts on `text`. An `EngineError` if the bundle has no prices."""
    tables = open_bundle(bundle).tables.layers()
    fit = Prices.of(tables).layers[0].fit
    prices = Prices.of(tables, fitted=False)
    kinds = [kind for kind in KINDS if kind != "level" or prices.layers[0].level.shape[1] > 1]
    plans = _sets(kinds, text.seed)
    pieces = [
        row[i : i + LENGTH]
        for row in text.rows(checkpoint, progress.say)
        for i in range(0, len(row), LENGTH)
    ]
    rows = [piece for piece in pieces if len(piece) > 1]
    measured = outcomes(
        bundle,
        prices,
        rows,
        [plan for _, _, plan in plans],
        text.seed,
        lambda runs: progress.over(runs, "verify prices", "rows", len(rows)),
    )
    sets = [
        _set(share, kind, outcome, fit)
        for (share, kind, _), outcome in zip(plans, measured, strict=True)
    ]
    return PriceCheck(
        tokens=measured[0].tokens,
        fit={kind: [float(x) for x in fit[KINDS.index(kind)]] for kind in kinds},
        groups=[_group(share, [s for s in sets if s["share"] == share]) for share in SHARES],
        slot_count_spearman=_rank([s["slots"] for s in sets], [s["measured"] for s in sets]),
        predicted_over_measured=_ratios(sets),
        sets=sets,
    )


def _ratios(sets: list[dict]) -> dict[str, float]:
    ratios = {}
    for kind in sorted({s["kind"] for s in sets}):
        predicted = sum(s["predicted"] for s in sets if s["kind"] == kind)
        ratios[kind] = round(predicted / sum(s["measured"] for s in sets if s["kind"] == kind), 3)
    return ratios


def _sets(kinds: list[str], seed: int) -> list[tuple[float, str, Perturbation]]:
    """(share, kind, plan) of every set."""
    random = np.random.default_rng([seed, 2])
    sets = []
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
            sets.append((share, used[0] if len(used) == 1 else "mixed", plan))
    return sets


def _set(share: float, kind: str, outcome: Outcome, fit: np.ndarray) -> dict:
    return {
        "share": share,
        "kind": kind,
        "slots": outcome.slots,
        "predicted": float(f"{outcome.predicted(fit):.4g}"),
        "measured": float(f"{outcome.measured:.4g}"),
        "square": float(f"{outcome.square / max(1, outcome.tokens):.4g}"),
    }


def _group(share: float, sets: list[dict]) -> dict:
    measured = [s["measured"] for s in sets]
    return {
        "share": share,
        "slots": [min(s["slots"] for s in sets), max(s["slots"] for s in sets)],
        "measured": [min(measured), max(measured)],
        "price_spearman": _rank([s["predicted"] for s in sets], measured),
        "square_spearman": _rank([s["square"] for s in sets], measured),
    }


def _rank(a: list[float], b: list[float]) -> float:
    return round(float(spearmanr(a, b).statistic), 3)


def _drawing(sets: list[dict], width: int = 64, height: int = 20) -> list[str]:
    """Predicted (across) against measured (up), both logarithmic; where they agree is dotted."""
    marks = {"skip": "o", "standin": "s", "level": "l", "mixed": "m"}
    values = [max(s[name], 1e-9) for s in sets for name in ("predicted", "measured")]
    low, high = math.log10(min(values)), math.log10(max(values))
    span = max(high - low, 1e-9)
    canvas = [[" "] * width for _ in range(height)]
    for column in range(width):
        canvas[round(column / (width - 1) * (height - 1))][column] = "."
    for s in sets:
        x, y = ((math.log10(max(s[name], 1e-9)) - low) / span for name in ("predicted", "measured"))
        canvas[round(y * (height - 1))][round(x * (width - 1))] = marks[s["kind"]]
    legend = ", ".join(
        f"{mark} {kind}" for kind, mark in marks.items() if any(s["kind"] == kind for s in sets)
    )
    return [
        f"  measured (up) against predicted (across), {10**low:.1e} to {10**high:.1e} nats per "
        f"token; {legend}",
        *("  |" + "".join(row).rstrip() for row in reversed(canvas)),
        "  +" + "-" * width,
    ]
