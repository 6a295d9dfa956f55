"""python -m bench [soak] NAME [OPTIONS] [--json FILE]; without a name: what there is."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from bench.harness import BENCHES, Bench, Run, new_record
from bench.tables import rewrite
from smoe.artifacts import SmoeError

MODULES = (
    "policies", "micro", "prep", "quality", "large", "backbones", "memory", "outofcore", "decoding",
    "contexts", "state", "families", "lengths", "sidebyside", "prompts", "opening", "models",
    "packing", "gpu", "pictures", "carried", "planes", "bits", "drafts", "rows", "evals", "shadow",
    "requests", "serving", "soak",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    for module in MODULES:
        importlib.import_module(f"bench.{module}")
    soak = arguments[:1] == ["soak"]
    names = arguments[1:] if soak else arguments
    if names == ["tables"] and not soak:
        for line in rewrite():
            print(line)
        return 0
    known = {name: bench for name, bench in BENCHES.items() if bench.soak == soak}
    if not names or names[0] not in known:
        print(listing())
        return 0 if not names or names[0] in ("-h", "--help") else 2
    try:
        run_bench(known[names[0]], names[1:], arguments)
    except SmoeError as error:
        raise SystemExit(f"Error: {error}") from error
    return 0


def listing() -> str:
    """Every bench with its line."""

    def lines(benches: list[Bench]) -> list[str]:
        return [f"  {bench.name:12} {bench.line}" for bench in benches]

    return "\n".join([
        "python -m bench NAME [OPTIONS] [--json FILE]   (--help after a name: its options)",
        *lines([bench for bench in BENCHES.values() if not bench.soak]),
        f"  {'tables':12} Rewrite the marked tables of README.md and docs/ from docs/figures.",
        "python -m bench soak NAME   the long checks, of which the tests run a tenth",
        *lines([bench for bench in BENCHES.values() if bench.soak]),
    ])  # fmt: skip


def run_bench(bench: Bench, arguments: list[str], command: list[str]) -> None:
    """Run a bench: every table on the screen as soon as it is there, and all in the record."""
    run = _parser(bench).parse_args(arguments, namespace=Run())
    record = new_record(bench.name, command)
    for table in bench.run(run):
        record.tables.append(table)
        if table.printed:
            print(f"\n{table.title or table.name}\n\n{table.markdown()}", flush=True)
        if run.json:
            record.write(run.json)


def _parser(bench: Bench) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {'soak ' if bench.soak else ''}{bench.name}",
        description=bench.run.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option in bench.options:
        parser.add_argument(*option.flags, **option.settings)
    parser.add_argument("--json", type=Path, help="write the record of the run here")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
