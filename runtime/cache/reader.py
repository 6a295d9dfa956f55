"""Reads that go on beside the computation: demand reads first, guesses only while nobody waits.

A few threads, which hold no lock of the interpreter while they read. A guess that has not begun can be withdrawn; one
that has begun is finished, since the bytes are on their way. What fails comes back with the request, never from a thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from smoe.runtime.errors import EngineError


class Request:
    """The planes of one record after `since`, up to `level`, to be read into `into`. `arrived` turns true when they are
    there, or failed with `error`."""

    def __init__(self, layer: int, expert: int, into: np.ndarray, since: int, level: int):
        self.layer, self.expert, self.into, self.since, self.level = (
            layer,
            expert,
            into,
            since,
            level,
        )
        self.arrived = False
        self.landed = False  # whoever asked has taken it
        self.nbytes = 0
        self.error: EngineError | None = None


class Reader:
    """`read(layer, expert, into, since, level)` gives the bytes read, or raises; `threads` of it run at once."""

    def __init__(self, read: Callable[[int, int, np.ndarray, int, int], int], threads: int):
        self._read = read
        self._demands: deque[Request] = deque()
        self._guesses: deque[Request] = deque()
        self._busy = 0  # demands that are being read
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name="smoe-read")
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, request: Request) -> Request:
        """Read as soon as may be."""
        return self._add(self._demands, request)

    def guess(self, request: Request) -> Request:
        """Read once no demand is waiting or being read."""
        return self._add(self._guesses, request)

    def withdraw(self) -> list[Request]:
        """The guesses that have not begun; they are forgotten here."""
        with self._changed:
            withdrawn = list(self._guesses)
            self._guesses.clear()
        return withdrawn

    def wait(self, requests: list[Request]) -> None:
        """Until one of `requests` has arrived."""
        with self._changed:
            self._changed.wait_for(lambda: any(request.arrived for request in requests))

    def close(self) -> None:
        """Finish what has begun, forget the rest."""
        with self._changed:
            self._closed = True
            self._demands.clear()
            self._guesses.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _add(self, queue: deque[Request], request: Request) -> Request:
        with self._changed:
            queue.append(request)
            self._changed.notify_all()
        return request

    def _next(self) -> Request | None:
        if self._demands:
            return self._demands[0]
        return self._guesses[0] if self._guesses and not self._busy else None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
                demanded = bool(self._demands)
                request = (self._demands if demanded else self._guesses).popleft()
                self._busy += demanded
            try:
                request.nbytes = self._read(
                    request.layer, request.expert, request.into, request.since, request.level
                )
            except EngineError as error:
                request.error = error
            finally:
                with self._changed:
                    self._busy -= demanded
                    request.arrived = True
                    self._changed.notify_all()
