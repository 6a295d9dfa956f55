"""What all benches share: options, turns, processes of their own, tables, and the record of a run.

    @bench(BUNDLE, rounds(3), option("--loss", type=float, default=0.01, help="nats per token"))
    def prices(run: Run) -> Rows:
        "What a loss budget buys."
        yield Table("prices", {"--loss": "{}", "tok/s": "{:.1f}"}, [[0.01, 52.3]])

A table carries its numbers as they were measured and says how each column is printed, so that the
Markdown on the screen and in the documents come from the same record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import cgroup, page_cache

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PACKAGES = ("smoe", "numpy", "onnxruntime", "torch", "transformers", "llama_cpp_python")


class Run(argparse.Namespace):
    """One run of a bench: what the command line said, by the options' names."""


@dataclass(frozen=True)
class Table:
    """`columns` gives each column's name and how `str.format` prints its values: a value that is a
    list fills several fields of one format, a text stands as it is, and None is an empty cell."""

    name: str
    columns: dict[str, str]
    rows: list[list[Any]]
    title: str = ""
    printed: bool = True  # or only in the record

    def markdown(self) -> str:
        formats = list(self.columns.values())
        lines = [list(self.columns), ["---"] * len(formats)]
        lines += [[cell(f, v) for f, v in zip(formats, row, strict=True)] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


Rows = Iterator[Table]


def cell(template: str, value: Any) -> str:
    """One value as its column prints it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "/").replace("\n", " ")
    return template.format(*value) if isinstance(value, list | tuple) else template.format(value)


# -- declaring a bench -----------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option of a bench, as argparse takes it."""

    flags: tuple[str, ...]
    settings: dict[str, Any]


def option(*flags: str, **settings: Any) -> Option:
    return Option(flags, settings)


@dataclass(frozen=True)
class Bench:
    """A bench by name: the function, its options, and whether it is a long check (`python -m bench
    soak NAME`)."""

    name: str
    run: Callable[[Run], Rows]
    options: tuple[Option, ...]
    soak: bool

    @property
    def line(self) -> str:
        """What it answers, in one line."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


BENCHES: dict[str, Bench] = {}


def bench(
    *options: Option, soak: bool = False
) -> Callable[[Callable[[Run], Rows]], Callable[[Run], Rows]]:
    """Register the function under its name."""

    def register(function: Callable[[Run], Rows]) -> Callable[[Run], Rows]:
        name = function.__name__
        BENCHES[name] = Bench(name=name, run=function, options=options, soak=soak)
        return function

    return register


# -- measuring -------------------------------------------------------------------------


def interleave(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What each way returned in each round. Every round starts with another way, so that none is
    always first."""
    results: dict[str, list[Any]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            note(f"round {turn + 1} of {rounds}: {name}")
            results[name].append(ways[name]())
    return results


@dataclass(frozen=True)
class Spread:
    """The median of some values, and the smallest and largest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def child_command(function: str, arguments: Mapping[str, Any]) -> list[str]:
    """The command that calls "module:function" of this folder in a process of its own."""
    return [sys.executable, "-m", "bench.child", function, json.dumps(arguments, default=str)]


def child_environment(site: Path | None = None) -> dict[str, str]:
    """This environment, with the smoe that is installed in the folder `site` before any other."""
    paths = [str(site.resolve()) if site else "", os.environ.get("PYTHONPATH", ""), str(ROOT)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def child_result(out: str) -> Any:
    """What the function returned: the last line of the process's output."""
    return json.loads(out.splitlines()[-1])


class ChildFailed(SystemExit):
    """A process of a bench that failed; `why` is its last word."""

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


def child(
    function: str, site: Path | None = None, seconds: float | None = None, **arguments: Any
) -> Any:
    """What "module:function" of this folder returns in a fresh process, with the smoe of `site`.
    Plain values only. A process that fails, or is not done in so many `seconds`, ends the bench
    after what it wrote, unless somebody goes on (`ChildFailed`)."""
    try:
        done = subprocess.run(
            child_command(function, arguments),
            capture_output=True, text=True, env=child_environment(site), timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        late = f"not done in {seconds:.0f} s"
        raise ChildFailed(f"{function} was {late}.", late) from error
    if done.returncode:
        note(done.stderr)
        why = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        said = f"{function} ended with {done.returncode}; above is what it said."
        raise ChildFailed(said, why[:200])
    return child_result(done.stdout)


def child_within(limit: int, function: str, **arguments: Any) -> Any:
    """The same in a memory cgroup of so many bytes, with the files of the argument `bundle` dropped
    from the page cache before."""
    page_cache.drop(page_cache.files_under(Path(arguments["bundle"])))
    with cgroup.Group(function.partition(":")[0], limit=limit) as group:
        done = group.run(child_command(function, arguments), env=child_environment())
    if done.code:
        note(done.err)
        raise SystemExit(f"{function} in {limit >> 20} MiB ended with {done.code}.")
    return child_result(done.out)


def note(*lines: str) -> None:
    """Progress, on stderr."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


# -- the record of a run ---------------------------------------------------------------


@dataclass
class Record:
    """What a run found, and all that is needed to run it again."""

    bench: str
    command: str
    date: str
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]
    tables: list[Table] = field(default_factory=list)
    note: str = ""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n", "utf-8")

    def table(self, name: str) -> Table:
        """A `KeyError` names the tables there are."""
        tables = {table.name: table for table in self.tables}
        if name not in tables:
            raise KeyError(f"There is no table {name!r}; there are {', '.join(tables)}.")
        return tables[name]


def read_record(path: Path) -> Record:
    data = json.loads(path.read_text("utf-8"))
    data["tables"] = [Table(**table) for table in data["tables"]]
    return Record(**data)


def new_record(bench: str, arguments: Sequence[str]) -> Record:
    """The record of a run that starts now, here, without tables yet."""
    return Record(
        bench=bench,
        command=" ".join(["python -m bench", *arguments]),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        commit=commit(),
        machine=machine(),
        versions=versions(),
    )


def commit() -> str:
    """The commit of this checkout, with a plus where files differ from it; "" where there is no
    checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
        return done.stdout.strip() if not done.returncode else ""

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short", "HEAD") + changed


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, and system."""
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(memory[0].split()[1]) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed
