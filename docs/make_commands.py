"""Writes docs/commands.md, the help of every command that click knows:  make docs"""

from pathlib import Path

import click

from smoe.prep.cli import cli as prep
from smoe.runtime.cli import cli as runtime

PROGRAMS = {"smoe-prep": prep, "smoe": runtime}
WIDTH = 78  # what click uses on a terminal of 80 columns


def page() -> str:
    """docs/commands.md: what `--help` prints for each command, on a terminal of 80 columns."""
    parts = ["# Commands\n\nWhat `--help` prints; `make docs` writes this page.\n"]
    for program, group in PROGRAMS.items():
        parent = click.Context(
            group, info_name=program, terminal_width=WIDTH, **group.context_settings
        )
        for name, command in group.commands.items():
            context = click.Context(command, info_name=name, parent=parent)
            parts.append(f"## {program} {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "commands.md").write_text(page(), "utf-8")
