"""An engine used where it cannot be: closed, in a second thread, in a forked child, on a system
that lacks a call."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.cache.storage import Shards
from smoe.runtime.routing import as_routed
from smoe.runtime.system import aligned

PATIENCE = 10.0  # seconds until what should happen at once has not


@pytest.fixture(scope="module")
def budget(golden):
    """Bytes that leave room for four experts of 14."""
    return memory_for(open_bundle(golden), 4, 300)


def _said(call) -> str:
    """The sentence of the `EngineError` that `call` raises in a thread of its own, in time."""
    said: list[str] = []

    def run() -> None:
        try:
            call()
            said.append("nothing was raised")
        except EngineError as error:
            said.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert said, "it waits for ever"
    return said[0]


def test_a_generation_that_is_used_after_close_is_a_sentence(golden, budget):
    with Engine.open(golden, beside=budget, context=300) as engine:
        generation = engine.generate([1, 2, 3], max_new_tokens=20)
        scores = engine.score([1, 2, 3, 4, 5])
        prefill = engine.prefill(engine.new_sequence(), np.arange(9))
        next(generation)
    said = "This engine is closed; open the bundle again."
    assert _said(lambda: next(generation)) == said
    assert _said(lambda: next(scores)) == said
    assert _said(prefill.finish) == said
    assert _said(lambda: engine.generate([1])) == said
    assert _said(lambda: engine.logits([1, 2])) == said


def test_a_second_thread_in_a_running_engine_gets_a_sentence(golden):
    second: list[str] = []

    def choose(routed, available):
        if not second:
            second.append(_said(lambda: engine.generate([1, 2, 3])))
            second.append(_said(lambda: engine.logits([1, 2, 3])))
            second.append(_said(prefill.advance))
            second.append(_said(prefill.discard))
        return as_routed(routed, available)

    with Engine.open(golden, policies=Policies(substitution=choose)) as engine:
        prefill = engine.prefill(engine.new_sequence(), np.arange(9))
        tokens = [token.id for token in engine.generate([1, 2, 3], max_new_tokens=5)]
        assert (
            second
            == ["Another thread is using this engine; take turns, or open a second engine."] * 4
        )
        assert tokens == [token.id for token in engine.generate([1, 2, 3], max_new_tokens=5)]


def test_threads_may_take_turns(golden, budget):
    with Engine.open(golden, beside=budget, context=300) as engine:
        wanted = engine.logits([1, 2, 3])
        turns: list[np.ndarray] = []
        for _ in range(3):
            thread = threading.Thread(target=lambda: turns.append(engine.logits([1, 2, 3])))
            thread.start()
            thread.join(PATIENCE)
        assert len(turns) == 3 and all(np.array_equal(turn, wanted) for turn in turns)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_a_sentence_and_the_parent_goes_on(golden, budget):
    def child(engine: Engine, answer) -> None:
        answer.send(_said(lambda: list(engine.generate([1, 2, 3], max_new_tokens=2))))

    with Engine.open(golden, beside=budget, context=300) as engine:
        wanted = [token.id for token in engine.generate([1, 2, 3], max_new_tokens=4)]
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=child, args=(engine, there))
        process.start()
        assert here.poll(PATIENCE)
        assert "opened in another process" in here.recv()
        process.join(PATIENCE)
        assert [token.id for token in engine.generate([1, 2, 3], max_new_tokens=4)] == wanted


FORKS = """
import os, signal, sys, time
from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.step import Phase, Span, Step
import numpy as np

bundle, threads = sys.argv[1], int(sys.argv[2])
budget = memory_for(open_bundle(bundle), 4, 300)
engine = Engine.open(bundle, beside=budget, context=300, threads=threads)
wanted = [token.id for token in engine.generate([1, 2, 3], max_new_tokens=12)]
prefill, paused = engine.prefill(engine.new_sequence(), np.arange(9)), engine.generate([1, 2, 3])
scores, span = engine.score([1, 2, 3, 4]), Span(
    engine.new_sequence(), np.array([1]), np.array([0]), Phase.DECODE)
next(paused)
doors = {
    "generate": lambda: list(engine.generate([1, 2, 3], max_new_tokens=2)),
    "text": lambda: list(engine.generate("def", max_new_tokens=2)),
    "paused": lambda: next(paused),
    "logits": lambda: engine.logits([1, 2]),
    "score": lambda: next(scores),
    "new score": lambda: list(engine.score([1, 2])),
    "prefill": prefill.finish,
    "new prefill": lambda: engine.prefill(engine.new_sequence(), np.arange(9)).finish(),
    "step": lambda: engine.step(Step((span,))),
}

def fork(call):
    child = os.fork()
    if child:
        return child
    signal.alarm(10)
    call()
    sys.exit(0)  # and all that an interpreter does in the end

def every_door():
    for name, door in doors.items():
        try:
            door()
        except EngineError as error:
            assert "opened in another process" in str(error), (name, error)
        else:
            raise AssertionError(name)
    print(*engine.mode_lines(), engine.stats.as_dict(), file=open(os.devnull, "w"))
    engine.close()
    engine.close()
    with Engine.open(bundle, beside=budget, context=300, threads=threads) as own:
        assert [token.id for token in own.generate([1, 2, 3], max_new_tokens=12)] == wanted

children = [fork(every_door)]
paused = engine.generate([1, 2, 3], max_new_tokens=40)
for number, _ in enumerate(paused):  # while reads and guesses are on their way
    if number % 8 == 0:
        children.append(fork(every_door if number % 16 else engine.close))
for child in children:
    _, status = os.waitpid(child, 0)
    assert status == 0, status
assert [token.id for token in engine.generate([1, 2, 3], max_new_tokens=12)] == wanted
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_door_hangs_in_a_fork_and_an_engine_of_its_own_runs_there(golden, threads):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, str(golden), str(threads)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lacking", [("preadv",), ("preadv", "pread")])
def test_a_system_without_positioned_reads_runs_all_the_same(golden, budget, monkeypatch, lacking):
    with Engine.open(golden, beside=budget, context=300, io="buffered") as engine:
        wanted = [token.id for token in engine.generate([1, 2, 3], max_new_tokens=8)]
    for name in (*lacking, "posix_fadvise"):
        monkeypatch.delattr(os, name)
    with Engine.open(golden, beside=budget, context=300, io="buffered") as engine:
        assert [token.id for token in engine.generate([1, 2, 3], max_new_tokens=8)] == wanted
        assert engine.stats.bytes_read > 0


def test_threads_read_records_apart_without_positioned_reads(golden, monkeypatch):
    bundle = open_bundle(golden)
    size = bundle.layouts[0].levels[-1]
    shards = Shards(bundle)
    wanted = aligned(7, size)
    for expert in range(7):
        shards.read(0, expert, wanted[expert])
    for name in ("preadv", "pread"):
        monkeypatch.delattr(os, name)
    rows = aligned(7, size)

    def read(expert: int) -> None:
        for _ in range(20):
            shards.read(0, expert, rows[expert])

    threads = [threading.Thread(target=read, args=(expert,)) for expert in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert np.array_equal(rows, wanted)
    shards.close()
