"""What all commands of `smoe-prep` share: how a result is shown."""

from __future__ import annotations

import json
from typing import Protocol

import click

from smoe.artifacts.errors import printable

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)


class Result(Protocol):
    """What a library function gives: for programs, and for people."""

    def as_dict(self) -> dict: ...
    def lines(self) -> list[str]: ...


def show(result: Result, as_json: bool) -> None:
    """Print a result on stdout."""
    show_text(result.as_dict(), "\n".join(result.lines()), as_json)


def show_text(data: dict, text: str, as_json: bool) -> None:
    """Print `data` for programs, or `text` for people."""
    click.echo(json.dumps(data) if as_json else printable(text))
