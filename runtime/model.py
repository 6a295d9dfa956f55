"""One step through the model: the page to read first.

`Model.run` names what happens to a step's tokens in every layer and does nothing else. Everything
it calls is a seam: `backbone` (attention, routers, state), `choose` (what runs for which slot),
`experts` (who computes it), `predict` (what will be wanted next)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from smoe.runtime.backbone import Backbone, Flow
from smoe.runtime.cache.predict import Predictor
from smoe.runtime.experts import Experts, Held
from smoe.runtime.routing import (
    Assignment,
    Available,
    Chooser,
    Dispatch,
    Routed,
    as_routed,
    assign,
    combine,
)
from smoe.runtime.stats import Stats
from smoe.runtime.step import Parts, Phase, Sequence, Span, Step, finished

FEW = 32  # tokens that go through a layer, or several, without a pause
MANY = 512  # tokens that are mixed without one

Run = Parts[list[np.ndarray]]  # a step on its way: it ends with each span's logits


class Advance(Protocol):
    """A backbone's loop from layer to layer below Python."""

    def __call__(self, layer: int, flow: Flow, held: Held) -> Iterable[np.ndarray]:
        """Run `flow`, for which the experts of all layers before `layer` are mixed, as far as all
        that routers choose is `held`: the ids int64 `[T, k]` of each layer that was passed, mixed
        too. `route` is asked for the one after them next, whose segment may have run."""
        ...


@dataclass(eq=False)
class Model:
    """`choose` decides for tokens that are decoded; a prompt takes what its router says. `advance`
    is there where the backbone can go on by itself while nothing is missing."""

    backbone: Backbone
    experts: Experts
    choose: Chooser
    predict: Predictor
    stats: Stats
    layers: int
    advance: Advance | None = None

    def step(self, step: Step) -> list[np.ndarray]:
        """Consume the tokens of `step`; each span's logits, float32 `[n, vocabulary]` for the n
        positions it keeps.

        Spans are no longer than `Prefill` makes them. A step that fails leaves its sequences as
        they were."""
        return finished(self.run(step))

    def run(self, step: Step) -> Run:
        """The same in parts: between two of them other steps may run, of other sequences. Closed
        before its end, it leaves its sequences as they were."""
        flow = self.backbone.begin(step)
        layer = self._go_ahead(0, flow)
        while layer < self.layers:
            mixed = yield from self._mixture(layer, flow)
            self.backbone.mix(layer, flow, mixed)
            layer = self._go_ahead(layer + 1, flow)
        return self.backbone.finish(flow)

    def _go_ahead(self, layer: int, flow: Flow) -> int:
        """As many layers from `layer` on as need nobody's word; the first that does."""
        step = flow.step
        if self.advance is None or layer == self.layers or step.tokens > FEW:
            return layer
        decides = self.choose is not as_routed and step.shortened.any()
        if decides or self._listens(step):
            return layer
        held = self.experts.held()
        passed = () if held is None else self.advance(layer, flow, held)
        for ids in passed:
            self.stats.slots += ids.size
            self.experts.used(layer, ids)
            layer += 1
        return layer

    def _mixture(self, layer: int, flow: Flow) -> Parts[np.ndarray]:
        """A layer up to what its experts add, float32 `[T, H]`; what every slot gave is gone then:
        of a long prompt it is the most there is."""
        routed = yield from self.backbone.routing(layer, flow)
        available = self.experts.available(layer)
        assignment = self._assign(routed, available)
        outputs = self._at_hand(routed, available, assignment)
        if outputs is None:
            outputs = yield from self._bring(routed, available, assignment, flow)
        else:
            yield
        del routed  # what the experts received is not needed any more
        return (yield from _mixed(outputs, assignment.weights))

    def _at_hand(
        self, routed: Routed, available: Available, assignment: Assignment
    ) -> np.ndarray | None:
        """What every slot gives, float32 `[T, k, H]`, if there is nothing to bring or to guess."""
        if self._listens(routed.step) or routed.tokens > FEW:
            return None
        return self.experts.at_hand(routed, assignment, available)

    def _bring(
        self, routed: Routed, available: Available, assignment: Assignment, flow: Flow
    ) -> Parts[np.ndarray]:
        """What every slot gives, float32 `[T, k, H]`, where some expert may be missing."""
        dispatch = Dispatch.of(assignment, available)
        self.experts.observe(routed)
        outputs = np.zeros((*assignment.ids.shape, routed.hidden.shape[1]), np.float32)
        pending = self.experts.start(routed.layer, dispatch, routed.hidden, outputs)
        self._expect(routed)
        yield from pending.parts(partial(self._look_ahead, routed.layer, flow, outputs, assignment))
        return outputs

    def _assign(self, routed: Routed, available: Available) -> Assignment:
        """What runs, counted."""
        assignment = assign(self.choose, routed, available)
        self.stats.slots += routed.ids.size
        if assignment.ids is not routed.ids:
            self.stats.substituted += int((assignment.ids != routed.ids).sum())
        if assignment.nats is not None:
            self.stats.nats_spent += float(assignment.nats.sum())
        return assignment

    def _listens(self, step: Step) -> bool:
        """Whether guesses go by what routers say of the step."""
        return self.predict.listens and bool(step.decoding.any())

    def _expect(self, routed: Routed) -> None:
        """Guesses go by what is decoded: a prompt needs most experts of every layer."""
        if self.predict.silent or not routed.step.decoding.any():
            return
        if not routed.step.decodes:
            routed = routed.take(np.flatnonzero(routed.step.decoding))
        self.experts.expect(self.predict(routed))

    def _look_ahead(
        self, layer: int, flow: Flow, outputs: np.ndarray, assignment: Assignment
    ) -> None:
        """While nothing is left but to wait: what the next layer would say of what is computed so
        far (SMoE, III-E)."""
        stats, looks_ahead = self.stats, self.predict.looks_ahead and layer + 1 < self.layers
        if not looks_ahead or not flow.step.decodes or not flow.whole:
            return
        if not self.predict.pays(stats.stall_seconds, stats.foresight_seconds):
            return
        started = time.perf_counter()
        routed = self.backbone.peek(layer + 1, flow, combine(outputs, assignment.weights))
        self.experts.expect(self.predict.foresee(routed))
        stats.foresight_seconds += time.perf_counter() - started


