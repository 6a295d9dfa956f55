"""Sequences that outlive their process: a file of ids and state, and what a chat says of it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import damaged_sessions

from smoe.runtime import Engine, EngineError
from smoe.runtime.conversation import Conversation
from smoe.runtime.session import load, save

CONTEXT = 128
# which bundle: with a program whole, with one made by a build, with ONNX Runtime; state that is
# appended to, and state that is replaced
WAYS = [("programmed", {"state": kind}) for kind in ("f32", "f16", "int8")]
WAYS += [("v6", {"executor": "program"}), ("v6", {"executor": "onnx"}), ("v1", {}), ("v2", {})]


@pytest.fixture
def bundle(request, programmed, goldens) -> Path:
    if request.param == "programmed":
        return programmed
    return next(path for path in goldens if path.stem == request.param)


def _ids(engine: Engine, count: int, seed: int = 0) -> list[int]:
    vocabulary = engine.manifest.model.vocabulary
    return np.random.default_rng(seed).integers(1, vocabulary, count).tolist()


def _said(engine: Engine, ids: list[int]) -> np.ndarray:
    """Logits of the last tokens, of which the first are there already."""
    return np.stack(list(engine.score(ids, prompt=len(ids) - 9, reuse=True)))


@pytest.mark.parametrize("bundle, how", WAYS, indirect=["bundle"], ids=str)
def test_a_session_goes_on_to_the_bit(bundle, how, tmp_path):
    file = tmp_path / "a.session"
    with Engine.open(bundle, context=CONTEXT, **how) as engine:
        ids = _ids(engine, 60)
        list(engine.score(ids[:45], prompt=40))
        save(engine, file)
        assert engine.sequence.ids == ids[:45]
        wanted = _said(engine, ids)
    with Engine.open(bundle, context=CONTEXT + 32, **how) as engine:  # of any length
        assert load(engine, file).tokens == 45
        read = engine.stats.prompt_tokens
        assert np.array_equal(_said(engine, ids), wanted)
        assert engine.stats.prompt_tokens - read == 51 - 45


@pytest.mark.parametrize("bundle, read", [("v6", 10), ("v1", 10), ("programmed", 40)],
                         indirect=["bundle"])  # fmt: skip
def test_a_prompt_that_goes_another_way_uses_the_start_that_it_shares(bundle, read, tmp_path):
    """As far as there is a way back: from what is recurrent there is none."""
    file = tmp_path / "a.session"
    with Engine.open(bundle, context=CONTEXT) as engine:
        ids = _ids(engine, 40)
        list(engine.generate(ids, max_new_tokens=4))
        save(engine, file)
    other = [*ids[:30], *reversed(ids[30:])]
    with Engine.open(bundle, context=CONTEXT) as engine:
        load(engine, file)
        tokens = [token.id for token in engine.generate(other, max_new_tokens=6, reuse=True)]
        assert engine.stats.prompt_tokens == read
    with Engine.open(bundle, context=CONTEXT) as engine:
        assert [token.id for token in engine.generate(other, max_new_tokens=6)] == tokens


def _refusal(engine: Engine, file: Path) -> str:
    written, sequence = file.read_bytes(), engine.sequence
    with pytest.raises(EngineError) as refused:
        load(engine, file)
    assert file.read_bytes() == written and engine.sequence is sequence
    assert "left as it is" in str(refused.value) and "--session" in str(refused.value)
    return str(refused.value)


def test_what_a_session_does_not_go_with_is_said(goldens, programmed, tmp_path):
    file, newest = tmp_path / "a.session", goldens[5]
    with Engine.open(newest, context=CONTEXT) as engine:
        list(engine.generate(_ids(engine, 90), max_new_tokens=2))
        save(engine, file)
    for options, said in (
        ({"executor": "onnx"}, "other arithmetic"),
        ({"state": "f32"}, "give the options that it was made with"),
        ({"level": 1}, "level 4 of 4; here"),
        (
            {"context": 64},
            "91 tokens, and the context is 64. It is left as it is; give a --context above",
        ),
    ):
        with Engine.open(newest, **{"context": CONTEXT, **options}) as engine:
            assert said in _refusal(engine, file)
    with Engine.open(programmed, context=CONTEXT) as engine:
        assert "of another bundle" in _refusal(engine, file)
        other = tmp_path / "other.safetensors"
        shutil.copyfile(newest / "tables.safetensors", other)
        assert "it is no session" in _refusal(engine, other)
        other.write_text("hello")
        assert "its header has" in _refusal(engine, other)
        os.mkfifo(tmp_path / "pipe")  # whoever read it would wait
        with pytest.raises(EngineError, match="it is no file"):
            load(engine, tmp_path / "pipe")


def test_a_conversation_comes_back_as_it_was(programmed, tmp_path):
    file, talk = tmp_path / "a.session", Conversation("kurz, bitte", [("Grüße", "🙂\n"), ("", "b")])
    with Engine.open(programmed, context=CONTEXT) as engine:
        save(engine, file, talk)
        saved = load(engine, file)
        assert saved.conversation == talk and saved.tokens == 0
        save(engine, file)
        assert load(engine, file).conversation == Conversation()


@pytest.mark.parametrize("bundle, state", [("programmed", "int8"), ("v1", None)],
                         indirect=["bundle"])  # fmt: skip
def test_a_damaged_session_is_refused_with_a_sentence_or_goes_on(bundle, state):
    """(`python -m bench soak sessions` tries 3,000.)"""
    totals, wrong = damaged_sessions.many(bundle, 150, seed=1, state=state)
    assert not wrong
    assert totals[damaged_sessions.REFUSED] > 100 and sum(totals.values()) == 150


KILLED = """
import sys
from pathlib import Path
from smoe.runtime import Engine
from smoe.runtime.session import load, save
bundle, file = sys.argv[1:]
with Engine.open(bundle, context=300) as engine:
    for count in range(100, 290):
        list(engine.score([1 + n % 30 for n in range(count)], prompt=count, reuse=True))
        save(engine, Path(file))
        print(count, flush=True)
