"""Memory: what is in use is there, what is given back is gone, and what cannot be had is said."""

import mmap
import os

import numpy as np
import pytest

from smoe.runtime.system import Places, aligned


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
def test_places_take_memory_only_as_far_as_they_are_in_use():
    page = mmap.PAGESIZE
    places = Places(5, 8 * page, most=12 * page)
    assert _resident(places.rows) == 0
    for held in ([8, 0, 4, 0, 0], [2, 0, 4, 6, 0], [2, 8, 0, 0, 1], [0, 0, 0, 0, 0]):
        places.keep(np.array(held) * page)
        for place, pages in enumerate(held):
            places.rows[place, : pages * page] = place + 1
        assert _resident(places.rows) == sum(held) * page
        assert all((places.rows[p, : n * page] == p + 1).all() for p, n in enumerate(held))


def test_what_is_given_back_never_reaches_into_the_next_place():
    nbytes = 3 * mmap.PAGESIZE // 2  # no whole number of pages
    places = Places(3, nbytes, most=3 * nbytes)
    places.keep(np.array([nbytes] * 3))
    places.rows[:] = 7
    for first in (mmap.PAGESIZE // 2, mmap.PAGESIZE, 0):
        places.keep(np.array([first, nbytes, nbytes]))
        assert (places.rows[0, :first] == 7).all() and (places.rows[1:] == 7).all()


def test_places_that_are_all_in_use_keep_their_pages():
    places = Places(3, 2 * mmap.PAGESIZE)
    places.rows[:] = 7
    places.keep(np.array([1, 0, 0]))  # of records: not to be taken for bytes
    assert (places.rows == 7).all()
