"""The engine: opens a bundle within a memory budget, generates from it, and scores text.

`Model.run` (model.py) is the page to read for what a token goes through; this one is what users
call. Below are the backbone (`backbone`), the experts' cache (`cache/`), deciding (`choose/`),
arithmetic (`kernels/`), text (`text`, `sampling`)."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import numpy as np

from smoe.artifacts import Bundle, open_bundle
from smoe.runtime import allowance, kernels, system
from smoe.runtime.assemble import assemble, fill
from smoe.runtime.budget import MemoryPlan, Requests
from smoe.runtime.cache import storage
from smoe.runtime.draft.decoder import Going
from smoe.runtime.draft.named import draft_bytes
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import AUTO, Execution, divide
from smoe.runtime.generation import Allowed, Continuation, Token
from smoe.runtime.ledger import Ledger
from smoe.runtime.model import Prefill, Prompt
from smoe.runtime.options import (
    DEFAULT,
    Policies,
    check_policies,
    policy_lines,
    tables_bytes,
)
from smoe.runtime.sampling import Bins, Sampler, Sampling
from smoe.runtime.stats import Stats
from smoe.runtime.step import Phase, Sequence, Span, Step, checked_ids, shared_start
from smoe.runtime.text import StopWhen, Stream, Text
from smoe.runtime.trace import PLAIN, Makers


class Engine:
    """One bundle in memory. Use it from one thread at a time; close it, or use it in a `with`.

    `bundle` is what was opened, `plan` what its memory is used for, `stats` what it counted, `text`
    its tokenizer, `sequence` what a generation may go on from (`session`)."""

    def __init__(
        self,
        bundle: Bundle,
        plan: MemoryPlan,
        threads: int | None = None,
        level: int | None = None,
        policies: Policies = DEFAULT,
        io: str | None = None,
        execution: Execution = AUTO,
        makers: Makers = PLAIN,
    ):
        self.bundle, self.path, self.manifest = bundle, bundle.path, bundle.manifest
        self.plan, self.context, self.policies = plan, plan.context, policies
        self.stats, self.text = Stats(), Text(bundle.path, self.manifest.files)
        self._process, self._using, self._bins = os.getpid(), threading.RLock(), Bins()
        self._turn = 0  # counts what has used the sequence, so that a paused generation notices
        self._kernels = kernels.choose(threads=threads)
        self.division = divide(self.manifest, bundle.program, execution, bundle.graphs)
        where = bundle.path, self.manifest, threads
        self._backbone = makers.backbone(*where, self.division, self._kernels)
        self.reading = storage.choose(bundle, level, io, plan)
        self._shards = storage.Shards(bundle, level, self.reading.io, self.stats)
        self.level = self._shards.level
        try:
            parts = self._backbone, self._kernels, self._shards
            made = assemble(bundle, plan, policies, self.division, *parts, self.stats, makers)
        except BaseException:
            self._shards.close()
            raise
        self._model, self._experts, self._cache = made.model, made.experts, made.cache
        self._new_ledger, self._decoder = made.new_ledger, made.decoder
        self.sequence, self._pinned = self.new_sequence(), ""

    @classmethod
    def open(
        cls,
        path: str | Path,
        memory: str | int | None = None,
        context: int | None = None,
        threads: int | None = None,
        level: int | None = None,
        policies: Policies = DEFAULT,
        io: str | None = None,
        beside: str | int | None = None,
        executor: str = "auto",
        state: str | None = None,
        requests: int = 1,
        held: int | None = None,
        makers: Makers = PLAIN,
    ) -> Engine:
        """Open the bundle at `path` in a process that holds no more than `memory` in all (bytes, or
        text like "64MiB"; None: what machine and cgroup leave), or no more than `beside` above what
        it holds now, for sequences of up to `context` tokens (None: 2048, or what the model was
        made for if that is less). `threads` run backbone and experts (None: as many as there are
        processor cores for; ONNX Runtime's segments as many as pay). `level` is how many planes of
        every expert are read (None: all; fewer is lossy). `policies` say what stays, what stands in
        and what is read ahead where memory does not hold all experts; `io` is "direct" (past the
        page cache) or "buffered" (None: by a measurement). `executor` runs the backbone: the
        bundle's "program", "onnx", or "auto", the program where there is one; `state` is what the
        program keeps of a sequence: "f32", "f16", "int8" (None: the bundle's; narrower is lossy).
        There is memory for so many `requests` at once (`serve.Loop`), which hold `held` tokens
        together (None: a whole context each). `makers` are what its parts are made by
        (`trace.traced`: so that they say what they do).

        A damaged bundle, or one without such a level, is a `BundleError`, a budget that is too
        small an `EngineError` that names the minimum, and so are policies that cannot work."""
        bundle = open_bundle(path)
        tables = tables_bytes(policies, bundle) + draft_bytes(policies, bundle)
        execution = Execution(executor, state)
        many = Requests(requests, held)
        plan = allowance.allow(bundle, memory, beside, context, level, tables, execution, many)
        check_policies(policies, plan, bundle.manifest)
        try:
            engine = cls(bundle, plan, threads, level, policies, io, execution, makers)
        except MemoryError as error:
            raise EngineError(
                f"{plan.lines()[0]}: that is more than this machine gives; state less memory."
            ) from error
        try:
            engine._fill()
        except BaseException:
            engine.close()
            raise
        return engine

    def _fill(self) -> None:
        fill(self._cache, self.bundle, self.plan, self.policies.warm, self._shards.level)
        if self.plan.capacity == self.plan.experts:
            self._pinned = f", {system.pin(self._cache.rows)}"
        self.reset_stats()

    def reset_stats(self) -> None:
        """Count from zero."""
        self.stats.reset()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards, and give memory back. The engine cannot be used afterwards: a
        generation that goes on is an `EngineError`."""
        if os.getpid() != self._process:  # a fork has none of the threads to wait for
            self._shards.close()
            return
        self._experts.close()
        self._shards.close()
        if self._using.acquire(blocking=False):  # else a step is on its way, and ends first
            self.sequence = Sequence(self._backbone.new_state(1))
            system.unpin(self._cache.rows)
            self._cache.release()
            self._backbone.release()
            self._using.release()
            allowance.leave(self.plan)

    @property
    def lossless(self) -> bool:
        """Whether logits are those of all experts at full level, and of the bundle's own state."""
        whole = self.level == self.bundle.levels and not self.division.narrower
        return self.policies.lossless and whole

    def residency(self) -> list[np.ndarray]:
        """Of every layer int64 `[E]`: the level at which each expert is in memory, or 0."""
        return [self._cache.levels(layer) for layer in range(len(self.manifest.layers))]

    def mode_lines(self) -> list[str]:
        """Every automatic choice with its reason, for people."""
        manifest, level, levels = self.manifest, self.level, self.bundle.levels
        shown = f" (level {level} of {levels})" if levels > 1 else ""
        return [
            f"model: {manifest.model.model_type}, {len(manifest.layers)} MoE layers, experts "
            f"{manifest.experts.encoding}{shown}, context {self.context}",
            self._kernels.line(),
            *self._backbone.lines(),
            *self.plan.lines(self.policies.eviction),
            f"reads: {self.reading.io} ({self.reading.reason}{self._shards.line()}){self._pinned}",
            self._backbone.prompt_line(self._pieces(self.context, self.context)[0]),
            *self.plan.requests_line(self.division.needs_onnxruntime),
            *policy_lines(self.policies, self.plan, level, manifest),
        ]

    # -- sequences and steps -----------------------------------------------------------------------

    def new_sequence(self, loss: float | None = None) -> Sequence:
        """A sequence that has consumed nothing, with a state of the context's length. It may spend
        `loss` nats per token (None: what the engine was opened with), and is exact at 0."""
        return Sequence(self._backbone.new_state(self.context), *self.spending(loss))

    def spending(self, loss: float | None) -> tuple[Ledger | None, bool]:
        """The ledger of a sequence that may spend so much, and whether it is exact."""
        if loss == 0:
            return None, True
        if loss is not None and not self.policies.loss:
            raise EngineError(
                f"A loss of {loss} nats per token was asked for, and this engine spends none; open "
                "it with a loss, or leave that out."
            )
        return (None if self._new_ledger is None else self._new_ledger(loss)), False

    def step(self, step: Step) -> list[np.ndarray]:
        """`Model.step`: each span's logits. Prompts of more than one chunk go through `prefill`."""
        with self._used():
            return self._model.step(step)

    def advance(self, going: SequenceOf[Going]) -> list[list[Token] | EngineError]:
        """`Decoder.advance`: what comes of each sequence in a step."""
        with self._used():
            return self._decoder.advance(going)

    def prefill(
        self, sequence: Sequence, ids: np.ndarray, keep: int = 1, phase: Phase = Phase.PREFILL
    ) -> Prefill:
        """A prompt int64 `[T]` on its way into `sequence`, with the logits of its last `keep`
        positions. Until it is done or discarded it may hold memory of the experts."""
        return self.prefill_all([Prompt(sequence, ids, keep, phase)])

    def prefill_all(self, prompts: SequenceOf[Prompt], whole: bool = True) -> Prefill:
        """The same of several, of different sequences, which share the reads of experts. Where not
        `whole` they go piece by piece, and take no memory of the experts: another prefill may."""
        chunk, tokens = self._backbone.chunk, sum(len(one.ids) for one in prompts)
        end = max(one.sequence.length + len(one.ids) for one in prompts)
        together, memory = self._pieces(end, tokens) if whole else (1, 0)
        return Prefill(self._model, prompts, together * chunk, memory, chunk, self._used)

    def grouped(self, tokens: int, whole: bool = True) -> int:
        """Of so many tokens of prompts, how many go through the model together."""
        together, _ = self._pieces(tokens, tokens) if whole else (1, 0)
        return together * self._backbone.chunk

    def held_bytes(self, tokens: int) -> int:
        """What a sequence of so many tokens takes, at most."""
        return self.division.held_bytes(tokens, self.context)

    @property
    def grain(self) -> int:
        """Tokens that what prompts share is a whole number of: in ONNX Runtime's segments bits
        depend on how tokens are grouped."""
        return self._backbone.chunk if self.division.needs_onnxruntime else 1

    def _pieces(self, end: int, tokens: int) -> tuple[int, int]:
        """How many pieces of prompts of so many `tokens`, up to the `end` of a sequence, go through
        the model together, and the bytes that experts lend them."""
        if not self._backbone.layer_major:
            return 1, 0
        piece = self._backbone.piece_bytes(end)
        together = self.plan.pieces(-(-tokens // self._backbone.chunk), piece)
        return together, self.plan.lent_to(together, piece)

    @contextlib.contextmanager
    def _used(self, turn: int | None = None) -> Iterator[None]:
        """One thread at a time, in the process that opened the engine, and in no later `turn`."""
        if os.getpid() != self._process:
            raise EngineError(
                "This engine was opened in another process, whose reading threads are not here; "
                "open the bundle again in this one."
            )
        if self._shards.closed:
            raise EngineError("This engine is closed; open the bundle again.")
        if not self._using.acquire(blocking=False):
            raise EngineError(
                "Another thread is using this engine; take turns, or open a second engine."
            )
        try:
            if turn not in (None, self._turn):
                raise EngineError(
                    "Another call used the engine while this one was paused; open a second engine."
                )
            yield
        finally:
            self._using.release()

    # -- what users call -----------------------------------------------------------------------

    def generate(
        self,
        prompt: str | SequenceOf[int] | np.ndarray,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: StopWhen | None = None,
        reuse: bool = False,
        special: bool = False,
    ) -> Iterator[Token]:
        """Tokens as they are made, up to `max_new_tokens`, an end token (which is yielded) or
        `stop`. Special tokens, which an end token mostly is, have no text unless `special` asks
        for it.

        With `reuse`, what the prompt shares with the call before is not computed again: the turns
        of a conversation keep their state. Leaving the loop early cancels; it stays usable."""
        how = Sampling(temperature, top_k, top_p, seed)
        made = self.continuation(how, stop or StopWhen(), max_new_tokens, special=special)
        return self._generate(self._checked_ids(prompt, max_new_tokens), made, reuse)

    def continuation(
        self, how: Sampling, stop: StopWhen, count: int, logprobs: int | None = None,
        special: bool = False, allowed: Allowed | None = None,
    ) -> Continuation:  # fmt: skip
        """What draws up to `count` tokens from a sequence's logits, of those that are `allowed`."""
        ends = self.manifest.model.end_ids if stop.ids is None else stop.ids
        stream = Stream(self.text, stop.strings, special)
        sampler, draft = Sampler(how, self._bins), self._decoder.new_draft()
        return Continuation(sampler, ends, stream, count, logprobs, allowed, draft)

    def checked_prompt(self, prompt: str | SequenceOf[int] | np.ndarray, more: int) -> np.ndarray:
        """Token ids int64 `[T]` of a text, or as they are; an `EngineError` if they and `more` new
        ones are not what this engine takes."""
        model = self.manifest.model
        ids = self.text.encode(prompt) if isinstance(prompt, str) else prompt
        return checked_ids(ids, model.vocabulary, self.context, model.context, more)

    def _generate(self, ids: np.ndarray, made: Continuation, reuse: bool) -> Iterator[Token]:
        self.stats.finish = "cancelled"  # until proven otherwise: the caller may leave the loop
        logits, turn = self._prefill(ids, reuse), self._turn
        tokens = [made.take(logits)]
        while True:
            self.stats.new_tokens += len(tokens)
            self.stats.finish = made.finish or self.stats.finish
            yield from tokens
            if made.finish:
                return
            what = Going(self.sequence, made, tokens[-1].id, made.take)
            with self._used(turn):
                (came,) = self._decoder.advance([what])
            if isinstance(came, EngineError):
                raise came
            tokens = came

    def logits(self, ids: SequenceOf[int] | np.ndarray) -> np.ndarray:
        """Logits at every position of `ids`, many at once: float32 `[T, vocabulary]`. For
        evaluation: what takes shortcuts while decoding takes them here."""
        checked, sequence = self._checked_ids(ids), self.sequence
        with self._used():
            self._turn += 1
            sequence.rewind(0)
            return self.prefill(sequence, checked, len(checked), Phase.VERIFY).finish()

    def score(
        self, ids: SequenceOf[int] | np.ndarray, prompt: int = 1, reuse: bool = False
    ) -> Iterator[np.ndarray]:
        """The same token by token, through the decode path: logits float32 `[vocabulary]` after the
        first `prompt` ids, which are read at once, and after each further one. `reuse` as in
        `generate`."""
        checked = self._checked_ids(ids)
        if not 1 <= prompt <= len(checked):
            raise EngineError(
                f"A prompt of {prompt} tokens was asked for; these are 1 to {len(checked)} of them."
            )
        return self._score(checked, prompt, reuse)

    def _score(self, ids: np.ndarray, prompt: int, reuse: bool) -> Iterator[np.ndarray]:
        yield self._prefill(ids[:prompt], reuse)
        turn = self._turn
        for token in ids[prompt:].tolist():
            yield self._decode(token, turn)

    # -- the parts of a generation -------------------------------------------------------------

    def _prefill(self, ids: np.ndarray, reuse: bool) -> np.ndarray:
        """Make the sequence hold `ids`; the logits float32 `[vocabulary]` at the last of them."""
        started, sequence = time.perf_counter(), self.sequence
        with self._used():
            self._turn += 1
            shared = min(shared_start(sequence.ids, ids), len(ids) - 1) if reuse else 0
            sequence.rewind(shared)
            rest = ids[sequence.length :]
            logits = self.prefill(sequence, rest).finish()
        self.stats.prompt_tokens += len(rest)
        self.stats.prefill_seconds += time.perf_counter() - started
        return logits[-1]

    def _decode(self, token: int, turn: int) -> np.ndarray:
        """The logits float32 `[vocabulary]` after one more token, if nothing else used the sequence
        since `turn`."""
        started = time.perf_counter()
        with self._used(turn):
            span = Span(self.sequence, np.array([token]), np.array([0]), Phase.DECODE)
            (logits,) = self._model.step(Step((span,)))
        self.stats.decode_steps += 1
        self.stats.decode_seconds += time.perf_counter() - started
        return logits[0]

    def _checked_ids(self, prompt: str | SequenceOf[int] | np.ndarray, more: int = 0) -> np.ndarray:
        """As `checked_prompt`, where this engine can be used at all: that is said now, and not at
        the first token."""
        with self._used():
            return self.checked_prompt(prompt, more)
