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
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.generation import Token
from smoe.runtime.model import Prefill, Prompt
from smoe.runtime.serve.admission import Admission, Beginning, Now
from smoe.runtime.serve.prefixes import Past, Prefixes
from smoe.runtime.serve.request import Generation, Listener, Request
from smoe.runtime.step import Phase, Sequence, Span, Step

MOST_WAITING = 256
READING = 2  # groups of prompts at once, so that a short one need not wait for a long one
RECENT = 32  # steps of which the median is the usual one
SLICE = 0.02  # seconds of reading prompts, while nobody generates, before others are looked at


@dataclass(frozen=True, eq=False)
class _Reading:
    """Prompts that are read together, of `generations`; or a beginning, `sequence`, that they wait
    for. `ids` are all that the sequences will hold."""

    prefill: Prefill
    ids: list[np.ndarray]
    generations: SequenceOf[Generation] = ()
    sequence: Sequence | None = None
    nbytes: int = 0


class Loop:
    """Requests through `engine`, up to `engine.plan.requests` at once; beyond, up to `waiting` of
    them wait their turn.

    Who iterates over a `Generation` runs the loop; after `start` a thread does, and then nobody
    else may use the engine. `submit` and `Generation.cancel` are for any thread."""

    def __init__(self, engine: Engine, waiting: int = MOST_WAITING):
        self.engine = engine
        nbytes = engine.division.state_bytes
        self._prefixes = Prefixes(nbytes, engine.grain)
        self._admission = Admission(self._prefixes, nbytes, waiting)
        self._reading: deque[_Reading] = deque()
        self._decoding: list[tuple[Generation, Token]] = []  # with the token to go on from
        self._usual: deque[float] = deque(maxlen=RECENT)
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- for any thread ----------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener | None = None) -> Generation:
        """Take a request in. Its tokens go to `listener` as they come, or to who iterates over what
        this gives. An `EngineError` for what this engine cannot do, and where too many wait."""
        if not self.alive:
            raise EngineError("This loop has ended; open the bundle again.")
        engine, count = self.engine, request.max_new_tokens
        made = engine.continuation(
            request.sampling, request.stop, count, request.logprobs, request.special
        )
        engine.spending(request.loss)
        ids = engine.checked_prompt(request.prompt, count)
        nbytes = engine.division.state_bytes(len(ids) + count)
        generation = Generation(ids, made, request.loss, nbytes, self._pump, listener)
        self._admission.add(generation)
        return generation

    def _pump(self) -> bool:
        """For who waits for tokens: a step, where no thread does it."""
        return self._thread is None and self.step()

    def start(self) -> None:
        """Run in a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self._serve, daemon=True, name="smoe-loop")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return not self._closed and (self._thread is None or self._thread.is_alive())

    @property
    def counts(self) -> dict[str, int]:
        """How many requests wait, have their prompts read, and generate."""
        reading = sum(len(one.generations) for one in [*self._reading])
        generating = len(self._decoding)
        return {"waiting": len(self._admission), "reading": reading, "generating": generating}

    def close(self) -> None:
        """End: what is on its way is cancelled, before the next step."""
        with self._admission.changed:
            self._closed = True
            self._admission.changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._end_all("cancelled")

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> bool:
        """A token for everybody who generates, and a part of the prompts; whether there is more to
        do."""
        self._leave()
        self._begin()
        self._prefixes.shrink(self._room())
        if self._decoding:
            self._decode()
        if self._reading:
            self._read()
        return bool(self._decoding or self._reading or len(self._admission))

    def _decode(self) -> None:
        """A token for everybody."""
        started, decoding = time.perf_counter(), self._decoding
        given = self._logits(decoding)
        self._decoding = []
        for (generation, _), logits in zip(decoding, given, strict=True):
            if isinstance(logits, EngineError):
                self._end(generation, "failed", logits)
            else:
                self._take(generation, logits)
        seconds = time.perf_counter() - started
        self._usual.append(seconds)
        self.engine.stats.decode_steps += 1
        self.engine.stats.decode_seconds += seconds

    def _logits(
        self, decoding: SequenceOf[tuple[Generation, Token]]
    ) -> list[np.ndarray | EngineError]:
        """Of everybody's last token, float32 `[vocabulary]`. If the step fails everybody goes
        alone, so that nobody fails of what another one needs."""
        spans = tuple(_span(generation, token) for generation, token in decoding)
        try:
            return [logits[0] for logits in self.engine.step(Step(spans))]
        except EngineError as error:
            return [error] if len(spans) == 1 else [self._alone(span) for span in spans]

    def _alone(self, span: Span) -> np.ndarray | EngineError:
        try:
            return self.engine.step(Step((span,)))[0][0]
        except EngineError as error:
            return error

    def _read(self) -> None:
        """Prompts, in turns, for as long as a token usually takes."""
        usual = statistics.median(self._usual) if self._decoding and self._usual else SLICE
        started = now = time.perf_counter()
        longest = 0.0
        while self._reading and now + longest <= started + usual:
            reading = self._reading.popleft()
            self._reading.append(reading)
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
        if reading.sequence is not None:
            self._prefixes.keep(Past(reading.sequence, reading.sequence.length))
            return
        for generation, logits in zip(reading.generations, reading.prefill.logits, strict=True):
            if generation.cancelled:
                self._end(generation, "cancelled")
            else:
                self._take(generation, logits)

    def _failed(self, reading: _Reading, error: EngineError) -> None:
        """What failed with others is tried alone, and what failed alone has failed."""
        if reading.sequence is not None:
            self._admission.alone(reading.ids[0])
        elif len(reading.generations) == 1:
            self._end(reading.generations[0], "failed", error)
        else:
            self._admission.back(reading.generations)

    def _take(self, generation: Generation, logits: np.ndarray) -> None:
        token = generation.take(logits)
        self.engine.stats.new_tokens += 1
        if generation.continuation.finish:
            self._end(generation, generation.continuation.finish)
        else:
            self._decoding.append((generation, token))

    def _end(self, generation: Generation, why: str, error: EngineError | None = None) -> None:
        """It leaves, and others may begin like it."""
        sequence = generation.sequence
        if sequence is not None and sequence.length >= len(generation.ids):
            self._prefixes.keep(self._past(generation))
        generation.end(why, error)
        self._admission.news = True

    # -- who is on the way -------------------------------------------------------------------------

    def _leave(self) -> None:
        """Whoever is not wanted any more. A prompt that is read with others' stays until all are
        through."""
        gone = self._admission.leave(lambda one: not one.cancelled)
        for reading in [one for one in self._reading if one.generations]:
            if all(generation.cancelled for generation in reading.generations):
                reading.prefill.discard()
                self._over(reading)
                gone += reading.generations
        gone += [generation for generation, _ in self._decoding if generation.cancelled]
        self._decoding = [pair for pair in self._decoding if not pair[0].cancelled]
        for generation in gone:
            self._end(generation, "cancelled")

    def _begin(self) -> None:
        """Whoever there is room for."""
        if len(self._reading) == READING or not self._admission.news:
            return
        active = self._active()
        now = Now(
            places=self.engine.plan.requests - len(active),
            room=self._room(),
            pasts=[self._past(generation) for generation, _ in self._decoding],
            reading=[ids for reading in self._reading for ids in reading.ids],
            together=lambda tokens: self.engine.grouped(tokens, whole=not self._reading),
        )
        chosen = self._admission.next(now)
        if not chosen:
            return
        self._admission.news = True  # others may begin beside them
        if isinstance(chosen, Beginning):
            self._start_beginning(chosen)
        else:
            self._start(chosen)

    def _start(self, generations: SequenceOf[Generation]) -> None:
        prompts = []
        for generation in generations:
            sequence = self._sequence(generation.ids, generation.loss, generation.alone)
            generation.begin(sequence)
            self.engine.stats.prompt_tokens += len(generation.ids) - sequence.length
            prompts.append(Prompt(sequence, generation.ids[sequence.length :]))
        ids = [generation.ids for generation in generations]
        self._reading.append(_Reading(self._prefill(prompts), ids, generations))

    def _start_beginning(self, beginning: Beginning) -> None:
        sequence = self._sequence(beginning.ids, loss=0.0)
        prompt = Prompt(sequence, beginning.ids[sequence.length :], keep=0)
        read = self._prefill([prompt]), [beginning.ids]
        self._reading.append(_Reading(*read, sequence=sequence, nbytes=beginning.nbytes))

    def _prefill(self, prompts: SequenceOf[Prompt]) -> Prefill:
        return self.engine.prefill_all(prompts, whole=not self._reading)

    def _sequence(self, ids: np.ndarray, loss: float | None, alone: bool = False) -> Sequence:
        """A new one, or one that begins like others."""
        pasts = [self._past(generation) for generation, _ in self._decoding]
        fork = None if alone else self._prefixes.begin(ids, pasts)
        if fork is None:
            return self.engine.new_sequence(loss)
        fork.ledger, fork.exact = self.engine.spending(loss)
        return fork

    def _past(self, generation: Generation) -> Past:
        """What others may begin like: of what is decoded nothing where it takes shortcuts, or where
        one token is another product than many."""
        sequence, engine = generation.sequence, self.engine
        assert sequence is not None
        exact = engine.grain == 1 and (engine.policies.lossless or sequence.exact)
        prompt = len(generation.ids) - len(generation.ids) % engine.grain
        return Past(sequence, sequence.length if exact else prompt)

    def _active(self) -> list[Generation]:
        reading = [generation for one in self._reading for generation in one.generations]
        return [*reading, *(generation for generation, _ in self._decoding)]

    def _room(self) -> int:
        """Bytes of state that nobody will need."""
        taken = sum(generation.nbytes for generation in self._active())
        return self.engine.plan.state - taken - sum(reading.nbytes for reading in self._reading)

    # -- its thread --------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._closed:
                if not self.step():
                    with self._admission.changed:
                        self._admission.changed.wait_for(
                            lambda: self._closed or len(self._admission)
                        )
        finally:
            why = "cancelled" if self._closed else "failed"
            self._closed = True
            self._end_all(why)

    def _end_all(self, why: str) -> None:
        gone = self._admission.leave(lambda one: False)
        for reading in self._reading:
            with contextlib.suppress(EngineError):  # the engine may be closed
                reading.prefill.discard()
        gone += self._active()
        self._reading.clear()
        self._decoding = []
        error = EngineError("The loop has ended; open the bundle again.")
        for generation in gone:
            self._end(generation, why, error if why == "failed" else None)


def _span(generation: Generation, token: Token) -> Span:
    assert generation.sequence is not None
    return Span(generation.sequence, np.array([token.id]), np.array([0]), Phase.DECODE)
