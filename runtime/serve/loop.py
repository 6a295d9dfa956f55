"""The loop that a server stands on: requests that come and go, and advance together.

`Loop.step` is the page to read: one token for everybody who generates, and beside it a part of the
prompts that are being read, for about as long as such a token takes. An expert is read and applied
once a step for all tokens that want it, and a beginning that prompts share is read once. What a
request gets does not depend on who shares its steps, but where the engine takes shortcuts: then a
request with `loss` 0 is exact nevertheless, and the others' shortcuts go by what is in memory."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.generation import Token
from smoe.runtime.model import Prefill, Prompt
from smoe.runtime.serve.admission import Admission, Beginning, Now
from smoe.runtime.serve.prefixes import Past, Prefixes
from smoe.runtime.serve.request import ENDED, Busy, Generation, Listener, Request
from smoe.runtime.serve.scoring import Scoring
from smoe.runtime.step import Sequence

T = TypeVar("T")
MOST_WAITING = 256
READING = 2  # groups of prompts at once, so that a short one need not wait for a long one
RECENT = 32  # steps of which the median is the usual one
SLICE = 0.02  # seconds of reading prompts, while nobody generates, before others are looked at


@dataclass(frozen=True, eq=False)
class _Reading:
    """Prompts of `generations` that are read together, `whole` where experts lend them memory; or
    a `beginning` of some that wait, for which there is `reserved` memory."""

    prefill: Prefill | Scoring
    generations: SequenceOf[Generation] = ()
    beginning: Prompt | None = None
    reserved: int = 0
    whole: bool = False


class Loop:
    """Requests through `engine`, up to `engine.plan.requests` at once; beyond, up to `waiting` of
    them wait their turn.

    Who iterates over a `Generation` runs the loop; after `start` a thread does, and then nobody
    else may use the engine. `submit`, `ask` and `Generation.cancel` are for any thread. What fails
    otherwise than with an `EngineError`, an interrupt too, ends the loop and all that is on its
    way."""

    def __init__(self, engine: Engine, waiting: int = MOST_WAITING):
        self.engine = engine
        engine.sequence.rewind(0)  # there is no room for what it holds
        self.prefixes = Prefixes(engine.held_bytes, engine.grain, engine.division.rewinds)
        self._admission = Admission(self.prefixes, engine.held_bytes, waiting)
        self._going: list[Generation] = []  # those that began
        self._reading: deque[_Reading] = deque()
        self._usual: deque[float] = deque(maxlen=RECENT)
        self._thread: threading.Thread | None = None
        self._asked: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._closed = False

    # -- for any thread ----------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener | None = None) -> Generation:
        """Take a request in. Its tokens go to `listener` as they come, or to who iterates over what
        this gives. An `EngineError` for what this engine cannot do, `Busy` where too many wait."""
        if not self.alive:
            raise Busy(ENDED)
        engine, count = self.engine, request.max_new_tokens
        how = request.sampling, request.stop, count, request.logprobs
        made = engine.continuation(*how, request.special, request.allowed)
        engine.spending(request.loss)
        ids = engine.checked_prompt(request.prompt, count)
        nbytes = engine.held_bytes(len(ids) + count)
        told = self._pump, listener
        generation = Generation(ids, made, request.loss, nbytes, *told, request.scored)
        self._admission.add(generation)
        return generation

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """What `question` says between two steps, when nothing else uses the engine: it should be a
        short one, and not fail. The answer is cancelled where the loop ends before."""
        answer: Future[T] = Future()
        with self._admission.changed:
            if self.alive:
                self._asked.append((answer, question))
                self._admission.changed.notify_all()
            else:
                answer.cancel()
        return answer

    def _pump(self) -> bool:
        """For who waits for tokens: a step, where no thread does it."""
        return self._thread is None and self.step()

    def start(self) -> None:
        """Run in a thread of its own, until `close`."""
        if self._thread is not None:
            raise EngineError("This loop runs in a thread already.")
        self._thread = threading.Thread(target=self._serve, daemon=True, name="smoe-loop")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return not self._closed and (self._thread is None or self._thread.is_alive())

    @property
    def counts(self) -> dict[str, int]:
        """How many requests wait, have their prompts read, and generate."""
        waiting, generating = len(self._admission), len(self._generating())
        reading = len(self._going) - generating
        return {"waiting": waiting, "reading": reading, "generating": generating}

    def close(self) -> None:
        """End: what is on its way is cancelled, before the next step."""
        with self._admission.changed:
            self._closed = True
            self._admission.changed.notify_all()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()
        self._end_all("cancelled")

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> bool:
        """What comes next for everybody who generates, and a part of the prompts; whether there is
        more to do."""
        try:
            self._answer()
            self._leave()
            self._begin()
            self.prefixes.shrink(self._room())
            if self._generating():
                self._decode()
            if self._reading:
                self._read()
        except BaseException:  # nobody can tell what of the step was done
            self._closed = True
            self._end_all("failed")
            raise
        return bool(self._going or self._reading or len(self._admission))

    def _answer(self) -> None:
        while self._asked:
            answer, question = self._asked.popleft()
            if answer.set_running_or_notify_cancel():
                answer.set_result(question())

    def _generating(self) -> list[Generation]:
        return [generation for generation in self._going if generation.last is not None]

    def _decode(self) -> None:
        """A step of everybody."""
        started, generating = time.perf_counter(), self._generating()
        for generation, came in zip(generating, self._advance(generating), strict=True):
            if isinstance(came, EngineError):
                self._end(generation, "failed", came)
                continue
            self.engine.stats.new_tokens += len(came)
            if generation.continuation.finish:
                self._end(generation, generation.continuation.finish)
        self._usual.append(time.perf_counter() - started)

    def _advance(self, generating: SequenceOf[Generation]) -> list[list[Token] | EngineError]:
        """What comes of each. If the step fails everybody goes alone, so that nobody fails of what
        another one needs."""
        try:
            return self.engine.advance([generation.going for generation in generating])
        except EngineError as error:
            if len(generating) == 1:
                return [error]
        return [came for one in generating for came in self._advance([one])]

    def _read(self) -> None:
        """Prompts, in turns, for as long as a token usually takes."""
        usual = statistics.median(self._usual) if self._usual and self._generating() else SLICE
        started = now = time.perf_counter()
        longest = 0.0
        while self._reading and now + longest <= started + usual:
            reading = self._reading[0]
            self._reading.rotate(-1)
            try:
                reading.prefill.advance()
            except EngineError as error:
                self._over(reading)
                self._failed(reading, error)
            else:
                if reading.prefill.done:
                    self._over(reading)
                    self._have_read(reading)
            before, now = now, time.perf_counter()
            longest = max(longest, now - before)
        self.engine.stats.prefill_seconds += now - started

    def _over(self, reading: _Reading) -> None:
        self._reading.remove(reading)
        self._admission.news = True

    def _have_read(self, reading: _Reading) -> None:
        """Everybody's first token."""
        if reading.beginning is not None:
            sequence = reading.beginning.sequence
            self.prefixes.keep(Past.of(sequence, sequence.length))
        logits = reading.prefill.logits
        for generation, row in zip(reading.generations, logits, strict=True):
            self._take(generation, row)

    def _failed(self, reading: _Reading, error: EngineError) -> None:
        """What failed with others is tried alone, and what failed alone has failed."""
        if len(reading.generations) == 1:
            self._end(reading.generations[0], "failed", error)
        else:
            others = reading.generations or self._admission.waiting_for(_ids(reading))
            for generation in others:
                generation.alone = True
            self._back(reading.generations)

    def _back(self, generations: SequenceOf[Generation]) -> None:
        """To wait for their turn again."""
        self._going = [one for one in self._going if one not in generations]
        self._admission.back(generations)

    def _take(self, generation: Generation, logits: np.ndarray) -> None:
        try:
            generation.take(logits)
        except EngineError as error:  # nothing that may come next
            self._end(generation, "failed", error)
            return
        self.engine.stats.new_tokens += 1
        if generation.continuation.finish:
            self._end(generation, generation.continuation.finish)

    def _end(self, generation: Generation, why: str, error: EngineError | None = None) -> None:
        """It leaves, and others may begin like it."""
        sequence = generation.sequence
        if sequence is not None and sequence.length >= len(generation.ids):
            self.prefixes.keep(self._past(generation))
        if generation in self._going:
            self._going.remove(generation)
        generation.end(why, error)
        self._admission.news = True

    # -- who is on the way -------------------------------------------------------------------------

    def _leave(self) -> None:
        """Whoever is not wanted any more. Those whose prompts were read with one of them begin
        again, and a beginning that nobody waits for is read no further."""
        gone = self._admission.leave(lambda one: not one.cancelled)
        gone += [generation for generation in self._going if generation.cancelled]
        if not gone:
            return
        for reading in [one for one in self._reading if one.beginning is None]:
            stay = [generation for generation in reading.generations if not generation.cancelled]
            if len(stay) < len(reading.generations):
                self._discard(reading)
                self._back(stay)
        for reading in [one for one in self._reading if one.beginning is not None]:
            if not self._admission.waiting_for(_ids(reading)):
                self._discard(reading)
        for generation in gone:
            self._end(generation, "cancelled")

    def _discard(self, reading: _Reading) -> None:
        self._over(reading)
        with contextlib.suppress(EngineError):  # the engine may be closed
            reading.prefill.discard()

    def _begin(self) -> None:
        """Whoever there is room for."""
        most = min(READING, self.engine.plan.requests)
        if len(self._reading) >= most or not self._admission.news:
            return
        prompts = [g.ids for reading in self._reading for g in reading.generations]
        now = Now(
            places=self.engine.plan.requests - len(self._going),
            room=self._room(),
            pasts=[self._past(generation) for generation in self._generating()],
            prompts=prompts,
            beginnings=[_ids(reading) for reading in self._reading if reading.beginning],
            together=lambda tokens: self.engine.grouped(tokens, self._may_borrow()),
        )
        chosen = self._admission.next(now)
        if not chosen:
            return
        self._admission.news = True  # others may begin beside them
        if isinstance(chosen, Beginning):
            self._start_beginning(chosen, now.pasts)
        else:
            self._start(chosen, now.pasts)

    def _may_borrow(self) -> bool:
        """Whether experts may lend a group of prompts memory: to one at a time."""
        return not any(reading.whole for reading in self._reading)

    def _start(self, generations: SequenceOf[Generation], pasts: SequenceOf[Past]) -> None:
        prompts = []
        for generation in generations:
            sequence = self._sequence(generation.ids, generation.loss, pasts, generation.alone)
            generation.begin(sequence)
            self.engine.stats.prompt_tokens += len(generation.ids) - sequence.length
            prompts.append(Prompt(sequence, generation.ids[sequence.length :]))
        self._going += generations
        whole, (first, *_) = self._may_borrow(), generations
        if first.scored is not None:  # then it is alone
            reading = _Reading(Scoring(self.engine, first), generations)
        else:
            reading = _Reading(self.engine.prefill_all(prompts, whole), generations, whole=whole)
        self._reading.append(reading)

    def _start_beginning(self, beginning: Beginning, pasts: SequenceOf[Past]) -> None:
        sequence, whole = self._sequence(beginning.ids, 0.0, pasts), self._may_borrow()
        prompt = Prompt(sequence, beginning.ids[sequence.length :], keep=0)
        prefill = self.engine.prefill_all([prompt], whole)
        told = Prompt(sequence, beginning.ids), beginning.nbytes
        self._reading.append(_Reading(prefill, (), *told, whole))

    def _sequence(
        self, ids: np.ndarray, loss: float | None, pasts: SequenceOf[Past], alone: bool = False
    ) -> Sequence:
        """A new one, or one that begins like others."""
        fork = None if alone else self.prefixes.begin(ids, pasts)
        if fork is None:
            return self.engine.new_sequence(loss)
        fork.ledger, fork.exact = self.engine.spending(loss)
        return fork

    def _past(self, generation: Generation) -> Past:
        """What others may begin like: of what is decoded nothing where it takes shortcuts, or where
        one token is another product than many."""
        sequence, engine = generation.sequence, self.engine
        assert sequence is not None
        exact = engine.policies.lossless or sequence.exact
        if exact and engine.grain == 1:
            return Past.of(sequence, sequence.length)
        if generation.scored is not None and not exact:
            return Past.of(sequence, 0)
        return Past.of(sequence, len(generation.ids) - len(generation.ids) % engine.grain)

    def _room(self) -> int:
        """Bytes of state that nobody will need."""
        taken = sum(generation.nbytes for generation in self._going)
        return self.engine.plan.state - taken - sum(one.reserved for one in self._reading)

    # -- its thread --------------------------------------------------------------------------------

    def _serve(self) -> None:
        changed = self._admission.changed
        while not self._closed:
            if not self.step():
                with changed:
                    changed.wait_for(lambda: self._closed or len(self._admission) or self._asked)

    def _end_all(self, why: str) -> None:
        for answer, _ in self._asked:
            answer.cancel()
        gone = [*self._admission.close(), *self._going]
        for reading in [*self._reading]:
            self._discard(reading)
        error = EngineError(ENDED)
        for generation in gone:
            self._end(generation, why, error if why == "failed" else None)


def _ids(reading: _Reading) -> np.ndarray:
    """Of a beginning."""
    return np.zeros(0, np.int64) if reading.beginning is None else reading.beginning.ids