def _mixed(outputs: np.ndarray, weights: np.ndarray) -> Parts[np.ndarray]:
    """What `combine` gives."""
    if len(outputs) <= MANY:
        return combine(outputs, weights)
    mixed = np.empty((len(outputs), outputs.shape[2]), np.float32)
    for low in range(0, len(outputs), MANY):
        rows = slice(low, low + MANY)
        mixed[rows] = combine(outputs[rows], weights[rows])
        yield
    return mixed


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens `ids` int64 `[T]` for `sequence`, with the logits of the last `keep` positions."""

    sequence: Sequence
    ids: np.ndarray
    keep: int = 1
    phase: Phase = Phase.PREFILL


class Prefill:
    """Prompts of different sequences on their way, layer after layer: an expert is read once for
    all chunks that share the read.

    `group` tokens (a whole number of the backbone's chunks) go through the model together, for
    which the experts lend so much `memory`; if they cannot, `chunk` tokens do. It changes no bit.
    `advance` does a part and may be followed by steps of other sequences; `discard` leaves the
    sequences as they were before. One of them has to be called to the end, for the memory's sake.
    `logits` float32 `[n, vocabulary]` are those of the positions that are kept, prompt after
    prompt, once `done`. `using` guards every call."""

    def __init__(
        self, model: Model, prompts: SequenceOf[Prompt], group: int, memory: int = 0,
        chunk: int | None = None,
        using: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ):  # fmt: skip
        self._model, self._using = model, using
        self._before = [
            (one.sequence, one.sequence.length, one.sequence.state.snapshot(one.sequence.length))
            for one in prompts
        ]
        self._left = [one for one in prompts if len(one.ids)]
        self._start = 0  # of the first of them
        self._group, self._memory, self._chunk = group, memory, chunk or group
        self._run: Run | None = None
        self._begun = False
        self._logits: list[np.ndarray] = []

    @property
    def done(self) -> bool:
        """Whether the sequences hold their prompts."""
        return self._run is None and not self._left

    @property
    def logits(self) -> np.ndarray:
        """Of the positions kept so far."""
        return np.concatenate(self._logits) if self._logits else np.zeros((0, 0), np.float32)

    def finish(self) -> np.ndarray:
        """All that is left; the logits. After a failure the sequences are as they were before."""
        with self._using(), self._undone_by_failure():
            while not self.done:
                self._advance()
        return self.logits

    def advance(self) -> None:
        """Some tokens or experts of one layer, for one group; nothing once it is done. After a
        failure the sequences are as they were before the prompts."""
        with self._using(), self._undone_by_failure():
            if not self.done:
                self._advance()

    def discard(self) -> None:
        """Throw it away."""
        with self._using():
            self._discard()

    @contextlib.contextmanager
    def _undone_by_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # an interrupt too
            self._discard()
            raise

    def _advance(self) -> None:
        if self._run is None:
            if not self._begun and not self._borrow(self._memory):
                self._group = self._chunk
            self._begun = True
            self._run = self._model.run(Step(self._spans()))
        try:
            next(self._run)
        except StopIteration as end:
            self._run = None
            self._logits += end.value
            if self.done:
                self._borrow(0)

    def _discard(self) -> None:
        if self._run is not None:
            self._run.close()
        self._run, self._left = None, []
        self._borrow(0)
        for sequence, length, state in self._before:
            del sequence.ids[length:]
            sequence.state.restore(state)

    def _borrow(self, nbytes: int) -> bool:
        """So much instead of what it had; whether that was possible."""
        return not self._memory or self._model.experts.lend(self, nbytes)

    def _spans(self) -> tuple[Span, ...]:
        """The next group: whole prompts, and of the last of them as many whole chunks as there is
        room for."""
        spans: list[Span] = []
        room = self._group
        while self._left and room > 0:
            prompt, start = self._left[0], self._start
            left = len(prompt.ids) - start
            count = left if left <= room else room - room % self._chunk
            if not count:
                break
            ids, kept = prompt.ids[start : start + count], len(prompt.ids) - prompt.keep - start
            keep = np.arange(min(max(0, kept), count), count)
            spans.append(Span(sequence=prompt.sequence, ids=ids, keep=keep, phase=prompt.phase))
            self._start, room = start + count, room - count
            if count == left:
                self._left.pop(0)
                self._start = 0
        return tuple(spans)
