"""Selection scores: the input of the topk whose indices reach the experts, caught as the router
calls it, so that no router needs to be known."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Scores(TorchFunctionMode):
    """A context that remembers every topk of its own thread since the last `take`; no function of
    torch is replaced. Beside a pass's products its cost does not show (docs/log.md)."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[torch.Tensor, torch.Tensor]] = []  # input, indices

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.topk or func is torch.Tensor.topk:
            self._calls.append((args[0] if args else kwargs["input"], result[1]))
        return result

    def take(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The scores `[T, E]` whose topk gave `ids` int64 `[T, k]`, if there was one."""
        calls, self._calls = self._calls, []
        with torch._C.DisableTorchFunction():
            for scores, indices in reversed(calls):
                same = indices.numel() == ids.numel()
                if same and torch.equal(indices.reshape(ids.shape), ids):
                    return scores.reshape(len(ids), -1)
        return None
