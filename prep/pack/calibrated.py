"""One layer's experts to nested codes, a few at a time, by what the sweep brings them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

from smoe.artifacts import nested
from smoe.artifacts.encodings import is_bias_or_norm
from smoe.artifacts.layout import RecordLayout
from smoe.prep.checkpoint.seam import expert_geometry, expert_inner, expert_weights
from smoe.prep.errors import PrepError
from smoe.prep.pack.encode import codes_record
from smoe.prep.pack.quantise import OWN, Quantised, quantise, second_moment
from smoe.prep.sweep.forward import AtExperts

COMMON = 256  # tokens of the layer at large, spread over the text, in every second moment
# Bytes of second moments in memory. The rest of what it takes is up to twelve times as much, and a
# CPU gains nothing from more experts at once; a GPU, whose columns go one by one, does.
AT_ONCE_CPU, AT_ONCE_GPU = 64 << 20, 1 << 30

Done = TypeVar("Done")


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

    def report(self) -> str:
        """For people: the loss of output by level, over all experts, and where text was narrow."""
        shown = []
        for matrices, lost in self._lost.items():
            shown.append(
                f"{matrices} " + ", ".join(f"{share:.2%}" for share in np.mean(lost, axis=0))
            )
        narrow = f"; {self.hardly} of {self.experts} experts hardly reached" if self.hardly else ""
        return "output lost by level: " + "; ".join(shown) + narrow

    def _some(self, experts: range) -> list[np.ndarray]:
        weights = [expert_weights(self._module, e) for e in experts]
        moments = [self._moments(e) for e in experts]
        first: list[str] = [name for name in ("gate", "up") if name in weights[0]]
        inputs, inner = (torch.stack(each) for each in zip(*moments, strict=True))
        del moments
        codes = self._quantised(first, weights, inputs)
        codes |= self._quantised(["down"], weights, inner)
        for matrices, lost in ((first, codes[first[0]].error), (["down"], codes["down"].error)):
            self._lost.setdefault("+".join(matrices), []).append(lost)
        return [self._record(i, w, codes) for i, w in enumerate(weights)]

    def _record(self, i: int, w: dict[str, np.ndarray], codes: dict[str, Quantised]) -> np.ndarray:
        vectors = {name: vector for name, vector in w.items() if is_bias_or_norm(name)}
        own = {name: (matrix.codes[i], matrix.scale[i]) for name, matrix in codes.items()}
        return codes_record(self._layout, self._encoding, own, vectors)

    def _quantised(
        self, names: list[str], weights: list[dict], moments: torch.Tensor
    ) -> dict[str, Quantised]:
        """Matrices with the same inputs, at once."""
        stacked = torch.stack(
            [torch.cat([torch.from_numpy(w[name]) for name in names]) for w in weights]
        )
        split = self._encoding.of(names[0])
        stacked = stacked.to(self._common.device)
        result = quantise(stacked, moments, split, self._encoding.group)
        parts = zip(
            names,
            np.split(result.codes, len(names), 1),
            np.split(result.scale, len(names), 1),
            strict=True,
        )
        return {name: Quantised(codes, scale, result.error) for name, codes, scale in parts}

    def _moments(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Second moments of what the first matrices and the last one of an expert receive."""
        tokens, ranks = torch.where(self._at.ids == expert)
        own, w = self._at.hidden[tokens], self._at.weights[tokens, ranks].float()
        own_inner = expert_inner(self._module, expert, own)
        common_inner = expert_inner(self._module, expert, self._common)
        return (
            second_moment(own, w, self._common),
            second_moment(own_inner, w, common_inner),
        )


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
