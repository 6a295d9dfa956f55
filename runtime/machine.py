"""What this machine and its control groups leave to this process: memory and processors.

Both versions of control groups are read where they are mounted, from the process's own group up to
the outermost one that it can see. What the system does not say is None, and the caller says so.
`proc` is where Linux tells of processes, `cpus` of processors."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import resource
except ModuleNotFoundError:  # not a Unix
    resource = None  # type: ignore[assignment]

PROC = Path("/proc")
CPUS = Path("/sys/devices/system/cpu")
# of a group's memory.stat: what cannot be given back, in versions 1 and 2
KEPT = (
    ("total_rss", "total_shmem"),
    ("anon", "shmem", "slab_unreclaimable", "kernel_stack", "pagetables", "percpu", "sock"),
)


@dataclass(frozen=True)
class Room:
    """Bytes that this process may hold in all, by the word of `keeper`."""

    nbytes: int
    keeper: str


@dataclass(frozen=True)
class Processors:
    """How many this process may keep busy, and why not more."""

    count: int
    reason: str


def memory_room(proc: Path = PROC) -> Room | None:
    """What is left to this process, with what it holds already: by its control groups, or by the
    machine if that is less. None where the system does not say."""
    free = _kilobytes(proc / "meminfo", "MemAvailable")
    if free is None:
        return None
    # of this process what cannot be reclaimed
    own = sum(_kilobytes(proc / "self/status", name) or 0 for name in ("RssAnon", "RssShmem"))
    rooms = [Room(free + own, "this machine"), *_group_rooms(own, proc)]
    return min(rooms, key=lambda room: room.nbytes)


def held_memory(proc: Path = PROC) -> int | None:
    """Bytes that this process has resident, anonymous and mapped; where only the most that it ever
    had is known, that. None where nothing is."""
    for file, name in (("smaps_rollup", "Rss"), ("status", "VmRSS")):  # the former to the byte
        held = _kilobytes(proc / "self" / file, name)
        if held is not None:
            return held
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def processors(proc: Path = PROC, cpus: Path = CPUS) -> Processors:
    """By affinity, which a container's set of processors is part of, and by the quotas of control
    groups: a thread beyond them would only wait for the others' time. Processors of one core share
    what multiplies, and count once."""
    every = os.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(every))
    able, cores = len(allowed), len({_siblings(cpus, cpu) for cpu in allowed})
    quota = min(_quotas(proc), default=math.inf)
    if quota < cores:
        count = math.floor(quota + 0.01)  # one thread more than they pay for waits half the time
        return Processors(max(1, count), f"a quota of {quota:.3g} processors")
    shared = f", {cores} cores" if cores < able else ""
    if able < every:
        return Processors(cores, f"allowed {able} of {every} processors{shared}")
    return Processors(cores, f"as many as there are {'cores' if shared else 'processors'}")


def _siblings(cpus: Path, cpu: int) -> str:
    """What names the core of a processor, where the system says; else the processor itself."""
    try:
        return (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _group_rooms(own: int, proc: Path) -> Iterator[Room]:
    """What every memory group above this process leaves it: the limit less what others keep."""
    for folder in _groups("memory", proc):
        limits = [_number(folder / f"memory.{name}") for name in ("limit_in_bytes", "max", "high")]
        known = [limit for limit in limits if limit is not None]
        if known:
            kept = _kept(folder)
            # what was allocated before the process came into the group is not counted there
            yield Room(max(0, min(known) - kept + min(own, kept)), "this container")


def _kept(group: Path) -> int:
    """Bytes of a group that it cannot reclaim, without swap."""
    try:
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        fields = {name: int(value) for name, value in lines}
    except (OSError, ValueError):
        return 0
    first, second = KEPT
    return sum(fields.get(name, 0) for name in (first if first[0] in fields else second))


def _quotas(proc: Path) -> Iterator[float]:
    """Processors that the groups above this process may use, where they are limited."""
    for folder in _groups("cpu", proc):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):  # version 1
            quota, period = (
                str(_number(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period")
            )
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # no "max", no -1
            yield int(quota) / int(period)


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """The folders of this process's groups that may limit `controller`, innermost first."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return
    groups = (line.split(":", 2) for line in lines if line.count(":") >= 2)
    names = {kinds: name for _, kinds, name in groups}
    for mount in (line for line in mounts if " - " in line):
        fields, _, kind = mount.partition(" - ")
        root, place = fields.split()[3:5]
        system, _, settings = kind.split(" ", 2)
        if system == "cgroup2":
            name = names.get("")
        elif system == "cgroup" and controller in settings.split(","):
            name = next((names[n] for n in names if controller in n.split(",")), None)
        else:
            continue
        if name is not None:
            yield from _upwards(Path(_unescaped(place)), _unescaped(root), name)


def _upwards(place: Path, root: str, name: str) -> Iterator[Path]:
    """From the group `name` to the one that is mounted at `place`, which is called `root`."""
    inside = name.removeprefix(root) if root != "/" else name
    folder = place / inside.lstrip("/")
    if ".." not in folder.parts:  # else the group lies outside what is mounted
        while folder != place:
            yield folder
            folder = folder.parent
    yield place


def _unescaped(text: str) -> str:
    r"""mountinfo writes a space as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _kilobytes(file: Path, name: str) -> int | None:
    """Bytes of the line "NAME: 12 kB"."""
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max", or no such file
        return None
