"""Replays against published answers, against a plain program, and against the best there can be;
broken traces."""

import csv
import dataclasses
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from smoe.artifacts import open_bundle, safetensors_file
from smoe.prep.errors import PrepError
from smoe.prep.replay.routing_trace import read_trace
from smoe.prep.replay.simulate import simulate
from smoe.runtime import Engine, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.cache.eviction import DEFAULT_EVICTION

MIB = 1 << 20


@pytest.fixture(scope="session")
def published(root, tmp_path_factory) -> Path:
    """Traces and answers of others (traces/NOTICE.md), unpacked."""
    directory = tmp_path_factory.mktemp("traces")
    for file in (root / "tests" / "prep" / "traces").glob("*.[cx]*"):
        packed = file.suffix == ".xz"
        (directory / (file.stem if packed else file.name)).write_bytes(
            lzma.decompress(file.read_bytes()) if packed else file.read_bytes()
        )
    return directory


@pytest.fixture(scope="session")
def qwen(published):
    return read_trace(published / "bigmoeonedge-qwen.route.csv")


# Some of the eleven budgets of each; all of them take minutes.
@pytest.mark.parametrize("policy, counting, budgets", [
    ("lru", "step", [250, 3000, 8000]),
    ("belady", "step", [250, 3000, 8000]),
    ("lfu", "step", [250, 2000, 8000]),
    ("layer", "whole", [250, 2000]),
    ("layerlfu", "whole", [750, 3000, 8000]),
])  # fmt: skip
def test_the_published_curve_to_three_decimals(published, qwen, policy, counting, budgets):
    with open(published / "bigmoeonedge-qwen-curve.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["policy"] == policy]
    asked = [int(row["budget_mib"]) for row in rows]
    name = {"layer": "layer-lru", "layerlfu": "layer-lfu"}.get(policy, policy)
    kept = [i for i, budget in enumerate(asked) if budget in budgets]
    assert len(kept) == len(budgets)
    found = simulate(qwen, [name], [asked[i] * MIB for i in kept], counting=counting)
    for i, row in zip(kept, found, strict=True):
        said = [
            f"{100 * row.hit_rate:.3f}",
            f"{100 * row.decode_hit_rate:.3f}",
            f"{row.bytes_read / MIB:.1f}",
        ]
        assert said == [rows[i][c] for c in ("hit_pct_cum", "hit_pct_decode", "read_mib")], rows[i]


def test_the_published_figures_of_olmoe(published):
    trace = read_trace(published / "waste-olmoe-299.jsonl")
    found = simulate(trace, ["lru"], [64, 128, 256, 542], counting="slot")
    assert [round(row.hit_rate, 4) for row in found] == [0, 0.3193, 0.5650, 0.8073]


def test_the_default_beats_lru_lfu_and_layer_lfu_on_both_traces(published, qwen):
    """At one budget a trace here; all of them are in docs/log.md, with the command."""
    olmoe = read_trace(published / "waste-olmoe-299.jsonl")
    for trace, budget in ((qwen, 1500 * MIB), (olmoe, 128)):
        best, *others = simulate(trace, [DEFAULT_EVICTION, "lru", "lfu", "layer-lfu"], [budget])
        assert best.peak <= budget and all(best.hit_rate > other.hit_rate for other in others)


# -- traces made here ------------------------------------------------------------------------------

ROUTE = """# route_trace v1
# model=pico n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100
# layer=1 expert_bytes=150
turn,phase,step,layer,slot,expert
0,0,0,0,0,3
0,0,0,0,1,1
0,0,1,0,0,1
0,0,1,0,1,2
0,0,0,1,0,0
0,0,0,1,1,1
0,0,1,1,0,0
0,0,1,1,1,3
0,1,2,0,0,1
0,1,2,0,1,0
0,1,2,1,0,0
0,1,2,1,1,3
"""


def test_a_replay_by_eye(tmp_path):
    """The prompt wants 3 1 2 and 0 1 3, each once; then 1 0 and 0 3. 600 bytes hold 3 of each
    layer, less one."""
    file = tmp_path / "pico.route.csv"
    file.write_text(ROUTE)
    trace = read_trace(file)
    assert trace.records == [100, 150] and [len(step.ids) for step in trace.steps] == [2, 2, 1, 1]
    (all_of_it,) = simulate(trace, ["lru"], [1000])
    assert (all_of_it.lookups, all_of_it.hits, all_of_it.decode_lookups, all_of_it.decode_hits) == (
        10,
        3,
        4,
        3,
    )
    assert all_of_it.bytes_read == 4 * 100 + 3 * 150 and all_of_it.peak == 850
    (tight,) = simulate(trace, ["lru"], [600])
    assert tight.peak <= 600 and tight.bytes_read > all_of_it.bytes_read


@pytest.mark.parametrize("name, text, sentence", [
    ("empty.jsonl", "", "no routed token"),
    ("a.jsonl", "{", "line 1: .* was wanted, found '{'"),
    ("a.jsonl", '{"layers": [[1, 2]]}\n{"layers": [[1], [2]]}', "line 2: 1 layers were wanted, f"),
    ("a.jsonl", '{"layers": [[1, 1]]}', "occurs twice"),
    ("a.jsonl", '{"layers": [[-1]]}', "-1 is no expert"),
    ("a.jsonl", '{"layers": [[true]]}', "True is no expert"),
    ("a.jsonl", '{"layers": [[99999999999]]}', "99999999999 is no expert"),
    ("a.route.csv", "", "no comment says n_layer"),
    ("a.route.csv", ROUTE.replace("n_layer=2", "n_layer=99999999"), "99999999 layers of 4 experts"),
    ("a.route.csv", ROUTE.replace("# layer=1 expert_bytes=150\n", ""), "no comment says expert_b"),
    ("a.route.csv", ROUTE.replace("0,1,2,1,1,3", "0,1,2,1,1,4"), "4 is no expert; 0 to 3"),
    ("a.route.csv", ROUTE.replace("0,1,2,1,1,3", "0,1,2,7,1,3"), "this trace has layers 0 to 1"),
    ("a.route.csv", ROUTE.replace("0,1,2,1,1,3", "0,5,2,1,1,3"), "phase is 5"),
    ("a.route.csv", ROUTE.replace("0,1,2,1,1,3", "0,1,2,1,1,x"), "expert is 'x'"),
    ("a.route.csv", ROUTE.replace("expert\n", "what\n", 1), "no column 'expert'"),
    ("a.txt", "", "is no trace"),
])  # fmt: skip
def test_broken_traces_are_sentences(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(PrepError, match=sentence):
        read_trace(tmp_path / name)


def test_a_bundle_replays_like_the_engine_runs(golden, smoe_prep):
    trace = read_trace(golden)
    rows = simulate(
        trace, ["belady", "score", DEFAULT_EVICTION], [6 * trace.records[0]], "smoe:0.35"
    )
    assert (
        rows[0].substituted == 0 < rows[1].substituted and rows[1].after_hit_rate > rows[1].hit_rate
    )
    done = smoe_prep("simulate", golden, "--residency", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rows"]
    assert found[0]["policy"] == "belady" and all(row["to_bound"] >= 0 for row in found)
    done = smoe_prep("simulate", golden, "--residency", "2")
    assert (
        done.returncode == 1
        and "A residency of 2.0 was asked for" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_where_nothing_is_asked_for_every_layer_has_room_for_its_share(tmp_path, smoe_prep):
    file = tmp_path / "pico.route.csv"
    file.write_text(ROUTE)
    done = smoe_prep("simulate", file, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["budget"] for row in rows} == {300, 400, 500, 750}
    assert {"layer-lru", "lru"} <= {row["policy"] for row in rows}
    done = smoe_prep("simulate", file, "--residency", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    assert "layer-lru" not in done.stdout and "lru" in done.stdout
    done = smoe_prep("simulate", file, "--residency", "0.2", "--policy", "layer-lru")
    assert done.returncode == 1 and "has no record for each layer, which layer-lru" in done.stderr


def test_the_engine_misses_what_its_replay_says(golden):
    """The same ids through the engine and through the simulator, token by token."""
    spec = safetensors_file.load(golden / "trace.safetensors")
    starts = [*np.flatnonzero(spec["starts"]).tolist(), len(spec["tokens"])]
    tokens = spec["tokens"][starts[0] : starts[1]]
    budget = memory_for(open_bundle(golden), 6, 300)
    policies = Policies(warm=False, prefetch="none")
    with Engine.open(golden, beside=budget, context=300, policies=policies) as engine:
        list(engine.score(tokens))
        stats = engine.stats
    trace = read_trace(golden)
    short = dataclasses.replace(trace, steps=trace.steps[: 2 * len(tokens)])
    (row,) = simulate(short, [DEFAULT_EVICTION], [6 * trace.records[0]])
    assert (row.lookups, row.loads) == (stats.wanted, stats.misses)


def test_what_goes_by_planes_is_not_replayed_with_whole_records(golden):
    with pytest.raises(PrepError, match="planes lets go of planes.*it can replay lru, lfu"):
        simulate(read_trace(golden), ["planes"], [10**6])
