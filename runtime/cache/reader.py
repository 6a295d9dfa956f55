"""Reads that go on beside the computation, most urgent first: demands, and guesses only while
nobody waits.

What is read at once is a run of planes of one expert, as many as nobody wants apart; of those that
may be read next, demands are ordered as the cache says (D²MoE's hottest-expert-bit-first).

A few threads, which hold no lock of the interpreter while they read. All that happens to a frame
happens in them, under one lock: it is claimed when its read begins and held or freed when it ends,
so that an interrupt of the thread that computes can lose none. What fails comes back with the load,
never from a thread."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from smoe.runtime.cache.residency import Key
from smoe.runtime.errors import EngineError

T = TypeVar("T")


class State(enum.Enum):
    """Where a load is."""

    WAITING = "waiting"
    READING = "reading"
    DONE = "done"
    WITHDRAWN = "withdrawn"


ENDED = (State.DONE, State.WITHDRAWN)


@dataclass(eq=False)
class Load:
    """The planes of an expert up to `level`, at its `turn` among the demands, the least first; a
    `guess` is wanted by none yet. `then` are more planes of the same record, read once these are
    there, into the frame that was claimed for all of them.

    When its read begins it gets the `frame` it goes into and the planes that are there already,
    `since`. When it is done it has `nbytes`, or an `error`."""

    key: Key
    level: int
    turn: tuple[int, ...] = ()
    guess: bool = False
    then: Load | None = None
    state: State = State.WAITING
    claimed: bool = False
    frame: int = -1
    since: int = 0
    nbytes: int = 0
    error: Exception | None = None

    @property
    def on_its_way(self) -> bool:
        """Whether it may still arrive."""
        return self.state in (State.WAITING, State.READING)

    @property
    def goes_on(self) -> bool:
        """Whether more planes follow."""
        return self.then is not None and self.then.on_its_way

    @property
    def top(self) -> int:
        """The level up to which planes follow."""
        return self.then.top if self.then is not None and self.goes_on else self.level

    def cut(self) -> None:
        """Nothing follows."""
        following = self.then
        while following is not None:
            following.state = State.WITHDRAWN
            following = following.then

    def urgency(self) -> tuple[bool, tuple[int, ...]]:
        """The least is read first: demands before guesses, then by their turns."""
        return self.guess, self.turn


def raise_first(loads: Iterable[Load]) -> None:
    """The first error of `loads`, as a sentence."""
    for load in loads:
        if isinstance(load.error, EngineError):
            raise load.error
        if load.error is not None:
            layer, expert = load.key
            raise EngineError(
                f"Reading expert {expert} of layer {layer} failed: {load.error!r}."
            ) from load.error


class Reader:
    """Loads on `threads` threads (0: each at once, in the caller's, for simulations).

    `begin(load)` claims a frame, or says that there is none now; `read(load)` gives the bytes read,
    or raises; `end(load)` takes what came of it. `begin` and `end` are called under `lock`."""

    def __init__(
        self,
        begin: Callable[[Load], bool],
        read: Callable[[Load], int],
        end: Callable[[Load], None],
        threads: int,
    ):
        self._begin, self._read, self._end = begin, read, end
        # An RLock itself is entered and left without a moment at which Ctrl-C could come in
        # between; a Condition is not.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._waiting: list[Load] = []
        self._reading: list[Load] = []
        self.refused: set[Load] = set()  # there was no frame, and nothing has changed since
        self.closed = False
        self._guesses_at_once = max(1, threads - 1)  # a thread stays free for demands
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name="smoe-read")
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, load: Load) -> None:
        """Read as soon as may be; an `EngineError` if the reader is closed."""
        with self.lock:
            if self.closed:
                raise EngineError("This engine is closed; open the bundle again.")
            self._waiting.append(load)
            if not load.guess:
                self._claim(load)
            self.changed.notify_all()
        if not self._threads:
            self.serve()

    def demand(self, load: Load, turn: tuple[int, ...]) -> None:
        """A guess is wanted now, at that turn."""
        with self.lock:
            load.guess, load.turn = False, turn
            if load.state is State.WAITING:
                self._claim(load)
            self.changed.notify_all()

    def withdraw(self, loads: Iterable[Load]) -> None:
        """Forget those of `loads` whose read has not begun; their frames are free again."""
        with self.lock:
            for load in loads:
                if load.state is State.WAITING:
                    load.state = State.WITHDRAWN
                    load.cut()
                    self._attempt(self._end, load)
            self._waiting = [load for load in self._waiting if load.state is State.WAITING]

    def retry(self) -> bool:
        """There may be a frame now where there was none; whether there was one."""
        with self.lock:
            again = sorted(self.refused, key=lambda load: (load.turn, load.key))
            claimed = [self._claim(load) for load in again if load in self._waiting]
            self.changed.notify_all()
        if not self._threads:
            self.serve()
        return any(claimed)

    def wait(self, loads: Iterable[Load]) -> bool:
        """Until one of `loads` has ended, or nothing is being read and no frame can be had for any
        of them: whether one has ended. An `EngineError` if the reader was closed meanwhile."""
        loads = list(loads)
        with self.lock:
            self.changed.wait_for(
                lambda: (
                    self.closed or any(load.state in ENDED for load in loads) or not self._busy()
                )
            )
            if self.closed:
                raise EngineError("This engine is closed; open the bundle again.")
            return any(load.state in ENDED for load in loads)

    def _busy(self) -> bool:
        """Whether a frame is being read into, or about to be."""
        return bool(self._reading) or any(load.claimed for load in self._waiting)

    @property
    def busy(self) -> bool:
        """Whether any load is not done; under the lock."""
        return bool(self._waiting or self._reading)

    def loads(self) -> list[Load]:
        """Those that are not done."""
        with self.lock:
            return self._waiting + self._reading

    def close(self) -> None:
        """Finish what has begun, forget the rest."""
        with self.lock:
            self.closed = True
            self.withdraw(list(self._waiting))
            self.changed.notify_all()
        for thread in self._threads:
            thread.join()

    def take(self) -> Load | None:
        """The most urgent load for which a frame can be had; its read begins."""
        with self.lock:
            if not self._waiting:
                return None
            demanded = any(not load.guess for load in (*self._waiting, *self._reading))
            for load in sorted(self._waiting, key=Load.urgency):
                if load.guess and (demanded or not self._may_guess()):
                    return None
                if load.claimed or (load.guess and self._claim(load)):
                    self._waiting.remove(load)
                    self._reading.append(load)
                    load.state = State.READING
                    return load
            return None

    def _may_guess(self) -> bool:
        return sum(load.guess for load in self._reading) < self._guesses_at_once

    def _claim(self, load: Load) -> bool:
        """A frame for it, if there is one now. A guess is not worth waiting for one."""
        self.refused.discard(load)
        load.claimed = bool(self._attempt(self._begin, load))
        if load.claimed:
            return True
        if load.error is None and not load.guess:
            self.refused.add(load)
        else:
            self._waiting.remove(load)
            load.state = State.WITHDRAWN if load.error is None else State.DONE
            load.cut()
        self.changed.notify_all()
        return False

    def finish(self, load: Load) -> None:
        """Read what `take` gave; whoever waits for it hears of it, and what follows may be read."""
        load.nbytes = self._attempt(self._read, load) or 0
        with self.lock:
            self._reading.remove(load)
            if load.error is not None or self.closed:
                load.cut()
            self._attempt(self._end, load)
            load.state = State.DONE
            if load.then is not None and load.goes_on:
                load.then.frame, load.then.claimed = load.frame, True
                self._waiting.append(load.then)
            self.changed.notify_all()

    def serve(self) -> bool:
        """Read the most urgent loads until there is none; whether there was one."""
        served = False
        while (load := self.take()) is not None:
            self.finish(load)
            served = True
        return served

    def _attempt(self, action: Callable[[Load], T], load: Load) -> T | None:
        """A thread ends here: what fails belongs to whoever waits for the load."""
        try:
            return action(load)
        except Exception as error:  # noqa: BLE001
            load.error = error
            return None

    def _work(self) -> None:
        while True:
            with self.lock:
                load = self.take()
                while load is None and not self.closed:
                    self.changed.wait()
                    load = self.take()
            if load is None:
                return
            self.finish(load)