"""


def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_session(programmed, tmp_path):
    file, random = tmp_path / "a.session", np.random.default_rng(3)
    known = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(programmed), str(file)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(random.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        counts = [100, *map(int, process.stdout.read().split())]
        process.communicate()
        with Engine.open(programmed, context=300) as engine:
            known = load(engine, file).tokens
            assert counts[-1] <= known <= counts[-1] + 1
            assert {one.name for one in tmp_path.iterdir()} <= {"a.session", "a.session.part"}
            save(engine, file)
            assert [one.name for one in tmp_path.iterdir()] == ["a.session"]


def test_a_disk_that_is_full_leaves_the_session_that_was_there(programmed, tmp_path):
    file = tmp_path / "a.session"
    with Engine.open(programmed, context=CONTEXT) as engine:
        save(engine, file)
        list(engine.generate(_ids(engine, 60), max_new_tokens=2))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            with pytest.raises(EngineError, match="cannot be saved in .*make room"):
                save(engine, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [one.name for one in tmp_path.iterdir()] == ["a.session"]
        assert load(engine, file).tokens == 0


# -- the commands ----------------------------------------------------------------------------------


def smoe(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "smoe.runtime", *map(str, arguments)],
        input=stdin,
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_run_goes_on_where_it_was(goldens, tmp_path):
    file = tmp_path / "a.session"
    options = ("--ids", "--json", "--context", CONTEXT, "--max-new-tokens", 5)
    prompt = [1 + n % 90 for n in range(60)]

    def run(ids: list[int], *more: object) -> dict:
        done = smoe("run", goldens[5], " ".join(map(str, ids)), *options, *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) | {"said": done.stderr}

    first = run(prompt, "--session", file)
    assert f"session: {file} is new" in first["said"] and first["stats"]["prompt_tokens"] == 60
    longer = [*prompt, *first["ids"]]
    second = run(longer, "--session", file)
    assert f"session: {file} goes on after 64 tokens" in second["said"]
    assert second["stats"]["prompt_tokens"] == 1 and second["ids"] == run(longer)["ids"]


def test_chat_goes_on_where_it_was(goldens, tmp_path):
    file, options = tmp_path / "a.session", ("--json", "--max-new-tokens", 4)
    chat = ("chat", goldens[5], *options)
    both = smoe(*chat, "--system", "be brief", stdin="hello\nagain\n\n")
    first = smoe(*chat, "--system", "be brief", "--session", file, stdin="hello\n\n")
    second = smoe(*chat, "--session", file, stdin="again\n\n")
    assert f"session: {file} goes on after" in second.stderr and "and 1 turn" in second.stderr
    wanted = [json.loads(line) for line in both.stdout.splitlines()]
    first, second = (json.loads(done.stdout) for done in (first, second))
    assert [first["text"], second["text"]] == [turn["text"] for turn in wanted]
    read = [turn["stats"]["prompt_tokens"] for turn in wanted]
    assert [first["stats"]["prompt_tokens"], second["stats"]["prompt_tokens"]] == [
        read[0],
        read[1] - read[0],
    ]


def test_a_session_that_outgrows_its_context_is_told_what_can_be_done(goldens, tmp_path):
    file, lines = tmp_path / "a.session", "".join(f"turn number {n}\n" for n in range(9)) + "\n"
    chat = ("chat", goldens[5], "--json", "--max-new-tokens", 4, "--session", file)
    chat = (*chat, "--overflow", "end", "--context")
    short = smoe(*chat, 100, stdin=lines)
    assert short.returncode == 0 and 0 < len(short.stdout.splitlines()) < 9
    assert "--context 200 has room for more (this model takes up to 300)" in short.stderr
    more = smoe(*chat, 200, stdin=lines)
    assert more.returncode == 0 and len(more.stdout.splitlines()) > 0
    assert "goes on after" in more.stderr
    most = smoe(*chat, 300, stdin=lines * 3)
    assert "this model takes no longer ones" in most.stderr


@pytest.mark.parametrize("command", [("run", "x"), ("chat",)])
def test_where_no_session_can_be_written_is_said_at_once(golden, tmp_path, command):
    done = smoe(command[0], golden, *command[1:], "--session", tmp_path / "none" / "a")
    assert done.returncode == 1 and "is no folder to write a into" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_what_fails_leaves_the_session_that_was_there(golden, tmp_path):
    file = tmp_path / "a.session"
    assert smoe("run", golden, "def main", "--session", file).returncode == 0
    written = file.read_bytes()
    done = smoe("run", golden, "x " * 400, "--session", file)
    assert done.returncode == 1 and "more than the context" in done.stderr
    assert file.read_bytes() == written
