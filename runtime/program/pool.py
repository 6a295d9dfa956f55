"""Blocks of memory for what sequences remember, and who uses them."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from smoe.runtime.system import aligned

SLAB = 2 << 20  # bytes that are asked of the system at once, or those of one block


class BlockPool:
    """Blocks of `nbytes`, known by their addresses, for all states of an executable: those that
    nobody uses any more serve the next. Thread-safe."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self._lock = threading.Lock()
        self._slabs: tuple[np.ndarray, ...] = ()  # uint8 [bytes], by rising address
        self._free: list[int] = []
        self._users: dict[int, int] = {}
        # rows of tables that are gone; a collector may add to them within any other call
        self._left: deque[np.ndarray] = deque()

    @property
    def used(self) -> int:
        """How many blocks somebody uses."""
        with self._lock:
            self._collect()
            return len(self._users)

    def take(self) -> int:
        """A block with one user, whatever is in it. A `MemoryError` if the system has none."""
        with self._lock:
            self._collect()
            if not self._free:
                self._grow()
            address = self._free.pop()
            self._users[address] = 1
            return address

    def share(self, addresses: Iterable[int]) -> None:
        """One user more of each; 0 is no block."""
        with self._lock:
            for address in addresses:
                if address:
                    self._users[address] += 1

    def release(self, addresses: Iterable[int]) -> None:
        """One user less."""
        with self._lock:
            self._release(addresses)

    def leave(self, row: np.ndarray) -> None:
        """The same of a table's row, int64, some time: it takes no lock."""
        self._left.append(row)

    def own(self, address: int) -> int:
        """The block itself if it has one user; else that user's copy of it."""
        with self._lock:
            self._collect()
            if self._users[address] == 1:
                return address
        copy = self.take()
        self.view(copy)[:] = self.view(address)
        self.release([address])
        return copy

    def view(self, address: int) -> np.ndarray:
        """The bytes of a block, uint8 `[nbytes]`."""
        slabs = self._slabs
        slab = slabs[bisect_right(slabs, address, key=_start) - 1]
        offset = address - _start(slab)
        return slab[offset : offset + self.nbytes]

    def _collect(self) -> None:
        while self._left:
            self._release(self._left.popleft().tolist())

    def _release(self, addresses: Iterable[int]) -> None:
        for address in addresses:
            if not address:
                continue
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
                self._free.append(address)

    def _grow(self) -> None:
        count = max(1, SLAB // self.nbytes)
        slab: np.ndarray = aligned(1, count * self.nbytes)[0]
        self._slabs = tuple(sorted((*self._slabs, slab), key=_start))
        self._free += range(_start(slab), _start(slab) + count * self.nbytes, self.nbytes)[::-1]


def _start(slab: np.ndarray) -> int:
    return slab.ctypes.data


class BlockTable:
    """Which blocks are used for what: `addresses` int64 `[pools, blocks]`, row i of pool i, 0 where
    there is none. What is in it when it is gone is left to the pools."""

    def __init__(self, pools: Sequence[BlockPool], blocks: int):
        self.pools = tuple(pools)
        self.addresses = np.zeros((len(self.pools), blocks), np.int64)

    def shared(self, firsts: Sequence[int], end: int) -> BlockTable:
        """Another one that uses the blocks `firsts[i]` to `end` of row i too."""
        other = BlockTable(self.pools, self.addresses.shape[1])
        for row, mine, pool, first in zip(
            other.addresses, self.addresses, self.pools, firsts, strict=True
        ):
            pool.share(mine[first:end].tolist())
            row[first:end] = mine[first:end]
        return other

    def clear(self, row: int, first: int, end: int) -> None:
        """Use these blocks no more."""
        some = self.addresses[row, first:end]
        if some.any():
            self.pools[row].release(some.tolist())
            some[:] = 0

    def __del__(self) -> None:
        for row, pool in zip(self.addresses, self.pools, strict=True):
            pool.leave(row)
