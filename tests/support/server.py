"""A server on a socket of its own, and clients that know no more than HTTP."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smoe.artifacts.manifest import File, Manifest
from smoe.runtime import Engine
from smoe.runtime.serve.server import Server, Serving

WAIT = 20.0  # seconds after which something will not come any more
LINE = b"\r\n\r\n"
# Writes calls as Qwen's template does, and is short.
CALLS = "{% for one in messages %}{{ one.content }}{% endfor %}{% if tools %}<tool_call>{% endif %}"


@dataclass
class Reply:
    """What a server said: `body` as JSON where it is."""

    status: int
    headers: dict[str, str]
    body: Any


@dataclass
class Client:
    """Asks the server at `port`."""

    port: int
    headers: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # what the server's log heard

    def ask(self, path: str, body: Any = None, method: str = "", **headers: str) -> Reply:
        """One request; `body` is bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, sent, self.headers | named)
            reply = connection.getresponse()
            raw = reply.read()
        finally:
            connection.close()
        told = {name.lower(): value for name, value in reply.getheaders()}
        is_json = told.get("content-type", "").startswith("application/json")
        return Reply(reply.status, told, json.loads(raw) if is_json else raw.decode())

    def events(self, path: str, body: Any) -> list[Any]:
        """All events of a stream."""
        reply = self.ask(path, body | {"stream": True})
        assert reply.headers["content-type"].startswith("text/event-stream"), reply.body
        blocks = [block for block in reply.body.split("\n\n") if block and block[0] != ":"]
        said = [block.removeprefix("data: ") for block in blocks]
        return [one if one == "[DONE]" else json.loads(one) for one in said]

    def open(self, path: str, body: Any) -> socket.socket:
        """A connection with a request on it that nobody has waited for."""
        sent = json.dumps(body).encode()
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}"
        opened.sendall(head.encode() + LINE + sent)
        return opened

    def raw(self, sent: bytes) -> bytes:
        """What comes back for these bytes until the server is done with them."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT) as opened:
            opened.sendall(sent)
            return opened.recv(1 << 16)

    def metric(self, name: str) -> float:
        """A value of /metrics."""
        page = self.ask("/metrics").body
        lines = [line.split() for line in page.splitlines() if line.startswith(f"{name} ")]
        return float(lines[0][1]) if lines else 0.0  # nothing of it was counted yet

    def busy(self) -> int:
        """Requests that wait, are read or generate."""
        told = self.ask("/health").body
        return told["waiting"] + told["reading"] + told["generating"]


def with_template(bundle: Path, copy: Path, template: str = CALLS) -> Path:
    """A `copy` of a bundle with another chat template."""
    shutil.copytree(bundle, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    content = json.dumps(settings | {"chat_template": template}).encode()
    (copy / "tokenizer_config.json").write_bytes(content)
    manifest = Manifest.parse((copy / "manifest.json").read_text(), "manifest.json")
    one = File(len(content), hashlib.sha256(content).hexdigest())
    files = manifest.files | {"tokenizer_config.json": one}
    (copy / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    return copy


@contextlib.contextmanager
def serving(bundle: Path, requests: int = 4, **how: Any) -> Iterator[Client]:
    """A server of `bundle`, as `Serving` says."""
    said: list[str] = []
    with Engine.open(bundle, context=how.pop("context", 300), requests=requests) as engine:
        told = Serving(how.pop("model", "pico"), port=0, **({"grace": 0.0} | how))
        server = Server(engine, told, said.append)
        thread = threading.Thread(target=server.run_until_closed, args=(False,))
        thread.start()
        try:
            until(lambda: any(line.startswith("serving:") for line in said))
            yield Client(server.port, said=said)
        finally:
            until(lambda: server.close() or not thread.is_alive())
            thread.join(WAIT)
            assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = WAIT) -> float:
    """Wait until something is true; the seconds that took."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() < started + seconds, "it did not come to that"
        time.sleep(0.005)
    return time.monotonic() - started
