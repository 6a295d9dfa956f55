"""Who comes in: plain ASGI before all else.

A server on a desk is asked by every page that a browser there has open. So a name that is not this
host's is refused where no key guards it (a page may point a name of its own at this machine), and
so is a page of another origin, unless it was named. Keys are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from smoe.runtime.serve.refusal import Refusal
from smoe.runtime.serve.sse import Receive, Send

App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
BODY = 8 << 20  # bytes of a request
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/", "/health")  # without a key
PREFLIGHT = "authorization, content-type"
SAFE = [(b"x-content-type-options", b"nosniff")]


@dataclass(frozen=True)
class Lock:
    """`key` (None: there is none), `origins` of pages that may ask ("*": all), and whether only
    the names of the `loopback` are answered to."""

    key: str | None = None
    origins: tuple[str, ...] = ()
    loopback: bool = True


class Door:
    """`app` behind a `lock`."""

    def __init__(self, app: App, lock: Lock):
        self._app, self._lock = app, lock
        self._key = None if lock.key is None else _digest(lock.key.encode())

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        origin = headers.get("origin")
        extra = list(SAFE)
        try:
            self._check_host(headers)
            if origin is not None and self._foreign(origin, headers):
                extra += self._cors(origin)
            if scope["method"] == "OPTIONS":
                await _answer(send, 204, extra + _preflight(headers))
                return
            scope["path"] = _path(scope["path"])
            self._check_key(scope["path"], headers)
            _check_body(headers)
        except Refusal as refusal:
            await refuse(send, refusal, extra)
            return

        async def told(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self._app(scope, receive, told)

    def _check_host(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self._lock.loopback and _name(host) not in LOOPBACK:
            raise Refusal(
                "This server answers to localhost only; give it --api-key, with which it answers "
                "to every name.",
                403,
            )

    def _foreign(self, origin: str, headers: dict[str, str]) -> bool:
        """Whether a page of somebody else's asks."""
        scheme, _, where = origin.partition("://")
        return scheme not in ("http", "https") or where != headers.get("host")

    def _cors(self, origin: str) -> list[tuple[bytes, bytes]]:
        allowed = self._lock.origins
        if "*" not in allowed and origin not in allowed:
            raise Refusal(
                "Pages of other origins may not ask here; start the server with --cors ORIGIN for "
                "this one.",
                403,
            )
        named = b"*" if "*" in allowed else origin.encode("latin-1")
        return [(b"access-control-allow-origin", named), (b"vary", b"origin")]

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        if self._key is None or path in OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key)
        if scheme.lower() != "bearer" or not right:
            raise Refusal(
                "The key is missing or wrong; send it as Authorization: Bearer KEY.",
                401,
                code="invalid_api_key",
            )


async def refuse(send: Send, refusal: Refusal, extra: list[tuple[bytes, bytes]]) -> None:
    """An answer to what is not read, and may not be what it says: the connection ends with it."""
    named = refusal.headers().items()
    headers = [(name.lower().encode(), value.encode()) for name, value in named]
    headers += [(b"content-type", b"application/json"), (b"connection", b"close"), *extra]
    await _answer(send, refusal.status, headers, json.dumps(refusal.as_dict()).encode())


async def _answer(
    send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes = b""
) -> None:
    length = [] if status == 204 else [(b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": status, "headers": [*headers, *length]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _preflight(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    asked = headers.get("access-control-request-headers", PREFLIGHT)
    return [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", asked.encode("latin-1")),
        (b"access-control-max-age", b"600"),
    ]


def _check_body(headers: dict[str, str]) -> None:
    """What the headers say of a body."""
    length = headers.get("content-length", "0")
    if "content-length" in headers and "transfer-encoding" in headers:
        raise Refusal("A body has either a Content-Length or a Transfer-Encoding.", 400)
    if not length.isdecimal() or int(length) > BODY:
        raise Refusal(f"The body is longer than {BODY} bytes; shorten it.", 413)


def _path(path: str) -> str:
    """Without a slash at its end."""
    return path.rstrip("/") or "/"


def _name(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _digest(key: bytes) -> bytes:
    """Of a constant length, whatever is guessed."""
    return hashlib.sha256(key).digest()
