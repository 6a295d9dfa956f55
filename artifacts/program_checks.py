"""The checks of a program at the door: a table is untrusted, and past here an executor follows it
blindly. It reads and writes inside its buffers, in an order in which all that is read was written,
in bounded work and memory, and it agrees with the manifest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from smoe.artifacts import program_ops, program_recurrent
from smoe.artifacts.errors import printable
from smoe.artifacts.manifest import Manifest, State
from smoe.artifacts.program import (
    ALIGN,
    FORMS,
    GROUPS,
    KINDS,
    PROGRAM,
    PROGRAM_WEIGHTS,
    RECURRENT,
    Buffer,
    Constant,
    KeyValues,
    Op,
    Program,
    View,
)
from smoe.artifacts.program_ops import MAX_RANK, MAX_SIZE, Table

MAX_OPS = 65536  # of a program
MAX_NAMED = 1 << 18  # buffers, constants
MAX_ROW = 1 << 28  # bytes of a row of all buffers that one segment writes
MAX_WORK = 1 << 36  # numbers and weights that a row goes through
MAX_MARKED = 1 << 28  # numbers of buffers that are written piece by piece
MAX_REASON = 500  # characters
SHOWN = 10  # sentences of one check
GIVEN = ("input_ids", "past_length", "logits_to_keep")  # what a graph takes and no segment gives
IN_PLACE = ("unary", "binary", "where")  # may write to the very numbers that they read


def problems(program: Program, manifest: Manifest, size: int) -> Iterator[str]:
    """Everything in a program that contradicts itself, the manifest, or its weight file of `size`
    bytes, as sentences."""
    checks: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: _counts(program, manifest),
        lambda: _buffers(program),
        lambda: _constants(program, size),
        lambda: program_recurrent.states(program, manifest),
        lambda: _states(program, manifest),
        lambda: _wires(program, manifest),
        lambda: _Flow(program, manifest).problems(),
    )
    for check in checks:
        wrong = list(islice(check(), SHOWN))
        for text in wrong:
            yield f"{PROGRAM}: {text}; build the bundle again."
        if wrong:  # the next check takes it for granted
            return


def _counts(program: Program, m: Manifest) -> Iterator[str]:
    ops = sum(len(part.ops or ()) for part in program.parts)
    for name, count, most in (
        ("operations", ops, MAX_OPS),
        ("buffers", len(program.buffers), MAX_NAMED),
        ("constants", len(program.constants), MAX_NAMED),
    ):
        if count > most:
            yield f"there are {count} {name}, more than {most}"
    if len(program.parts) != len(m.backbone.segments):
        yield f"there are {len(program.parts)} parts for {len(m.backbone.segments)} segments"
    names = Counter(b.name for b in program.buffers) + Counter(c.name for c in program.constants)
    for name, count in names.items():
        if count > 1 or not 1 <= len(name) <= MAX_REASON:
            yield f"the name {name[:60]!r} stands for {count} buffers or constants, or is no name"
    for number, part in enumerate(program.parts):
        reason = part.reason
        if (part.ops is None) != bool(reason) or len(reason) > MAX_REASON:
            yield f"part {number} must have operations, or a reason of {MAX_REASON} characters"
        elif printable(reason) != reason:
            yield f"the reason of part {number} holds characters that a terminal would obey"


def _fits(shape: tuple[int, ...]) -> bool:
    return len(shape) <= MAX_RANK and all(1 <= size < MAX_SIZE for size in shape)


def _buffers(program: Program) -> Iterator[str]:
    for buffer in program.buffers:
        if buffer.kind not in KINDS or not _fits(buffer.shape) or buffer.nbytes > MAX_ROW:
            yield (
                f"buffer {buffer.name[:60]!r} is {buffer.kind[:9]!r} {list(buffer.shape[:9])}, "
                f"{MAX_ROW} bytes a row of {', '.join(KINDS)} at most were wanted"
            )


def _constants(program: Program, size: int) -> Iterator[str]:
    end = 0
    for constant in program.constants:
        possible = _possible(constant)
        end = max(end, constant.offset + constant.nbytes)
        inside = 0 <= constant.offset <= size - constant.nbytes and not constant.offset % ALIGN
        if not possible or constant.nbytes != constant.wanted or not inside:
            yield (
                f"constant {constant.name[:60]!r} is {constant.form[:9]!r} "
                f"{list(constant.shape[:9])} of {constant.nbytes} bytes at {constant.offset}, not "
                f"of that size or outside {PROGRAM_WEIGHTS} of {size} bytes"
            )
    if end != size:  # it is read whole
        yield f"{PROGRAM_WEIGHTS} has {size} bytes, its last constant ends at {end}"


def _possible(constant: Constant) -> bool:
    if constant.form not in FORMS or not _fits(constant.shape):
        return False
    if constant.form in ("f32", "bf16"):
        return constant.group == 0 and not constant.wide
    return constant.group in GROUPS and len(constant.shape) == 2


# -- what the manifest says ------------------------------------------------------------------------


def _states(program: Program, m: Manifest) -> Iterator[str]:
    """Keys and values are those of the manifest's states, and all of a segment that is known."""
    listed = {state.input: state for state in m.backbone.state}
    taken = Counter(name for s in program.states for name in (s.keys, s.values))
    for state in program.states:
        widths = state.key_width, state.value_width
        if state.latent:  # of one head of keys the values, and what is beside them
            widths = state.value_width, state.key_width - state.value_width
        wanted = zip((state.keys, state.values), widths, strict=True)
        if state.latent and state.heads != 1:
            yield f"state {state.keys[:60]!r} has latents, and {state.heads} heads of keys"
        known = 0 <= state.segment < len(program.parts)
        if not known or program.parts[state.segment].ops is None:
            yield f"state {state.keys[:60]!r} is of part {state.segment}, which is not known"
        for name, width in wanted:
            if taken[name] > 1 or not _is_state(listed.get(name), state, width):
                yield (
                    f"state {name[:60]!r}, {state.heads} heads of {width} numbers in segment "
                    f"{state.segment}, is not one of the manifest's"
                )
    there = taken.keys() | {state.name for state in program.recurrent}
    for number, part in enumerate(program.parts):
        for spec in m.backbone.state:
            kept = spec.shape or spec.growing >= 0  # one number is no memory
            if part.ops is not None and spec.segment == number and kept and spec.input not in there:
                yield f"part {number} lacks the state {spec.input!r}"


