"""Little memory on purpose: processes inside a memory cgroup, and files that are really not in the page cache.

    with Group("bench", limit=500 << 20) as group:
        left = drop(files)                     # bytes that stayed in memory in spite of it
        done = group.run([sys.executable, "child.py"])
        print(done.seconds, done.peak, done.killed)

Notable: a cgroup counts a page of a file where it was touched first, so what another process holds is free in here. Drop
the files of a run before it, those of its libraries too (`libraries`). Swap would count apart; `unavailable` refuses it.
This is cgroup version 1, and needs root; it knows nothing of version 2 (where memory.max and memory.peak are).
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import resource
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path("/sys/fs/cgroup/memory")
PAGE = mmap.PAGESIZE


def unavailable() -> str | None:
    """Why processes cannot be limited here, as a sentence; None if they can."""
    if not (ROOT / "memory.limit_in_bytes").exists():
        return f"There is no memory cgroup of version 1 at {ROOT}."
    if not os.access(ROOT, os.W_OK):
        return f"{ROOT} cannot be written to; run this as root."
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        return "There is swap, which a memory cgroup does not bound; switch it off (swapoff -a)."
    return None


@dataclass(frozen=True)
class Outcome:
    """What became of a process. `peak` is the most bytes that were counted at once, `full` how often the limit was
    met (mostly: pages of files gave way), `faults` how many page faults waited for a disk."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    full: int
    faults: int
    killed: bool  # because there was no memory left


class Group:
    """A memory cgroup of our own, removed at the end of the `with`; `limit` bytes, or none."""

    def __init__(self, name: str, limit: int | None = None):
        self.path, self.limit = ROOT / f"smoe-{name}-{os.getpid()}", limit

    def __enter__(self) -> Group:
        self.path.mkdir()
        if self.limit is not None:
            self._write("memory.limit_in_bytes", self.limit)
        return self

    def __exit__(self, *_: object) -> None:
        self.path.rmdir()

    def run(self, command: list[str], timeout: float | None = None, **popen) -> Outcome:
        """Run a command that is inside from its first instruction on. After `timeout` seconds it is killed, and the
        exit code is -9 without `killed`."""
        self._write(
            "memory.force_empty", 0
        )  # pages of a run before, which this one would find for nothing
        self._write("memory.max_usage_in_bytes", 0)
        full, kills = self._read("memory.failcnt"), self._kills()
        faults, started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_majflt, time.monotonic()
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | popen
        with subprocess.Popen([*enter, *command], **pipes) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
        return Outcome(
            process.returncode, out or "", err or "", time.monotonic() - started,
            self._read("memory.max_usage_in_bytes"), self._read("memory.failcnt") - full,
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_majflt - faults, self._kills() > kills,
        )  # fmt: skip

    def _read(self, name: str) -> int:
        return int((self.path / name).read_text())

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def _kills(self) -> int:
        pairs = (
            line.split() for line in (self.path / "memory.oom_control").read_text().splitlines()
        )
        return int(dict(pairs)["oom_kill"])


def files_of(path: Path) -> list[Path]:
    """A file, or all files of a directory."""
    return sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    return sum(file.stat().st_size for file in files_of(path))


def libraries(*modules: str) -> list[Path]:
    """The shared libraries of installed packages, which may be dropped too."""
    found = (importlib.util.find_spec(module) for module in modules)
    folders = (
        Path(folder) for spec in found if spec for folder in spec.submodule_search_locations or ()
    )
    beside = (
        f
        for folder in folders
        for f in (folder, folder.with_name(folder.name + ".libs"))
        if f.is_dir()
    )
    return [f for folder in beside for f in folder.rglob("*.so*")]


def drop(files: Iterable[Path]) -> int:
    """Take files out of the page cache, after writing what was not yet on disk; the bytes that stayed, because another
    process has them mapped."""
    files = list(files)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return sum(resident(file) for file in files)


def fetch(path: Path) -> int:
    """Read all of a model, so that it is in the page cache; the bytes that are."""
    for file in files_of(path):
        with open(file, "rb") as opened:
            while opened.read(16 << 20):
                pass
    return sum(resident(file) for file in files_of(path))


def read_ahead(file: Path) -> int:
    """Bytes that the kernel reads around a page fault in a file, at most; 0 where it does not say."""
    device = file.stat().st_dev
    said = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(said.read_text()) * 1024 if said.exists() else 0


def resident(file: Path) -> int:
    """How many bytes of a file are in the page cache."""
    size = file.stat().st_size
    if not size:
        return 0
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as mapped,
    ):
        pages = np.zeros(-(-size // PAGE), np.uint8)
        start = np.frombuffer(mapped, np.uint8)
        failed = _libc().mincore(start.ctypes.data, size, pages.ctypes.data)
        del start  # or the mapping cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {file}")
    return int(np.count_nonzero(pages & 1)) * PAGE


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return libc
