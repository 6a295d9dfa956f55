"""Which experts are resident: pure bookkeeping, no bytes and no clock, so that a simulator can drive the same code."""

from __future__ import annotations

from collections import OrderedDict

Key = tuple[int, int]  # (layer, expert)


class Residency:
    """A pool of `capacity` frames (places for one record each) over all layers, least recently used out first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._free = list(range(capacity))[::-1]
        self._frames: OrderedDict[Key, int] = OrderedDict()  # least recently used first

    def __contains__(self, key: Key) -> bool:
        return key in self._frames

    def __len__(self) -> int:
        return len(self._frames)

    def ensure(self, key: Key) -> tuple[int, bool]:
        """(frame, hit): the frame that holds `key` from now on. On a miss the caller fills it, or calls `forget`."""
        if key in self._frames:
            self._frames.move_to_end(key)
            return self._frames[key], True
        frame = self._free.pop() if self._free else self._frames.popitem(last=False)[1]
        self._frames[key] = frame
        return frame, False

    def forget(self, key: Key) -> None:
        """Give up `key`'s frame: it could not be filled."""
        self._free.append(self._frames.pop(key))
