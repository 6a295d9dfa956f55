"""Which executor runs which segment of a backbone: the bundle's program what it knows, ONNX Runtime
the rest. Pure: neither of them is loaded here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from smoe.artifacts.manifest import STATE_KINDS, Initializer, Manifest, State
from smoe.artifacts.program import PROGRAM_WEIGHTS, Program
from smoe.runtime.errors import EngineError
from smoe.runtime.kernels.blocks import TOKENS
from smoe.runtime.program.embedding import left_in_file
from smoe.runtime.program.layout import StateLayout
from smoe.runtime.program.plan import ROWS, Plan, plan

EXECUTORS = ("auto", "program", "onnx")
SCANS = 4  # sequences that it scans at once, at most (native/program_scan.h)
KERNELS = 3 << 19  # bytes that its products and attention take (native/products.h, attention.h)
ALIGNED = 64  # bytes; where weights begin in their file


@dataclass(frozen=True)
class Execution:
    """What users ask for. executor: one of `EXECUTORS`; "auto" is the program where the bundle has
    one, and ONNX Runtime for what it does not know. state: one of `STATE_KINDS`, which the program
    keeps of keys and values (None: what the bundle says)."""

    executor: str = "auto"
    state: str | None = None


AUTO = Execution()
UNSAID = "not known, and no reason is given"
ASKED, NONE = "asked for", "the bundle has no program"  # why all is ONNX Runtime's

# Measured with bench/memory.py on x86-64, ONNX Runtime 1.31: the code pages that tokenizers and
# kernels touch when they first run, those of ONNX Runtime, and what a session of it holds besides
# its weights.
CODE = 12 << 20
ONNX_CODE = 6 << 20
SESSION = 1 << 19


@dataclass(frozen=True)
class Division:
    """Who runs the segments of `manifest`: the `program` (None: nothing) where there is no reason
    against it, ONNX Runtime where there is; `reasons` are "" for the former."""

    manifest: Manifest
    program: Program | None
    reasons: tuple[str, ...]
    execution: Execution

    @cached_property
    def onnx(self) -> tuple[bool, ...]:
        """By segment: whether ONNX Runtime runs it."""
        return tuple(bool(reason) for reason in self.reasons)

    @property
    def own_kind(self) -> str:
        """What the bundle keeps keys and values in: chosen when it was built, or else float32
        beside weights in float32, and float16."""
        backbone = self.manifest.backbone
        return backbone.state_kind or ("f32" if backbone.precision == "f32" else "f16")

    @property
    def kind(self) -> str:
        """What they are kept in."""
        return self.execution.state or self.own_kind

    @property
    def narrower(self) -> bool:
        """Whether that is less than the bundle's, which costs some nats."""
        kept = self.program is not None and self.program.states
        return bool(kept) and STATE_KINDS.index(self.kind) < STATE_KINDS.index(self.own_kind)

    @property
    def needs_onnxruntime(self) -> bool:
        """Whether it has to be loaded at all."""
        return any(self.onnx)

    def onnx_states(self) -> tuple[State, ...]:
        """Those that ONNX Runtime's segments keep."""
        return tuple(spec for spec in self.manifest.backbone.state if self.onnx[spec.segment])

    @cached_property
    def places(self) -> Plan:
        """Where the program's buffers lie, and what they take."""
        assert self.program is not None
        return plan(self.program, self.wires())

    def wires(self) -> frozenset[str]:
        """The program's buffers that others read and write: its layers' experts, and segments that
        it does not know."""
        wires = [dataclasses.astuple(layer.wires) for layer in self.manifest.layers]
        names = {name for one in wires for name in one}
        for there, segment in zip(self.onnx, self.manifest.backbone.segments, strict=True):
            names |= {*segment.inputs, *segment.outputs} if there else set()
        return frozenset(names)

    def backbone_bytes(self) -> int:
        """Weights, what runs them, and the code that is loaded for it."""
        nbytes = CODE
        if self.program is not None:
            left = left_in_file(self.program)
            nbytes += self.manifest.files[PROGRAM_WEIGHTS].size
            nbytes -= sum(constant.nbytes for _, constant, _ in left)
        if self.needs_onnxruntime:
            mine = [index for index, there in enumerate(self.onnx) if there]
            weights = sum(end - start for start, end in runs_of(weights_of(self.manifest, mine)))
            copies = 1 if self.manifest.backbone.precision == "f32" else 2  # its own, if not float
            nbytes += copies * weights + SESSION * len(mine) + ONNX_CODE
        return nbytes

    def token_bytes(self, context: int) -> int:
        """What passes between segments for a token of a prompt: of ONNX Runtime's a residual and a
        row of a mask."""
        nbytes = 0 if self.program is None else self.places.step
        if self.needs_onnxruntime:
            nbytes += 4 * context + 16 * max(layer.hidden for layer in self.manifest.layers)
        return nbytes

    def workspace(self, context: int, tokens: int) -> int:
        """What a chunk of so many `tokens` takes on its way, with its logits as they are made and
        drawn from: of one token, or of all, where a graph gives no others."""
        backbone, kept, nbytes = self.manifest.backbone, 3, 0
        if self.program is not None:
            nbytes += tokens * self.places.step + ROWS * self.places.scratch + KERNELS
            nbytes += SCANS * self.places.scan
        if self.needs_onnxruntime:  # a few copies of the hidden state, all heads' scores, and masks
            fused = all(state.in_place for state in backbone.state)
            per_position = 4 * backbone.heads * (1 if fused else 3) + 16
            widest = max(layer.hidden for layer in self.manifest.layers)
            nbytes += tokens * (64 * widest + per_position * context)
        if self.onnx[-1]:
            kept = 2 if "logits_to_keep" in backbone.segments[-1].inputs else tokens + 1
        return nbytes + 4 * self.manifest.model.vocabulary * kept

    @property
    def rewinds(self) -> bool:
        """Whether a sequence can be shortened to any length: it has neither windows nor recurrent
        state."""
        layout = None if self.program is None else StateLayout.of(self.program, self.kind)
        forgets = layout is not None and (layout.recurrent or any(layout.windows))
        return not forgets and all(spec.in_place for spec in self.onnx_states())

    def held_bytes(self, tokens: int, context: int) -> int:
        """Of a sequence of so many `tokens` whose state is made for a `context`: where ONNX Runtime
        writes to it in place, it is all there from the start."""
        whole = any(spec.in_place for spec in self.onnx_states())
        return self.state_bytes(context if whole else tokens)

    def state_bytes(self, context: int) -> int:
        """Of a sequence of `context` tokens."""
        kept = sum(spec.nbytes(context) for spec in self.onnx_states())
        if self.program is not None:
            kept += StateLayout.of(self.program, self.kind).nbytes(context)
        return kept

    def token_state(self) -> tuple[int, int]:
        """Bytes that a token adds to a sequence: those that stay, and those that go again once it
        is behind a window."""
        kept = sum(spec.nbytes(1) - spec.nbytes(0) for spec in self.onnx_states())
        if self.program is None:
            return kept, 0
        layout = StateLayout.of(self.program, self.kind)
        pairs = list(zip(layout.attentions, layout.windows, strict=True))
        stay, go = (
            sum(one.nbytes for one, window in pairs if bool(window) == windowed) // TOKENS
            for windowed in (False, True)
        )
        return kept + stay, go

    def lines(self) -> list[str]:
        """For people: who runs the backbone, and why not the program."""
        every, precision = len(self.reasons), self.manifest.backbone.precision
        reasons = Counter(reason for reason in self.reasons if reason)
        if reasons and reasons.keys() <= {NONE, ASKED}:
            why = ", ".join(reasons)
            return [f"backbone: ONNX Runtime ({why}), {precision}"]
        others = (
            f"backbone: {times} of {every} segments in ONNX Runtime: {reason}"
            for reason, times in reasons.items()
        )
        program = f"{every - sum(self.onnx)} of {every} segments in the program"
        return [f"backbone: {program}, {precision}{self._state()}", *others]

    def _state(self) -> str:
        if self.program is None or not self.program.states:
            return ""
        why = "half the bytes of f32" if self.kind == "f16" else "as exact as the backbone"
        if self.manifest.backbone.state_kind:
            why = "the bundle's"
        if self.execution.state:
            why = "asked for"
        if self.narrower:
            why += f", LOSSY: narrower than the bundle's {self.own_kind}"
        return f", state {self.kind} ({why})"


