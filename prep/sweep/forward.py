"""Text through a model, one layer's experts in memory: many passes that meet at every layer.

A pass is a thread that pauses where it reaches a layer's experts and goes on with their output;
one thread runs at a time. So a layer's experts are read once, however much text there is and
however many observers look on. Memory holds the backbone, one layer's experts and what all passes
have in hand; the order of work, and of every sum, is the same in every run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from smoe.prep.checkpoint.checkpoint import Checkpoint, one_small_heap
from smoe.prep.checkpoint.seam import ExpertsModule, experts_run_by, mixed_outputs
from smoe.prep.errors import NotDifferentiableError, PrepError
from smoe.prep.progress import Progress
from smoe.prep.sweep.scores import Scores
from smoe.prep.workdir import FinishedLayers
from smoe.runtime.machine import processors

Arrays = dict[str, np.ndarray]
BATCH = 4  # rows of a pass
TOGETHER = 8192  # tokens whose experts run at once: small products are slow


@dataclass(frozen=True)
class AtExperts:
    """What one layer's experts receive from T tokens, all rows of text one after another.

    `module` has its weights read, but in `Observer.resume`, where they are on the meta device.
    `starts` are the first tokens of the passes, and T. hidden float32 `[T, H]`, ids int64, mixing
    weights and norms of the slots' outputs float32 `[T, k]`; an id that is the number of experts
    means no expert. scores float `[T, E]` or, with a last one for no expert, `[T, E + 1]`, None
    where the router uses no topk. gradients float32 `[draws, T, H]` on the way back only. All
    tensors are on the sweep's device.
    """

    layer: int
    module: ExpertsModule
    starts: tuple[int, ...]
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor | None = None
    norms: torch.Tensor | None = None
    gradients: torch.Tensor | None = None

    def passes(self) -> Iterator[slice]:
        """The tokens of one pass after another."""
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            yield slice(start, end)


class Visitor(Protocol):
    """Somebody who learns from a sweep, layer by layer."""

    name: str

    def visit(self, at: AtExperts) -> Arrays:
        """Learn from a layer whose experts are in memory; what `resume` will need of that."""

    def finish(self) -> list[Arrays]:
        """After the last layer: its tables per layer, none if it leaves no tables."""


class Observer(Visitor, Protocol):
    """A visitor of the way forward, which may be interrupted and goes on. The way back is walked as
    a whole."""

    def resume(self, at: AtExperts, known: Arrays) -> None:
        """An interrupted run had visited this layer, and left what its visit returned."""


class WayBack(Protocol):
    """Rows that go along and then back (`gradients`); `refusal` says why they cannot."""

    refusal: str

    def passes(self, device: str) -> list[Pass]:
        """The passes forward."""

    def walk_back(self, device: str, progress: Progress) -> None:
        """All of them back, once they have arrived."""


class AbandonedError(BaseException):
    """In the thread of a pass that is given up; no model's `except Exception` holds it."""


class Pass:
    """Work in a thread of its own that runs only while `go` waits for it: neither a forward pass
    nor autograd's way back can be left half-way otherwise."""

    _current = threading.local()

    def __init__(self, work: Callable[[], object]):
        self.result: object = None  # what `work` returned, once `go` gave None
        self._work = work
        self._words: queue.SimpleQueue = queue.SimpleQueue()  # from the thread; None: it ended
        self._answers: queue.SimpleQueue = queue.SimpleQueue()  # to the thread
        self._pool = ThreadPoolExecutor(1)
        self._running: Future | None = None

    @classmethod
    def current(cls) -> Pass:
        """The pass whose thread this is."""
        return cls._current.value

    def go(self, answer: object = None):
        """Start, or go on with `answer`: what the work pauses with next, None at its end. Raises
        what the work raises."""
        if self._running is None:
            self._running = self._pool.submit(self._run)
            self._running.add_done_callback(lambda _: self._words.put(None))
        else:
            self._answers.put(answer)
        word = self._words.get()
        if word is None:
            self.result = self._running.result()
        return word

    def pause(self, word: object):
        """In the thread: say `word` to who waits, and wait for the answer."""
        self._words.put(word)
        answer = self._answers.get()
        if answer is AbandonedError:
            raise AbandonedError
        return answer

    def experts(self, layer: int, hidden, ids, weights) -> torch.Tensor:
        """In the thread, from the seam: the output of a layer's experts, shaped as `hidden`."""
        return self.pause(_Arrival(layer, hidden, ids, weights, None))

    def abandon(self) -> None:
        """Let the thread end, wherever it is, and wait for that."""
        self._answers.put(AbandonedError)
        self._pool.shutdown()

    def _run(self) -> object:
        self._current.value = self
        return self._work()


