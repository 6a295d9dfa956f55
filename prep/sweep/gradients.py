"""How strongly the model's own predictions depend on the outputs of its experts: the gradient at
every layer's experts.

At every position labels are drawn from the model's own distribution, independently; g is the
gradient of the sum of their log-likelihoods at the experts' output. A small perturbation d of that
output then costs E[(g . d)^2] / 2 nats of KL divergence, summed over all positions that it reaches
(Fisher information).

The rows go forward with all other text of a sweep, the backbone under autograd and a layer's
experts one node of its graph. Then every draw walks back, and all of them meet at each layer's
experts, which are read for the second time: there g is complete, and goes back through them too.
What autograd saves for the way back lies in a file, but for the first of it, so that memory does
not grow with the text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.ends import Ends
from smoe.prep.checkpoint.seam import ExpertsModule, expert_geometry, expert_outputs, slots_of
from smoe.prep.errors import NotDifferentiableError
from smoe.prep.progress import Progress
from smoe.prep.sweep.forward import BATCH, AtExperts, Visitor, batches_of
from smoe.prep.sweep.passes import Pass

IN_MEMORY = 64 << 20  # bytes that are saved for the way back and not in the file
SMALL = 64 << 10  # bytes of a tensor that is never worth the file
LOGITS = 64 << 20  # bytes of the logits of one pass, if one row does not have more


class Backward:
    """Rows of token ids int64 `[n, length]` that a sweep takes forward and then `draws` times back;
    `observers` visit each layer on that way, last first, with `gradients`.

    `refusal` is why the model cannot be differentiated, if it cannot. Files lie in `directory`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: np.ndarray,
        draws: int,
        seed: int,
        observers: Sequence[Visitor],
        directory: Path | None = None,
    ):
        self.refusal = ""
        self._checkpoint, self._rows, self._observers = checkpoint, rows, observers
        self._draws, self._seed, self._directory = draws, seed, directory
        self._graphs: list[_Graph] = []
        self._saved: SavedTensors | None = None

    def passes(self, device: str) -> list[Pass]:
        """The passes forward."""
        self._saved = SavedTensors(self._checkpoint.model, self._directory)
        row = self._rows.shape[1] * self._checkpoint.config.vocab_size * 4
        batches = batches_of(list(self._rows), max(1, min(BATCH, LOGITS // row)))
        self._graphs = [_Graph(self._checkpoint, b, device, self._saved) for b in batches]
        return list(self._graphs)

    def walk_back(self, device: str, ends: Ends, progress: Progress) -> None:
        """All draws of all passes back, meeting at every layer's experts."""
        assert self._saved is not None
        generators = [_generator(device, self._seed, draw) for draw in range(self._draws)]
        running = [[_Back(graph, g) for g in generators] for graph in self._graphs]
        try:
            with progress.stage("gradients"):
                self._meet(running, device, ends, progress)
        except NotDifferentiableError as error:
            self.refusal = str(error)
        finally:
            for back in (back for draws in running for back in draws):
                back.abandon()
            self._graphs.clear()
            self._saved.close()

    def _meet(
        self, running: list[list[_Back]], device: str, ends: Ends, progress: Progress
    ) -> None:
        layers = len(self._checkpoint.layers)
        count = progress.counter("gradients", "layers", layers)
        arrived = [[back.go() for back in draws] for draws in running]
        ends.leave()
        for done, layer in enumerate(reversed(range(layers)), 1):
            self._refuse_unreached(layer, arrived)
            received = [graph.received(layer) for graph in self._graphs]
            with contextlib.ExitStack() as stack:
                with progress.stage("read"):
                    module = stack.enter_context(self._checkpoint.experts(layer, device))
                at = _together(layer, module, received, arrived)
                for observer in self._observers:
                    with progress.stage(observer.name):
                        observer.visit(at)
                at_hidden, at_weights = _through_experts(at)
                places = list(at.passes())
                del at
            arrived = [
                [
                    back.go((at_hidden[draw, tokens], at_weights[draw, tokens]))
                    for draw, back in enumerate(draws)
                ]
                for draws, tokens in zip(running, places, strict=True)
            ]
            count.done(done)

    def _refuse_unreached(self, layer: int, arrived: list[list[tuple | None]]) -> None:
        if any(word is None or word[0] != layer for draws in arrived for word in draws):
            name = self._checkpoint.layers[layer][0]
            raise NotDifferentiableError(f"the gradient of the logits does not reach {name}")


def _generator(device: str, seed: int, draw: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed * 1009 + draw)


def _together(
    layer: int,
    module: ExpertsModule,
    received: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    arrived: list[list[tuple[int, torch.Tensor]]],
) -> AtExperts:
    """All passes' tokens at a layer. Empties `arrived`: gradients are the largest there is."""
    hidden, ids, weights = (torch.cat(parts) for parts in zip(*received, strict=True))
    at = AtExperts(
        layer=layer,
        module=module,
        starts=(0, *np.cumsum([len(part[1]) for part in received]).tolist()),
        hidden=hidden,
        ids=ids,
        weights=weights,
    )
    gradients = hidden.new_empty(len(arrived[0]), *hidden.shape)
    for draws, tokens in zip(arrived, at.passes(), strict=True):
        for draw in range(len(draws)):
            gradients[draw, tokens] = draws[draw][1].reshape(-1, hidden.shape[-1])
            draws[draw] = (layer, gradients)
    return dataclasses.replace(at, gradients=gradients)


def _through_experts(at: AtExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """Per draw, gradients at what the experts received `[draws, T, H]` and at the mixing weights
    `[draws, T, k]`."""
    assert at.gradients is not None
    at_hidden = torch.zeros_like(at.gradients)
    at_weights = at.weights.new_zeros(len(at.gradients), *at.weights.shape, dtype=torch.float32)
    for expert, tokens, slots in slots_of(at.ids, expert_geometry(at.module)[0]):
        with torch.enable_grad():
            x = at.hidden[tokens].detach().requires_grad_()
            y = expert_outputs(at.module, expert, x)
        w = at.weights.reshape(-1)[slots, None].float()
        for draw, g in enumerate(at.gradients):
            at_weights[draw].view(-1)[slots] = (g[tokens] * y.detach()).sum(-1)
            (at_x,) = torch.autograd.grad(y, x, w * g[tokens], retain_graph=True)
            at_hidden[draw].index_add_(0, tokens, at_x)
    return at_hidden, at_weights


class SavedTensors:
    """Where autograd keeps what it needs on the way back: the first `IN_MEMORY` bytes in memory,
    the rest in a file without a name in `directory`. The model's own weights stay where they are.
    """

    def __init__(self, model: torch.nn.Module, directory: Path | None):
        self._weights = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  see `close`
        self._held = 0

    def put(self, tensor: torch.Tensor):
        """Keep a tensor as it is now; `get` takes what this returns."""
        storage = tensor.untyped_storage()
        weight = self._weight(storage.data_ptr())
        if weight is not None:  # by name, so to say: it may leave memory, and come again
            return _View(weight, tensor.shape, tensor.stride(), tensor.storage_offset())
        if storage.nbytes() < tensor.nbytes:
            return tensor.detach()
        if tensor.nbytes < SMALL or self._held + tensor.nbytes <= IN_MEMORY:
            self._held += tensor.nbytes
            return tensor.detach().clone()
        start, copy = self._file.seek(0, 2), tensor.detach().cpu().clone()  # dense
        flat = copy.as_strided((copy.numel(),), (1,)).view(torch.uint8).numpy()
        self._file.write(flat.data)
        return start, copy.shape, copy.stride(), copy.dtype, tensor.device

    def get(self, packed) -> torch.Tensor:
        """The tensor again."""
        if isinstance(packed, torch.Tensor):
            return packed
        if isinstance(packed, _View):
            whole = packed.weight.detach()
            return whole.as_strided(packed.shape, packed.strides, packed.offset)
        start, shape, strides, dtype, device = packed
        flat = torch.empty(math.prod(shape), dtype=dtype)
        self._file.seek(start)
        self._file.readinto(flat.view(torch.uint8).numpy().data)
        return flat.as_strided(shape, strides).to(device)

    def close(self) -> None:
        self._file.close()

    def _weight(self, address: int) -> torch.Tensor | None:
        """The model's own tensor that lies there. Addresses are looked up anew: weights move."""
        found = (t for t in self._weights if t.untyped_storage().data_ptr() == address)
        return next(found, None)


@dataclass(frozen=True)
class _View:
    """A view of one of the model's own weights."""

    weight: torch.Tensor
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int | torch.SymInt


class _Graph(Pass):
    """A pass forward under autograd; `result` is what `_OwnScore` gives."""

    result: torch.Tensor

    def __init__(self, checkpoint: Checkpoint, batch: np.ndarray, device: str, saved: SavedTensors):
        super().__init__(partial(self._forward, checkpoint.model, batch, device))
        self.anchor = torch.zeros(0, requires_grad=True, device=device)
        self._saved = saved
        self._received: list[tuple] = []

    def _forward(self, model: torch.nn.Module, batch: np.ndarray, device: str) -> torch.Tensor:
        saving = torch.autograd.graph.saved_tensors_hooks(self._saved.put, self._saved.get)
        with torch.enable_grad(), saving, _refusing():
            logits = model(input_ids=torch.from_numpy(batch).to(device), use_cache=False).logits
            return _OwnScore.apply(logits)

    def experts(self, layer, hidden, ids, weights):
        x = hidden.detach().reshape(-1, hidden.shape[-1])
        self._received.append((self._saved.put(x), ids, weights.detach()))
        return _Experts.apply(super().experts, layer, self.anchor, hidden, ids, weights)

    def received(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a layer's experts received: hidden `[T, H]`, ids and weights `[T, k]`."""
        hidden, ids, weights = self._received[layer]
        self._received[layer] = (None, None, None)
        return self._saved.get(hidden), ids, weights


class _Back(Pass):
    """One draw's way back through the graph of a pass; pauses with (layer, gradient)."""

    def __init__(self, graph: _Graph, generator: torch.Generator):
        super().__init__(partial(self._walk, graph))
        self._generator = generator

    def _walk(self, graph: _Graph) -> None:
        # In this thread, on an accelerator too: autograd's own is one for all draws, and would wait
        # in the first of them for ever.
        with _refusing(), torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(graph.result, graph.anchor, retain_graph=True)

    def own_gradient(self, logits: torch.Tensor) -> torch.Tensor:
        """The gradient at `logits` `[n, length, V]` of the log-likelihood of labels drawn from
        them."""
        gradient = torch.empty_like(logits)
        for row, filled in zip(logits, gradient, strict=True):  # these are large: one at a time
            p = row.float().softmax(-1)
            labels = torch.multinomial(p, 1, generator=self._generator)
            filled.copy_(p.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=p.dtype)))
        return gradient


class _Experts(torch.autograd.Function):
    """One layer's experts as a node of the backbone's graph."""

    @staticmethod
    def forward(ctx, run, layer, anchor, hidden, ids, weights):
        ctx.layer, ctx.shape = layer, hidden.shape
        return run(layer, hidden.detach(), ids, weights.detach())

    @staticmethod
    def backward(ctx, gradient):
        at_hidden, at_weights = Pass.current().pause((ctx.layer, gradient))
        anchor = gradient.new_zeros(0)
        return None, None, anchor, at_hidden.reshape(ctx.shape), None, at_weights


class _OwnScore(torch.autograd.Function):
    """Stands for the log-likelihood of drawn labels; its value is of no use, its gradient is drawn
    anew each time."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        back = Pass.current()
        assert isinstance(back, _Back)
        return back.own_gradient(logits)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Autograd's own word for a model that cannot be differentiated becomes ours."""
    try:
        yield
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
    except RuntimeError as error:
        raise NotDifferentiableError(str(error).strip().split("\n")[0]) from error
