"""Text through a model, one layer's experts in memory: many passes that meet at every layer.

A pass is a thread that pauses where it reaches a layer's experts and goes on with their output;
one thread runs at a time. So a layer's experts are read once, however much text there is and
however many observers look on. Memory holds the backbone, one layer's experts and what all passes
have in hand; the order of work, and of every sum, is the same in every run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from smoe.prep.checkpoint.checkpoint import Checkpoint, one_small_heap
from smoe.prep.checkpoint.coded import all_finite
from smoe.prep.checkpoint.ends import Ends
from smoe.prep.checkpoint.seam import ExpertsModule, experts_run_by, mixed_outputs
from smoe.prep.errors import NotDifferentiableError, PrepError
from smoe.prep.progress import Progress
from smoe.prep.sweep.held import Aside
from smoe.prep.sweep.passes import Arrival, Pass, Plain, Shelf
from smoe.prep.workdir import FinishedLayers
from smoe.runtime.machine import processors

Arrays = dict[str, np.ndarray]
BATCH = 4  # rows of a pass
TOGETHER = 8192  # tokens whose experts run at once: small products are slow
PIECE = 4  # times as many whose outputs are in memory at once


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

    def walk_back(self, device: str, ends: Ends, progress: Progress) -> None:
        """All of them back, once they have arrived; past the head, `ends` may leave."""


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
    with within_memory(device):
        checkpoint.move_backbone(device)
    batches = batches_of(rows, 1 if logits else BATCH)
    plain = [Plain(checkpoint.model, batch, device, logits is not None) for batch in batches]
    graph = backward.passes(device) if backward else []
    lockstep = _Lockstep(checkpoint, plain, graph, device, backward, progress)
    if finished is not None and device == "cpu":
        lockstep.put_aside(finished.directory)
    count = progress.counter("sweep", "layers", len(checkpoint.layers))
    ends = Ends(checkpoint)
    seam = experts_run_by(checkpoint.model, checkpoint.layers, _arrive)
    with within_memory(device), ends, lockstep, seam:
        with progress.stage("sweep"):
            lockstep.start()
            for layer in range(len(checkpoint.layers)):
                ends.leave()
                outputs, worked = lockstep.outputs(layer, observers, finished)
                lockstep.go_on(outputs, logits)
                count.done(layer + 1, worked=worked)
        if backward is not None and not backward.refusal:
            backward.walk_back(device, ends, progress)


def refuse_missing_device(device: str) -> None:
    """A `PrepError` if torch cannot compute on `device`."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PrepError(f"--device {device} cannot be used: {reason}; leave it out.") from error


