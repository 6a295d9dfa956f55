"""What the benches stand on: the cgroup, the page cache, the clock, the picture."""

import json
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import cgroup
import engines
import numpy as np
import outofcore
import picture
import pytest

limited = pytest.mark.skipif(bool(cgroup.unavailable()), reason=cgroup.unavailable() or "")
MIB = 1 << 20


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


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
    cgroup.drop([file])
    with cgroup.Group("test", 48 * MIB) as group:
        done = group.run(
            _python(f"print(sum(len(part) for part in iter(open({str(file)!r}, 'rb').read, b'')))")
        )
        assert done.killed, "64 MiB in one piece"
        done = group.run(_python(f"f = open({str(file)!r}, 'rb')\nwhile f.read(65536): pass"))
    assert (done.code, done.killed) == (0, False)
    assert done.full > 0


def test_dropped_files_are_gone(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(np.random.default_rng(0).bytes(3 * MIB + 5))
    (tmp_path / "empty").touch()
    if cgroup.drop(cgroup.files_of(tmp_path)):
        pytest.skip("this file system keeps its pages")
    assert cgroup.resident(file) == 0
    with open(file, "rb") as opened:
        opened.seek(2 * MIB)
        opened.read(100)
    assert 0 < cgroup.resident(file) < 3 * MIB
    file.read_bytes()
    assert cgroup.resident(file) == -(-(3 * MIB + 5) // cgroup.PAGE) * cgroup.PAGE


@pytest.fixture
def stub(monkeypatch):
    """An engine over 4 ids that is sure of what follows, and a clock that it moves on by a second
    for each."""
    now = SimpleNamespace(seconds=0)

    def engine(ask, about):
        about["asked"] = ask.model
        yield None
        for following in [*ask.ids[1:], 0]:
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
    return outofcore.Row(engine, share, share and share * MIB, 0, run, failure, 50 * MIB, 0, 7)


ROWS = [
    *(_row("smoe", None, rate) for rate in (90, 110, 400)),
    _row("llama.cpp", None, 100),
    _row("smoe", 25, 80),
    _row("llama.cpp", 25, 0, "killed after 2 s: the limit is too small for it"),
]


def test_the_table_has_medians_ratios_and_failures():
    lines = outofcore.table(ROWS).splitlines()
    assert lines[2].startswith("| none |  | smoe | 110 | 1.10 | 3 | 1.5 s | 52 | 7 |")
    assert lines[3].startswith("| none |  | llama.cpp | 100 | 1.00 |")
    assert lines[4].startswith("| 25 % | 26 | smoe | 80 |  | 0.1 |")
    assert "killed after 2 s" in lines[5]
    assert outofcore.perplexities(ROWS[2:4]).endswith(
        "first 2 tokens: smoe 90.017, llama.cpp 20.086"
    )


def test_the_picture_is_svg_with_a_line_for_each_engine():
    tree = ElementTree.fromstring(outofcore.drawn(ROWS))
    names = [element.tag.split("}")[1] for element in tree.iter()]
    assert (names.count("polyline"), names.count("circle")) == (2, 3)
    assert "<&" not in picture.lines("a < b & c", ["x"], "", {"n": [1.0]})
    assert json.dumps(outofcore.SHARES).startswith("[null, 100")
