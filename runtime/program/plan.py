"""Where the buffers of a program lie: those that cross segments in the memory of a step, the others
in a scratch that every block of rows uses again; each takes the place of what is not needed any
more. What is needed only while a scan goes from row to row (`artifacts.program.scans`) has a place
for one row, however many there are: it may be as large as a state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from smoe.artifacts.program import Buffer, Op, Program, scans
from smoe.runtime.program.embedding import left_in_file

ALIGNED = 64  # bytes
ROWS = 128  # that a segment takes at once (native/program.h)
BYTES = {"f32": 4, "i64": 8, "bool": 1}


@dataclass(frozen=True)
class Plan:
    """`offsets` in bytes a row, within the scratch, the step's memory, or that of kept rows; the
    latter two are for buffers in `crossing`. `scratch`, `step` and `kept` are their sizes.

    Buffers in `scanned` lie in memory of one row, of `scan` bytes, for each scan that runs."""

    crossing: frozenset[str]
    scanned: frozenset[str]
    offsets: dict[str, int]
    scratch: int
    scan: int
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
    scratch, scan, offsets = 0, 0, {}
    scanned: set[str] = set()
    for part in program.parts:
        mine = _scanned(part.ops or ()) - crossing
        inside = _lives(program, part.ops or (), crossing, mine)
        placed, size = _placed(life for life in inside if life.buffer.name not in mine)
        rows, row_size = _placed(life for life in inside if life.buffer.name in mine)
        scratch, scan = max(scratch, size), max(scan, row_size)
        offsets.update(placed | rows)
        scanned |= mine
    step, step_size = _placed([life for life in lives if not life.buffer.kept])
    kept, kept_size = _placed([life for life in lives if life.buffer.kept])
    return Plan(
        crossing=frozenset(crossing),
        scanned=frozenset(scanned),
        offsets=offsets | step | kept,
        scratch=scratch,
        scan=scan,
        step=step_size,
        kept=kept_size,
    )


def _scanned(ops: Sequence[Op]) -> set[str]:
    """What no operation outside of one scan reads or writes."""
    uses = Counter(name for op in ops for name in _sources(op))
    alone: set[str] = set()
    for scan in scans(ops):
        mine = Counter(name for place in scan for name in _sources(ops[place]))
        alone |= {name for name, count in mine.items() if count == uses[name]}
    return alone


def _sources(op: Op) -> set[str]:
    return {view.source for view in (*op.inputs, *op.outputs)}


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


def _lives(
    program: Program, ops: Sequence[Op], crossing: Collection[str], scanned: Collection[str]
) -> list[_Life]:
    """Of the buffers inside a segment, in operations. A scan is over for all rows at once."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    begins = {place: scan.start for scan in scans(ops) for place in scan}
    ends = {place: scan.stop - 1 for scan in scans(ops) for place in scan}
    for index, op in enumerate(ops):
        for name in _sources(op):
            own = name in scanned
            first.setdefault(name, index if own else begins.get(index, index))
            last[name] = index if own else ends.get(index, index)
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
