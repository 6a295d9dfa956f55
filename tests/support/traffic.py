"""Clients that behave as clients do: many at once, some that hang up, some that send nonsense."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from smoe.runtime import Engine
from smoe.runtime.serve.sse import DONE

from .server import WAIT, Client, until

COMPLETION = "/v1/completions"
NONSENSE = (
    b"{", b'{"prompt": [[]]}', b'{"prompt": "x", "n": 3}', b'{"prompt": "x", "what": 1}', b"\xff",
    b'{"prompt": [1e9]}', b'{"prompt": "x", "max_tokens": 100000}',
)  # fmt: skip
LENGTHS, NEW = (1, 200), (1, 60)  # of prompts, and of answers


@dataclass(frozen=True)
class Known:
    """A request, and the text that it gets when nobody else is there."""

    ids: list[int]
    tokens: int
    text: str

    def body(self, stream: bool) -> dict[str, object]:
        """What is asked."""
        how = {"max_tokens": self.tokens, "temperature": 0, "stream": stream}
        return {"prompt": self.ids, **how}


@dataclass
class Seen:
    """What clients saw: answers by their status, and what was wrong; seconds between the parts of a
    stream, and until the work of one that hung up had ended."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)


def known(engine: Engine, count: int, seed: int) -> list[Known]:
    """Some of which begin alike."""
    chance = np.random.default_rng(seed)
    most = min(LENGTHS[1], engine.context - NEW[1])
    begins = chance.integers(1, engine.manifest.model.vocabulary, most).tolist()
    made = []
    for number in range(count):
        ids = chance.integers(
            1, engine.manifest.model.vocabulary, chance.integers(1, most)
        ).tolist()
        ids = begins[: len(ids) // 2] + ids[len(ids) // 2 :] if number % 3 == 0 else ids
        tokens = int(chance.integers(*NEW))
        text = "".join(token.text for token in engine.generate(ids, tokens))
        made.append(Known(ids, tokens, text))
    return made


def load(client: Client, asked: list[Known], seconds: float, clients: int, seed: int) -> Seen:
    """So many clients at once for so long: each asks, waits or hangs up, and sends nonsense."""
    seen, until_then = Seen(), time.monotonic() + seconds

    def one(number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        while time.monotonic() < until_then:
            try:
                _act(client, asked, chance, seen)
            except OSError as error:
                seen.wrong.append(f"no answer: {error}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: not client.busy())
    return seen


def _act(client: Client, asked: list[Known], chance: random.Random, seen: Seen) -> None:
    one, kind = chance.choice(asked), chance.random()
    if kind < 0.1:
        status = client.ask(COMPLETION, chance.choice(NONSENSE), "POST").status
        seen.statuses[f"{status} for nonsense"] += 1
        if status != 400:
            seen.wrong.append(f"nonsense is {status}")
    elif kind < 0.3:
        with client.open(COMPLETION, one.body(chance.random() < 0.5)):
            time.sleep(chance.random() ** 3)
        seen.statuses["hung up"] += 1
    elif kind < 0.6:
        reply = client.ask(COMPLETION, one.body(False))
        seen.statuses[str(reply.status)] += 1
        _compare(one, reply.status, [reply.body] if reply.status == 200 else [], seen)
    else:
        _stream(client, one, seen)


def _stream(client: Client, one: Known, seen: Seen) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=WAIT)
    connection.request("POST", COMPLETION, json.dumps(one.body(True)))
    reply, parts, last = connection.getresponse(), [], 0.0
    while reply.status == 200 and (line := reply.readline()):
        if not line.startswith(b"data: {"):
            seen.wrong += [] if line in (b"\n", DONE[:-1]) or line[:1] == b":" else [repr(line)]
            continue
        now = time.perf_counter()
        seen.between += [now - last] if last else []
        last = now
        parts.append(json.loads(line[6:]))
    connection.close()
    seen.statuses[f"{reply.status} streamed"] += 1
    _compare(one, reply.status, parts, seen)


def _compare(one: Known, status: int, parts: list[dict], seen: Seen) -> None:
    if status == 503:
        return
    if status != 200 or any("error" in part for part in parts):
        seen.wrong.append(f"{status}: {parts[-1:]}")
        return
    text = "".join(choice["text"] for part in parts for choice in part["choices"])
    if text != one.text:
        seen.wrong.append(f"{text!r} instead of {one.text!r}")


def hang_ups(client: Client, asked: list[Known], count: int, seed: int) -> Seen:
    """Clients that hang up one after another at a random moment, also while prompts are read; and
    how long the server was at work for them afterwards."""
    seen, chance = Seen(), random.Random(seed)
    usual = _seconds(client, asked[0])
    for number in range(count):
        one = chance.choice(asked)
        body = one.body(stream=number % 2 == 0) | {"max_tokens": NEW[1]}
        with client.open(COMPLETION, body):
            time.sleep(chance.uniform(0, usual))
        seen.ended.append(until(lambda: not client.busy()))
        seen.statuses["hung up"] += 1
    for one in asked[:3]:
        reply = client.ask(COMPLETION, one.body(False))
        _compare(one, reply.status, [reply.body], seen)
    return seen


def _seconds(client: Client, one: Known) -> float:
    started = time.monotonic()
    client.ask(COMPLETION, one.body(False) | {"max_tokens": NEW[1]})
    return time.monotonic() - started