def divide(
    manifest: Manifest, program: Program | None, execution: Execution = AUTO, graphs: bool = True
) -> Division:
    """Who runs the segments of a bundle that has this `program`, and these `graphs` unless they did
    not travel along. An `EngineError` for what is asked and cannot be, or would have no effect."""
    _check_names(execution)
    if execution.executor == "onnx" and not graphs:
        raise EngineError(
            "The ONNX graphs of this bundle did not travel along; leave executor onnx out, or copy "
            f"{manifest.backbone.weights} and the segments beside it, too."
        )
    every = len(manifest.backbone.segments)
    if execution.executor == "program" and program is None:
        raise EngineError(
            "This bundle has no program for its backbone; make it one with smoe-prep add BUNDLE "
            "--program, or leave executor program out."
        )
    asked = execution.executor == "onnx"
    if program is None or asked:
        program, reasons = None, (ASKED if asked else NONE,) * every
    else:
        reasons = tuple("" if p.ops is not None else p.reason or UNSAID for p in program.parts)
        _check_states(manifest, reasons)
    division = Division(manifest, None if all(reasons) else program, reasons, execution)
    _check_effect(division)
    return division


def _check_names(execution: Execution) -> None:
    if execution.executor not in EXECUTORS:
        raise EngineError(
            f"There is no executor {execution.executor[:40]!r}; there are {', '.join(EXECUTORS)}."
        )
    if execution.state is not None and execution.state not in STATE_KINDS:
        raise EngineError(
            f"There is no state {execution.state[:40]!r}; there are {', '.join(STATE_KINDS)}."
        )


