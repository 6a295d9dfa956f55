"""Routers of levels layer by layer, against what every slot would cost at each level: for models
that do not fit into memory whole.

On the way back of a sweep the gradient at a layer's MoE output is there, and so is the price of
each slot by itself, p = (g . w_e (y_e at level j - y_e at the full level))^2 / 2, the mean over
draws, of which `price_fit` makes nats as of all prices. The router learns to choose the level of
least nats + price of a bit x bits, at prices that are drawn anew for every token, so that its
logits hold wherever the mean is put later. One layer is in memory at a time."""

from __future__ import annotations

import numpy as np
import torch

from smoe.artifacts import Bundle
from smoe.prep.bits.coarse import CoarseExperts
from smoe.prep.bits.goal import Goal
from smoe.prep.bits.router import LevelRouter
from smoe.prep.checkpoint.seam import expert_geometry, slots_of
from smoe.prep.sweep.forward import Arrays, AtExperts

STEPS, TOKENS, RATE, DECAY = 600, 512, 5e-4, 1e-2  # of AdamW, at most; TOKENS of a step
PASSES = 30  # over the same text, at most


class Apart:
    """A visitor of the way back that trains the `routers` of one layer after another; `losses` are
    of the slots' nats and bits, per slot and in bits, in the first and the last tenth of the
    steps."""

    name = "routers of levels"

    def __init__(self, bundle: Bundle, routers: list[LevelRouter], goal: Goal, seed: int):
        self.losses: dict[int, tuple[float, float]] = {}
        self._bundle, self._routers, self._goal, self._seed = bundle, routers, goal, seed

    def visit(self, at: AtExperts) -> Arrays:
        nats = self._goal.nats(slot_moments(self._bundle, at))
        with torch.enable_grad():
            self.losses[at.layer] = self._train(at, nats)
        return {}

    def finish(self) -> list[Arrays]:
        return [router.tables() for router in self._routers]

    def _train(self, at: AtExperts, nats: torch.Tensor) -> tuple[float, float]:
        """`nats` float32 `[T, k, J]`."""
        goal, router = self._goal, self._routers[at.layer].to(at.hidden.device)
        generator = torch.Generator().manual_seed(self._seed * 1009 + at.layer)
        count = min(STEPS, -(-PASSES * len(at.ids) // TOKENS))
        steps = torch.optim.AdamW(router.parameters(), RATE, weight_decay=DECAY)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(steps, count)
        weights = at.ids < len(router.bias)
        losses = []
        for _ in range(count):
            rows = torch.randint(len(at.ids), (TOKENS,), generator=generator)
            prices = goal.drawn(TOKENS, generator)
            rows, prices = rows.to(at.hidden.device), prices.to(at.hidden.device)
            logits = router(at.hidden[rows], at.ids[rows], at.weights[rows])
            share = goal.priced(logits, prices[:, None]).softmax(-1)
            costs = goal.costs(at.layer, nats[rows], prices[:, None])
            loss = ((share * costs).sum(-1) * weights[rows]).sum() / weights[rows].sum().clamp(1)
            steps.zero_grad()
            loss.backward()
            steps.step()
            slower.step()
            losses.append(loss.item())
        tenth = max(1, count // 10)
        return float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))


@torch.no_grad()
def slot_moments(bundle: Bundle, at: AtExperts) -> torch.Tensor:
    """p of every slot at every level, float32 `[T, k, J]`; 0 for no expert."""
    assert at.gradients is not None
    coarse = CoarseExperts(bundle, at.layer, at.module, str(at.hidden.device), kept=False)
    moments = at.hidden.new_zeros(at.ids.numel(), bundle.levels)
    for expert, tokens, slots in slots_of(at.ids, expert_geometry(at.module)[0]):
        y = coarse(expert, at.hidden[tokens])
        felt = torch.einsum("dnh,jnh->dnj", at.gradients[:, tokens], y - y[-1])
        weights = at.weights.reshape(-1)[slots, None].float()
        moments[slots] = (felt * weights).square().mean(0) / 2
    return moments.reshape(*at.ids.shape, -1)
