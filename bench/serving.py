"""What the server costs: tokens per second of one stream over a socket, beside those of the engine
that is behind it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench import options
from bench.decoding import random_ids
from bench.harness import Rows, Run, Table, bench, child, interleave, note, option
from smoe.runtime import Engine

Answer = dict[str, Any]
CONTEXT = 1024
WARM = 8  # tokens before the clock starts


@bench(
    options.BUNDLE, options.rounds(5), option("--new", type=int, default=256, help="tokens"),
    option("--prompt", type=int, default=64, help="tokens"),
    option("--memory", help="of the process, like 2GiB"),
)  # fmt: skip
def serving(run: Run) -> Rows:
    """One stream through the server, beside the engine alone: in turns, a process each."""
    how = {"bundle": str(run.bundle), "new": run.new, "prompt": run.prompt, "memory": run.memory}
    ways = {
        "engine": lambda: child("serving:alone", **how),
        "server": lambda: child("serving:served", **how),
    }
    results = interleave(ways, run.rounds)
    middle = {way: sorted(results[way], key=_speed)[run.rounds // 2] for way in ways}
    one = middle["engine"]["tokens_per_second"]
    columns = {"way": "{}", "tok/s": "{:.1f}", "x engine": "{:.3f}", "first token, ms": "{:.1f}"}
    lines = [
        [way, _speed(answer), _speed(answer) / one, 1e3 * answer["first"]]
        for way, answer in middle.items()
    ]
    title = f"{run.rounds} rounds, {run.prompt} tokens in and {run.new} out"
    yield Table("serving", columns, lines, title)


def _speed(answer: Answer) -> float:
    return answer["tokens_per_second"]


def alone(bundle: str, new: int, prompt: int, memory: str | None) -> Answer:
    """The engine by itself."""
    with Engine.open(bundle, context=CONTEXT, memory=memory) as engine:
        ids = random_ids(prompt, engine.manifest.model.vocabulary)
        list(engine.generate(ids, WARM, temperature=1.0, seed=1))
        started = time.perf_counter()
        times = [time.perf_counter() for _ in engine.generate(ids, new, temperature=1.0, seed=1)]
    return _answer(started, times, len(times))


def served(bundle: str, new: int, prompt: int, memory: str | None) -> Answer:
    """The same over a socket, asked by another process."""
    with Engine.open(bundle, context=CONTEXT, memory=memory, requests=1) as engine:
        ids = random_ids(prompt, engine.manifest.model.vocabulary)
        with _server(engine) as port:
            child("serving:ask", port=port, ids=ids, new=WARM)
            return child("serving:ask", port=port, ids=ids, new=new)


@contextmanager
def _server(engine: Engine) -> Iterator[int]:
    from smoe.runtime.serve.server import Server, Serving

    running = threading.Event()
    server = Server(engine, Serving("model", port=0, grace=0.0), lambda *lines: running.set())
    thread = threading.Thread(target=server.run_until_closed, args=(False,))
    thread.start()
    running.wait()
    try:
        yield server.port
    finally:
        while not server.close() and thread.is_alive():
            time.sleep(0.01)
        thread.join()


def ask(port: int, ids: list[int], new: int) -> Answer:
    """One stream, as its client sees it."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"prompt": ids, "max_tokens": new, "stream": True, "temperature": 1, "seed": 1}
    body["stream_options"] = {"include_usage": True}
    body["logprobs"] = 0  # so that every token is a part of its own, with text or without
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    reply = connection.getresponse()
    came = [(time.perf_counter(), line) for line in reply if line.startswith(b"data: {")]
    connection.close()
    if reply.status != 200:
        note(f"the server said {reply.status}")
    made = json.loads(came[-1][1][6:])["usage"]["completion_tokens"]
    return _answer(started, [when for when, _ in came], made)


def _answer(started: float, times: list[float], made: int) -> Answer:
    rate = (made - 1) / (times[-1] - times[0])
    return {"tokens_per_second": rate, "first": times[0] - started}