def _is_state(spec: State | None, state: KeyValues, width: int) -> bool:
    """Whether the manifest's state appends so many heads of that width for every token."""
    if spec is None or spec.segment != state.segment or spec.growing < 0 or spec.dtype != "F32":
        return False
    fixed = [size for axis, size in enumerate(spec.shape) if axis != spec.growing]
    sizes = 1 <= state.heads < MAX_SIZE and 1 <= width < MAX_SIZE
    return sizes and math.prod(fixed) == state.heads * width


def _wires(program: Program, m: Manifest) -> Iterator[str]:
    """What experts and the outside take or give is of one kind and shape in every program."""
    buffers = {buffer.name: buffer for buffer in program.buffers}
    wanted: list[tuple[str, str, int]] = [("logits", "f32", m.model.vocabulary)]
    for layer in m.layers:
        wires = layer.wires
        wanted += [(wires.hidden, "f32", layer.hidden), (wires.output, "f32", layer.hidden)]
        wanted += [(wires.ids, "i64", layer.top_k), (wires.weights, "f32", layer.top_k)]
        if layer.routing:
            wanted += [(name, "f32", layer.experts) for name in (wires.scores, wires.raw)]
    for name, kind, size in wanted:
        buffer = buffers.get(name)
        if buffer is None:  # of parts that are not known
            continue
        if (buffer.kind, buffer.shape) != (kind, (size,)):
            yield (
                f"buffer {name[:60]!r} is {buffer.kind} {list(buffer.shape)}, {kind} [{size}] was "
                "wanted"
            )
        elif buffer.kept and name != "logits":
            yield f"buffer {name[:60]!r} has the kept rows only, all were wanted"


