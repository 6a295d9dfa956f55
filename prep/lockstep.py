"""Many forward passes in lockstep: each layer's experts are read once, however much text there is.

Every pass is a greenlet that pauses where it reaches a layer's experts and goes on with their result. So memory holds
the backbone, one layer's experts and the hidden states of all passes; and the order of work, and of every sum, is the
same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from greenlet import getcurrent, greenlet

from smoe.prep.checkpoint import Checkpoint
from smoe.prep.errors import PrepError
from smoe.prep.experts import experts_run_by, mixed_outputs

T = TypeVar("T")


@dataclass(frozen=True)
class Arrived:
    """A pass at a layer's experts: hidden float32 `[.., H]`, ids int64 and mixing weights float32 `[T, k]`; `noted` is
    what the caller's `note` made of the ids."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    noted: object

    @property
    def tokens(self) -> torch.Tensor:
        """hidden as `[T, H]`."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])


def lockstep(
    checkpoint: Checkpoint,
    passes: list[Callable[[], T]],
    visit: Callable[[int, list[Arrived]], Iterable[torch.Tensor]],
    note: Callable[[torch.Tensor], object] = lambda ids: None,
) -> Iterator[T]:
    """Run `passes`, each of which calls the model once, and yield what they return, in order.

    `visit(layer, arrived)` gives the experts' output for every pass, one after another, shaped as its hidden state.
    `note(ids)` is called as a pass arrives, before another one runs.
    """
    main = getcurrent()

    def pause(layer, module, hidden, ids, weights):
        return main.switch(layer, Arrived(hidden, ids, weights, note(ids)))

    with torch.no_grad(), experts_run_by(checkpoint.model, checkpoint.layers, pause):
        running = [greenlet(run) for run in passes]
        arrived = [run.switch() for run in running]
        for layer in range(len(checkpoint.layers)):
            if {at for at, _ in arrived} != {layer}:
                raise PrepError(
                    f"{checkpoint.path}: the model does not run its layers in order; it cannot be prepared."
                )
            for i, output in enumerate(visit(layer, [slots for _, slots in arrived])):
                arrived[i] = running[i].switch(output)
                if layer == len(checkpoint.layers) - 1:
                    yield arrived[i]
                    arrived[i] = None


def as_trained(checkpoint: Checkpoint) -> Callable[[int, list[Arrived]], Iterator[torch.Tensor]]:
    """A `visit` that computes what the model itself would."""

    def visit(layer: int, arrived: list[Arrived]) -> Iterator[torch.Tensor]:
        with checkpoint.experts(layer) as module:
            for slots in arrived:
                mixed, _ = mixed_outputs(module, slots.tokens, slots.ids, slots.weights)
                yield mixed.reshape(slots.hidden.shape)

    return visit
