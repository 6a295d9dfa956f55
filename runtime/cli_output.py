"""What the commands print: text on stdout, all else on stderr."""

from __future__ import annotations

import click

from smoe.artifacts.errors import printable


def show(text: str, end: str = "\n") -> None:
    """Text on stdout. Everything that is printed comes by here or by `say`: bundles are somebody
    else's."""
    click.echo(printable(text) + end, nl=False)


def say(*lines: str) -> None:
    """Lines on stderr."""
    for line in lines:
        click.echo(printable(line), err=True)