# -- operations in their order ---------------------------------------------------------------------


@dataclass
class _Written:
    """What of a buffer is written: all of it where there is no `mask`, bool of a row's numbers."""

    part: int | None  # None: given by the runtime
    mask: np.ndarray | None = None


class _Flow:
    """A walk through all parts as they run."""

    def __init__(self, program: Program, manifest: Manifest):
        self._program, self._manifest = program, manifest
        self._table = Table(
            {buffer.name: buffer for buffer in program.buffers},
            {constant.name: constant for constant in program.constants},
            {state.keys: state for state in program.states},
            {state.name: state for state in program.recurrent},
            manifest.model.vocabulary,
        )
        self._uses = program_recurrent.Uses(self._table.recurrent)
        self._written: dict[str, _Written] = {}
        self._foreign = set(GIVEN) | {state.input for state in manifest.backbone.state}
        self._appended: set[str] = set()
        self._work = self._marked = 0

    def problems(self) -> Iterator[str]:
        """Up to the first part that is wrong."""
        for number, part in enumerate(self._program.parts):
            wrong = list(self._before(number))
            wrong += self._foreign_part(number) if part.ops is None else self._part(number)
            wrong = wrong or list(self._behind(number))
            yield from wrong
            if wrong:
                return
        for buffer in self._program.buffers:
            if not self._whole(buffer.name):
                yield f"buffer {buffer.name[:60]!r} is not written whole"
        for keys in self._table.states.keys() - self._appended:
            yield f"no attention uses the state {keys[:60]!r}"
        yield from self._uses.end()

    def _before(self, number: int) -> Iterator[str]:
        """What a layer's experts give, whose segment is that before part `number`."""
        layer = number - 1 - self._manifest.backbone.prelude
        if layer < 0:
            return
        name = self._manifest.layers[layer].wires.output
        if name in self._written:
            yield f"{name[:60]!r} is written before part {number}, and is the experts' to give"
        self._foreign.add(name)
        if name in self._table.buffers:
            self._written[name] = _Written(None)

    def _behind(self, number: int) -> Iterator[str]:
        """What the experts behind part `number` take, or behind the last whoever asks for
        logits."""
        layer, layers = number - self._manifest.backbone.prelude, self._manifest.layers
        names = ["logits"] if layer == len(layers) else []
        if 0 <= layer < len(layers):
            wires = layers[layer].wires
            names = [wires.hidden, wires.ids, wires.weights]
            names += [wires.scores, wires.raw] if layers[layer].routing else []
        for name in names:
            if not self._whole(name) and name not in self._foreign:
                yield f"part {number} does not give {name[:60]!r}"

    def _whole(self, name: str) -> bool:
        return name in self._written and self._written[name].mask is None

    def _foreign_part(self, number: int) -> Iterator[str]:
        """A segment that ONNX Runtime runs: it takes and gives buffers by the names of its graph,
        and passes on what only its like take."""
        segment = self._manifest.backbone.segments[number]
        for name in segment.inputs:
            if not self._whole(name) and name not in self._foreign:
                yield f"part {number} is not known and takes {name[:60]!r}, which has no buffer"
        self._foreign |= set(segment.outputs)
        last = number == len(self._program.parts) - 1
        for name in set(segment.outputs) & self._table.buffers.keys():
            if name in self._written or (self._table.buffers[name].kept and not last):
                yield f"part {number} gives {name[:60]!r}, which is written before, or kept rows"
            self._written[name] = _Written(number)

    def _part(self, number: int) -> Iterator[str]:
        row = 0
        for place, op in enumerate(self._program.parts[number].ops or ()):
            sources = {view.source for view in op.outputs} - self._written.keys()
            wrong = list(program_ops.problems(op, self._table)) or list(self._step(op, number))
            if wrong:
                where = f"part {number}, operation {place} ({op.kind[:20]!r})"
                yield from (f"{where}: {text}" for text in wrong)
                return
            row += sum(self._table.buffers[source].nbytes for source in sources)
        yield from self._uses.behind(number)
        if row > MAX_ROW:
            yield f"part {number} writes {row} bytes for every row, more than {MAX_ROW}"

    def _step(self, op: Op, number: int) -> Iterator[str]:
        """One operation that is right by itself, after those before it."""
        views = [view for view in (*op.inputs, *op.outputs) if not view.absent]
        self._work += max(math.prod(view.shape) for view in views)
        self._work += math.prod(self._table.constants[op.weight].shape) if op.weight else 0
        if self._work > MAX_WORK:
            yield f"so far a row goes through more than {MAX_WORK} numbers"
        yield from self._uses.step(op, number)
        yield from self._rows(op, number)
        if op.kind == "attention":
            state = self._table.states[(op.names or {})["state"]]
            if state.segment != number or state.keys in self._appended:
                yield f"the state {state.keys[:60]!r} is of another segment, or used twice"
            self._appended.add(state.keys)
        for view in op.inputs:
            if view.source in self._table.buffers and not self._reads(view):
                yield f"it reads of {view.source[:60]!r} what was not written"
        for view in op.outputs:
            yield from self._writes(op, view, number)

    def _rows(self, op: Op, number: int) -> Iterator[str]:
        """Operations work on all rows or on the kept ones; `keep` alone leads from these to
        those."""
        buffers = self._table.buffers
        takes = {buffers[view.source].kept for view in op.inputs if view.source in buffers}
        gives = {buffers[view.source].kept for view in op.outputs}
        if op.kind == "keep":
            fine = takes == {False} and gives == {True}
        elif op.kind in ("embedding", "position", "attention", *RECURRENT) or self._uses.scanning:
            fine = takes | gives == {False}
        else:
            fine = len(takes | gives) == 1
        if not fine:
            yield "it mixes all rows with the kept ones"
        if gives == {True} and number != len(self._program.parts) - 1:
            yield "it writes kept rows, which the last part alone may"

    def _reads(self, view: View) -> bool:
        written = self._written.get(view.source)
        if written is None or written.mask is None:
            return written is not None
        return bool(self._marks(written.mask, view).all())

    def _writes(self, op: Op, view: View, number: int) -> Iterator[str]:
        buffer, written = self._table.buffers[view.source], self._written.get(view.source)
        mine = [other for other in op.inputs if other.source == view.source]
        if written is not None and written.part != number:
            yield f"it writes to {view.source[:60]!r}, which another segment gives"
        elif op.kind == "scatter":
            if not self._reads(view) or any(_meet(view, other) for other in mine):
                yield f"it changes {view.source[:60]!r}, which is not written before, or its input"
        elif view in mine and op.kind in IN_PLACE:
            if any(other != view and _meet(view, other) for other in mine):
                yield f"it reads of {view.source[:60]!r} what it overwrites"
        elif not self._mark(buffer, view, number):
            yield f"it writes to {view.source[:60]!r} what was written before"
        if self._marked > MAX_MARKED:
            yield f"buffers are written in pieces of more than {MAX_MARKED} numbers"

    def _mark(self, buffer: Buffer, view: View, number: int) -> bool:
        """Write to what is not written yet; False where some of it is."""
        written = self._written.get(buffer.name)
        if written is None and math.prod(view.shape) == buffer.numbers:
            self._written[buffer.name] = _Written(number)
            return True
        if written is None:
            self._marked += buffer.numbers
            if self._marked > MAX_MARKED:
                return True
            written = _Written(number, np.zeros(buffer.numbers, np.bool_))
            self._written[buffer.name] = written
        if written.mask is None:
            return False
        marks = self._marks(written.mask, view)
        fresh = not marks.any()
        marks[...] = True
        self._marked += buffer.numbers
        if written.mask.all():
            written.mask = None
        return fresh

    def _marks(self, mask: np.ndarray, view: View) -> np.ndarray:
        """What a view reaches of a buffer's mask."""
        self._marked += math.prod(view.shape)
        return np.lib.stride_tricks.as_strided(mask[view.offset :], view.shape, view.strides)


def _meet(one: View, other: View) -> bool:
    """Whether the spans of two views of one buffer share a number; their gaps count."""
    return one.offset < other.end and other.offset < one.end
