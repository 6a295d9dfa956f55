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

from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import experts_run_by, mixed_outputs
from smoe.prep.errors import PrepError

T = TypeVar("T")
TOGETHER = 8192  # tokens whose experts run at once


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


def mixed(
    module: torch.nn.Module, arrived: list[Arrived]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What `mixed_outputs` gives for every pass, one after another: a few passes at once, since small products are slow."""
    whole = max(1, TOGETHER // max(1, len(arrived[0].ids))) if arrived else 1
    for start in range(0, len(arrived), whole):
        group = arrived[start : start + whole]
        x, ids, weights = (
            torch.cat([getattr(slots, name) for slots in group])
            for name in ("tokens", "ids", "weights")
        )
        outputs, norms = mixed_outputs(module, x, ids, weights)
        sizes = [len(slots.ids) for slots in group]
        for slots, output, norm in zip(
            group, outputs.split(sizes), norms.split(sizes), strict=True
        ):
            yield output.reshape(slots.hidden.shape), norm


def outputs(module: torch.nn.Module, arrived: list[Arrived]) -> Iterator[torch.Tensor]:
    """The experts' output for every pass, as a `visit` of `lockstep` gives it."""
    for output, _ in mixed(module, arrived):
        yield output


def as_trained(checkpoint: Checkpoint) -> Callable[[int, list[Arrived]], Iterator[torch.Tensor]]:
    """A `visit` that computes what the model itself would."""

    def visit(layer: int, arrived: list[Arrived]) -> Iterator[torch.Tensor]:
        with checkpoint.experts(layer) as module:
            yield from outputs(module, arrived)

    return visit
