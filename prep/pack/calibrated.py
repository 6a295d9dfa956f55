"""One layer's experts to nested codes, a few at a time, by what the sweep brings them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

from smoe.artifacts import nested
from smoe.artifacts.encodings import is_bias_or_norm
from smoe.artifacts.layout import RecordLayout
from smoe.prep.checkpoint.seam import (
    expert_geometry,
    expert_inner,
    expert_weights,
    felt_in_output,
)
from smoe.prep.errors import PrepError
from smoe.prep.pack.encode import codes_record
from smoe.prep.pack.quantise import (
    OWN,
    Quantised,
    made_up_for,
    quantise,
    second_moment,
    shares,
)
from smoe.prep.sweep.forward import AtExperts

COMMON = 256  # tokens of the layer at large, spread over the text, in every second moment
# Bytes of second moments in memory. The rest of what it takes is up to twelve times as much, and a
# CPU gains nothing from more experts at once; a GPU, whose columns go one by one, does.
AT_ONCE_CPU, AT_ONCE_GPU = 32 << 20, 1 << 30
# Tokens that an expert's last matrix learns from, evenly spread over its own: so many, or so many
# for each of its columns. Every level of every token costs a run of the first matrices.
LEARNT, LEARNT_PER_COLUMN = 4096, 4
# The levels of a last matrix, as BASE and FULL: making up for what the first ones lost at the base
# level draws its codes away from what the full one wants.
LAST_BASE, LAST_FULL = 3.0, 3.0

Done = TypeVar("Done")
# The share of output lost at each level from 1, of the first matrices and of the last.
Losses = dict[str, list[float]]


class Calibrated:
    """Quantises the experts of one layer, a few at a time, on what arrives there.

    `hardly` is how many experts fewer than `OWN` tokens reach: such go by the layer at large more
    than by their own."""

    def __init__(self, at: AtExperts, encoding: nested.Nested, layout: RecordLayout):
        self._at, self._module, self._encoding, self._layout = at, at.module, encoding, layout
        self._lost: dict[str, list[np.ndarray]] = {}
        stride = max(1, len(at.ids) // COMMON)
        passes = [at.hidden[tokens] for tokens in at.passes()]
        self._common = torch.cat([part[:: min(stride, len(part))] for part in passes])[:COMMON]
        self.experts = expert_geometry(at.module)[0]
        reached = at.ids.flatten().bincount(minlength=self.experts)[: self.experts]
        self.hardly = int((reached < OWN).sum())

    def records(self) -> Iterator[np.ndarray]:
        """The record of one expert after another. A `PrepError` if one alone is too much for the
        memory of the device."""
        count, hidden, width = expert_geometry(self._module)
        budget = AT_ONCE_CPU if self._common.device.type == "cpu" else AT_ONCE_GPU
        at_once = max(1, budget // (4 * max(hidden, width) ** 2))
        return in_groups_that_fit(range(count), at_once, self._some)

    def losses(self) -> Losses:
        """Of the layer, over all experts."""
        return {matrices: np.mean(lost, axis=0).tolist() for matrices, lost in self._lost.items()}

    def report(self) -> str:
        """For people: the loss of output by level, over all experts, and where text was narrow."""
        shown = [
            f"{matrices} " + ", ".join(f"{share:.2%}" for share in lost)
            for matrices, lost in self.losses().items()
        ]
        narrow = f"; {self.hardly} of {self.experts} experts hardly reached" if self.hardly else ""
        return "output lost by level: " + "; ".join(shown) + narrow

    def _some(self, experts: range) -> list[np.ndarray]:
        """The first matrices, and then the last by what those, with their errors, give it."""
        weights = [expert_weights(self._module, e) for e in experts]
        names: list[str] = [name for name in ("gate", "up") if name in weights[0]]
        first = self._on_device([w[name] for w in weights for name in names])
        down = self._on_device([w["down"] for w in weights])
        moments = [self._moments(e, last) for e, last in zip(experts, down, strict=True)]
        split, group = self._encoding.of(names[0]), self._encoding.group
        found = quantise(first[None], torch.cat(moments)[None], split, group)
        damaged = (first - found.rest).unflatten(1, (len(experts), len(names))).unbind(1)
        inner = [self._inner(e, *of) for e, *of in zip(experts, down, damaged, strict=True)]
        wanted, moment = (torch.stack(each, 1) for each in zip(*inner, strict=True))
        last = quantise(wanted, moment, self._encoding.down, group, LAST_BASE, LAST_FULL)
        for matrices, lost in (("+".join(names), found.error), ("down", last.error)):
            self._lost.setdefault(matrices, []).append(lost)
        return [self._record(i, w, names, found, last) for i, w in enumerate(weights)]

    def _on_device(self, matrices: list[np.ndarray]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(w) for w in matrices]).to(self._common.device)

    def _moments(self, expert: int, down: torch.Tensor) -> torch.Tensor:
        """Second moments of what gate and up receive, `[matrices, H, H]`: tokens count by how much
        their output feels an error of that matrix."""
        x, share = self._tokens(expert)
        felt = [share * each for each in felt_in_output(self._module, expert, x, down)]
        return torch.stack(
            [second_moment(x, each / each.norm() if each.any() else share) for each in felt]
        )

    def _tokens(self, expert: int, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What an expert receives (`most` of it, about) and some of what its layer does, and how
        much each token counts."""
        tokens, ranks = torch.where(self._at.ids == expert)
        if most is not None:
            apart = -(-len(tokens) // most) or 1
            tokens, ranks = tokens[::apart], ranks[::apart]
        own, weights = self._at.hidden[tokens], self._at.weights[tokens, ranks].float()
        return torch.cat([own, self._common]), shares(weights, len(self._common))

    def _inner(
        self, expert: int, down: torch.Tensor, first: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What each level of an expert's last matrix should come to, now that the `first` ones
        `[levels, matrices, width, H]` are what they are, and the second moments of what it
        receives. The full level's are taken as they were: it has little to make up for."""
        x, share = self._tokens(expert, max(LEARNT, LEARNT_PER_COLUMN * down.shape[1]))
        right = expert_inner(self._module, expert, x) * share[:, None]
        received = [
            expert_inner(self._module, expert, x, matrices) * share[:, None]
            for matrices in first[:-1]
        ]
        moments = torch.stack([inner.T @ inner for inner in [*received, right]])
        wanted = torch.stack([right.T @ inner for inner in [*received, right]])
        return made_up_for(down, moments, wanted), moments

    def _record(
        self,
        i: int,
        w: dict[str, np.ndarray],
        names: list[str],
        first: Quantised,
        down: Quantised,
    ) -> np.ndarray:
        places = range(i * len(names), (i + 1) * len(names))
        own = {
            name: (first.codes[k], first.scale[k]) for name, k in zip(names, places, strict=True)
        }
        own["down"] = down.codes[i], down.scale[i]
        vectors = {name: vector for name, vector in w.items() if is_bias_or_norm(name)}
        return codes_record(self._layout, self._encoding, own, vectors)


def in_groups_that_fit(
    items: range, at_once: int, work: Callable[[range], list[Done]]
) -> Iterator[Done]:
    """What `work` makes of one group of `items` after another, of up to `at_once`; of half as many
    from where the device runs out of memory (`torch.OutOfMemoryError`). A `PrepError` if one alone
    does not fit."""
    first = items.start
    while first < items.stop:
        group = items[first - items.start :][:at_once]
        try:
            done = work(group)
        except torch.OutOfMemoryError as error:
            if len(group) == 1:
                raise PrepError(
                    "The device has too little memory to quantise even one expert "
                    f"({str(error).splitlines()[0]}); leave --device out, or free some."
                ) from error
            done, at_once = [], len(group) // 2
        else:
            first = group.stop
        torch.cuda.empty_cache()  # for groups of another size; nothing where there is no GPU
        yield from done
