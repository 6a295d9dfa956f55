"""The backbone of a step: spans cut into pieces, segment after segment, and what passes between
them.

`Model.run` asks it for what a segment says of a layer's tokens (`route`), gives it what the experts
make of them (`mix`), and for the logits in the end (`finish`). Who runs a segment is `segments`'
word."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from smoe.artifacts.errors import first_line
from smoe.artifacts.manifest import Manifest
from smoe.runtime.budget import chunk_tokens, show_size, slot_bytes
from smoe.runtime.errors import EngineError
from smoe.runtime.routing import Routed
from smoe.runtime.segments import (
    LARGE,
    ORT_ERRORS,
    SegmentState,
    TwoValued,
    Values,
    open_sessions,
    ort_value,
    segment_threads,
    value_bytes,
)
from smoe.runtime.step import Phase, Sequence, Span, Step

TRIED = 3  # tokens on which it is seen what a mask is

# hidden, ids, weights, scores, raw weights
KINDS = [np.dtype(kind) for kind in (np.float32, np.int64, np.float32, np.float32, np.float32)]


@dataclass(eq=False)
class _Piece:
    """Tokens of a span that a segment takes at once: `low` to `high` of the step, the first of
    which is number `past` of its sequence. `values` are those that pass between segments."""

    low: int
    high: int
    past: int
    keep: np.ndarray  # int64, among these tokens
    values: Values
    shape: tuple[int, ...] = ()  # of its hidden state, as the graph has it
    masks: dict[str, TwoValued] = field(default_factory=dict)  # values too, while it waits


class _SpanFlow:
    """One span on its way: its pieces, and its new state until the step is done."""

    def __init__(self, span: Span, state: SegmentState, pieces: list[_Piece]):
        self.span, self.pieces, self.state = span, pieces, state
        self.replaced: Values = {}

    def value(self, name: str) -> ort.OrtValue:
        """Of a state's input."""
        return self.replaced[name] if name in self.replaced else self.state.values[name]


class Flow:
    """A step on its way through the segments. Until it is done the sequences are what they were
    before it."""

    def __init__(self, step: Step, spans: list[_SpanFlow]):
        self.step, self.spans = step, spans

    @property
    def whole(self) -> bool:
        """Whether no span is cut: pieces that wait for one another keep no more than they need."""
        return all(len(span.pieces) == 1 for span in self.spans)

    def pieces(self) -> Iterator[tuple[_SpanFlow, _Piece]]:
        """All, in the order of the step's tokens."""
        for span in self.spans:
            for piece in span.pieces:
                yield span, piece


