"""How calls end before their answer does: clients that go, a queue that is full, a thread that is
dead, a server that is told to stop."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("uvicorn", reason="smoe[serve]")
from support import traffic
from support.server import Client, serving, until

from smoe.runtime import Engine
from smoe.runtime.serve import Loop
from smoe.runtime.serve.desk import Desk
from smoe.runtime.serve.refusal import Refusal

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": [9, 8, 7], "max_tokens": 290, "seed": 1, "stop": []}


@pytest.fixture(scope="module")
def bundle(goldens):
    return goldens[-1]


@pytest.fixture(scope="module")
def client(bundle):
    with serving(bundle) as served:
        yield served


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_generation(client, stream):
    """As often as there is luck: an answer of 290 tokens may be through before."""
    cut = 0
    for _ in range(5):
        before = client.metric("smoe_new_tokens_total")
        with client.open(COMPLETION, LONG | {"stream": stream}) as opened:
            until(lambda: client.busy())
            if stream:
                opened.recv(100)
        until(lambda: not client.busy())
        cut += client.metric("smoe_new_tokens_total") - before < 290
    assert cut


def test_a_client_that_goes_during_its_prompt_ends_it(client):
    cancelled = 'smoe_answers_total{finish="cancelled"}'
    before, number = client.metric(cancelled), 0
    while client.metric(cancelled) == before:
        number += 1
        assert number < 100
        body = {"prompt": [10 + number] * 299, "max_tokens": 1, "stream": number % 2 == 0}
        with client.open(COMPLETION, body):
            time.sleep(0.002 * (number % 10))  # it may not have begun, or be through
        until(lambda: not client.busy())
    assert client.ask(COMPLETION, {"prompt": "x", "max_tokens": 1}).status == 200


def test_more_than_may_wait_are_told_to_come_again(bundle):
    with serving(bundle, requests=1, waiting=1) as client:
        opened = [client.open(COMPLETION, LONG | {"stream": True}) for _ in range(2)]
        until(lambda: client.busy() == 2)
        reply = client.ask(COMPLETION, LONG)
        assert reply.status == 503 and int(reply.headers["retry-after"]) > 0
        assert reply.body["error"]["type"] == "overloaded_error"
        for one in opened:
            one.close()
        until(lambda: not client.busy())
        assert client.ask(COMPLETION, {"prompt": "x", "max_tokens": 1}).status == 200


def test_a_worker_that_stands_still_is_seen(bundle):
    with Engine.open(bundle, context=64) as engine, Loop(engine) as loop:
        loop.start()
        loop.ask(lambda: time.sleep(1.0))

        async def seen():
            desk = Desk(loop, "pico", 4, print, answers=0.1)
            assert await desk.ask(lambda: True) is None
            until(lambda: loop.ask(lambda: True).result())
            assert await desk.ask(lambda: True)

        asyncio.run(seen())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_is_dead_is_seen_and_nobody_waits_for_it(bundle):
    def die():
        raise ZeroDivisionError

    with Engine.open(bundle, context=64) as engine, Loop(engine) as loop:
        loop.start()

        async def seen():
            desk = Desk(loop, "pico", 4, print)
            loop.ask(die)
            until(lambda: not loop.alive)
            started = time.monotonic()
            assert await desk.ask(lambda: True) is None
            assert time.monotonic() < started + 1
            with pytest.raises(Refusal) as refused:
                async with desk.call(lambda: []) as call:
                    call.begin(loop, [])
                    await desk.work(lambda: loop.submit(None))
            assert refused.value.status == 503

        asyncio.run(seen())


def _command(bundle, *more):
    command = [sys.executable, "-m", "smoe.runtime", "serve", str(bundle), "--port", "0", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _port(process):
    for line in process.stderr:
        if line.startswith("serving:"):
            return int(line.split(" (")[0].rpartition(":")[2])
    raise AssertionError("it did not start")


def test_a_signal_tells_streams_that_it_is_over(bundle):
    with _command(bundle, "--context", "300", "--grace", "0") as process:
        client = Client(_port(process))
        with client.open(COMPLETION, LONG | {"stream": True}) as opened:
            told = opened.recv(1 << 16)
            process.send_signal(signal.SIGTERM)
            while more := opened.recv(1 << 16):
                told += more
        assert process.wait(20) == 0
        assert b'"error"' in told and b"shutting down" in told and b"[DONE]" not in told


def test_an_interrupt_lets_answers_end(bundle):
    with _command(bundle, "--context", "300") as process:
        client = Client(_port(process))
        with client.open(COMPLETION, LONG | {"max_tokens": 60, "stream": True}) as opened:
            told = opened.recv(1 << 16)
            process.send_signal(signal.SIGINT)
            while more := opened.recv(1 << 16):
                told += more
        assert process.wait(20) == 0 and b"[DONE]" in told


def test_what_cannot_be_served_is_one_sentence(bundle, tmp_path):
    def said(*more):
        with _command(bundle, *more) as process:
            _, error = process.communicate(timeout=30)
        assert process.returncode in (1, 2) and "Traceback" not in error
        return error

    assert "give it an --api-key" in said("--host", "0.0.0.0")
    assert "--insecure has no effect" in said("--insecure")
    assert "cannot be listened at" in said("--host", "256.1.1.1", "--insecure")
    empty = tmp_path / "key"
    empty.write_text("\n")
    assert "--api-key is empty" in said("--api-key", f"@{empty}")


def test_without_its_extra_it_says_what_to_install(bundle):
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("starlette", "uvicorn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from smoe.runtime.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "serve", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and "pip install 'smoe[serve]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_clients_that_hang_up_at_random_moments(bundle):
    with Engine.open(bundle, context=300) as engine:
        asked = traffic.known(engine, 8, seed=1)
    with serving(bundle) as client:
        seen = traffic.hang_ups(client, asked, 20, seed=1)
    assert not seen.wrong and len(seen.ended) == 20


def test_random_traffic_ends_as_it_should(bundle):
    """A tenth of `python -m bench soak load`, or less."""
    with Engine.open(bundle, context=300) as engine:
        asked = traffic.known(engine, 12, seed=2)
    with serving(bundle, waiting=8) as client:
        seen = traffic.load(client, asked, seconds=6, clients=8, seed=2)
        assert client.ask("/health").status == 200
    assert not seen.wrong and not any(name.startswith("500") for name in seen.statuses)
    assert not any("failed" in line for line in client.said)
