"""Passes of text through a model: threads that pause where they reach a layer's experts."""

from __future__ import annotations

import inspect
import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from smoe.prep.sweep.held import Held
from smoe.prep.sweep.scores import Scores


class AbandonedError(BaseException):
    """In the thread of a pass that is given up; no model's `except Exception` holds it."""


class Pass:
    """Work in a thread of its own that runs only while `go` waits for it: neither a forward pass
    nor autograd's way back can be left half-way otherwise."""

    _current = threading.local()

    def __init__(self, work: Callable[[], object]):
        self.result: object = None  # what `work` returned, once `go` gave None
        self._work = work
        self._words: queue.SimpleQueue = queue.SimpleQueue()  # from the thread; None: it ended
        self._answers: queue.SimpleQueue = queue.SimpleQueue()  # to the thread
        self._pool = ThreadPoolExecutor(1)
        self._running: Future | None = None

    @classmethod
    def current(cls) -> Pass:
        """The pass whose thread this is."""
        return cls._current.value

    @classmethod
    def is_here(cls) -> bool:
        """Whether this thread is that of such a pass."""
        return isinstance(getattr(cls._current, "value", None), cls)

    def go(self, answer: object = None):
        """Start, or go on with `answer`: what the work pauses with next, None at its end. Raises
        what the work raises."""
        if self._running is None:
            self._running = self._pool.submit(self._run)
            self._running.add_done_callback(lambda _: self._words.put(None))
        else:
            self._answers.put(answer)
        word = self._words.get()
        if word is None:
            self.result = self._running.result()
        return word

    def pause(self, word: object):
        """In the thread: say `word` to who waits, and wait for the answer."""
        self._words.put(word)
        answer = self._answers.get()
        if answer is AbandonedError:
            raise AbandonedError
        return answer

    def experts(self, layer: int, hidden, ids, weights) -> torch.Tensor:
        """In the thread, from the seam: the output of a layer's experts, shaped as `hidden`."""
        return self.pause(Arrival(layer, hidden, ids, weights, None))

    def abandon(self) -> None:
        """Let the thread end, wherever it is, and wait for that."""
        self._answers.put(AbandonedError)
        self._pool.shutdown()

    def _run(self) -> object:
        self._current.value = self
        return self._work()


@dataclass(frozen=True)
class Arrival:
    """A pass at a layer's experts: hidden float `[.., H]`, ids and weights `[T, k]`."""

    layer: int
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor | None

    @property
    def tokens(self) -> torch.Tensor:
        return self.hidden.reshape(-1, self.hidden.shape[-1])


class Plain(Pass):
    """A forward pass over a batch of token ids int64 `[n, length]`."""

    result: torch.Tensor | None  # its logits, where they were asked for

    def __init__(self, model: PreTrainedModel, batch: np.ndarray, device: str, logits: bool):
        super().__init__(partial(self._forward, model, batch, device, logits))
        self.tokens = batch.size
        self.held = Held(model, batch.size * model.config.get_text_config().hidden_size)
        self._scores = Scores()

    @torch.no_grad()
    def _forward(self, model, batch, device, logits) -> torch.Tensor | None:
        options = {} if logits else fewest_logits(model)
        with self._scores, self.held:
            ids = torch.from_numpy(batch).to(device)
            result = model(input_ids=ids, use_cache=False, **options).logits
        return result[0] if logits else None

    def experts(self, layer, hidden, ids, weights):
        scores = self._scores.take(ids)
        return self.pause(Arrival(layer, hidden, ids, weights, scores))


def fewest_logits(model: torch.nn.Module) -> dict[str, int]:
    """Asks for the last position's logits where the model can: nobody reads the others, and over a
    large vocabulary they are most of the memory."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


class Shelf:
    """The hidden states of passes of so many `tokens`, float32 `[T, H]`, once and not a second time
    in the passes: while a pass waits, the memory of its own is let go."""

    def __init__(self, tokens: list[int]):
        ends = np.cumsum([0, *tokens]).tolist()
        self._places = [slice(*pair) for pair in itertools.pairwise(ends)]
        self._tokens = ends[-1]
        self.hidden = torch.empty(0)

    def take(self, number: int, hidden: torch.Tensor) -> None:
        """Keep those of a pass."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if not len(self.hidden):
            self.hidden = rows.new_empty(self._tokens, rows.shape[1])
        self.hidden[self._places[number]] = rows
        storage = hidden.untyped_storage()
        if storage.resizable() and hidden.is_contiguous() and storage.nbytes() == hidden.nbytes:
            storage.resize_(0)

    def give_back(self, number: int, hidden: torch.Tensor) -> None:
        """Before a pass goes on."""
        storage = hidden.untyped_storage()
        if not storage.nbytes():
            storage.resize_(hidden.nbytes)
            hidden.copy_(self.hidden[self._places[number]].reshape(hidden.shape))

    def clear(self) -> None:
        self.hidden = torch.empty(0)
