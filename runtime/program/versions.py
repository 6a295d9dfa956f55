"""Recurrent state of a sequence, at the lengths for which it is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from smoe.runtime.program.layout import KEPT


@dataclass(eq=False)
class Version:
    """What a sequence of `length` tokens remembers, float32 `arrays` and int64 where each of them
    lies. They are not written to once their step is over, unless nobody wants them any more;
    `shared`: others may."""

    length: int
    arrays: list[np.ndarray]
    addresses: np.ndarray
    shared: bool = False

    @classmethod
    def of(cls, length: int, arrays: list[np.ndarray]) -> Version:
        """Of these arrays."""
        return cls(length, arrays, np.array([array.ctypes.data for array in arrays], np.int64))

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in self.arrays)


class Versions:
    """A step reads `before` and writes `after`, so that it may be run again or given up. It counts
    once the sequence goes on behind it. The last `KEPT` ends of steps of several tokens are kept.

    `addresses` int64 `[arrays, 2]` are those of both, filled in place."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self._shapes = tuple(shapes)
        self.addresses = np.zeros((len(self._shapes), 2), np.int64)
        self._before = self._after = self._new(0, np.zeros)
        self._several = False  # whether the step has more than one token
        self._kept: list[Version] = []
        self._spare: Version | None = None

    def _new(self, length: int, make: Callable[..., np.ndarray]) -> Version:
        return Version.of(length, [make(shape, np.float32) for shape in self._shapes])

    @property
    def before(self) -> list[np.ndarray]:
        """What the step finds."""
        return self._before.arrays

    @property
    def after(self) -> list[np.ndarray]:
        """What it leaves, in memory with anything in it until then."""
        return self._after.arrays

    @property
    def nbytes(self) -> int:
        """Of all that is held."""
        held = {self._before, self._after, *self._kept, *([self._spare] if self._spare else [])}
        return sum(version.nbytes for version in held)

    def lengths(self, most: int) -> list[int]:
        """Those up to `most` that it can go back to, falling; always 0, and `most` itself where
        there is nothing to remember."""
        if not self._shapes:
            return [most, 0]
        held = {v.length for v in (self._before, self._after, *self._kept)} | {0}
        return sorted((length for length in held if length <= most), reverse=True)

    def begin(self, past: int, end: int) -> None:
        """Before a step from `past` tokens, which must be one of `lengths`, to `end`."""
        if not self._shapes:
            return
        self.go_to(past)
        self._after, self._spare = self._spare or self._new(end, np.empty), None
        self._after.length, self._several = end, end - past > 1
        self.addresses[:, 0] = self._before.addresses
        self.addresses[:, 1] = self._after.addresses

    def go_to(self, length: int) -> None:
        """Be at `length`, which must be one of `lengths`; what is longer is forgotten."""
        before, after = self._before, self._after
        if not self._shapes:
            return
        if after is not before and after.length == length:
            self._before = after
            if self._several:
                self._keep(after)
        else:
            self._before = self._version(length)
        self._kept = [version for version in self._kept if version.length <= length]
        self._after = self._before
        for version in (before, after):
            if version not in (self._before, *self._kept) and not version.shared:
                self._spare = version

    def at(self, length: int) -> list[np.ndarray]:
        """The arrays at `length`, one of `lengths`."""
        return self._version(length).arrays

    def _version(self, length: int) -> Version:
        for version in (self._before, self._after, *self._kept):
            if version.length == length:
                return version
        return self._new(0, np.zeros)

    def _keep(self, version: Version) -> None:
        if version not in self._kept:
            self._kept = [*self._kept, version][-KEPT:]

    def snapshot(self) -> Version:
        """Where it is, which is kept too."""
        self._keep(self._before)
        self._before.shared = True
        return self._before

    def restore(self, version: Version) -> None:
        """Be there again."""
        self._before = self._after = version
        self._kept = [one for one in self._kept if one.length <= version.length]

    def fork(self, length: int) -> Versions:
        """The same at `length`, one of `lengths`, without a copy."""
        other = Versions(self._shapes)
        other._before = other._after = self._version(length)
        other._kept = [version for version in self._kept if version.length <= length]
        other._keep(other._before)
        for version in other._kept:
            version.shared = True
        return other

    def load(self, length: int, arrays: Sequence[np.ndarray]) -> None:
        """Be at `length`, with a copy of these."""
        copies = [np.array(array, np.float32, order="C") for array in arrays]
        self._before = self._after = Version.of(length, copies)
        self._kept = []
