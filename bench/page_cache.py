"""Files that are really in the page cache, or really not.

A memory cgroup counts a page of a file where it was touched first, so what another process holds is
free inside. Drop the files of a run before it, those of its libraries too (`libraries`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

PAGE = mmap.PAGESIZE


def files_under(path: Path) -> list[Path]:
    """A file, or all files of a directory."""
    return sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    return sum(file.stat().st_size for file in files_under(path))


def libraries(*modules: str) -> list[Path]:
    """The shared libraries of installed packages, which may be dropped too."""
    specs = [spec for spec in map(importlib.util.find_spec, modules) if spec]
    folders = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
    folders += [folder.with_name(folder.name + ".libs") for folder in folders]
    return [file for folder in folders if folder.is_dir() for file in folder.rglob("*.so*")]


def drop(files: Iterable[Path]) -> int:
    """Take files out of the page cache, after writing what was not yet on disk; the bytes that
    stayed, because another process has them mapped."""
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
    for file in files_under(path):
        with open(file, "rb") as opened:
            while opened.read(16 << 20):
                pass
    return sum(resident(file) for file in files_under(path))


def read_ahead(file: Path) -> int:
    """Bytes that the kernel reads around a page fault in a file, at most; 0 where it does not
    say."""
    device = file.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(setting.read_text()) * 1024 if setting.exists() else 0


def resident(file: Path) -> int:
    """How many bytes of a file are in the page cache."""
    nbytes = file.stat().st_size
    if not nbytes:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_ubyte * -(-nbytes // PAGE))()
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), nbytes, mmap.MAP_PRIVATE) as mapped,
    ):
        start = (ctypes.c_char * nbytes).from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(start))
        failed = libc.mincore(address, ctypes.c_size_t(nbytes), pages)
        del start  # or the mapping cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {file}")
    return sum(page & 1 for page in bytes(pages)) * PAGE
