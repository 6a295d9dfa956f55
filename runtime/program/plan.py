"""Where the buffers of a program lie: those that cross segments in the memory of a step, the others
in a scratch that every block of rows uses again; each takes the place of what is not needed any
more."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from smoe.artifacts.program import Buffer, Op, Program
from smoe.runtime.program.embedding import left_in_file

ALIGNED = 64  # bytes
BYTES = {"f32": 4, "i64": 8, "bool": 1}


@dataclass(frozen=True)
class Plan:
    """`offsets` in bytes a row, within the scratch, the step's memory, or that of kept rows; the
    latter two are for buffers in `crossing`. `scratch`, `step` and `kept` are their sizes."""

    crossing: frozenset[str]
    offsets: dict[str, int]
    scratch: int
    step: int
    kept: int


@dataclass(frozen=True)
class _Life:
    """A buffer from one point in time to another, both of them included."""

    buffer: Buffer
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return aligned(self.buffer)


def elements(shape: Iterable[int]) -> int:
    """How many there are."""
    count = 1
    for size in shape:
        count *= size
    return count


def aligned(buffer: Buffer) -> int:
    """Bytes of a row, rounded up."""
    nbytes = elements(buffer.shape) * BYTES[buffer.kind]
    return -(-nbytes // ALIGNED) * ALIGNED


def plan(program: Program, wires: Collection[str] | None) -> Plan:
    """`wires` are the buffers that others read or write between segments; None: all of them."""
    written: dict[str, list[int]] = {}
    read: dict[str, list[int]] = {}
    for index, part in enumerate(program.parts):
        for op in part.ops or ():
            for uses, views in ((read, op.inputs), (written, op.outputs)):
                for view in views:
                    uses.setdefault(view.source, []).append(index)
    looked_up = {buffer.name for _, _, buffer in left_in_file(program)}
    crossing = {
        b.name
        for b in program.buffers
        if wires is None
        or b.name in looked_up
        or b.name in wires
        or not (written.get(b.name) and read.get(b.name))
        or len({*written[b.name], *read[b.name]}) > 1
    }
    lives = _crossing_lives(program, crossing, written, read)
    scratch, offsets = 0, {}
    for part in program.parts:
        placed, size = _placed(_lives(program, part.ops or (), crossing))
        scratch = max(scratch, size)
        offsets.update(placed)
    step, step_size = _placed([life for life in lives if not life.buffer.kept])
    kept, kept_size = _placed([life for life in lives if life.buffer.kept])
    return Plan(frozenset(crossing), offsets | step | kept, scratch, step_size, kept_size)


def _crossing_lives(
    program: Program,
    crossing: Collection[str],
    written: dict[str, list[int]],
    read: dict[str, list[int]],
) -> list[_Life]:
    """In segments. What a segment gives is there until the next one has run, which may be tried
    before its turn; ids until the end of the step, so that one can look up what was routed; all of
    it where a segment is not known, whose reads nobody knows."""
    end = len(program.parts)
    whole = all(part.ops is not None for part in program.parts)
    lives = []
    for buffer in program.buffers:
        writes, reads = written.get(buffer.name, []), read.get(buffer.name, [])
        if buffer.name not in crossing:
            continue
        first, last = 0, end
        if whole and (writes or reads):
            first = min(writes) if writes else max(0, min(reads) - 1)
            last = max([first + 1, *reads, *writes])
        lives.append(_Life(buffer, first, end if buffer.kind == "i64" else last))
    return lives


def _lives(program: Program, ops: Iterable[Op], crossing: Collection[str]) -> list[_Life]:
    """Of the buffers inside a segment, in operations."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, op in enumerate(ops):
        for view in (*op.inputs, *op.outputs):
            first.setdefault(view.source, index)
            last[view.source] = index
    return [
        _Life(b, first[b.name], last[b.name])
        for b in program.buffers
        if b.name in first and b.name not in crossing
    ]


def _placed(lives: Iterable[_Life]) -> tuple[dict[str, int], int]:
    """The lowest place for each, one after another; how much that takes."""
    offsets: dict[str, int] = {}
    alive: list[tuple[int, int, int]] = []  # offset, end, last
    total = 0
    for life in sorted(lives, key=lambda life: (life.first, -life.nbytes)):
        alive = sorted(one for one in alive if one[2] >= life.first)
        offset = 0
        for low, high, _ in alive:
            if offset + life.nbytes <= low:
                break
            offset = max(offset, high)
        offsets[life.buffer.name] = offset
        alive.append((offset, offset + life.nbytes, life.last))
        total = max(total, offset + life.nbytes)
    return offsets, total
