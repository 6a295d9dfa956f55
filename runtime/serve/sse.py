"""Server-sent events, and clients that go away: a few lines of ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from smoe.runtime.serve.fields import Json

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
BEAT = b": still at it\n\n"  # a comment, so that nobody takes the silence for the end


class Gone(Exception):
    """The client is not there any more."""


def event(said: Json) -> bytes:
    """One event."""
    return b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled, and `Gone` raised, when the client goes before. The
    request's body has been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        await _cancelled(working, leaving)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """End them, and see to it that they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def stream(send: Send, events: AsyncIterator[bytes], heartbeat: float) -> None:
    """A response of `events`; where none comes for `heartbeat` seconds, a comment does."""
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    clock = _Clock(asyncio.get_running_loop().time())
    beating = asyncio.ensure_future(_beat(send, clock, heartbeat))
    try:
        async for sent in events:
            clock.last = asyncio.get_running_loop().time()
            await send({"type": "http.response.body", "body": sent, "more_body": True})
    finally:
        await _cancelled(beating)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Clock:
    """When something was sent last."""

    def __init__(self, last: float):
        self.last = last


async def _beat(send: Send, clock: _Clock, heartbeat: float) -> None:
    events = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while True:
            await asyncio.sleep(max(0.0, clock.last + heartbeat - events.time()))
            if events.time() - clock.last >= heartbeat:
                clock.last = events.time()
                await send({"type": "http.response.body", "body": BEAT, "more_body": True})
