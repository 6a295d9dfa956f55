"""A prompt whose own tokens have probabilities, too: the logits of all of it would be more memory
than the model's, so that it is read some tokens at a time, and of each row of logits is kept what
was asked for."""

from __future__ import annotations

import numpy as np

from smoe.runtime.engine import Engine
from smoe.runtime.generation import probabilities
from smoe.runtime.model import Prefill, Prompt
from smoe.runtime.serve.request import Generation
from smoe.runtime.step import Phase

LOGITS = 8 << 20  # bytes of them that may be there at once
LEAST, MOST = 16, 128  # tokens at a time


class Scoring:
    """The prompt of `generation` on its way through `engine`, as a `model.Prefill` is. Its tokens
    are given and not drawn, so that they take the shortcuts of tokens that are decoded: what they
    cost is in the probabilities."""

    def __init__(self, engine: Engine, generation: Generation):
        self._engine, self._generation = engine, generation
        rows = LOGITS // (4 * engine.manifest.model.vocabulary)
        # In ONNX Runtime's segments whole chunks, on whose length bits depend.
        self._rows = engine.grain if engine.grain > 1 else min(max(LEAST, rows), MOST)
        self._start, self._piece = 0, self._next(0)
        self.logits = np.zeros((0, 0), np.float32)

    @property
    def done(self) -> bool:
        """Whether the sequence holds the prompt, and `logits` `[1, vocabulary]` are those after
        it."""
        return self._start == len(self._generation.ids)

    def advance(self) -> None:
        """A part of it. After a failure it has to be given up."""
        self._piece.advance()
        if not self._piece.done:
            return
        logits, ids = self._piece.logits, self._generation.ids
        self._start += len(logits)
        following = ids[self._start - len(logits) + 1 : self._start + 1].tolist()
        best = self._generation.scored or 0
        for row, token in zip(logits, following, strict=False):  # after the last one none follows
            self._generation.scores.append(probabilities(row, token, best))
        if self.done:
            self.logits = logits[-1:].copy()
        else:
            self._piece = self._next(self._start)

    def discard(self) -> None:
        """Give it up."""
        self._piece.discard()

    def _next(self, start: int) -> Prefill:
        sequence, ids = self._generation.sequence, self._generation.ids[start : start + self._rows]
        assert sequence is not None
        prompt = Prompt(sequence, ids, keep=len(ids), phase=Phase.VERIFY)
        return self._engine.prefill_all([prompt], whole=False)
