"""Traces: what an engine did, in the format that Chrome and Perfetto read, and nothing else
changed."""

import json
import os
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError
from smoe.runtime.budget import memory_for
from smoe.runtime.cli import cli
from smoe.runtime.trace import Trace, traced

CONTEXT = 64


@pytest.fixture
def file(tmp_path):
    return tmp_path / "trace.json"


def _events(file) -> list[dict]:
    """As the format wants them: complete events and metadata, those of a thread one within the
    other."""
    whole = json.loads(file.read_text())
    assert whole.keys() == {"displayTimeUnit", "traceEvents"} and whole["displayTimeUnit"] == "ms"
    events = whole["traceEvents"]
    for event in events:
        assert event["ph"] in ("X", "M") and isinstance(event["name"], str)
        assert event["pid"] == os.getpid() and isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        assert event["ph"] == "M" or (event["ts"] >= 0 and event["dur"] >= 0)
    spans = [event for event in events if event["ph"] == "X"]
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    for thread in {event["tid"] for event in spans}:
        assert thread in named
        open_ends: list[float] = []
        mine = [event for event in spans if event["tid"] == thread]
        for event in sorted(mine, key=lambda event: (event["ts"], -event["dur"])):
            while open_ends and open_ends[-1] <= event["ts"]:
                open_ends.pop()
            end = event["ts"] + event["dur"]
            assert not open_ends or end <= open_ends[-1] + 0.002, event  # rounded to 1 ns
            open_ends.append(end)
    return spans


def _decoded(path, experts, makers=None):
    given = {} if makers is None else {"makers": makers}
    budget = memory_for(open_bundle(path), experts, CONTEXT)
    with Engine.open(path, beside=budget, context=CONTEXT, **given) as engine:
        return np.stack(list(engine.score(np.arange(3, 30), 8))), engine.stats.as_dict()


@pytest.mark.parametrize("experts", [4, 14])
def test_a_trace_says_what_was_done_and_changes_no_bit(programmed, file, experts):
    wanted, counted = _decoded(programmed, experts)
    with Trace(file) as trace:
        logits, stats = _decoded(programmed, experts, traced(trace))
    assert np.array_equal(logits, wanted) and stats["slots"] == counted["slots"]
    spans = _events(file)
    names = {span["name"] for span in spans}
    assert {"step", "part", "segment", "last segment", "kernel", "read", "wait"} <= names
    reads = [span["args"] for span in spans if span["name"] == "read"]
    assert all(set(read) == {"layer", "expert", "guess", "planes", "bytes"} for read in reads)
    assert sum(read["bytes"] for read in reads) >= stats["bytes_read"]
    steps = [span for span in spans if span["name"] == "step"]
    assert len(steps) == 30 - 3 - 8 and all(span["args"]["tokens"] == 1 for span in steps)
    slots = sum(span["args"]["slots"] for span in spans if span["name"] == "kernel")
    assert slots == stats["slots"]


def test_bench_writes_one(golden, file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 20)
    asked = ["bench", str(golden), "--text", str(text), "--context", "64", "--tokens", "40"]
    asked += ["--length", "40", "--json"]
    done = CliRunner().invoke(cli, [*asked, "--trace", str(file)])
    assert done.exit_code == 0, done.output
    assert {"step", "kernel", "segment"} <= {span["name"] for span in _events(file)}


def test_spans_of_many_threads_are_whole_lines(file):
    with Trace(file) as trace:

        def work(number: int) -> None:
            for i in range(50):
                with trace.span("outer", number=number), trace.span("inner", i=i) as about:
                    about["more"] = "ä"

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    spans = _events(file)
    assert len(spans) == 400 and sum("more" in span["args"] for span in spans) == 200


def test_what_fails_inside_is_in_the_trace_and_goes_on_its_way(file):
    with pytest.raises(ValueError, match="inside"), Trace(file) as trace, trace.span("failing"):
        raise ValueError("inside")
    assert [span["name"] for span in _events(file)] == ["failing"]


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(EngineError, match="cannot be written: .*leave out the trace"):
        Trace(tmp_path / "none" / "trace.json")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_a_full_disk_is_a_sentence_at_the_end(golden, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 20)
    asked = ["bench", str(golden), "--text", str(text), "--tokens", "40", "--context", "64"]
    done = CliRunner().invoke(cli, [*asked, "--trace", "/dev/full"])
    assert isinstance(done.exception, EngineError)
    assert "/dev/full cannot be written: No space left on device" in str(done.exception)
