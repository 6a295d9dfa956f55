"""What the benches stand on: turns, records, tables, cgroups, the page cache, the clock."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bench import (
    budgets,
    cgroup,
    engines,
    harness,
    models,
    outofcore,
    page_cache,
    tables,
)
from bench.__main__ import main
from bench.harness import Record, Table
from smoe.artifacts import open_bundle

MIB = 1 << 20
REASON = cgroup.unavailable()
limited = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def _python(code):
    return [sys.executable, "-c", code]


# -- turns, processes, records ---------------------------------------------------------


def test_every_way_runs_once_a_round_and_each_is_first_once():
    order = []
    ways = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    results = harness.interleave(ways, 3)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert results["a"] == [1, 6, 8]
    assert harness.spread(results["a"]) == harness.Spread(6, 1, 8)


def test_a_child_runs_the_smoe_of_the_site_that_is_named(tmp_path):
    runtime = tmp_path / "smoe" / "runtime"
    runtime.mkdir(parents=True)
    (runtime / "__init__.py").write_text("WHERE = __file__")
    code = "import json, smoe.runtime; print(json.dumps(smoe.runtime.__file__))"
    done = subprocess.run(
        _python(code), capture_output=True, text=True, env=harness.child_environment(tmp_path)
    )
    assert harness.child_result(done.stdout) == str(runtime / "__init__.py")


def test_a_child_that_fails_ends_the_bench_with_its_words(golden, capfd):
    with pytest.raises(SystemExit, match="memory:peak_once ended with 1"):
        harness.child(
            "memory:peak_once", bundle=golden, budget=5 << 20, context=64, prompt=1, loss=0.0
        )
    assert "too small" in capfd.readouterr().err


def test_a_run_prints_its_tables_and_writes_a_record_that_gives_them_again(tmp_path, capsys):
    file = tmp_path / "record.json"
    assert main(["batching", "--json", str(file)]) == 0
    record = harness.read_record(file)
    assert record.table("batching").markdown() in capsys.readouterr().out
    assert record.command == f"python -m bench batching --json {file}"
    assert record.machine["cores"] >= 1 and record.machine["memory"] > MIB
    assert {"python", "numpy", "onnxruntime"} <= set(record.versions)
    assert len(record.date) == 10
    with pytest.raises(KeyError, match="there are batching"):
        record.table("other")


def test_benches_are_listed_with_a_line_each_and_unknown_ones_are_refused(capsys):
    assert main([]) == 0
    listing = capsys.readouterr().out
    names = {line.split()[0] for line in listing.splitlines() if line.startswith("  ")}
    assert names == {*harness.BENCHES, "tables"}
    assert all(bench.line.endswith((".", "?")) for bench in harness.BENCHES.values())
    assert main(["nonsense"]) == 2
    assert main(["soak", "policies"]) == 2, "it is no long check"


# -- tables ----------------------------------------------------------------------------

COLUMNS = {"name": "{}", "KL": "{:.2f} ± {:.1f}", "speed": "{:.1f} tok/s"}
RECORD = Record(
    bench="b",
    command="python -m bench b",
    date="2026-01-02",
    commit="abc",
    machine={"cpu": "A chip", "cores": 2},
    versions={},
    tables=[Table("one", COLUMNS, [["a|b", [0.123, 0.25], 5], ["c", None, "killed"]])],
    note="one run",
)
MARKDOWN = """\
| name | KL | speed |
| --- | --- | --- |
| a/b | 0.12 ± 0.2 | 5.0 tok/s |
| c |  | killed |"""


def test_marked_blocks_are_made_from_the_record_and_nothing_else_changes(tmp_path):
    RECORD.write(tmp_path / "f.json")
    blocks = ("<!-- table: one f.json -->", "<!-- source: f.json -->")
    page = "a\n" + "\nb\n".join(f"{block}\n{{}}\n<!-- end -->" for block in blocks)
    source = "`python -m bench b`, 2 cores of A chip, commit abc, 2026-01-02, one run."
    assert tables.rewritten(page.format("old", "old"), tmp_path) == page.format(MARKDOWN, source)
    again = page.format(MARKDOWN, source)
    assert tables.rewritten(again, tmp_path) == again


@pytest.mark.parametrize(
    ("marker", "error", "words"),
    [
        ("<!-- table: one -->", ValueError, "a name and a file"),
        ("<!-- table: one g.json -->", ValueError, "there is no"),
        ("<!-- table: two f.json -->", KeyError, "there are one"),
    ],
)
def test_a_marker_that_cannot_be_followed_is_named(tmp_path, marker, error, words):
    RECORD.write(tmp_path / "f.json")
    with pytest.raises(error, match=words):
        tables.rewritten(f"{marker}\n<!-- end -->", tmp_path)


def test_the_tables_of_the_documents_are_what_the_records_give():
    for document in tables.documents():
        text = document.read_text("utf-8")
        assert tables.rewritten(text) == text, f"{document.name}: run python -m bench tables"


def test_every_record_says_what_gave_it():
    for file in tables.FIGURES.glob("*.json"):
        record = harness.read_record(file)
        assert record.command and record.date and record.commit and record.machine["cpu"], file
        assert all(table.markdown() for table in record.tables), file


# -- little memory ---------------------------------------------------------------------


@limited
def test_a_process_in_a_group_is_counted_limited_and_told_apart():
    with cgroup.Group("test", 64 * MIB) as group:
        fits = group.run(_python(f"x = b'1' * {24 * MIB}; print(len(x))"))
        assert (fits.code, fits.out, fits.killed) == (0, f"{24 * MIB}\n", False)
        assert 24 * MIB < fits.peak <= 64 * MIB
        assert group.run(_python(f"x = b'1' * {80 * MIB}")).killed
        late = group.run(_python("import time; time.sleep(60)"), timeout=0.5)
        assert (late.code, late.killed) == (-9, False)
        assert late.peak < fits.peak, "each run is counted by itself"
    assert not group.path.exists()


@limited
def test_files_do_not_break_a_limit(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(bytes(64 * MIB))
    page_cache.drop([file])
    with cgroup.Group("test", 48 * MIB) as group:
        assert group.run(_python(f"open({str(file)!r}, 'rb').read()")).killed, "in one piece"
        done = group.run(_python(f"f = open({str(file)!r}, 'rb')\nwhile f.read(65536): pass"))
    assert (done.code, done.killed) == (0, False)
    assert done.full > 0


def test_where_a_version_cannot_be_had_it_says_why():
    for version in cgroup.versions():
        refusal = version.refusal()
        assert refusal is None or refusal.endswith((".", "yes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroup, "versions", list)
        assert cgroup.unavailable() == "There is no memory cgroup here, of either version."
        with pytest.raises(OSError, match="no memory cgroup"):
            cgroup.Group("test")


def test_groups_of_version_2_by_their_files(tmp_path):
    """What is written and read, in a folder: this kernel may have given its memory controller to
    version 1. A real one is used by the tests above where there is one."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    version = cgroup.Version2(tmp_path, tmp_path / "user")
    assert version.refusal() is None and version.parent() == tmp_path
    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.swap.max").write_text("max\n")
    version.limit(group, 5 * MIB)
    assert (group / "memory.max").read_text() == str(5 * MIB)
    assert (group / "memory.swap.max").read_text() == "0"
    (group / "memory.peak").write_text("4096\n")
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\n")
    assert (version.peak(group), version.full(group), version.kills(group)) == (4096, 7, 1)
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    assert "version 1 may have it" in version.refusal()


