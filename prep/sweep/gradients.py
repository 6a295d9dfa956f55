"""How strongly the model's own predictions depend on the outputs of its experts: gradients at every layer's experts.

At every position labels are drawn from the model's own distribution, independently; g is the gradient of the sum of
their log-likelihoods at the experts' output. A small perturbation d of that output then costs E[(g . d)^2] / 2 nats of
KL divergence, summed over all positions that it reaches (Fisher).

Two sweeps, each layer's experts read once in each. Forward, the backbone is under autograd and the experts are one
node of its graph. Backward, one thread per draw walks that graph, and all draws meet where they reach a layer's
experts: there g is complete, the experts are in memory, and go back through them too. One thread runs at a time.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import (
    expert_geometry,
    expert_outputs,
    experts_run_by,
    mixed_outputs,
    slots_of,
)
from smoe.prep.errors import PrepError


@dataclass(frozen=True)
class AtExperts:
    """What one layer's experts received for T tokens, and how the draws' log-likelihoods depend on what they gave.

    tokens float32 `[T, H]`, ids int64 and mixing weights float32 `[T, k]`, gradients float32 `[draws, T, H]`.
    """

    tokens: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    gradients: torch.Tensor


Visit = Callable[[int, torch.nn.Module, AtExperts], None]


def sweep_gradients(
    checkpoint: Checkpoint, rows: np.ndarray, draws: int, seed: int, visit: Visit
) -> None:
    """Run `rows` of token ids int64 `[n, length]` forward and `draws` times back, and call
    `visit(layer, module, at)` for every layer, last first, while its experts are in memory.

    Memory holds the backbone's graph of all tokens (`row_bytes`). A model that cannot be differentiated is a `PrepError`.
    """
    sweeps = _Sweeps(checkpoint, draws, seed)
    with _only_values(checkpoint.model):
        with (
            torch.enable_grad(),
            experts_run_by(checkpoint.model, checkpoint.layers, sweeps.forward),
        ):
            logits = checkpoint.model(input_ids=torch.from_numpy(rows), use_cache=False).logits
            score = _OwnScore.apply(sweeps, logits)
        del logits
        sweeps.back(score, visit)


def row_bytes(checkpoint: Checkpoint, row: np.ndarray, draws: int) -> int:
    """About what `sweep_gradients` holds for one row of token ids int64 `[length]`: its graph and the draws' gradients, and
    as much again for what comes and goes (peaks were 1.2 and 2.3 times the former; docs/log.md, 2026-11-25)."""
    weights = {
        p.untyped_storage().data_ptr() for p in checkpoint.model.parameters() if not p.is_meta
    }
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def nothing(layer, module, hidden, ids, mixing):
        return (
            torch.zeros_like(hidden, requires_grad=True) * 1
        )  # no leaf: a model may add to it in place

    with (
        _only_values(checkpoint.model),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        experts_run_by(checkpoint.model, checkpoint.layers, nothing),
    ):
        logits = checkpoint.model(input_ids=torch.from_numpy(row[None]), use_cache=False).logits
    hidden = max(expert_geometry(module)[1] for _, module in checkpoint.layers)
    gradients = 3 * draws * len(row) * hidden * 4  # arrived, going on, and at one layer's experts
    return 2 * (sum(kept.values()) + 3 * logits.nbytes + gradients)


@contextlib.contextmanager
def _only_values(model: torch.nn.Module) -> Iterator[None]:
    """Parameters are not differentiated: only values are, and experts come and go."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)