def _check_effect(division: Division) -> None:
    execution = division.execution
    if execution.executor == "program" and division.program is None:
        raise EngineError(
            f"This bundle's program knows none of its segments ({division.reasons[0]}); leave "
            "executor program out."
        )
    if execution.state and not (division.program and division.program.states):
        raise EngineError(
            f"State {execution.state} has no effect: no state of this bundle is kept by a program, "
            "and ONNX Runtime keeps it as the graph says; leave it out."
        )


def _check_states(manifest: Manifest, reasons: tuple[str, ...]) -> None:
    """What ONNX Runtime runs can look at no state that the program keeps."""
    owners = {spec.input: spec.segment for spec in manifest.backbone.state}
    for index, segment in enumerate(manifest.backbone.segments):
        hidden = [n for n in segment.inputs if n in owners and not reasons[owners[n]]]
        if reasons[index] and hidden:
            raise EngineError(
                f"Segment {index}, which the program does not know, looks at the state "
                f"{hidden[0][:60]!r}, which the program keeps; use executor onnx, or build the "
                "bundle again."
            )


def weights_of(manifest: Manifest, segments: Iterable[int]) -> list[Initializer]:
    """The initializers of these segments, as they lie in the weight file."""
    names = {name for index in segments for name in manifest.backbone.segments[index].weights}
    wanted = (w for w in manifest.backbone.initializers if w.name in names)
    return sorted(wanted, key=lambda weight: weight.offset)


def runs_of(weights: Iterable[Initializer]) -> list[tuple[int, int]]:
    """Start and end of the runs of bytes that `weights`, by rising offset, lie in; they may
    share bytes."""
    runs: list[tuple[int, int]] = []
    for w in weights:
        start, end = runs.pop() if runs and w.offset < runs[-1][1] + ALIGNED else (w.offset, 0)
        runs.append((start, max(end, w.offset + w.nbytes)))
    return runs
