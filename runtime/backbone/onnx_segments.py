"""Segments that ONNX Runtime runs: spans cut into pieces, and what passes between segments for each
of them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from smoe.artifacts.errors import first_line
from smoe.artifacts.manifest import Manifest, Segment, Wires
from smoe.runtime.backbone.sessions import (
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
from smoe.runtime.budget import chunk_tokens
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import Division
from smoe.runtime.sizes import show_size
from smoe.runtime.step import Parts, Phase, Sequence, SequenceState, Span, Step, finished

Shape = list[int | str | None]  # of a graph's value; what is no number is open

TRIED = 3  # tokens on which it is seen what a mask is


@dataclass(eq=False)
class _Piece:
    """Tokens of a span that a segment takes at once: `low` to `high` of the step, the first of
    which is number `past` of its sequence. `values` are those that pass between segments."""

    low: int
    high: int
    past: int
    keep: np.ndarray  # int64, among these tokens
    values: Values
    # of hidden states as their graphs have them, by the name of what the experts make of them
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    masks: dict[str, TwoValued] = field(default_factory=dict)  # values too, while it waits


class _SpanRows:
    """One span on its way: its pieces, and its new state until the step is done."""

    def __init__(self, state: SegmentState, pieces: list[_Piece], replaced: Values | None = None):
        self.state, self.pieces = state, pieces
        self.replaced: Values = {} if replaced is None else replaced

    def value(self, name: str) -> ort.OrtValue:
        """Of a state's input."""
        return self.replaced[name] if name in self.replaced else self.state.values[name]


