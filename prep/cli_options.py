"""What commands of `smoe-prep` share: options, and how a result is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import click

from smoe.artifacts.errors import printable
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe

SEED = Calibration("").seed

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)

model_argument = click.argument("model", type=click.Path(path_type=Path))
device_option = click.option(
    "--device",
    default=Recipe().device,
    show_default=True,
    help="What text runs on, as torch names it: cpu, or cuda. Another one gives other bytes.",
)


def calibration_options(required: bool) -> Callable:
    """The text of a command, how much of it, and the seed."""

    options = (
        click.option(
            "--calibration",
            metavar="SOURCE",
            required=required,
            help="Text or conversations: .txt, .jsonl, .json or .parquet (.gz and .zst too), a "
            "directory of them, or a data set name[subset](split):n, of which n are fetched.",
        ),
        click.option(
            "--tokens", type=int, help="How many tokens to use. Default: 65536, or all there are."
        ),
        click.option(
            "--seed",
            type=int,
            default=SEED,
            show_default=True,
            help="Order of documents, samples, and what the model writes itself.",
        ),
    )

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


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
