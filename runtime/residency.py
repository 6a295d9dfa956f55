"""Which experts are resident: pure bookkeeping, no bytes and no clock, so that a simulator can drive the same code."""

from __future__ import annotations

from collections import OrderedDict

Key = tuple[int, int]  # (layer, expert)


class Residency:
    """A pool of `capacity` frames (places for one record each) over all layers, least recently used out first.

    A miss takes two calls, with the read between them: until `put`, nothing claims that the record is there, so a read
    that fails or is interrupted leaves no trace.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._free = list(range(capacity))[::-1]
        self._frames: OrderedDict[Key, int] = OrderedDict()  # least recently used first

    def __contains__(self, key: Key) -> bool:
        return key in self._frames

    def __len__(self) -> int:
        return len(self._frames)

    def get(self, key: Key) -> int | None:
        """The frame that holds `key`, which becomes the most recently used; None on a miss."""
        if key not in self._frames:
            return None
        self._frames.move_to_end(key)
        return self._frames[key]

    def reserve(self) -> int:
        """A frame to fill; the least recently used expert goes if none is free. The same one until `put`."""
        if not self._free:
            self._free.append(self._frames.popitem(last=False)[1])
        return self._free[-1]

    def put(self, key: Key) -> None:
        """The reserved frame holds `key` now."""
        self._frames[key] = self._free.pop()