@contextlib.contextmanager
def within_memory(device: str) -> Iterator[None]:
    """What does not fit into the memory of an accelerator is a `PrepError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).strip().split("\n")[0]
        raise PrepError(
            f"--device {device} has too little memory ({reason}); free some and give the same "
            "command again, or leave the option out."
        ) from error


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


class _Lockstep:
    """All passes of a sweep, at the same layer's experts. What plain passes hand over lies in one
    tensor, and in none of theirs while they wait."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plain: list[Plain],
        graph: list[Pass],
        device: str,
        backward: WayBack | None,
        progress: Progress,
    ):
        self._checkpoint, self._device, self._backward = checkpoint, device, backward
        self._plain, self._graph, self._progress = plain, graph, progress
        self._arrived: list[Arrival] = []
        self._arrived_graph: list[Arrival] = []
        self._shelf = Shelf([each.tokens for each in plain])
        self._aside: Aside | None = None

    def put_aside(self, directory: Path) -> None:
        """Plain passes that wait hold their other hidden states in a file in `directory`."""
        largest = max((each.tokens for each in self._plain), default=0)
        self._aside = Aside(directory, 4 * largest * self._checkpoint.config.hidden_size)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for each in [*self._plain, *self._graph]:
            each.abandon()
        self._shelf.clear()
        if self._aside is not None:
            self._aside.close()

    def start(self) -> None:
        """Every pass to its first layer."""
        for number, each in enumerate(self._plain):
            self._arrived.append(each.go())
            self._put(number)
        with self._refusing():
            self._arrived_graph = [each.go() for each in self._graph]

    def outputs(
        self, layer: int, observers: Sequence[Observer], finished: FinishedLayers | None
    ) -> tuple[Iterator[torch.Tensor], bool]:
        """The experts' output for every pass, the plain ones first, float32, shaped as its hidden
        state; and whether they had to be computed. Every observer has visited the layer."""
        self._refuse_disorder(layer)
        shapes = [each.hidden.shape for each in (*self._arrived, *self._arrived_graph)]
        known = finished.known(layer) if finished else None
        if finished and known is not None:
            at = self._groups(self._checkpoint.layers[layer][1])[0]
            for observer in observers:
                observer.resume(at, _of_observer(known, observer))
            return finished.outputs(layer, shapes, self._device), False
        left: Arrays = {}
        with contextlib.ExitStack() as stack:
            with self._progress.stage("read"):
                experts = self._checkpoint.experts(layer, self._device)
                groups = self._groups(stack.enter_context(experts))
            norms = [torch.zeros_like(at.weights) for at in groups]
            pieces = itertools.chain(*map(_run_experts, groups, norms))
            outputs: list[torch.Tensor] = []
            if finished:  # on the disk they are in nobody's way
                finished.keep_outputs(layer, pieces)
            else:
                outputs += pieces
            for observer in observers:
                with self._progress.stage(observer.name):
                    seen = observer.visit(dataclasses.replace(groups[0], norms=norms[0]))
                left |= {f"{observer.name}.{name}": array for name, array in seen.items()}
        if finished:
            finished.keep(layer, left)
            return finished.outputs(layer, shapes, self._device), True
        return _parts(outputs, shapes), True

    def go_on(
        self, outputs: Iterator[torch.Tensor], logits: Callable[[torch.Tensor], None] | None
    ) -> None:
        """Every pass to its next layer, or its end."""
        for number, plain in enumerate(self._plain):
            self._shelf.give_back(number, self._arrived[number].hidden)
            if self._aside is not None:
                self._aside.bring(number)
            self._arrived[number] = plain.go(next(outputs))
            self._put(number)
            if logits is not None and self._arrived[number] is None:
                assert plain.result is not None
                logits(plain.result)
                plain.result = None
        with self._refusing():
            for number, graph in enumerate(self._graph):
                self._arrived_graph[number] = graph.go(next(outputs))

    def _put(self, number: int) -> None:
        """What a plain pass arrived with, if it did, in its place."""
        arrived = self._arrived[number]
        if arrived is None:
            return
        if len(arrived.ids) != self._plain[number].tokens:
            self._refuse_order()
        if not all_finite(arrived.hidden):
            raise PrepError(
                f"{self._checkpoint.path}: what {self._checkpoint.layers[arrived.layer][0]} "
                "receives from this text is not finite; its weights are damaged, or too large for "
                "float32. Download the checkpoint again."
            )
        self._shelf.take(number, arrived.hidden)
        if self._aside is not None:
            self._aside.put(number, self._plain[number].held)

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
            self._refuse_order()

    def _refuse_order(self) -> None:
        raise PrepError(
            f"{self._checkpoint.path}: the model does not run its layers in order; it cannot "
            "be prepared."
        )

    def _groups(self, module: ExpertsModule) -> list[AtExperts]:
        """The tokens of the plain passes and of those under autograd, where there are some."""
        groups = []
        if self._arrived:
            groups.append(_together(module, self._arrived, self._shelf.hidden))
        if self._arrived_graph:
            hidden = torch.cat([each.tokens for each in self._arrived_graph])
            groups.append(_together(module, self._arrived_graph, hidden))
        return groups


def _together(module: ExpertsModule, arrived: list[Arrival], hidden: torch.Tensor) -> AtExperts:
    scores = [each.scores for each in arrived]
    known = [part for part in scores if part is not None]
    return AtExperts(
        layer=arrived[0].layer,
        module=module,
        starts=(0, *np.cumsum([len(each.ids) for each in arrived]).tolist()),
        hidden=hidden,
        ids=torch.cat([each.ids for each in arrived]),
        weights=torch.cat([each.weights for each in arrived]),
        scores=torch.cat(known) if len(known) == len(scores) else None,
    )


def _run_experts(at: AtExperts, norms: torch.Tensor) -> Iterator[torch.Tensor]:
    """The experts' output, a few passes at once and in pieces of a few times that, `[n, H]`; fills
    `norms` `[T, k]` with that of every slot's."""
    group = max(1, TOGETHER // at.starts[1])
    starts = [*at.starts[:-1:group], at.starts[-1]]
    for first in range(0, len(starts) - 1, PIECE):
        some = starts[first : first + PIECE + 1]
        piece = slice(some[0], some[-1])
        parts = [slice(a - some[0], b - some[0]) for a, b in itertools.pairwise(some)]
        slots = at.ids[piece], at.weights[piece]
        output, norms[piece] = mixed_outputs(at.module, at.hidden[piece], *slots, parts)
        yield output


def _parts(outputs: list[torch.Tensor], shapes: list[torch.Size]) -> Iterator[torch.Tensor]:
    """Each pass's own output: the model may change it in place."""
    rows = [shape.numel() // shape[-1] for shape in shapes]
    ends = np.cumsum([0, *rows]).tolist()
    whole = torch.cat(outputs)
    for (start, end), shape in zip(itertools.pairwise(ends), shapes, strict=True):
        yield whole[start:end].reshape(shape).clone()


def _of_observer(known: Arrays, observer: Observer) -> Arrays:
    prefix = f"{observer.name}."
    return {k.removeprefix(prefix): array for k, array in known.items() if k.startswith(prefix)}
