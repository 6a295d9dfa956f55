"""The server in a process: an engine, its loop, the door and uvicorn, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.serve.app import make_app
from smoe.runtime.serve.bodies import MOST_PROMPTS
from smoe.runtime.serve.desk import Desk
from smoe.runtime.serve.door import Lock
from smoe.runtime.serve.loop import Loop
from smoe.runtime.serve.openai import HEARTBEAT, PATIENCE
from smoe.runtime.serve.prompt_cache import PromptCache

HEADERS = 10.0  # seconds for the headers of a request
CONNECTIONS = 1024
GRACE = 10.0  # seconds for what is on its way when a signal comes
BACKLOG = 128


@dataclass(frozen=True)
class Serving:
    """Where and how: up to `waiting` requests beside those that advance. Times are in seconds, and
    as they say in `server`, `app` and `desk`. What prompts begin with outlives it in `cache`."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8080
    lock: Lock = field(default_factory=Lock)
    waiting: int = 64
    grace: float = GRACE
    heartbeat: float = HEARTBEAT
    patience: float = PATIENCE
    cache: PromptCache | None = None


class Server:
    """`Serving` of an `engine`; `log` hears what happens. `close` ends it, from any thread."""

    def __init__(self, engine: Engine, serving: Serving, log: Callable[..., None]):
        self._engine, self._serving, self._log = engine, serving, log
        self._events: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._server: _Uvicorn | None = None
        self.port = serving.port

    def run_until_closed(self, signals: bool = True) -> None:
        """Serve, until `close` or, in the main thread, one of the usual `signals`."""
        serving = self._serving
        with listening(serving.host, serving.port) as socket_:
            self.port = socket_.getsockname()[1]
            host = f"[{serving.host}]" if ":" in serving.host else serving.host
            key = "without a key" if serving.lock.key is None else "with a key"
            self._log(f"serving: {serving.model} at http://{host}:{self.port} ({key})")
            # The desk bounds calls; a call may be many prompts, and none has begun when it comes.
            most = serving.waiting + self._engine.plan.requests + MOST_PROMPTS
            with Loop(self._engine, most) as loop:
                if serving.cache:
                    self._log(serving.cache.fill(self._engine, loop.prefixes))
                loop.start()
                asyncio.run(self._serve(loop, socket_, signals))
            if serving.cache:
                self._log(serving.cache.store(self._engine, loop.prefixes))

    async def _serve(self, loop: Loop, socket_: socket.socket, signals: bool) -> None:
        serving = self._serving
        most = serving.waiting + self._engine.plan.requests
        self._desk = Desk(loop, serving.model, most, self._log)
        app = make_app(self._desk, serving.lock, serving.heartbeat, serving.patience)
        self._server = _Uvicorn(_config(app, serving))
        self._events = asyncio.get_running_loop()
        if signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._events.add_signal_handler(number, self._leave)
        await self._server.serve([socket_])

    def close(self) -> bool:
        """New requests are refused, those on their way have the time of grace. Whether it runs."""
        if self._events is None or self._events.is_closed():
            return False
        self._events.call_soon_threadsafe(self._leave)
        return True

    def _leave(self) -> None:
        """The second time at once."""
        assert self._server is not None
        if self._leaving is not None:
            self._server.force_exit = True
            return
        self._log("shutting down")
        self._server.should_exit = True
        self._leaving = asyncio.ensure_future(self._desk.close(self._serving.grace))


class _Uvicorn(uvicorn.Server):
    """Hears no signals: `Server` does, while streams can still be told."""

    def capture_signals(self) -> Any:
        """None."""
        return contextlib.nullcontext()


class Patient(H11Protocol):
    """A connection whose requests have so many seconds for their headers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and has said nothing yet."""
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(HEADERS, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; an `EngineError` where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"{host}:{port} cannot be listened at ({error}); name another --host or --port."
        ) from error


def _config(app: Any, serving: Serving) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(serving.grace) + 5,
    )
