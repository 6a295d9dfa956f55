"""Routers of levels end to end, as D²MoE trains them (Wang et al., MobiCom 2025, section 4.1): the
whole model in memory, each slot at the level that its router picks, and the loss

    cross-entropy to the original model's own distribution + price of a bit x expected bits.

Only routers are trained. The level of largest logit is computed, and the gradient is that of the
mixture of all levels by their softmax (straight through); the paper does not say which. Where a
capacity is given, no more than its share of an expert's tokens is computed at a level while
training, and the rest, drawn at random, skips the expert."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from smoe.artifacts import Bundle
from smoe.prep.bits.coarse import CoarseExperts
from smoe.prep.bits.goal import Goal
from smoe.prep.bits.router import LevelRouter
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import experts_run_by, mixed_outputs, slots_of
from smoe.prep.progress import Progress

ROWS, RATE, DECAY = 4, 1e-3, 1e-2  # of a step; of AdamW


class Together:
    """The whole model, with levels for every slot."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        bundle: Bundle,
        routers: Sequence[LevelRouter],
        goal: Goal,
        capacity: Sequence[float],
        seed: int,
        device: str = "cpu",
    ):
        self._checkpoint, self._bundle, self._routers = checkpoint, bundle, routers
        self._goal, self._capacity, self._device = goal, torch.tensor(capacity), device
        self._generator = torch.Generator().manual_seed(seed)
        self._coarse: list[CoarseExperts] = []
        self._prices = torch.zeros(0)  # of every token of the step
        self._bits: list[torch.Tensor] = []  # per layer: expected bits of every token

    @threadpool_limits.wrap(limits=1, user_api="blas")
    def train(self, rows: np.ndarray, epochs: int, progress: Progress) -> list[float]:
        """On token ids int64 `[n, length]`; the loss of every step, in nats per token at the middle
        price."""
        order = [self._shuffled(len(rows)) for _ in range(epochs)]
        batches = [part for each in order for part in each.split(ROWS)]
        parameters = [p for router in self._routers for p in router.parameters()]
        steps = torch.optim.AdamW(parameters, RATE, weight_decay=DECAY)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(steps, len(batches))
        losses = []
        with self._whole():
            for batch in progress.over(batches, "routers of levels", "steps", len(batches)):
                steps.zero_grad()
                loss = self._loss(torch.from_numpy(rows[batch.numpy()]))
                loss.backward()
                steps.step()
                slower.step()
                losses.append(loss.item())
        return losses

    def _shuffled(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """All layers' experts in memory, the original ones too."""
        with contextlib.ExitStack() as stack:
            for layer in range(len(self._checkpoint.layers)):
                module = stack.enter_context(self._checkpoint.experts(layer, self._device))
                self._coarse.append(
                    CoarseExperts(self._bundle, layer, module, self._device, kept=True)
                )
                self._routers[layer].to(self._device)
            yield
            self._coarse.clear()

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Of rows of token ids, in nats per token; a row has one price of a bit."""
        ids, goal = ids.to(self._device), self._goal
        prices = goal.drawn(len(ids), self._generator).to(self._device)
        self._prices = prices.repeat_interleave(ids.shape[1])
        with torch.no_grad():
            wanted = self._logits(ids, self._original).log_softmax(-1)
        self._bits.clear()
        given = self._logits(ids, self._at_levels).log_softmax(-1)
        kl = (wanted.exp() * (wanted - given)).sum(-1).reshape(-1)
        bits = torch.stack(self._bits).sum(0) * float(np.exp(goal.price))
        half = (self._prices / 2).exp()
        return (kl / half + bits * half).mean()

    def _logits(self, ids: torch.Tensor, run) -> torch.Tensor:
        model = self._checkpoint.model
        with experts_run_by(model, self._checkpoint.layers, run):
            return model(input_ids=ids, use_cache=False).logits.float()

    def _original(self, layer, module, hidden, ids, weights):
        mixed, _ = mixed_outputs(module, hidden.reshape(-1, hidden.shape[-1]), ids, weights)
        return mixed.reshape(hidden.shape)

    def _at_levels(self, layer, module, hidden, ids, weights):
        router, experts = self._routers[layer], len(self._routers[layer].bias)
        flat = hidden.reshape(-1, hidden.shape[-1])
        mixed, bits = torch.zeros_like(flat), flat.new_zeros(len(flat))
        for expert, tokens, slots in slots_of(ids, experts):
            x, w = flat[tokens], weights.reshape(-1)[slots].float()
            logits = self._goal.priced(router.of_expert(expert, x, w), self._prices[tokens])
            share = logits.softmax(-1)
            bits = bits.index_add(0, tokens, share @ self._goal.bits.to(share.device))
            picked = self.within_capacity(share.argmax(-1))
            gate = (picked - share).detach() + share
            gate = gate * picked.sum(-1, keepdim=True)  # a slot that is dropped teaches nothing
            gate = gate * w[:, None]
            y = self._coarse[layer](expert, x)
            mixed = mixed.index_add(0, tokens, torch.einsum("nj,jnh->nh", gate, y))
        self._bits.append(bits * float(self._goal.scale.weight[layer]))
        return mixed.reshape(hidden.shape)

    def within_capacity(self, levels: torch.Tensor) -> torch.Tensor:
        """One of each row `[n, J]`, or none where its level has had its share of tokens."""
        picked = torch.nn.functional.one_hot(levels, len(self._goal.bits)).float()
        if not len(self._capacity):
            return picked
        order = self._shuffled(len(levels)).to(levels.device)
        rank = picked[order].cumsum(0)  # among those of the level, in a random order
        most = (self._capacity.to(levels.device) * len(levels)).ceil()
        kept = torch.empty_like(picked)
        kept[order] = picked[order] * (rank <= most)
        return kept
