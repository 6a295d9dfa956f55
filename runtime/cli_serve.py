"""`smoe serve`: a bundle behind an endpoint of OpenAI's kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from smoe.runtime.cli_options import engine_options, open_engine
from smoe.runtime.cli_output import say
from smoe.runtime.errors import EngineError
from smoe.runtime.hub import located
from smoe.runtime.text import read_text

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PARTS = ("starlette", "uvicorn", "h11", "prometheus_client", "llguidance")


@click.command()
@engine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option(
    "--api-key",
    metavar="KEY|@FILE",
    help="What clients have to know. Needed where --host is no loopback.",
)
@click.option("--insecure", is_flag=True, help="DANGEROUS. Listen anywhere without a key.")
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="Pages of this origin may ask, like https://chat.example; * is all. Default: none.",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="How many advance together.",
)
@click.option(
    "--held",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Tokens that these hold together. Default: --requests times --context.",
)
@click.option(
    "--waiting",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="How many more may wait; others are told to come again.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="What is on its way has so long when a signal ends the server.",
)
@click.option(
    "--prompt-cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="What is kept of prompts goes here when the server ends, and the next one begins with it. "
    "It holds what clients asked.",
)
@click.option("--model-name", help="What clients call the model. Default: the bundle's name.")
def serve(
    bundle: Path,
    host: str,
    port: int,
    api_key: str | None,
    insecure: bool,
    cors: tuple[str, ...],
    waiting: int,
    grace: float,
    prompt_cache: Path | None,
    model_name: str | None,
    **options: Any,
) -> None:
    """Answer clients of OpenAI's API, many at once, and show a page; docs/server.md says what it
    takes. SIGINT or SIGTERM ends it, the second time at once."""
    key = _key(api_key)
    loopback = host in LOOPBACK
    if not loopback and key is None and not insecure:
        raise EngineError(
            f"Anybody who reaches {host} could use this server; give it an --api-key, or say "
            "--insecure."
        )
    if insecure and (loopback or key is not None):
        raise click.UsageError("--insecure has no effect here; leave it out.")
    try:
        from smoe.runtime.serve.door import Lock
        from smoe.runtime.serve.prompt_cache import PromptCache
        from smoe.runtime.serve.server import Server, Serving
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PARTS:
            raise
        raise EngineError(
            f"smoe serve needs {error.name}, which is not installed. Install it with:  pip install "
            "'smoe[serve]'"
        ) from error
    place = located(bundle)
    lock = Lock(key, cors, loopback and key is None)
    cache = None if prompt_cache is None else PromptCache(prompt_cache)
    name = model_name or place.resolve().stem
    serving = Serving(name, host, port, lock, waiting, grace, cache=cache)
    with open_engine(place, options) as engine:
        say(*engine.mode_lines())
        Server(engine, serving, say).run_until_closed()


def _key(given: str | None) -> str | None:
    """A key as it is stated, or of a file."""
    if given is None or not given.startswith("@"):
        key = given
    else:
        key = read_text(Path(given[1:])).strip()
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise EngineError("--api-key is empty, or no line of plain characters; state another one.")
    return key