class Backbone:
    """All segments of a bundle. Not thread-safe: one step at a time.

    `chunk` tokens of a span run at once; a constant of the bundle. `threads` are those of each
    segment. Where not `layer_major`, a span is no longer than a chunk: some segment looks at
    another's state."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None = None):
        """Of the bundle at `path`. An `EngineError` if a segment does not load."""
        self._manifest, self._segments = manifest, manifest.backbone.segments
        self._wires = [layer.wires for layer in manifest.layers]
        self.chunk = chunk_tokens(manifest)
        states = manifest.backbone.state
        self._state_inputs = {spec.input for spec in states}
        self._in_place = {spec.output: spec.input for spec in states if spec.in_place}
        self._replaced = {spec.output: spec.input for spec in states if not spec.in_place}
        owners = {spec.input: spec.segment for spec in states}
        takes = [(name, i) for i, segment in enumerate(self._segments) for name in segment.inputs]
        wired = [
            (name, i) for i, wires in enumerate(self._wires) for name in dataclasses.astuple(wires)
        ]
        self._layer_values = {name for name, _ in wired}
        self._last_use = dict(sorted(takes + wired, key=lambda use: use[1]))
        self._made = {
            name: i for i, segment in enumerate(self._segments) for name in segment.outputs
        }
        self._dead = [self._last_used_in(index) for index in range(len(self._segments))]
        self.layer_major = all(owners.get(name, index) == index for name, index in takes)
        self.threads = segment_threads(manifest, threads)
        self._sessions, self._weights = open_sessions(path, manifest, self.threads)
        self._kept = {
            output.name: (output.type, output.shape)
            for session in self._sessions
            for output in session.get_outputs()
            if output.name not in self._in_place and output.name not in self._replaced
        }
        self._masks = self._two_valued()

    def _two_valued(self) -> set[str]:
        """What the first segment gives for every pair of tokens and has two values, tried on a few
        tokens: while pieces wait for one another a bit is kept of each."""
        pairs = {
            name
            for name, (kind, shape) in self._kept.items()
            if kind == "tensor(float)" and sum(not isinstance(size, int) for size in shape) > 1
        }
        if not self.layer_major or self.chunk == 1 or not pairs & set(self._segments[0].outputs):
            return set()
        ids, sequence = np.zeros(TRIED, np.int64), Sequence(self.new_state(TRIED))
        flow = self.begin(Step((Span(sequence, ids, np.array([0]), Phase.PREFILL),)))
        ((span, piece),) = flow.pieces()
        try:
            self._run(0, span, piece, remember=False)
        except EngineError:
            return set()  # the first step will say it
        given = pairs & set(self._segments[0].outputs)
        return {name for name in given if TwoValued.of(piece.values[name].numpy()) is not None}

    def _last_used_in(self, index: int) -> list[str]:
        """Values that no segment after `index` takes, and that did not go before."""
        names = {*self._made, *self._last_use, *(wires.output for wires in self._wires)}
        outputs = self._segments[index].outputs
        return [
            n
            for n in names
            if self._last_use.get(n, -1) == index or (n in outputs and n not in self._last_use)
        ]

    def release(self) -> None:
        """Give back sessions and weights; it cannot be used afterwards."""
        self._sessions, self._weights = [], {}

    def new_state(self, context: int) -> SegmentState:
        """That of a sequence of up to `context` tokens that has consumed none."""
        return SegmentState(self._manifest.backbone.state, context)

    def begin(self, step: Step) -> Flow:
        """A step's spans, each cut into pieces of `chunk` tokens: ONNX Runtime's products differ
        between one row and many, so that the cut, and with it every bit, depends on nothing but the
        span."""
        spans, low = [], 0
        for span in step.spans:
            state = span.sequence.state
            assert isinstance(state, SegmentState)
            pieces = []
            for start in range(0, len(span.ids), self.chunk):
                ids = span.ids[start : start + self.chunk]
                mine = (span.keep >= start) & (span.keep < start + len(ids))
                piece = _Piece(
                    low=low + start,
                    high=low + start + len(ids),
                    past=span.sequence.length + start,
                    keep=span.keep[mine] - start,
                    values={},
                )
                last = piece.keep if len(piece.keep) else np.array([len(ids) - 1])
                if (
                    not self.layer_major
                ):  # what another segment looks at is the state before the step
                    piece.values.update(state.values)
                piece.values["input_ids"] = ort_value(ids.reshape(1, -1))
                piece.values["past_length"] = ort_value(np.array([piece.past], np.int64))
                piece.values["logits_to_keep"] = ort_value(last)
                pieces.append(piece)
            spans.append(_SpanFlow(span, state, pieces))
            low += len(span.ids)
        return Flow(step, spans)

    def route(self, layer: int, flow: Flow) -> Routed:
        """Run segment `layer` on every piece: what it says of the layer's tokens, checked, since
        graphs come from the bundle and what they give is as untrusted as the rest of it."""
        parts = []
        for span, piece in flow.pieces():
            self._run(layer, span, piece)
            parts.append([value.numpy() for value in self._said(layer, piece)])
            if len(span.pieces) > 1:
                self._forget(layer, piece)
        return self._routed(layer, flow.step, parts)

    def mix(self, layer: int, flow: Flow, mixed: np.ndarray) -> None:
        """The experts of `layer` gave `mixed` float32 `[T, H]`."""
        for _, piece in flow.pieces():
            piece.values[self._wires[layer].output] = self._shaped(layer, piece, mixed)

    def values(self, layer: int, flow: Flow, names: SequenceOf[str]) -> list[np.ndarray]:
        """Run segment `layer` on a flow of one piece: these values as it gives them. For checks of
        a bundle that is being made; `route` is for those that are."""
        ((span, piece),) = flow.pieces()
        self._run(layer, span, piece)
        return [piece.values[name].numpy() for name in names]

    def peek(self, layer: int, flow: Flow, mixed: np.ndarray) -> Routed:
        """What segment `layer` would say if the layer before had given `mixed`; nothing remembers
        it."""
        parts = []
        for span, piece in flow.pieces():
            ahead = _Piece(piece.low, piece.high, piece.past, piece.keep, dict(piece.values))
            ahead.values[self._wires[layer - 1].output] = self._shaped(layer - 1, piece, mixed)
            self._run(layer, span, ahead, remember=False)
            parts.append([value.numpy() for value in self._said(layer, ahead)])
        return self._routed(layer, flow.step, parts)

    def finish(self, flow: Flow) -> list[np.ndarray]:
        """Run the last segment: each span's logits, float32 `[n, vocabulary]` for the n positions
        it keeps. Now the sequences have consumed their tokens."""
        last = len(self._segments) - 1
        logits: list[list[np.ndarray]] = [[] for _ in flow.spans]
        for index, span in enumerate(flow.spans):
            for piece in span.pieces:
                if not len(piece.keep) and not self._remembers(last):
                    continue
                self._run(last, span, piece)
                if len(piece.keep):
                    given = piece.values["logits"].numpy()[0]
                    logits[index].append(
                        given if len(given) == len(piece.keep) else given[piece.keep]
                    )
                piece.values.clear()
        for span in flow.spans:
            span.state.values.update(span.replaced)
            span.span.sequence.ids.extend(span.span.ids.tolist())
        nothing = np.zeros((0, self._manifest.model.vocabulary), np.float32)
        return [
            parts[0] if len(parts) == 1 else np.concatenate(parts or [nothing]) for parts in logits
        ]

    def threads_line(self) -> str:
        """For people."""
        counts = {n: self.threads.count(n) for n in sorted(set(self.threads))}
        shown = ", ".join(f"{count} segments on {n}" for n, count in counts.items())
        pays = f"a second thread pays from weights of {show_size(LARGE)} on, unless told"
        return f"backbone threads: {shown} ({pays})"

    def prompt_line(self, together: int) -> str:
        """How prompts run, where so many pieces may wait for the same experts; for people."""
        if not self.layer_major:
            why = "since a segment of this model looks at another's state"
            return f"prompts: chunks of {self.chunk} tokens one after another, {why}"
        if self.chunk == 1:
            return f"prompts: token by token, up to {together} tokens share the read of an expert"
        share = f"of which up to {together} share the read of an expert"
        return f"prompts: chunks of {self.chunk} tokens, {share}"

    def piece_bytes(self, length: int) -> int:
        """What a piece of a span that ends at `length` of its sequence keeps, at most, while
        another one runs."""
        slots = max(slot_bytes(layer) for layer in self._manifest.layers)
        return self._kept_bytes(self.chunk, length) + self.chunk * slots

    def _kept_bytes(self, tokens: int, length: int) -> int:
        """At most what passes between segments for a piece of so many tokens that ends at `length`
        of its sequence."""
        sizes = {
            name: value_bytes(kind, shape, [] if self._of_all(name, shape) else [tokens], length)
            // (32 if name in self._masks else 1)
            for name, (kind, shape) in self._kept.items()
        }
        most = 0
        for index in range(len(self._segments) - 1):
            alive = [n for n in sizes if self._made[n] <= index < self._last_use.get(n, -1)]
            most = max(most, sum(sizes[name] for name in alive))
        return most

    def _of_all(self, name: str, shape: list[int | str | None]) -> bool:
        """Whether no axis of a value is the new tokens': where a graph takes a single token, and,
        to be safe, where one axis is open and it is neither a layer's nor as wide as a hidden
        state (rotary tables have a row for every token so far)."""
        if self.chunk == 1:
            return True
        fixed = [size for size in shape if isinstance(size, int)]
        wide = math.prod(fixed) >= min(layer.hidden for layer in self._manifest.layers)
        one_open = len(shape) - len(fixed) == 1
        return one_open and not wide and name not in self._layer_values

    def _shaped(self, layer: int, piece: _Piece, mixed: np.ndarray) -> ort.OrtValue:
        """The part of `mixed` that is the piece's, in the shape of its hidden state."""
        return ort_value(mixed[piece.low : piece.high].reshape(piece.shape))

    def _remembers(self, index: int) -> bool:
        return any(spec.segment == index for spec in self._manifest.backbone.state)

    def _run(self, index: int, span: _SpanFlow, piece: _Piece, remember: bool = True) -> None:
        """Run segment `index`: its outputs are added to the piece's values. Without `remember`
        state that it replaces is forgotten; what it wrote in place lies behind the sequence's
        length."""
        segment, session, values = self._segments[index], self._sessions[index], piece.values
        # A binding does not keep what is bound to it: these live until the run is over.
        masks = {name: piece.masks[name].value() for name in piece.masks if name in segment.inputs}
        try:
            binding = session.io_binding()
            for name in segment.inputs:
                value = masks.get(name) or values.get(name) or span.value(name)
                binding.bind_ortvalue_input(name, value)
            for name in segment.outputs:
                if name in self._in_place:
                    binding.bind_ortvalue_output(name, span.value(self._in_place[name]))
                else:
                    binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise EngineError(
                f"Segment {index} of the backbone failed: {first_line(error)}"
            ) from error
        values.update(zip(segment.outputs, binding.get_outputs(), strict=True))
        if index < len(self._wires):
            piece.shape = values[self._wires[index].hidden].shape()
        if remember and self._replaced:
            span.replaced.update(
                (self._replaced[name], values[name])
                for name in segment.outputs
                if name in self._replaced
            )

    def _forget(self, index: int, piece: _Piece) -> None:
        """Drop what no later segment takes. What is kept while other pieces run is copied out of
        ONNX Runtime's arena, which would keep their peak for ever."""
        for name in self._dead[index]:
            piece.values.pop(name, None)
            piece.masks.pop(name, None)
        for name in self._segments[index].outputs:
            if name in piece.values and name not in self._in_place:
                value = piece.values.pop(name)  # its array may be a view of it
                mask = TwoValued.of(value.numpy()) if name in self._masks else None
                if mask is None:
                    piece.values[name] = ort_value(np.array(value.numpy()))
                else:
                    piece.masks[name] = mask

    def _said(self, layer: int, piece: _Piece) -> list[ort.OrtValue]:
        """hidden, ids, weights, and scores and raw weights where the router's rule is known, of one
        piece."""
        wires, values = self._wires[layer], piece.values
        names = [wires.hidden, wires.ids, wires.weights]
        if self._manifest.layers[layer].routing is not None:
            names += [wires.scores, wires.raw]
        return [values[name] for name in names]

    def _routed(self, index: int, step: Step, parts: list[list[np.ndarray]]) -> Routed:
        layer, tokens = self._manifest.layers[index], step.tokens
        k, experts = layer.top_k, layer.experts
        widths = (layer.hidden, k, k, experts, experts)[: len(parts[0])]
        arrays = [_joined([part[i] for part in parts]) for i in range(len(widths))]
        ids = arrays[1]
        fits = all(a.size == tokens * width for a, width in zip(arrays, widths, strict=True))
        kinds = [a.dtype for a in arrays] == KINDS[: len(arrays)]
        if not (fits and kinds and ids.min() >= 0 and ids.max() <= experts):
            shapes = ", ".join(f"{part.dtype} {part.shape}" for part in parts[0])
            raise EngineError(
                f"Segment {index} gives hidden, ids, weights (scores, raw weights) as {shapes}, "
                f"which is not what layer {index} of the manifest takes, or experts beyond "
                f"{experts}; copy the bundle again, or build it again."
            )
        hidden, ids, weights, *scored = (a.reshape(tokens, -1) for a in arrays)
        scores, raw = scored if scored else (None, None)
        return Routed(
            layer=index,
            step=step,
            hidden=hidden,
            ids=ids,
            weights=weights,
            scores=scores,
            raw=raw,
            rule=layer.routing,
        )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """All pieces' rows, flat where there are several."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part.reshape(-1) for part in parts])
