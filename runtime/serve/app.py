"""The server as one ASGI application: which path is whose, and what becomes of errors."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from smoe.runtime.serve.desk import Desk
from smoe.runtime.serve.door import App, Door, Lock
from smoe.runtime.serve.openai import HEARTBEAT, PATIENCE, OpenAI
from smoe.runtime.serve.refusal import Refusal, broken

PAGE = Path(__file__).with_name("page.html")


def make_app(
    desk: Desk, lock: Lock, heartbeat: float = HEARTBEAT, patience: float = PATIENCE
) -> App:
    """`desk` behind a `lock`. Streams that say nothing for `heartbeat` seconds say so, and a body
    has `patience` seconds to arrive."""
    api = OpenAI(desk, heartbeat, patience)
    posts = {
        "/chat/completions": api.chat,
        "/completions": api.completion,
        "/tokenize": api.tokenize,
    }
    gets = {
        "/models": api.models,
        "/models/{name:path}": api.model,
        "/tokenizer_info": api.tokenizer_info,
        "/residency": api.residency,
        "/health": api.health,
        "/metrics": api.metrics,
        "/openapi.json": api.openapi,
    }
    routes = [Route("/", _page(), methods=["GET"])]
    for prefix in ("/v1", ""):
        routes += [Route(prefix + path, one, methods=["POST"]) for path, one in posts.items()]
        routes += [Route(prefix + path, one, methods=["GET"]) for path, one in gets.items()]
    handlers = {
        Refusal: _refused,
        HTTPException: _unknown,
        ClientDisconnect: _gone,
        Exception: _broken,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # the door takes them off
    return Door(app, lock)


def _page() -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a page that may do what is in it, ask this server, and nothing else."""
    page = PAGE.read_text("utf-8")
    script, style = (_fingerprint(page, name) for name in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src "
        "'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}

    async def told(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return told


def _fingerprint(page: str, element: str) -> str:
    """By which a browser knows that what is in an element is what it was."""
    inside = page.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
    digest = hashlib.sha256(inside.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    close = {"Connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.as_dict(), error.status, error.headers() | close)


async def _unknown(request: Request, error: Exception) -> Response:
    """A path or a method that is not there."""
    assert isinstance(error, HTTPException)
    what = "path" if error.status_code == 404 else "method"
    refusal = Refusal(f"There is no such {what} here; /openapi.json has all.", error.status_code)
    return JSONResponse(refusal.as_dict(), error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _broken(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the log has it."""
    return JSONResponse(broken().as_dict(), 500)