class _Sweeps:
    """Both sweeps over all layers."""

    def __init__(self, checkpoint: Checkpoint, draws: int, seed: int):
        self._checkpoint, self._seed, self._draws = checkpoint, seed, draws
        self._anchor = torch.zeros(
            0, requires_grad=True
        )  # what the first layer has to require a gradient for
        self._received: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.current: _Back | None = None

    def forward(self, layer, module, hidden, ids, weights):
        if layer != len(self._received):
            raise PrepError(
                f"{self._checkpoint.path}: the model does not run its layers in order; it has no prices."
            )
        return _Experts.apply(self, layer, self._anchor, hidden, ids, weights)

    def mixed(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output, shaped as `hidden`."""
        x = hidden.reshape(-1, hidden.shape[-1])
        self._received[layer] = (x.detach(), ids, weights.detach())
        with self._checkpoint.experts(layer) as module:
            return mixed_outputs(module, x, ids, weights)[0].reshape(hidden.shape)

    def back(self, score: torch.Tensor, visit: Visit) -> None:
        """All draws backward from `score`, meeting at every layer's experts."""
        with ThreadPoolExecutor(self._draws) as pool:
            running = [_Back(pool, d, score, self._anchor) for d in range(self._draws)]
            try:
                self._meet(running, visit)
            finally:
                for back in running:
                    back.abandon()

    def _meet(self, running: list[_Back], visit: Visit) -> None:
        arrived = [self._run(back, None) for back in running]
        for layer in reversed(range(len(self._checkpoint.layers))):
            if any(at is None or at[0] != layer for at in arrived):
                raise PrepError(
                    f"{self._checkpoint.path}: layer {layer} does not reach the logits; no prices."
                )
            tokens, ids, weights = self._received.pop(layer)
            gradients = torch.stack([at[1].reshape(tokens.shape) for at in arrived])
            with self._checkpoint.experts(layer) as module:
                visit(layer, module, AtExperts(tokens, ids, weights, gradients))
                answers = _through_experts(module, tokens, ids, weights, gradients)
            del gradients
            arrived = [
                self._run(back, answer) for back, answer in zip(running, answers, strict=True)
            ]

    def _run(self, back: _Back, answer) -> tuple[int, torch.Tensor] | None:
        self.current = back
        return back.until_experts(answer)

    def own_gradient(self, logits: torch.Tensor, draw: int) -> torch.Tensor:
        """The gradient at `logits` `[n, length, V]` of the log-likelihood of labels drawn from them."""
        generator = torch.Generator().manual_seed(self._seed * 1009 + draw)
        gradient = torch.empty_like(logits)
        for row, found in zip(
            logits, gradient, strict=True
        ):  # one at a time: these are the largest tensors there are
            p = row.float().softmax(-1)
            labels = torch.multinomial(p, 1, generator=generator)
            found.copy_(p.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=p.dtype)))
        return gradient


def _through_experts(
    module: torch.nn.Module,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gradients: torch.Tensor,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per draw, gradients `[T, H]` at what the experts received and `[T, k]` at the mixing weights."""
    at_x, at_weights = torch.zeros_like(gradients), torch.zeros(len(gradients), *weights.shape)
    for expert, tokens, its in slots_of(ids, expert_geometry(module)[0]):
        with torch.enable_grad():
            received = x[tokens].detach().requires_grad_()
            y = expert_outputs(module, expert, received)
        w = weights.reshape(-1)[its, None].float()
        for draw, g in enumerate(gradients):
            at_weights[draw].view(-1)[its] = (g[tokens] * y.detach()).sum(-1)
            (found,) = torch.autograd.grad(y, received, w * g[tokens], retain_graph=True)
            at_x[draw].index_add_(0, tokens, found)
    return list(zip(at_x, at_weights, strict=True))


class _Experts(torch.autograd.Function):
    """One layer's experts as a node of the backbone's graph."""

    @staticmethod
    def forward(ctx, sweeps, layer, anchor, hidden, ids, weights):
        ctx.sweeps, ctx.layer, ctx.shape = sweeps, layer, hidden.shape
        return sweeps.mixed(layer, hidden, ids, weights)

    @staticmethod
    def backward(ctx, gradient):
        at_x, at_weights = ctx.sweeps.current.pause(ctx.layer, gradient)
        return None, None, torch.zeros(0), at_x.reshape(ctx.shape), None, at_weights


class _OwnScore(torch.autograd.Function):
    """Stands for the log-likelihood of drawn labels; its value is of no use, its gradient is drawn anew each time."""

    @staticmethod
    def forward(ctx, sweeps, logits):
        ctx.sweeps = sweeps
        ctx.save_for_backward(logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        return None, ctx.sweeps.own_gradient(logits, ctx.sweeps.current.draw)


class _Back:
    """One draw's way back: a thread, because autograd cannot be left half-way otherwise. It runs only while
    `until_experts` waits for it."""

    def __init__(self, pool: Executor, draw: int, score: torch.Tensor, anchor: torch.Tensor):
        self.draw = draw
        self._said: queue.Queue = (
            queue.Queue()
        )  # by the thread: (layer, gradient), or None when it ended
        self._answers: queue.Queue = queue.Queue()  # to the thread; None gives it up
        self._pool, self._between = pool, (score, anchor)
        self._walk: Future | None = None

    def until_experts(
        self, answer: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[int, torch.Tensor] | None:
        """Go on with the experts' `answer` to the next layer's experts: (layer, gradient), or None at the end."""
        if self._walk is None:
            self._walk = self._pool.submit(torch.autograd.grad, *self._between, retain_graph=True)
            self._walk.add_done_callback(lambda _: self._said.put(None))
        else:
            self._answers.put(answer)
        said = self._said.get()
        if said is None:
            self._walk.result()  # raises what went wrong
        return said

    def pause(self, layer: int, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In the thread: say where it is, and wait for what comes back through the experts."""
        self._said.put((layer, gradient))
        answer = self._answers.get()
        if answer is None:
            raise _AbandonedError
        return answer

    def abandon(self) -> None:
        """Let the thread end, wherever it is."""
        self._answers.put(None)


class _AbandonedError(Exception):
    """The sweep was given up."""