@dataclass(frozen=True)
class _Arrival:
    """A pass at a layer's experts: hidden float `[.., H]`, ids and weights `[T, k]`."""

    layer: int
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor | None

    @property
    def tokens(self) -> torch.Tensor:
        return self.hidden.reshape(-1, self.hidden.shape[-1])


# NumPy's own threads, waiting for work, take the processors from torch's: three times the time.
@threadpool_limits.wrap(limits=1, user_api="blas")
@torch.no_grad()
def sweep(
    checkpoint: Checkpoint,
    rows: Sequence[np.ndarray],
    observers: Sequence[Observer],
    device: str = "cpu",
    backward: WayBack | None = None,
    finished: FinishedLayers | None = None,
    progress: Progress | None = None,
    logits: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Run `rows` of token ids int64 `[length]`, of which only the last may be shorter, through the
    model on `device`; every observer visits every layer.

    With `backward` its rows go along, and then back. `finished` keeps what every layer leaves, so
    that the same sweep goes on from there after an interruption. `logits` gets those of one row
    after another, float32 `[length, V]`. A `PrepError` if the model does not run its layers in
    order.
    """
    progress = progress or Progress(quiet=True)
    progress.say(f"sweep: {sum(len(row) for row in rows)} tokens on {device}")
    one_small_heap()
    if torch.get_num_threads() > (there := processors().count):  # torch knows of no quota
        torch.set_num_threads(there)
    checkpoint.move_backbone(device)
    batches = batches_of(rows, 1 if logits else BATCH)
    plain = [_Plain(checkpoint.model, batch, device, logits is not None) for batch in batches]
    graph = backward.passes(device) if backward else []
    lockstep = _Lockstep(checkpoint, plain, graph, device, backward)
    count = progress.counter("sweep", "layers", len(checkpoint.layers))
    with lockstep, experts_run_by(checkpoint.model, checkpoint.layers, _arrive):
        lockstep.start()
        for layer in range(len(checkpoint.layers)):
            outputs, worked = lockstep.outputs(layer, observers, finished)
            lockstep.go_on(outputs, logits)
            del outputs
            count.done(layer + 1, worked=worked)
        if backward is not None and not backward.refusal:
            backward.walk_back(device, progress)


def refuse_missing_device(device: str) -> None:
    """A `PrepError` if torch cannot compute on `device`."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PrepError(f"--device {device} cannot be used: {reason}; leave it out.") from error


def batches_of(rows: Sequence[np.ndarray], together: int) -> Iterator[np.ndarray]:
    """Rows of one length, a few at a time, and the last if it is shorter: int64 `[n, length]`."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    for start in range(0, len(whole), together):
        yield np.stack(whole[start : start + together])
    if len(rows) > len(whole):
        yield rows[-1][None]


def _arrive(layer, module, hidden, ids, weights):
    """The seam, in a pass's thread."""
    return Pass.current().experts(layer, hidden, ids, weights)


class _Plain(Pass):
    """A forward pass over a batch of token ids int64 `[n, length]`."""

    result: torch.Tensor | None  # its logits, where they were asked for

    def __init__(self, model: torch.nn.Module, batch: np.ndarray, device: str, logits: bool):
        super().__init__(partial(self._forward, model, batch, device, logits))
        self._scores = Scores()

    @torch.no_grad()
    def _forward(self, model, batch, device, logits) -> torch.Tensor | None:
        options = {} if logits else _fewest_logits(model)
        with self._scores:
            ids = torch.from_numpy(batch).to(device)
            result = model(input_ids=ids, use_cache=False, **options).logits
        return result[0] if logits else None

    def experts(self, layer, hidden, ids, weights):
        scores = self._scores.take(ids)
        return self.pause(_Arrival(layer, hidden, ids, weights, scores))


def _fewest_logits(model: torch.nn.Module) -> dict[str, int]:
    """Ask for one position's logits where the model can: nobody reads them, and over a large
    vocabulary they are most of the memory."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


class _Lockstep:
    """All passes of a sweep, at the same layer's experts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plain: list[_Plain],
        graph: list[Pass],
        device: str,
        backward: WayBack | None,
    ):
        self._checkpoint, self._device, self._backward = checkpoint, device, backward
        self._plain, self._graph = plain, graph
        self._arrived: list[_Arrival] = []
        self._arrived_graph: list[_Arrival] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for each in [*self._plain, *self._graph]:
            each.abandon()

    def start(self) -> None:
        """Every pass to its first layer."""
        self._arrived = [each.go() for each in self._plain]
        with self._refusing():
            self._arrived_graph = [each.go() for each in self._graph]

    def outputs(
        self, layer: int, observers: Sequence[Observer], finished: FinishedLayers | None
    ) -> tuple[list[torch.Tensor], bool]:
        """The experts' outputs float32 `[T, H]` of the plain passes and of those under autograd,
        and whether they had to be computed; every observer has visited the layer."""
        self._refuse_disorder(layer)
        module = self._checkpoint.layers[layer][1]
        groups = [_together(module, a) for a in (self._arrived, self._arrived_graph) if a]
        known = finished.known(layer) if finished else None
        if finished and known is not None:
            for observer in observers:
                observer.resume(groups[0], _of_observer(known, observer))
            return finished.outputs(layer, [at.hidden for at in groups]), False
        left: Arrays = {}
        with self._checkpoint.experts(layer, self._device) as module:
            groups = [dataclasses.replace(at, module=module) for at in groups]
            computed = [_run_experts(at) for at in groups]
            for observer in observers:
                seen = observer.visit(dataclasses.replace(groups[0], norms=computed[0][1]))
                left |= {f"{observer.name}.{name}": array for name, array in seen.items()}
        outputs = [output for output, _ in computed]
        if finished:
            finished.keep(layer, outputs, left)
        return outputs, True

    def go_on(
        self, outputs: list[torch.Tensor], logits: Callable[[torch.Tensor], None] | None
    ) -> None:
        """Every pass to its next layer, or its end."""
        outputs = list(outputs)
        if self._plain:
            parts = _parts(outputs.pop(0), self._arrived)
            for i, plain in enumerate(self._plain):
                self._arrived[i] = plain.go(next(parts))
                if logits is not None and self._arrived[i] is None:
                    assert plain.result is not None
                    logits(plain.result)
                    plain.result = None
        with self._refusing():
            if self._arrived_graph:
                parts = _parts(outputs.pop(0), self._arrived_graph)
                for i, graph in enumerate(self._graph):
                    self._arrived_graph[i] = graph.go(next(parts))

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """A model that cannot be differentiated goes on without the passes under autograd."""
        try:
            yield
        except NotDifferentiableError as error:
            assert self._backward is not None
            self._backward.refusal = str(error)
            for each in self._graph:
                each.abandon()
            self._graph, self._arrived_graph = [], []

    def _refuse_disorder(self, layer: int) -> None:
        arrived = [*self._arrived, *self._arrived_graph]
        if any(each is None or each.layer != layer for each in arrived):
            raise PrepError(
                f"{self._checkpoint.path}: the model does not run its layers in order; it cannot "
                "be prepared."
            )


