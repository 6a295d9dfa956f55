"""Which experts are resident: pure bookkeeping, no bytes and no clock, so that a simulator can drive the same code."""

from __future__ import annotations

from collections import OrderedDict

Key = tuple[int, int]  # (layer, expert)


class Residency:
    """A pool of `capacity` slots over all layers, least recently used out first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._free = list(range(capacity))[::-1]
        self._slots: OrderedDict[Key, int] = OrderedDict()  # least recently used first

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def ensure(self, key: Key) -> tuple[int, bool]:
        """(slot, hit): the slot that holds `key` from now on. On a miss the caller fills it, or calls `forget`."""
        if key in self._slots:
            self._slots.move_to_end(key)
            return self._slots[key], True
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        self._slots[key] = slot
        return slot, False

    def forget(self, key: Key) -> None:
        """Give up `key`'s slot: it could not be filled."""
        self._free.append(self._slots.pop(key))