class OnnxSegments:
    """The segments of the bundle at `path` that `division` gives to ONNX Runtime
    (`executor.Executor`).

    `chunk` tokens of a span run at once; a constant of the bundle. `threads` are those of each
    segment by its number. Where not `layer_major`, a span is no longer than a chunk: some segment
    looks at another's state."""

    def __init__(
        self, path: Path, manifest: Manifest, division: Division, threads: int | None = None
    ):
        """An `EngineError` if a segment does not load."""
        self._manifest, self._segments = manifest, manifest.backbone.segments
        self.vocabulary = manifest.model.vocabulary
        self._wires = [layer.wires for layer in manifest.layers]
        self._states = division.onnx_states()
        self.chunk = chunk_tokens(manifest)
        self.in_place = {spec.output: spec.input for spec in self._states if spec.in_place}
        self.replaced = {spec.output: spec.input for spec in self._states if not spec.in_place}
        mine = [index for index, there in enumerate(division.onnx) if there]
        owners = {spec.input: spec.segment for spec in self._states}
        takes = [(name, i) for i, segment in enumerate(self._segments) for name in segment.inputs]
        wired = [
            (name, index + manifest.backbone.prelude)
            for index, wires in enumerate(self._wires)
            for name in dataclasses.astuple(wires)
        ]
        self._layer_values = {name for name, _ in wired}
        self._last_use = dict(sorted(takes + wired, key=lambda use: use[1]))
        self._made = {
            name: i for i, segment in enumerate(self._segments) for name in segment.outputs
        }
        self.dead = {index: self._last_used_in(index) for index in mine}
        self.layer_major = all(
            owners.get(name, index) == index for name, index in takes if index in mine
        )
        self.threads = {index: segment_threads(manifest, index, threads) for index in mine}
        self.sessions, self._weights = open_sessions(path, manifest, self.threads)
        self.taken, self.kept = self._values()
        self.masks: set[str] = set()
        self.masks = self._two_valued()

    def _values(self) -> tuple[dict[str, Shape], dict[str, tuple[str, Shape]]]:
        """The shapes of what the sessions take, by name; types and shapes of all that passes
        between segments."""
        given = [value for session in self.sessions.values() for value in session.get_outputs()]
        taken = [value for session in self.sessions.values() for value in session.get_inputs()]
        state = {*self.in_place, *self.replaced, *(spec.input for spec in self._states)}
        passing = [v for v in (*taken, *given) if v.name in self._made and v.name not in state]
        kept = {value.name: (value.type, value.shape) for value in passing}
        return {value.name: value.shape for value in taken}, kept

    def _two_valued(self) -> set[str]:
        """What the first segment gives for every pair of tokens and has two values, tried on a few
        tokens: while pieces wait for one another a bit is kept of each."""
        pairs = {
            name
            for name, (kind, shape) in self.kept.items()
            if kind == "tensor(float)" and sum(not isinstance(size, int) for size in shape) > 1
        }
        given = pairs & set(self._segments[0].outputs)
        if not self.layer_major or self.chunk == 1 or not given:
            return set()
        ids, sequence = np.zeros(TRIED, np.int64), Sequence(self.new_state(TRIED))
        step = Step((Span(sequence, ids, np.array([0]), Phase.PREFILL),))
        rows = self.begin(step, [sequence.state]).ahead()
        try:
            finished(rows.parts(0))
        except EngineError:
            return set()  # the first step will say it
        return {name for name in given if TwoValued.of(rows.read(name)) is not None}

    def _last_used_in(self, index: int) -> list[str]:
        """Values that no segment after `index` takes; some may have gone before."""
        names = {*self._made, *self._last_use, *(wires.output for wires in self._wires)}
        return [name for name in names if self._last_use.get(name, -1) <= index]

    def release(self) -> None:
        """Give back sessions and weights; it cannot be used afterwards."""
        self.sessions, self._weights = {}, {}

    def new_state(self, context: int) -> SegmentState:
        """That of a sequence of up to `context` tokens that has consumed none."""
        return SegmentState(self._states, context)

    def begin(self, step: Step, states: SequenceOf[SequenceState]) -> OnnxRows:
        """A step's spans, each cut into pieces of `chunk` tokens: ONNX Runtime's products differ
        between one row and many, so that the cut, and with it every bit, depends on nothing but the
        span."""
        spans, low = [], 0
        for span, state in zip(step.spans, states, strict=True):
            assert isinstance(state, SegmentState)
            starts = range(0, len(span.ids), self.chunk)
            spans.append(_SpanRows(state, [self._piece(span, state, low, n) for n in starts]))
            low += len(span.ids)
        return OnnxRows(self, spans)

    def _piece(self, span: Span, state: SegmentState, low: int, start: int) -> _Piece:
        """The piece of a span from its token `start` on, which itself starts at `low`."""
        ids = span.ids[start : start + self.chunk]
        mine = (span.keep >= start) & (span.keep < start + len(ids))
        keep, past = span.keep[mine] - start, span.sequence.length + start
        # What another segment looks at is the state before the step.
        values = {} if self.layer_major else dict(state.values)
        last = keep if len(keep) else np.array([len(ids) - 1])
        values["input_ids"] = ort_value(ids.reshape(1, -1))
        values["past_length"] = ort_value(np.array([past], np.int64))
        values["logits_to_keep"] = ort_value(last)
        return _Piece(low + start, low + start + len(ids), past, keep, values)

    def kept_bytes(self, tokens: int, length: int) -> int:
        """At most what passes between segments for `tokens` that end at `length` of their
        sequence."""
        sizes = {
            name: value_bytes(kind, shape, [] if self._of_all(name, shape) else [tokens], length)
            // (32 if name in self.masks else 1)
            for name, (kind, shape) in self.kept.items()
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

    def threads_line(self) -> str:
        """For people."""
        counts = Counter(self.threads.values())
        shown = ", ".join(f"{counts[n]} segments on {n}" for n in sorted(counts))
        pays = f"a second thread pays from weights of {show_size(LARGE)} on, unless told"
        return f"backbone threads: {shown} ({pays})"

    def names(self, index: int) -> Segment:
        """What a segment takes and gives."""
        return self._segments[index]

    def wires(self, index: int) -> Wires | None:
        """Of the layer whose experts run after a segment, if it has one."""
        layer = index - self._manifest.backbone.prelude
        return self._wires[layer] if 0 <= layer < len(self._wires) else None

    def remembers(self, index: int) -> bool:
        """Whether a segment has state."""
        return any(spec.segment == index for spec in self._states)


class OnnxRows:
    """A step on its way through ONNX Runtime's segments (`executor.Rows`). Until it is done the
    sequences are what they were before it."""

    def __init__(self, segments: OnnxSegments, spans: list[_SpanRows], guess: bool = False):
        self._segments, self._spans, self._guess = segments, spans, guess

    def _pieces(self) -> Iterator[tuple[_SpanRows, _Piece]]:
        """All, in the order of the step's tokens."""
        for span in self._spans:
            for piece in span.pieces:
                yield span, piece

    def parts(self, segment: int, names: SequenceOf[str] = ()) -> Parts[list[np.ndarray]]:
        """Piece by piece. What waits for other pieces of its span is cut down to what it needs."""
        given: list[list[np.ndarray]] = []
        for span, piece in self._pieces():
            if given:
                yield
            self._run(segment, span, piece)
            given.append([piece.values[name].numpy() for name in names])
            if len(span.pieces) > 1:
                self._forget(segment, piece)
        return [_joined([part[i] for part in given]) for i in range(len(names))]

    def read(self, name: str) -> np.ndarray:
        """With the axis of the tokens first, where the graph says which one it is."""
        axis = _token_axis(self._segments.kept[name][1])
        arrays = [piece.values[name].numpy() for _, piece in self._pieces()]
        return _joined([np.moveaxis(array, axis, 0) for array in arrays])

    def write(self, name: str, value: np.ndarray) -> None:
        """To every piece its part, in the shape of the hidden state that it is for, or else of the
        graph's input."""
        shape = self._segments.taken.get(name, [])
        axis = _token_axis(shape)
        row = [size for n, size in enumerate(shape) if n != axis]
        for _, piece in self._pieces():
            part = value[piece.low : piece.high]
            try:
                if name in piece.shapes:
                    part = part.reshape(piece.shapes[name])
                else:
                    part = np.moveaxis(part.reshape(len(part), *row), 0, axis)
            except (TypeError, ValueError) as error:
                raise EngineError(
                    f"A graph of the backbone takes {name[:40]!r} as {shape}, and gets "
                    f"{part.shape}; copy the bundle again, or build it again."
                ) from error
            piece.values[name] = ort_value(np.ascontiguousarray(part))

    def logits(self, segment: int) -> np.ndarray:
        """Pieces of which nothing is kept are left out where nothing remembers them."""
        parts = []
        for span, piece in self._pieces():
            if len(piece.keep) or self._segments.remembers(segment):
                self._run(segment, span, piece)
            if len(piece.keep):
                given = piece.values["logits"].numpy()[0]
                parts.append(given if len(given) == len(piece.keep) else given[piece.keep])
            piece.values.clear()
        nothing = np.zeros((0, self._segments.vocabulary), np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [nothing])

    def ahead(self) -> OnnxRows:
        """What a guess writes stays with it: values here, and state behind the length."""
        spans = []
        for span in self._spans:
            pieces = [replace(piece, values=dict(piece.values)) for piece in span.pieces]
            spans.append(_SpanRows(span.state, pieces, span.replaced))
        return OnnxRows(self._segments, spans, guess=True)

    def finish(self) -> None:
        """State that was replaced."""
        for span in self._spans:
            span.state.values.update(span.replaced)

    def _run(self, index: int, span: _SpanRows, piece: _Piece) -> None:
        """Run segment `index`: its outputs are added to the piece's values. On a guess, state that
        it replaces is forgotten; what it wrote in place lies behind the sequence's length."""
        segments, values = self._segments, piece.values
        names, session = segments.names(index), segments.sessions[index]
        # A binding does not keep what is bound to it: these live until the run is over.
        masks = {name: piece.masks[name].value() for name in piece.masks if name in names.inputs}
        try:
            binding = session.io_binding()
            for name in names.inputs:
                value = masks.get(name) or values.get(name) or span.value(name)
                binding.bind_ortvalue_input(name, value)
            for name in names.outputs:
                if name in segments.in_place:
                    binding.bind_ortvalue_output(name, span.value(segments.in_place[name]))
                else:
                    binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise EngineError(
                f"Segment {index} of the backbone failed: {first_line(error)}"
            ) from error
        values.update(zip(names.outputs, binding.get_outputs(), strict=True))
        wires = segments.wires(index)
        if wires is not None:
            piece.shapes[wires.output] = values[wires.hidden].shape()
        if not self._guess:
            replaced = segments.replaced
            span.replaced.update((replaced[n], values[n]) for n in names.outputs if n in replaced)

    def _forget(self, index: int, piece: _Piece) -> None:
        """Drop what no later segment takes. What is kept while other pieces run is copied out of
        ONNX Runtime's arena, which would keep their peak for ever."""
        segments = self._segments
        for name in segments.dead[index]:
            piece.values.pop(name, None)
            piece.masks.pop(name, None)
        for name in segments.names(index).outputs:
            if name in piece.values and name not in segments.in_place:
                value = piece.values.pop(name)  # its array may be a view of it
                mask = TwoValued.of(value.numpy()) if name in segments.masks else None
                if mask is None:
                    piece.values[name] = ort_value(np.array(value.numpy()))
                else:
                    piece.masks[name] = mask


def _token_axis(shape: Shape) -> int:
    """Of a value in a graph: its only open axis, or the first where none is or several are."""
    axes = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    return axes[0] if len(axes) == 1 else 0


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """All pieces' rows, flat where there are several."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part.reshape(-1) for part in parts])