def _together(module: ExpertsModule, arrived: list[_Arrival]) -> AtExperts:
    scores = [each.scores for each in arrived]
    known = [part for part in scores if part is not None]
    return AtExperts(
        layer=arrived[0].layer,
        module=module,
        starts=(0, *np.cumsum([len(each.ids) for each in arrived]).tolist()),
        hidden=torch.cat([each.tokens for each in arrived]),
        ids=torch.cat([each.ids for each in arrived]),
        weights=torch.cat([each.weights for each in arrived]),
        scores=torch.cat(known) if len(known) == len(scores) else None,
    )


def _run_experts(at: AtExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts' output `[T, H]`, and the norm of every slot's `[T, k]`: a few passes at once."""
    group = max(1, TOGETHER // at.starts[1])
    starts = [*at.starts[:-1:group], at.starts[-1]]
    parts = [slice(*ends) for ends in itertools.pairwise(starts)]
    return mixed_outputs(at.module, at.hidden, at.ids, at.weights, parts)


def _parts(output: torch.Tensor, arrived: list[_Arrival]) -> Iterator[torch.Tensor]:
    """Each pass's own output, shaped as its hidden state: the model may change it in place."""
    sizes, shapes = [len(each.ids) for each in arrived], [each.hidden.shape for each in arrived]
    for part, shape in zip(output.split(sizes), shapes, strict=True):
        yield part.reshape(shape).clone()


def _of_observer(known: Arrays, observer: Observer) -> Arrays:
    prefix = f"{observer.name}."
    return {k.removeprefix(prefix): array for k, array in known.items() if k.startswith(prefix)}
