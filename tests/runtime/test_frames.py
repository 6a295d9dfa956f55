"""Frames: what is in use is there, what is given back is gone, and what cannot be had is said."""

import mmap
import os

import numpy as np
import pytest

from smoe.runtime.cache.frames import Frames
from smoe.runtime.system import aligned


def test_memory_that_is_not_there_is_a_memory_error():
    with pytest.raises(MemoryError, match="bytes: "):
        aligned(1, 1 << 60)


def _resident(rows: np.ndarray) -> int:
    """Bytes of `rows` that take memory, by what the system says of the mapping."""
    start = rows.ctypes.data
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(start // mmap.PAGESIZE * 8)
        entries = np.frombuffer(pages.read(rows.nbytes // mmap.PAGESIZE * 8), np.uint64)
    return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE


@pytest.mark.skipif(
    not os.path.exists("/proc/self/pagemap"),
    reason="this system does not say which pages are resident",
)
def test_frames_take_memory_only_as_far_as_they_are_in_use():
    page = mmap.PAGESIZE
    frames = Frames(5, 8 * page, most=12 * page)
    assert _resident(frames.rows) == 0
    for used in ([8, 0, 4, 0, 0], [2, 0, 4, 6, 0], [2, 8, 0, 0, 1], [0, 0, 0, 0, 0]):
        frames.trim(np.array(used) * page)
        for frame, pages in enumerate(used):
            frames.rows[frame, : pages * page] = frame + 1
        assert _resident(frames.rows) == sum(used) * page
        assert all((frames.rows[f, : n * page] == f + 1).all() for f, n in enumerate(used))


def test_what_is_given_back_never_reaches_into_the_next_frame():
    nbytes = 3 * mmap.PAGESIZE // 2  # no whole number of pages
    frames = Frames(3, nbytes, most=3 * nbytes)
    frames.trim(np.array([nbytes] * 3))
    frames.rows[:] = 7
    for first in (mmap.PAGESIZE // 2, mmap.PAGESIZE, 0):
        frames.trim(np.array([first, nbytes, nbytes]))
        assert (frames.rows[0, :first] == 7).all() and (frames.rows[1:] == 7).all()


def test_frames_that_are_all_in_use_keep_their_pages():
    frames = Frames(3, 2 * mmap.PAGESIZE)
    frames.rows[:] = 7
    frames.trim(np.array([1, 0, 0]))  # of records: not to be taken for bytes
    assert (frames.rows == 7).all()


@pytest.mark.skipif(
    not os.path.exists("/proc/self/pagemap"),
    reason="this system does not say which pages are resident",
)
def test_frames_that_are_lent_take_no_memory():
    nbytes = 4 * mmap.PAGESIZE
    frames = Frames(3, nbytes)
    for _ in range(2):
        frames.rows[:] = 7
        frames.release(np.array([nbytes, 0, nbytes]))
        assert _resident(frames.rows) == 2 * nbytes
        assert (frames.rows[[0, 2]] == 7).all()
