"""`smoe`: what the command line says becomes a call, what it returns is printed. Errors are one
sentence, exit code 1."""

from __future__ import annotations

import sys

from smoe.artifacts import SmoeError
from smoe.artifacts.errors import printable


def main() -> None:
    """The command `smoe`."""
    from smoe.runtime.cli import cli

    try:
        cli(prog_name="smoe")
    except (SmoeError, OSError) as error:
        print(printable(f"smoe: {error}"), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
