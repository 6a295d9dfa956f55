"""The engine: opens a bundle, runs sequences through segments and experts, generates.

`Engine.step` is the page to read first, `Experts.run` the second. Everything below them is one of: the backbone
(`backbone`), deciding (`policies`, `scheduler`, `residency`), bytes (`store`, `reader`, `memory`), arithmetic
(`kernels`), text (`text`, `sampling`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from smoe.artifacts import Bundle, open_bundle
from smoe.artifacts.manifest import Layer, Manifest
from smoe.runtime import kernels, system
from smoe.runtime.backbone import LARGE, Backbone, Sequence, Values, ort_value
from smoe.runtime.budget import MemoryPlan, chunk_tokens, parse_size, plan_memory, show_size
from smoe.runtime.cache import storage
from smoe.runtime.choose.priced import CAP
from smoe.runtime.errors import EngineError
from smoe.runtime.experts import Experts, Routed
from smoe.runtime.options import Policies, tables_bytes
from smoe.runtime.sampling import Sampler, Sampling
from smoe.runtime.stats import Stats
from smoe.runtime.text import StopWhen, Stream, Text

DEFAULT = Policies()
MOST_LOSS = 1.0  # nats per token: far beyond what leaves a text readable


@dataclass(frozen=True)
class Token:
    """A generated token. `text` may be empty while a character or a stop string is undecided; joined it is the text."""

    id: int
    text: str


class Engine:
    """One bundle in memory. Use it from one thread; close it, or use it in a `with`."""

    def __init__(
        self,
        bundle: Bundle,
        plan: MemoryPlan,
        threads: int | None = None,
        level: int | None = None,
        policies: Policies = DEFAULT,
        io: str | None = None,
    ):
        path, manifest = bundle.path, bundle.manifest
        self.bundle, self.path, self.manifest = bundle, path, manifest
        self.plan, self.context, self.policies = plan, plan.context, policies
        self.stats = Stats()
        self.text = Text(path, manifest.files)
        self._turn = 0  # counts what has used the sequence, so that a paused generation notices
        self._kernels = kernels.choose(threads=threads)
        self._backbone = Backbone(path, manifest, threads)
        self._sequence = Sequence(manifest.backbone.state, plan.context)
        self.reading = storage.choose(bundle, level, io, plan)
        self._shards = storage.Shards(bundle, level, self.reading.io)
        try:
            self._experts = Experts(
                manifest, plan, self._shards, self._kernels, policies, bundle.tables, self.stats
            )
        except BaseException:
            self._shards.close()
            raise
        self._pinned = ""

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
    ) -> Engine:
        """Open the bundle at `path` within `memory` (bytes, or text like "64MiB"; None: all experts resident) for
        sequences of up to `context` tokens (None: 2048, or what the model was made for if that is less). `threads`
        run the backbone (None: as many as pay, by the size of each segment's weights) and the experts (None: all that
        this process may use). `level` is how many planes of every expert are read (None: all; fewer is lossy).
        `policies` say what stays, what stands in and what is read ahead where memory does not hold all experts; `io` is
        "direct" (past the page cache) or "buffered" (None: by a short measurement).

        A damaged bundle, or one without such a level, is a `BundleError`, a budget that is too small an `EngineError`
        that names the minimum, and so are policies that have no effect or cannot work.
        """
        bundle = open_bundle(path)
        plan = _plan(bundle, memory, context, level, tables_bytes(policies, bundle))
        _check(policies, plan, bundle.manifest)
        try:
            engine = cls(bundle, plan, threads, level, policies, io)
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
        self._experts.fill(self.policies.warm)
        if self.plan.capacity == self.plan.experts:
            self._pinned = f", {system.pin(self._experts.places.rows)}"
        self.reset_stats()

    def reset_stats(self) -> None:
        """Count from zero."""
        self.stats = self._experts.stats = Stats()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards. The engine cannot be used afterwards."""
        self._experts.close()
        self._shards.close()

    @property
    def lossless(self) -> bool:
        """Whether the logits are those of all experts at their full level."""
        return self.policies.lossless and self._shards.level == len(self._shards.layouts[0].levels)

    def mode_lines(self) -> list[str]:
        """Every automatic choice with its reason, for people."""
        experts, model = self.manifest.experts, self.manifest.model
        refused = [layer.routing_refusal for layer in self.manifest.layers if layer.routing is None]
        return [
            f"model: {model.model_type}, {len(self.manifest.layers)} MoE layers, experts {experts.encoding}"
            f"{self._level_line()}, backbone {self.manifest.backbone.precision}, context {self.context}",
            f"kernels: {self._kernels.name} ({self._kernels.reason}), up to {self._kernels.threads} threads",
            _threads_line(self._backbone.threads),
            *self.plan.lines(self.policies.eviction),
            f"reads: {self.reading.io} ({self.reading.reason}){self._pinned}",
            *self._policy_lines(),
            *([f"substitution: not possible with this model: {refused[0]}"] if refused else []),
        ]

    def _policy_lines(self) -> list[str]:
        if self.plan.capacity == self.plan.experts:
            return []
        p, level = self.policies, self._shards.level
        beside = f" than level {level}" if level < len(self._shards.layouts[0].levels) else ""
        return [
            f"policies: eviction {p.eviction}{' in shares by layer' if p.shares else ''}, "
            f"{'warm' if p.warm else 'cold'} start, prefetch {p.prefetch}, "
            + (
                f"at most {p.loss} nats per token for reading less{beside}, {CAP:.0f} tokens' worth saved up"
                if p.loss
                else f"substitution {p.substitution}"
            )
            + (" (lossless)" if self.lossless else " (lossy)")
        ]

    def _level_line(self) -> str:
        levels = len(self._shards.layouts[0].levels)
        return f" (level {self._shards.level} of {levels})" if levels > 1 else ""

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, sequence: Sequence, ids: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Consume `ids` int64 `[T]`; the logits float32 `[len(keep), vocabulary]` at positions `keep` int64 of them.

        A step that fails leaves the sequence empty and the engine usable.
        """
        values = self._backbone.begin(sequence, ids, keep)
        try:
            for index, layer in enumerate(self.manifest.layers):
                self._backbone.run(index, values, sequence)
                values[layer.wires.output] = self._mixture(index, values, sequence)
            self._backbone.run(len(self.manifest.layers), values, sequence)
        except BaseException:  # an interrupt too: some segments have moved on, others have not
            sequence.reset()
            raise
        sequence.ids.extend(ids.tolist())
        logits = values["logits"].numpy()[0]
        return logits if len(logits) == len(keep) else logits[keep]

    def _mixture(self, index: int, values: Values, sequence: Sequence) -> ort.OrtValue:
        """What the experts of one layer give."""
        wires = self.manifest.layers[index].wires
        shape = values[wires.hidden].shape()

        def foresight(partial: np.ndarray) -> Routed:
            """The next layer's routing, if this layer's output were `partial`."""
            started = time.perf_counter()
            ahead = values | {wires.output: ort_value(partial.reshape(shape))}
            self._backbone.run(index + 1, ahead, sequence, keep=False)
            routed = _routed(index + 1, self.manifest.layers[index + 1], ahead)
            self.stats.foresight_seconds += time.perf_counter() - started
            return routed

        routed = _routed(index, self.manifest.layers[index], values)
        return ort_value(self._experts.run(index, routed, foresight).reshape(shape))

    # -- what users call -------------------------------------------------------------------------------------------

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
    ) -> Iterator[Token]:
        """Tokens as they are made, up to `max_new_tokens`, an end token (which is yielded, without text) or `stop`.

        With `reuse`, what the prompt shares with the call before is not computed again: the turns of a conversation
        keep their state. Leaving the loop early cancels; the engine stays usable.
        """
        ids = self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        how = Sampling(temperature, top_k, top_p, seed)
        stop = stop or StopWhen()
        if max_new_tokens < 1:
            raise EngineError(f"max_new_tokens is {max_new_tokens}; at least 1 is wanted.")
        checked = self._checked_ids(ids, max_new_tokens)
        stream = Stream(self.text, stop.strings)
        return self._generate(checked, max_new_tokens, Sampler(how), stop, stream, reuse)

    def _generate(
        self,
        ids: np.ndarray,
        count: int,
        sampler: Sampler,
        stop: StopWhen,
        stream: Stream,
        reuse: bool,
    ) -> Iterator[Token]:
        ends = self.manifest.model.end_ids if stop.ids is None else stop.ids
        self.stats.finish = "cancelled"  # until proven otherwise: the caller may leave the loop
        logits = self._prefill(ids, reuse)
        turn = self._turn
        for made in range(1, count + 1):
            token = sampler.draw(logits)
            text = "" if token in ends else stream.push(token)
            last = (
                "end"
                if token in ends
                else "stop"
                if stream.stopped
                else "length"
                if made == count
                else ""
            )
            self.stats.new_tokens += 1
            if last:
                self.stats.finish = last
                yield Token(token, text + ("" if stream.stopped else stream.finish()))
                return
            yield Token(token, text)
            if self._turn != turn:
                raise EngineError(
                    "Another call used the engine while this generation was paused; open a second engine."
                )
            logits = self._decode(token)

    def logits(self, ids: SequenceOf[int] | np.ndarray) -> np.ndarray:
        """Logits at every position of `ids`, from a prefill: float32 `[T, vocabulary]`. For evaluation."""
        checked = self._checked_ids(ids)
        self._turn += 1
        self._sequence.rewind(0)
        return np.concatenate(
            [
                self.step(self._sequence, part, np.arange(len(part)))
                for part in self._chunks(checked)
            ]
        )

    def score(
        self, ids: SequenceOf[int] | np.ndarray, prompt: int = 1, reuse: bool = False
    ) -> Iterator[np.ndarray]:
        """The same token by token, through the decode path: logits float32 `[vocabulary]` after the first `prompt` ids,
        which are read at once, and after each further one. `reuse` as in `generate`."""
        checked = self._checked_ids(ids)
        if not 1 <= prompt <= len(checked):
            raise EngineError(
                f"A prompt of {prompt} tokens was asked for; these are 1 to {len(checked)} of them."
            )
        return self._score(checked, prompt, reuse)

    def _score(self, ids: np.ndarray, prompt: int, reuse: bool) -> Iterator[np.ndarray]:
        yield self._prefill(ids[:prompt], reuse)
        turn = self._turn
        for token in ids[prompt:]:
            if self._turn != turn:
                raise EngineError(
                    "Another call used the engine while this scoring was paused; open a second engine."
                )
            yield self._decode(token)

    # -- the parts of a generation -----------------------------------------------------------------------------------

    def _prefill(self, ids: np.ndarray, reuse: bool) -> np.ndarray:
        """Make the sequence hold `ids`; the logits float32 `[vocabulary]` at the last of them."""
        started = time.perf_counter()
        self._turn += 1
        self._sequence.rewind(min(_shared(self._sequence.ids, ids), len(ids) - 1) if reuse else 0)
        rest = ids[self._sequence.length :]
        for part in self._chunks(rest):
            logits = self.step(self._sequence, part, np.array([len(part) - 1]))
        self.stats.prompt_tokens += len(rest)
        self.stats.prefill_seconds += time.perf_counter() - started
        return logits[-1]

    def _decode(self, token: int) -> np.ndarray:
        started = time.perf_counter()
        logits = self.step(self._sequence, np.array([token]), np.array([0]))[0]
        self.stats.decode_steps += 1
        self.stats.decode_seconds += time.perf_counter() - started
        return logits

    def _chunks(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        chunk = chunk_tokens(self.manifest)
        for start in range(0, len(ids), chunk):
            yield ids[start : start + chunk]

    def _checked_ids(self, ids: SequenceOf[int] | np.ndarray, more: int = 0) -> np.ndarray:
        """`ids` as int64 `[T]`, if they and `more` new tokens fit the vocabulary and the context."""
        if self._shards.closed:
            raise EngineError("This engine is closed; open the bundle again.")
        try:
            array, vocabulary = np.asarray(ids), self.manifest.model.vocabulary
        except (ValueError, OverflowError) as error:
            raise EngineError("Token ids must be a flat sequence of integers.") from error
        if array.size == 0:
            raise EngineError("The prompt is empty; give at least one token.")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise EngineError("Token ids must be a flat sequence of integers.")
        if not (0 <= array.min() and array.max() < vocabulary):
            raise EngineError(
                f"Token ids go from {array.min()} to {array.max()}; this model has 0 to {vocabulary - 1}."
            )
        if len(array) + more > self.context:
            raise EngineError(
                f"{len(array)} prompt tokens and {more} new ones are more than the context of {self.context}; shorten "
                f"the prompt, ask for fewer tokens, or open the bundle with a longer context "
                f"(this model takes up to {self.manifest.model.context})."
            )
        return array.astype(np.int64)


def _threads_line(threads: list[int]) -> str:
    counts = {n: threads.count(n) for n in sorted(set(threads))}
    shown = ", ".join(f"{count} segments on {n}" for n, count in counts.items())
    return f"backbone threads: {shown} (a second thread pays from weights of {show_size(LARGE)} on, unless told)"


def _plan(
    bundle: Bundle, budget: str | int | None, context: int | None, level: int | None, tables: int
) -> MemoryPlan:
    return plan_memory(
        bundle, None if budget is None else parse_size(budget), context, level, tables
    )


def _check(policies: Policies, plan: MemoryPlan, manifest: Manifest) -> None:
    """Refuse what would have no effect or cannot work."""
    if (
        plan.capacity == plan.experts
        and policies != DEFAULT
        and isinstance(policies.substitution, str)
    ):
        raise EngineError(
            f"All {plan.experts} experts fit into memory, so that policies for missing ones have no effect; leave them "
            f"out, or state less memory than {show_size(plan.total)}."
        )
    if not 0 <= policies.loss <= MOST_LOSS:
        raise EngineError(
            f"A loss of {policies.loss} nats per token was asked for; it goes from 0 to {MOST_LOSS}."
        )
    if policies.loss and policies.substitution != "none":
        raise EngineError(
            f"Substitution {policies.substitution} and a loss budget exclude each other: what stands in for a missing "
            "expert is decided by one of them. Leave one out."
        )
    most = max(layer.top_k for layer in manifest.layers)
    share = plan.capacity // len(manifest.layers)
    if policies.shares and share < most:
        raise EngineError(
            f"Shares by layer cannot work with {plan.capacity} resident experts: {share} for each of "
            f"{len(manifest.layers)} layers, and a token uses {most}; leave them out, or state at least "
            f"{show_size(plan.fixed + most * len(manifest.layers) * plan.record, up=True)}."
        )


def _routed(index: int, layer: Layer, values: Values) -> Routed:
    """What segment `index` says of its tokens, if it is what the manifest says: graphs come from the bundle, and what
    they give is as untrusted as the rest of it."""
    wires, k = layer.wires, layer.top_k
    hidden, ids, weights = (
        values[name].numpy() for name in (wires.hidden, wires.ids, wires.weights)
    )
    tokens = hidden.size // layer.hidden
    scored = (
        [] if layer.routing is None else [values[wires.scores].numpy(), values[wires.raw].numpy()]
    )
    if (
        (hidden.dtype, ids.dtype, weights.dtype) != (np.float32, np.int64, np.float32)
        or (hidden.size, ids.size, weights.size) != (tokens * layer.hidden, tokens * k, tokens * k)
        or not (ids.size and 0 <= ids.min() and ids.max() <= layer.experts)
        or any((s.dtype, s.size) != (np.float32, tokens * layer.experts) for s in scored)
    ):
        raise EngineError(
            f"Segment {index} gives hidden {hidden.dtype} {hidden.shape}, ids {ids.dtype} {ids.shape} and weights "
            f"{weights.dtype} {weights.shape}, which is not what layer {index} of the manifest takes; copy the bundle "
            "again, or build it again."
        )
    scores, raw = (s.reshape(tokens, layer.experts) for s in scored) if scored else (None, None)
    return Routed(
        hidden.reshape(tokens, layer.hidden),
        ids.reshape(tokens, k),
        weights.reshape(tokens, k),
        scores,
        raw,
    )


def _shared(held: list[int], ids: np.ndarray) -> int:
    """How many tokens two sequences share at their start."""
    n = min(len(held), len(ids))
    differ = np.flatnonzero(np.asarray(held[:n], np.int64) != ids[:n])
    return int(differ[0]) if len(differ) else n
