"""What the operating system gives: memory on page boundaries, memory that stays, and how much of it
is left."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np

try:
    import resource
except ModuleNotFoundError:  # not a Unix
    resource = None  # type: ignore[assignment]

NO_RESERVE = (
    0x4000 if sys.platform == "linux" else 0
)  # MAP_NORESERVE on x86-64 and aarch64, which Python's mmap lacks


def aligned(rows: int, nbytes: int, reserve: bool = True) -> np.ndarray:
    """uint8 `[rows, nbytes]` that starts on a page boundary, as reading past the page cache wants
    it; not touched yet. Without `reserve` it may be more than the system has. A `MemoryError` if
    the system does not give it."""
    flags = {}
    if hasattr(mmap, "MAP_PRIVATE"):  # only pages of a private mapping can be given back
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if reserve else NO_RESERVE)}
    try:
        mapping = mmap.mmap(-1, max(1, rows * nbytes), **flags)
    except OSError as error:
        raise MemoryError(f"{rows * nbytes} bytes: {error.strerror}") from error
    return np.frombuffer(mapping, np.uint8, rows * nbytes).reshape(rows, nbytes)


def pin(array: np.ndarray) -> str:
    """Keep `array` from being swapped out; what came of it, for the mode line."""
    if resource is None:
        return "not pinned (this system has no mlock)"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)) == 0:
        return "pinned"
    allowed = "without limit" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:.1f}MiB"
    return f"not pinned ({os.strerror(ctypes.get_errno())}; RLIMIT_MEMLOCK allows {allowed})"


def trim_heap() -> None:
    """Give the system back what was freed, where the C library keeps it and can be asked to
    (glibc)."""
    trim = None if resource is None else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def spare_memory(budget: int) -> int | None:
    """Bytes that this process could still get beside `budget`: of the machine, or of its memory
    cgroup if that is less. None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            free = next(
                int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
            )
    except (OSError, StopIteration, ValueError):
        return None
    return min(free, *_cgroup_rooms(), free) - budget


def _cgroup_rooms() -> list[int]:
    """What the memory cgroups above this process leave it: limit less what is used and cannot be
    reclaimed."""
    rooms = []
    try:
        with open("/proc/self/cgroup") as lines:
            groups = [line.rstrip("\n").split(":", 2) for line in lines]
    except OSError:
        return []
    for _, controllers, name in groups:
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        limit_file = "memory.limit_in_bytes" if controllers else "memory.max"
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            if root not in (folder, *folder.parents):
                break
            limit = _number(folder / limit_file)
            if limit is not None:
                rooms.append(limit - _anonymous(folder))
    return rooms


def _anonymous(group: Path) -> int:
    try:
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_rss", fields.get("anon", 0)))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max", or no such file
        return None


def peak_memory() -> int | None:
    """The most memory that this process has had resident at once, anonymous and mapped. None where
    Linux does not say."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def reset_peak_memory() -> None:
    """Let `peak_memory` start again from what is resident now, where Linux allows that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
