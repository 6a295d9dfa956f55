"""Writes docs/commands.md from what the commands print:  make docs"""

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "smoe.prep": ("smoe-prep", "build inspect profile pack export verify simulate plan"),
    "smoe.runtime": ("smoe", "run chat bench info verify"),
}


def main() -> None:
    parts = ["# Commands\n\nWhat `--help` prints; `make docs` writes this page.\n"]
    for module, (name, commands) in COMMANDS.items():
        for command in commands.split():
            done = subprocess.run(
                [sys.executable, "-m", module, command, "--help"],
                capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"},
            )  # fmt: skip
            parts.append(f"## {name} {command}\n\n```\n{done.stdout.rstrip()}\n```\n")
    (Path(__file__).parent / "commands.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
