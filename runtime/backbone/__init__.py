"""The backbone of a step: segment after segment, on whichever executor runs them, and what passes
between them and the experts.

`Model.run` asks it for what a segment says of a layer's tokens (`routing`), gives it what the
experts make of them (`mix`), and for the logits in the end (`finish`). ONNX Runtime is loaded only
where a segment needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts.manifest import Manifest
from smoe.runtime import kernels
from smoe.runtime.backbone.executor import Executor, Rows
from smoe.runtime.backbone.program_segments import ProgramRows, ProgramSegments
from smoe.runtime.budget import chunk_tokens, slot_bytes
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import Division, divide
from smoe.runtime.experts import Held
from smoe.runtime.routing import Routed
from smoe.runtime.step import Kinds, Parts, SequenceState, Step, finished

# hidden, ids, weights, scores, raw weights
KINDS = [np.dtype(kind) for kind in (np.float32, np.int64, np.float32, np.float32, np.float32)]


class BackboneState:
    """What the segments remember of one sequence (`step.SequenceState`): of each executor, its
    own."""

    def __init__(self, parts: SequenceOf[SequenceState]):
        self.parts = parts

    def rewind(self, length: int) -> int:
        """To the longest that there is a way back to for all of them."""
        while (reached := min(part.rewind(length) for part in self.parts)) < length:
            length = reached
        return length

    def fork(self, length: int) -> BackboneState:
        return BackboneState([part.fork(length) for part in self.parts])

    def snapshot(self, length: int) -> list[object]:
        return [part.snapshot(length) for part in self.parts]

    def restore(self, snapshot: object) -> None:
        assert isinstance(snapshot, list)
        for part, taken in zip(self.parts, snapshot, strict=True):
            part.restore(taken)

    def arrays(self, length: int) -> Iterator[tuple[str, np.ndarray]]:
        """By the number of an executor, and its own names."""
        for number, part in enumerate(self.parts):
            for name, array in part.arrays(length):
                yield f"{number}.{name}", array

    def check(self, kinds: Kinds, length: int) -> None:
        mine: list[Kinds] = [{} for _ in self.parts]
        for name, kind in kinds.items():
            number, _, rest = name.partition(".")
            if number not in map(str, range(len(mine))):
                raise EngineError(f"It has the array {name[:40]!r}, which no executor here knows.")
            mine[int(number)][rest] = kind
        for part, its in zip(self.parts, mine, strict=True):
            part.check(its, length)

    def load(self, arrays: Mapping[str, np.ndarray], length: int) -> None:
        for number, part in enumerate(self.parts):
            part.load(_Prefixed(f"{number}.", arrays), length)


class _Prefixed(Mapping[str, np.ndarray]):
    """Those of `arrays` whose names begin with `prefix`, without it."""

    def __init__(self, prefix: str, arrays: Mapping[str, np.ndarray]):
        self._prefix, self._arrays = prefix, arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        cut = len(self._prefix)
        return (name[cut:] for name in self._arrays if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(eq=False)
class Flow:
    """A step on its way through the segments. `whole` is true where no span is cut: pieces that
    wait for one another keep no more than they need. `ran` is a segment that has run before it was
    asked for, or -1."""

    step: Step
    rows: tuple[Rows, ...]  # of each executor
    whole: bool
    ran: int = -1


class Backbone:
    """All segments of a bundle, divided between its executors. Not thread-safe: one step at a time.

    `chunk` tokens of a prompt are a piece; where ONNX Runtime runs a segment they decide the bits,
    and are a constant of the bundle. Where not `layer_major`, a span is no longer than that: some
    segment looks at another's state."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        threads: int | None = None,
        division: Division | None = None,
        chosen: kernels.Kernels | None = None,
    ):
        """Of the bundle at `path`; `division` None is ONNX Runtime alone, whose segments run on
        `threads` (None: as many as pay), `chosen` None the best kernels for the program. An
        `EngineError` if a segment does not load."""
        self._manifest, self._segments = manifest, manifest.backbone.segments
        self._wires = [layer.wires for layer in manifest.layers]
        self._prelude = int(manifest.backbone.prelude)
        self._division = division or divide(manifest, None)
        self.chunk = chunk_tokens(manifest, self._division.needs_onnxruntime)
        self.layer_major = True
        self._executors: list[Executor] = []
        self._lines = self._division.lines()
        if self._division.program is not None:
            chosen = chosen or kernels.choose(threads=threads)
            self._executors.append(ProgramSegments(path, self._division, chosen))
        if self._division.needs_onnxruntime:
            from smoe.runtime.backbone.onnx_segments import OnnxSegments  # loads ONNX Runtime

            onnx = OnnxSegments(path, manifest, self._division, threads)
            self.layer_major = onnx.layer_major
            self._lines.append(onnx.threads_line())
            self._executors.append(onnx)
        last = len(self._executors) - 1
        self._runs = [last if onnx else 0 for onnx in self._division.onnx]
        self._handed = [list(self._hand_over(index)) for index in range(len(self._segments))]
        self._takers = [self._who_takes(wires.output) for wires in self._wires]

    def _hand_over(self, index: int) -> Iterator[tuple[str, int]]:
        """What a segment takes that another executor made, and which."""
        made = {name: i for i, segment in enumerate(self._segments) for name in segment.outputs}
        program = self._division.program
        buffers = {buffer.name for buffer in program.buffers} if program else set()
        for name in self._segments[index].inputs:
            source = self._runs[made.get(name, index)]
            if source != self._runs[index] and name in buffers:
                yield name, source

    def _who_takes(self, name: str) -> set[int]:
        """The executors that take what a layer's experts give."""
        runs = zip(self._segments, self._runs, strict=True)
        takes = {run for segment, run in runs if name in segment.inputs}
        return takes or set(self._runs)

    def release(self) -> None:
        """Give back sessions and weights; it cannot be used afterwards."""
        for executor in self._executors:
            executor.release()
        self._executors = []

    def new_state(self, context: int) -> BackboneState:
        """That of a sequence of up to `context` tokens that has consumed none."""
        return BackboneState([executor.new_state(context) for executor in self._executors])

    def begin(self, step: Step) -> Flow:
        """A step before its first layer."""
        states = [span.sequence.state for span in step.spans]
        parts = [state.parts for state in states if isinstance(state, BackboneState)]
        rows = tuple(
            executor.begin(step, [part[n] for part in parts])
            for n, executor in enumerate(self._executors)
        )
        flow = Flow(step, rows, all(len(span.ids) <= self.chunk for span in step.spans))
        if self._prelude:
            self._run(0, flow)
        return flow

    def route(self, layer: int, flow: Flow) -> Routed:
        """What `routing` ends with, without a pause."""
        return finished(self.routing(layer, flow))

    def routing(self, layer: int, flow: Flow) -> Parts[Routed]:
        """Run the segment before the experts of `layer`: what it says of the layer's tokens,
        checked, since graphs come from the bundle and what they give is as untrusted as the rest of
        it."""
        wires = self._wires[layer]
        names = [wires.hidden, wires.ids, wires.weights]
        if self._manifest.layers[layer].routing is not None:
            names += [wires.scores, wires.raw]
        values = yield from self._parts(layer + self._prelude, flow, names)
        return self._routed(layer, flow.step, values)

    def mix(self, layer: int, flow: Flow, mixed: np.ndarray) -> None:
        """The experts of `layer` gave `mixed` float32 `[T, H]`."""
        for executor in self._takers[layer]:
            flow.rows[executor].write(self._wires[layer].output, mixed)

    @property
    def advances(self) -> bool:
        """Whether `advance` is there: the program runs all segments."""
        return not self._division.needs_onnxruntime

    def advance(self, layer: int, flow: Flow, held: Held) -> Iterator[np.ndarray]:
        """From layer to layer without Python, as far as all that routers choose is `held`
        (`model.Advance`)."""
        (program,), (rows,) = self._executors, flow.rows
        assert isinstance(program, ProgramSegments) and isinstance(rows, ProgramRows)
        loop = program.loop(held)
        if loop is None:  # nothing is run that would be run again
            return
        if flow.ran != layer + self._prelude:
            self._run(layer + self._prelude, flow)
        reached = rows.advance(loop, layer)
        flow.ran = reached + self._prelude
        for passed in range(layer, reached):
            yield rows.read(self._wires[passed].ids)

    def values(self, layer: int, flow: Flow, names: SequenceOf[str]) -> list[np.ndarray]:
        """Run the segment before the experts of `layer` on a flow of one piece: these values as it
        gives them. For checks of a bundle that is being made; `route` is for those that are."""
        return [np.array(value) for value in self._run(layer + self._prelude, flow, names)]

    def peek(self, layer: int, flow: Flow, mixed: np.ndarray) -> Routed:
        """What the segment of `layer` would say if the layer before had given `mixed`; nothing
        remembers it."""
        ahead = Flow(flow.step, tuple(rows.ahead() for rows in flow.rows), flow.whole)
        self.mix(layer - 1, ahead, mixed)
        return self.route(layer, ahead)

    def finish(self, flow: Flow) -> list[np.ndarray]:
        """Run the last segment: each span's logits, float32 `[n, vocabulary]` for the n positions
        it keeps. Now the sequences have consumed their tokens."""
        last, spans = len(self._segments) - 1, flow.step.spans
        counts = [len(span.keep) for span in spans]
        logits = np.zeros((0, self._manifest.model.vocabulary), np.float32)
        rows = flow.rows[self._runs[last]]
        if flow.ran == last:
            logits = np.array(rows.read("logits"))
        elif sum(counts) or any(spec.segment == last for spec in self._manifest.backbone.state):
            self._give(last, flow)
            logits = rows.logits(last)
        for each in flow.rows:
            each.finish()
        for span in spans:
            span.sequence.ids.extend(span.ids.tolist())
        return np.split(logits, np.cumsum(counts)[:-1])

    def lines(self) -> list[str]:
        """Who runs it, for people."""
        return self._lines

    def prompt_line(self, together: int) -> str:
        """How prompts run, where so many pieces may wait for the same experts; for people."""
        if not self.layer_major:
            why = "since a segment of this model looks at another's state"
            return f"prompts: chunks of {self.chunk} tokens one after another, {why}"
        if not self._division.needs_onnxruntime or self.chunk == 1:
            how = "token by token" if self._division.needs_onnxruntime else "any number of tokens"
            tokens = together * self.chunk
            return f"prompts: {how}, up to {tokens} tokens share the read of an expert"
        share = f"of which up to {together} share the read of an expert"
        return f"prompts: chunks of {self.chunk} tokens, {share}"

    def piece_bytes(self, length: int) -> int:
        """What a piece of a span that ends at `length` of its sequence keeps, at most, while
        another one runs."""
        slots = max(slot_bytes(layer) for layer in self._manifest.layers)
        kept = sum(executor.kept_bytes(self.chunk, length) for executor in self._executors)
        return kept + self.chunk * slots

    def _run(self, index: int, flow: Flow, names: SequenceOf[str] = ()) -> list[np.ndarray]:
        return finished(self._parts(index, flow, names))

    def _parts(
        self, index: int, flow: Flow, names: SequenceOf[str] = ()
    ) -> Parts[list[np.ndarray]]:
        """Run a segment, if it has not run yet; what it says under `names`."""
        rows = flow.rows[self._runs[index]]
        if flow.ran == index:
            return [rows.read(name) for name in names]
        self._give(index, flow)
        return (yield from rows.parts(index, names))

    def _give(self, index: int, flow: Flow) -> None:
        """Hand over what a segment takes of another executor's."""
        for name, source in self._handed[index]:
            flow.rows[self._runs[index]].write(name, flow.rows[source].read(name))

    def _routed(self, index: int, step: Step, arrays: list[np.ndarray]) -> Routed:
        layer, tokens = self._manifest.layers[index], step.tokens
        k, experts = layer.top_k, layer.experts
        widths = (layer.hidden, k, k, experts, experts)[: len(arrays)]
        ids = arrays[1].copy()  # of what passes between segments, all that outlives the step
        fits = all(a.size == tokens * width for a, width in zip(arrays, widths, strict=True))
        kinds = [a.dtype for a in arrays] == KINDS[: len(arrays)]
        if not (fits and kinds and ids.min() >= 0 and ids.max() <= experts):
            shapes = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
            raise EngineError(
                f"Segment {index + self._prelude} gives hidden, ids, weights (scores, raw weights) "
                f"as {shapes}, which is not what layer {index} of the manifest takes, or experts "
                f"beyond {experts}; copy the bundle again, or build it again."
            )
        hidden, _, weights, *scored = (a.reshape(tokens, -1) for a in arrays)
        scores, raw = scored if scored else (None, None)
        return Routed(
            layer=index,
            step=step,
            hidden=hidden,
            ids=ids.reshape(tokens, -1),
            weights=weights,
            scores=scores,
            raw=raw,
            rule=layer.routing,
        )
