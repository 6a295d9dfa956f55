"""Where calls come in and tokens go out: between the event loop of a server and the loop of an
engine.

Text becomes token ids in threads of their own, ids go to the loop, and its tokens come back by a
call's queue. A call that nobody waits for any more is cancelled, whatever it was about to do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from smoe.runtime.errors import EngineError
from smoe.runtime.generation import Token
from smoe.runtime.serve.answers import Spelling
from smoe.runtime.serve.loop import Loop
from smoe.runtime.serve.refusal import Refusal, broken, busy
from smoe.runtime.serve.request import Busy, Generation, Request
from smoe.runtime.serve.tally import Tally

T = TypeVar("T")
TEXT_THREADS = 2
ANSWERS = 4.0  # seconds in which the loop's thread has to say that it is there
ENDED = "The server is shutting down; send it to the one that comes after it."


class Call:
    """What one client waits for: `generations`, whose tokens come by one queue."""

    def __init__(self, tally: Tally, log: Callable[[str], None]):
        self.generations: list[Generation] = []
        self._tally, self._log = tally, log
        self._events = asyncio.get_running_loop()
        self._came: deque[tuple[int, Token | None]] = deque()
        self._wake = asyncio.Event()
        self._over: Refusal | None = None
        self._cancelled = False

    def begin(self, loop: Loop, requests: Sequence[Request]) -> None:
        """Submit what was asked; from any thread."""
        for number, request in enumerate(requests):
            self.generations.append(loop.submit(request, self._listener(number)))
            if self._cancelled:
                self.cancel()

    def cancel(self) -> None:
        """Nobody waits any more; from any thread."""
        self._cancelled = True
        for generation in [*self.generations]:
            generation.cancel()

    def end(self, refusal: Refusal) -> None:
        """Who waits hears that it is over; from the event loop."""
        self._over = refusal
        self._wake.set()
        self.cancel()

    async def tokens(self) -> AsyncIterator[list[tuple[int, Token | None]]]:
        """What has come since: tokens with the number of their generation, None at its end. A
        `Refusal` where one did not come to it."""
        left = len(self.generations)
        while left:
            await self._wake.wait()
            self._wake.clear()
            if self._over is not None:
                raise self._over
            came = [self._came.popleft() for _ in range(len(self._came))]
            for number, token in came:
                if token is None:
                    self._refuse_failed(self.generations[number])
                    left -= 1
            if came:
                yield came

    def _refuse_failed(self, generation: Generation) -> None:
        if generation.finish == "cancelled":
            raise busy(ENDED)
        if generation.finish == "failed":
            self._log(f"an answer failed: {generation.error}")
            raise broken()

    def _listener(self, number: int) -> Callable[[Token | None], None]:
        last, first = time.perf_counter(), True

        def listen(token: Token | None) -> None:
            nonlocal last, first
            now = time.perf_counter()
            if token is not None:
                self._tally.token(first, now - last)
            last, first = now, False
            self._came.append((number, token))
            with contextlib.suppress(RuntimeError):  # the server is gone, and so is who waits
                self._events.call_soon_threadsafe(self._wake.set)

        return listen


class Desk:
    """Calls to `loop`, whose engine answers as `model`: up to `most` at once. `log` hears what
    clients do not. The loop's thread has so many seconds for `answers` about itself."""

    def __init__(
        self,
        loop: Loop,
        model: str,
        most: int,
        log: Callable[[str], None],
        answers: float = ANSWERS,
    ):
        self.loop, self.engine, self.model = loop, loop.engine, model
        self.spelling = Spelling(self.engine.text)
        self.started = int(time.time())
        self.log = log
        self.tally = Tally()
        self._most, self._answers = most, answers
        self._texts = ThreadPoolExecutor(TEXT_THREADS, "smoe-text")
        self._calls: set[Call] = set()
        self._closing = False

    @contextlib.asynccontextmanager
    async def call(self, prepare: Callable[[], Sequence[Request]]) -> AsyncIterator[Call]:
        """What `prepare` makes of a body, submitted; cancelled at the end, if it is not through."""
        if self._closing:
            raise busy(ENDED)
        if len(self._calls) >= self._most:
            self.tally.refused += 1
            raise busy(f"{len(self._calls)} requests are here already; try again later.")
        call = Call(self.tally, self.log)
        self._calls.add(call)
        try:
            await self.work(lambda: call.begin(self.loop, prepare()))
            yield call
        finally:
            call.cancel()
            self._calls.discard(call)
            for generation in call.generations:
                self.tally.ended(generation)

    async def work(self, work: Callable[[], T]) -> T:
        """What `work` gives, which may take long, in a thread for that."""
        events = asyncio.get_running_loop()
        try:
            return await events.run_in_executor(self._texts, work)
        except Busy as error:
            raise busy(str(error)) from error
        except EngineError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: EngineError) -> Refusal:
        """A sentence about the request; not one about this machine."""
        said = str(error)
        if str(self.engine.path) in said:
            self.log(said)
            return broken()
        code = "context_length_exceeded" if "more than the context" in said else None
        return Refusal(said, code=code)

    async def ask(self, question: Callable[[], T]) -> T | None:
        """What the loop's thread says to it between two steps; None if it does not in time."""
        answer = asyncio.wrap_future(self.loop.ask(question))
        done, _ = await asyncio.wait({answer}, timeout=self._answers)
        if not done:
            answer.cancel()
        return None if answer.cancelled() or not done else answer.result()

    async def close(self, grace: float) -> None:
        """No new calls; those that are here have `grace` seconds, and then hear that it is over."""
        self._closing = True
        until = time.monotonic() + grace
        while self._calls and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for call in [*self._calls]:
            call.end(busy(ENDED))
        self._texts.shutdown(wait=False, cancel_futures=True)
