"""From second moments to nats: the coefficients of `runtime.choose.prices`, measured on the bundle
itself.

A price is the second-order cost of one change. What it leaves out (routers that choose otherwise
further on, changes that add up) is measured: per kind of shortcut a few runs that a scheduler could
have made, at several sizes, and as many at random slots, few of which are cheap; and a non-negative
fit of nats = a * sum p + b * sum sqrt(p) to them, by relative error. The first alone would make
what is cheap too dear a little, the second too cheap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from smoe.artifacts import open_bundle, safetensors_file
from smoe.artifacts.tables import save_tables
from smoe.prep.prices.shortcuts import LENGTH, Outcome, Perturbation, at_random, cheapest, outcomes
from smoe.prep.progress import Progress
from smoe.runtime.choose.prices import AS_IT_IS, KINDS, Prices

TOKENS = 4096
SIZES = (0.0005, 0.002, 0.006, 0.02)  # nats per token, by the moments alone
AT_RANDOM = (0.001, 0.004, 0.01, 0.03)  # of all slots


@dataclass(frozen=True)
class Fit:
    """One kind of shortcut: its runs' slots, and nats per token predicted by the fit and "
    "measured."""

    kind: str
    slots: list[int]
    predicted: list[float]
    measured: list[float]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        lines = [f"  {self.kind:8} {'slots':>8}  {'predicted':>9}  {'measured':>9}"]
        for slots, predicted, measured in zip(
            self.slots, self.predicted, self.measured, strict=True
        ):
            lines.append(f"  {'':8} {slots:8}  {predicted:9.2g}  {measured:9.2g}")
        return lines


def add_fit(bundle: Path, rows: Sequence[np.ndarray], seed: int, progress: Progress) -> list[Fit]:
    """Put `price_fit` into the tables of `bundle`, once; per kind what was measured, for people.
    `rows` of token ids should be none of those that the moments come from."""
    file = bundle / "tables.safetensors"
    tables = open_bundle(bundle).tables.layers()
    if "price_fit" in tables[0]:
        return []
    prices = Prices.of(tables, fitted=False)
    kinds = [kind for kind in KINDS if kind != "level" or prices.layers[0].level.shape[1] > 1]
    plans = [plan for kind in kinds for plan in _plans(kind, prices)]
    text = _pieces(rows, TOKENS)
    measured = outcomes(
        bundle,
        prices,
        text,
        plans,
        seed,
        lambda runs: progress.over(runs, "price fit", "rows", len(text)),
    )
    fit, each = AS_IT_IS.copy(), len(plans) // len(kinds)
    by_kind = {kind: measured[i * each : (i + 1) * each] for i, kind in enumerate(kinds)}
    for kind, runs in by_kind.items():
        fit[KINDS.index(kind)] = fitted(runs, KINDS.index(kind))
    metadata = safetensors_file.read_header(file).metadata
    save_tables(file, [layer | {"price_fit": fit} for layer in tables], metadata)
    return [_fit(kind, runs, fit) for kind, runs in by_kind.items()]


def _fit(kind: str, runs: Sequence[Outcome], fit: np.ndarray) -> Fit:
    return Fit(
        kind=kind,
        slots=[int(run.slots) for run in runs],
        predicted=[round(float(run.predicted(fit)), 6) for run in runs],
        measured=[round(float(run.measured), 6) for run in runs],
    )


def _plans(kind: str, prices: Prices) -> list[Perturbation]:
    random = [
        at_random([kind], share, 0.0, 1.0, "weights", number)
        for number, share in enumerate(AT_RANDOM)
    ]
    return [*(cheapest(kind, prices, nats) for nats in SIZES), *random]


def fitted(runs: Sequence[Outcome], kind: int) -> np.ndarray:
    """float32 `[2]`: the coefficients of p and of sqrt(p), from outcomes of that kind alone. Three
    digits: what the last bits of a sum are depends on the machine."""
    usable = [run for run in runs if run.kl > 0 and run.moments[kind] > 0]
    if not usable:
        return AS_IT_IS[kind]
    sums = np.array([[run.moments[kind] / run.kl, run.roots[kind] / run.kl] for run in usable])
    scale = sums.max(0)
    coefficients, _ = nnls(sums / scale, np.ones(len(usable)))
    return np.array([float(f"{x:.2e}") for x in coefficients / scale], np.float32)


def _pieces(rows: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Up to `tokens` of `rows` in pieces of `LENGTH`."""
    pieces = [row[i : i + LENGTH] for row in rows for i in range(0, len(row), LENGTH)]
    return [piece for piece in pieces if len(piece) > 1][: max(1, tokens // LENGTH)]
