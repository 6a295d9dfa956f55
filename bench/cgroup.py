"""Little memory on purpose: processes inside a memory cgroup, of version 1 or 2.

    with Group("bench", limit=500 << 20) as group:
        outcome = group.run([sys.executable, "child.py"])
        print(outcome.seconds, outcome.peak, outcome.killed)

Version 2 wants a group in which no process is, to make others in. The root of the hierarchy is one,
for root; anyone else starts the bench with

    systemd-run --user --scope -p Delegate=yes python -m bench NAME ...

and it moves itself into a group beside those it makes. What cannot be had is said by `unavailable`.
A kernel gives its memory controller to one of the two versions only, so a machine runs one half of
this page.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = "max"
ASIDE = "smoe-bench"  # the group that a bench moves into, so that no process is in the one above


@dataclass(frozen=True)
class Outcome:
    """What became of a process. `peak` is the most bytes that were counted at once, `full` how
    often the limit was met (mostly: pages of files gave way), `faults` how many page faults waited
    for a disk; `killed` because there was no memory left."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    full: int
    faults: int
    killed: bool


class Version1:
    """memory.* of the older hierarchy, where a group may hold processes and groups at once."""

    def __init__(self, root: Path):
        self.root = root

    def refusal(self) -> str | None:
        if not os.access(self.root, os.W_OK):
            return f"{self.root} cannot be written to; run this as root."
        if len(Path("/proc/swaps").read_text().splitlines()) > 1:
            return "There is swap, which the limit does not bound; switch it off (swapoff -a)."
        return None

    def parent(self) -> Path:
        return self.root

    def limit(self, group: Path, limit: int) -> None:
        _write(group / "memory.limit_in_bytes", limit)

    def start_over(self, group: Path) -> None:
        """Give up the pages of a run before, which the next one would find for nothing, and count
        from zero."""
        _write(group / "memory.force_empty", 0)
        _write(group / "memory.max_usage_in_bytes", 0)

    def peak(self, group: Path) -> int:
        return int((group / "memory.max_usage_in_bytes").read_text())

    def full(self, group: Path) -> int:
        return int((group / "memory.failcnt").read_text())

    def kills(self, group: Path) -> int:
        return _pairs(group / "memory.oom_control")["oom_kill"]


class Version2:
    """memory.* of the unified hierarchy, where a group holds processes or groups."""

    def __init__(self, root: Path, own: Path):
        """`root` of the hierarchy, and the group that this process is in."""
        self.root, self.own = root, own.parent if own.name == ASIDE else own

    def refusal(self) -> str | None:
        if "memory" not in _words(self.root / "cgroup.controllers"):
            return f"The memory controller is not in {self.root} (version 1 may have it)."
        if self._is_open(self.root):
            return None
        if not os.access(self.own / "cgroup.subtree_control", os.W_OK):
            return (
                f"{self.own} cannot be written to; run this as root, or inside "
                "systemd-run --user --scope -p Delegate=yes"
            )
        return None

    def parent(self) -> Path:
        if self._is_open(self.root):
            return self.root
        if "memory" not in _words(self.own / "cgroup.subtree_control"):
            aside = self.own / ASIDE
            aside.mkdir(exist_ok=True)
            _write(aside / "cgroup.procs", os.getpid())
            _write(self.own / "cgroup.subtree_control", "+memory")
        return self.own

    def _is_open(self, group: Path) -> bool:
        control = group / "cgroup.subtree_control"
        return os.access(control, os.W_OK) and "memory" in _words(control)

    def limit(self, group: Path, limit: int) -> None:
        _write(group / "memory.max", limit)
        if (group / "memory.swap.max").exists():
            _write(group / "memory.swap.max", 0)

    def start_over(self, group: Path) -> None:
        """A peak cannot be set back on every kernel: an empty group is made anew."""
        limit = (group / "memory.max").read_text().strip()
        group.rmdir()
        group.mkdir()
        if limit != NO_LIMIT:
            self.limit(group, int(limit))

    def peak(self, group: Path) -> int:
        return int((group / "memory.peak").read_text())  # Linux 5.19

    def full(self, group: Path) -> int:
        return _pairs(group / "memory.events")["max"]

    def kills(self, group: Path) -> int:
        return _pairs(group / "memory.events")["oom_kill"]


def versions() -> list[Version1 | Version2]:
    """The hierarchies that are mounted here."""
    mounted: list[Version1 | Version2] = []
    for line in (
        Path("/proc/mounts").read_text().splitlines() if os.path.exists("/proc/mounts") else []
    ):
        _, place, kind, settings, *_ = line.split()
        if kind == "cgroup" and "memory" in settings.split(","):
            mounted.append(Version1(Path(place)))
        if kind == "cgroup2":
            mounted.append(Version2(Path(place), Path(place) / _own_group()))
    return mounted


def unavailable() -> str | None:
    """Why processes cannot be limited here, as a sentence; None if they can."""
    refusals = [version.refusal() for version in versions()]
    if None in refusals:
        return None
    return " ".join(map(str, refusals)) or "There is no memory cgroup here, of either version."


class Group:
    """A memory cgroup of our own, removed at the end of the `with`; `limit` bytes, or none."""

    def __init__(self, name: str, limit: int | None = None):
        usable = [version for version in versions() if version.refusal() is None]
        if not usable:
            raise OSError(unavailable())
        self.version, self.limit = usable[0], limit
        self.path = self.version.parent() / f"smoe-{name}-{os.getpid()}"

    def __enter__(self) -> Group:
        self.path.mkdir()
        if self.limit is not None:
            self.version.limit(self.path, self.limit)
        return self

    def __exit__(self, *_: object) -> None:
        self.path.rmdir()

    def run(
        self, command: list[str], timeout: float | None = None, env: dict[str, str] | None = None
    ) -> Outcome:
        """Run a command that is inside from its first instruction on. After `timeout` seconds it is
        killed, and the exit code is -9 without `killed`."""
        self.version.start_over(self.path)
        full, kills = self.version.full(self.path), self.version.kills(self.path)
        faults, started = _faults(), time.monotonic()
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs")]
        with subprocess.Popen(
            [*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
        return Outcome(
            code=process.returncode,
            out=out,
            err=err,
            seconds=time.monotonic() - started,
            peak=self.version.peak(self.path),
            full=self.version.full(self.path) - full,
            faults=_faults() - faults,
            killed=self.version.kills(self.path) > kills,
        )


def _own_group() -> str:
    """This process's group in the unified hierarchy, without the leading slash."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next((line[4:] for line in lines if line.startswith("0::/")), "")


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_majflt


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def _pairs(file: Path) -> dict[str, int]:
    lines = (line.split() for line in file.read_text().splitlines())
    return {name: int(value) for name, value in lines}


def _write(file: Path, value: int | str) -> None:
    file.write_text(str(value))