def test_dropped_files_are_gone(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(np.random.default_rng(0).bytes(3 * MIB + 5))
    (tmp_path / "empty").touch()
    if page_cache.drop(page_cache.files_under(tmp_path)):
        pytest.skip("this file system keeps its pages")
    assert page_cache.resident(file) == 0
    with open(file, "rb") as opened:
        opened.seek(2 * MIB)
        opened.read(100)
    assert 0 < page_cache.resident(file) < 3 * MIB
    assert page_cache.fetch(file) == -(-(3 * MIB + 5) // page_cache.PAGE) * page_cache.PAGE


# -- a model that does not fit ---------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    """An engine over 4 ids that is sure of what follows, and a clock that it moves on by a second
    for each."""
    now = SimpleNamespace(seconds=0)

    def engine(request, about):
        about["asked"] = request.model
        yield None
        for following in [*request.ids[1:], 0]:
            now.seconds += 1
            yield np.where(np.arange(4) == following, 30.0, 0.0)

    monkeypatch.setitem(engines.ENGINES, "stub", engine)
    monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: now.seconds))


@pytest.mark.parametrize(
    ("warm", "seconds", "read", "timed"), [(3, 9, 3, 7), (8, 3, 4, 4), (1, 3, 1, 4)]
)
def test_the_clock_starts_behind_what_is_warm(stub, warm, seconds, read, timed):
    done = engines.run(engines.Request("stub", "m", [0, 1, 2, 3, 0, 1, 2, 3, 0, 1], warm, seconds))
    assert (done.warm, done.tokens, done.rate) == (read, timed, 1)
    assert len(done.nats) == read + timed - (read + timed == 10) and max(done.nats) < 1e-6
    assert done.about == {"asked": "m"}


def test_a_smoe_run_is_what_the_engine_says(golden, answer):
    ids = answer["prompt"].ravel().tolist()
    done = engines.run(engines.Request("smoe", str(golden), ids, warm=2, context=160))
    assert done.warm + done.tokens == len(ids)
    logits = answer["logits"].reshape(len(ids), -1).astype(np.float64)
    following = logits[np.arange(len(ids) - 1), ids[1:]]
    assert done.nats == pytest.approx(
        (np.log(np.exp(logits[:-1]).sum(-1)) - following).tolist(), rel=1e-3
    )


def _row(engine, share, rate, failure=""):
    run = None if failure else {"rate": rate, "nats": [2.0, 3.0 + rate / 100], "opened": 1.5}
    limit = share * MIB or None
    return outofcore.Row(engine, share, limit, 0, run, failure, 50 * MIB, 0, 7)


ROWS = [
    *(_row("smoe", 0, rate) for rate in (90, 110, 400)),
    _row("llama.cpp", 0, 100),
    _row("smoe", 25, 80),
    _row("llama.cpp", 25, 0, "killed after 2 s: the limit is too small for it"),
]


def test_the_tables_have_medians_ratios_and_failures():
    lines = outofcore.speeds(ROWS).markdown().splitlines()
    assert lines[0] == "| memory of the process | smoe, tokens per second | llama.cpp | ratio |"
    assert lines[2:] == ["| no limit | 110 | 100 | 1.1 |", "| 26 MB (25 %) | 80 |  |  |"]
    lines = outofcore.details(ROWS).markdown().splitlines()
    assert lines[2].startswith("| none |  | smoe | 110 | 1.10 | 3 | 1.5 s | 52 | 7 |")
    assert lines[3].startswith("| none |  | llama.cpp | 100 | 1.00 |")
    assert lines[4].startswith("| 25 % | 26 | smoe | 80 |  | 0.1 |")
    assert "killed after 2 s" in lines[5]
    table = outofcore.perplexities(ROWS[2:4])
    assert table.markdown().endswith("| smoe | 90.017 |\n| llama.cpp | 20.086 |")


# -- one commit beside another ---------------------------------------------------------


def test_a_side_by_side_run_of_the_same_code_gives_the_same_logits(golden, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "a b c d e f g h " * 40}) + "\n")
    settings = {"bundle": golden, "loss": 0.0, "io": "buffered", "text": text, "tokens": 60}
    all_in, some = (
        harness.child("sidebyside:decode", share=share, context=64, **settings)
        for share in (None, 0.5)
    )
    assert all_in["logits"] == some["logits"]
    assert all_in["bytes_read"] == 0 < some["bytes_read"]


def test_a_budget_holds_the_share_and_a_byte_less_does_not(golden):
    plan = budgets.planner(golden, 64)
    budget = budgets.budget_for_share(golden, 0.5, 64)
    half = plan(None).experts // 2
    assert plan(budget).capacity == half > plan(budget - 1).capacity


def test_a_bundle_takes_tables_and_trace_of_another(goldens, tmp_path):
    bundle = shutil.copytree(goldens[-1], tmp_path / "bundle")
    for path in (*bundle.rglob("tables.safetensors"), *bundle.rglob("trace.safetensors")):
        path.unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    kept = {name: file for name, file in manifest["files"].items() if (bundle / name).exists()}
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"files": kept}))
    assert not any(open_bundle(bundle).tables.layers())
    models.graft(bundle, goldens[-1])
    given, taken = (open_bundle(p, hashes=True) for p in (goldens[-1], bundle))
    assert (
        taken.study("trace.safetensors").read_bytes()
        == given.study("trace.safetensors").read_bytes()
    )
    for mine, theirs in zip(taken.tables.layers(), given.tables.layers(), strict=True):
        assert mine.keys() == theirs.keys() and len(mine) > 10
        assert all(np.array_equal(mine[name], theirs[name], equal_nan=True) for name in mine)
