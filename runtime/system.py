"""What the operating system gives: memory on page boundaries, memory that stays, and the most of it
that there was."""

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


def unpin(array: np.ndarray) -> None:
    """Undo `pin`, if it was: what is pinned cannot be given back."""
    if resource is not None:
        libc = ctypes.CDLL(None)
        libc.munlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))


def trim_heap() -> None:
    """Give the system back what was freed, where the C library keeps it and can be asked to
    (glibc)."""
    trim = None if resource is None else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
