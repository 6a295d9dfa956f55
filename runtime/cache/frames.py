"""The memory that records are read into: rows of one mapping, on page boundaries, given back as far
as they are not used."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import numpy as np

from smoe.runtime.system import aligned


class Frames:
    """`count` frames of `nbytes` each: `rows` uint8 `[count, nbytes]`.

    If no more than `most` bytes of them are in use at once, they take memory only as far as they
    are, so there may be more of them than fit."""

    def __init__(self, count: int, nbytes: int, most: int | None = None):
        if most is not None:
            aligned(1, most)  # where the system would not give that, it says so here
        self.rows = aligned(count, nbytes, reserve=most is None)
        self._used = np.zeros(count, np.int64)
        self._trims, self._advise = most is not None, _madvise()
        if self._trims and self._advise:
            self._advise(self.rows.ctypes.data, self.rows.nbytes, mmap.MADV_NOHUGEPAGE)

    def trim(self, nbytes: np.ndarray) -> None:
        """Of each frame only so many bytes are in use now: give the others back to the system,
        where there may be more frames than fit. What a frame will hold from now on counts as
        used."""
        if self._trims:
            self._give_back(nbytes)

    def release(self, nbytes: np.ndarray) -> None:
        """The same wherever there are frames."""
        if not self._trims:
            self._used[:] = self.rows.shape[1]  # nobody kept count
        self._give_back(nbytes)

    def _give_back(self, nbytes: np.ndarray) -> None:
        if self._advise is None:
            return
        for frame in np.flatnonzero(self._used > nbytes).tolist():
            base = self.rows[frame].ctypes.data
            start, end = base + int(nbytes[frame]), base + int(self._used[frame])
            start += -start % mmap.PAGESIZE
            end -= end % mmap.PAGESIZE  # the system would round up, into the next frame
            if end > start:
                self._advise(start, end - start, mmap.MADV_DONTNEED)
        self._used[:] = nbytes


def _madvise() -> Callable[[int, int, int], object] | None:
    """madvise(2), where the system has it."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    libc = ctypes.CDLL(None)
    return lambda address, nbytes, advice: libc.madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice
    )
