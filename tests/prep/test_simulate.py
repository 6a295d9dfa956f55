"""Replays against published answers, against a plain program, and against the best there can be; broken traces."""

import csv
from pathlib import Path

import pytest

from smoe.prep.simulate import simulate
from smoe.prep.traces import read_trace

MIB = 1 << 20


@pytest.fixture(scope="session")
def published(root) -> Path:
    """Traces and answers of others, which are no part of the project."""
    found = root.parent / "shared" / "traces"
    if not found.is_dir():
        pytest.skip(f"no {found}: the published traces are not there")
    return found


@pytest.fixture(scope="session")
def qwen(published):
    return read_trace(published / "bigmoeonedge-qwen.route.csv")


@pytest.mark.parametrize("policy, counting, budgets", [
    ("lru", "step", None),
    ("belady", "step", None),
    ("lfu", "step", [250, 2000, 8000]),
    ("layer", "whole", [250, 2000]),
    ("layerlfu", "whole", [750, 3000, 8000]),
])  # fmt: skip
def test_the_published_curve_to_three_decimals(published, qwen, policy, counting, budgets):
    with open(published / "bigmoeonedge-qwen-curve.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["policy"] == policy]
    asked = [int(row["budget_mib"]) for row in rows]
    name = {"layer": "layer-lru", "layerlfu": "layer-lfu"}.get(policy, policy)
    kept = [i for i, budget in enumerate(asked) if budgets is None or budget in budgets]
    assert len(kept) == len(budgets or asked) > 0
    found = simulate(qwen, [name], [asked[i] * MIB for i in kept], counting=counting)
    for i, row in zip(kept, found, strict=True):
        said = [f"{100 * row.hit_rate:.3f}", f"{100 * row.decode_hit_rate:.3f}", f"{row.bytes_read / MIB:.1f}"]
        assert said == [rows[i][c] for c in ("hit_pct_cum", "hit_pct_decode", "read_mib")], rows[i]


def test_the_published_figures_of_olmoe(published):
    trace = read_trace(published / "waste-olmoe-299.jsonl")
    found = simulate(trace, ["lru"], [64, 128, 256, 542], counting="slot")
    assert [round(row.hit_rate, 4) for row in found] == [0, 0.3193, 0.5650, 0.8073]
