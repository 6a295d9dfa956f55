"""Opening a program, and the native executor of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smoe.artifacts.program import PROGRAM_WEIGHTS, Constant, Program
from smoe.runtime.errors import EngineError
from smoe.runtime.kernels import (
    Kernels,
    native_mixture,
    native_part,
    native_program,
    native_state,
)
from smoe.runtime.program import flatten
from smoe.runtime.program.embedding import EmbeddingFile, left_in_file, without
from smoe.runtime.program.layout import StateLayout
from smoe.runtime.program.plan import plan
from smoe.runtime.program.pool import BlockPool
from smoe.runtime.program.reference import ReferenceProgram
from smoe.runtime.program.seam import Executable, LayerExperts, Rows, Spans
from smoe.runtime.program.state import ProgramState
from smoe.runtime.system import aligned

if TYPE_CHECKING:
    import smoe.runtime.kernels._native as _native

PART = 64  # rows of a segment without a pause (128 are no faster)


def open_program(
    path: Path,
    program: Program,
    kernels: Kernels,
    threads: int,
    wires: Collection[str] | None = None,
) -> Executable:
    """The executor of `program`, which was checked, of the bundle at `path`: reads its weights
    once, but for embeddings, whose rows are read when they are wanted.

    `wires` names the buffers that will be read or written between segments, beside those that
    nothing of the program writes or reads; None: any of them, at the price of memory. Weights that
    cannot be read, and a table that the native module does not take, are an `EngineError`.
    """
    file = path / PROGRAM_WEIGHTS
    if kernels.name == "reference":
        return ReferenceProgram(program, _weights(file, []))
    left = [constant for _, constant, _ in left_in_file(program)]
    return _Native(program, file, _weights(file, left), kernels.name, threads, wires)


def _weights(path: Path, left: Iterable[Constant]) -> np.ndarray:
    """The bytes of the file, on a page boundary. Those of constants that are `left` in it are zeros
    that take no memory."""
    try:
        size = path.stat().st_size
        weights: np.ndarray = aligned(1, size)[0]
        gaps = sorted((constant.offset, constant.offset + constant.nbytes) for constant in left)
        starts, ends = [0, *(end for _, end in gaps)], [*(start for start, _ in gaps), size]
        with path.open("rb", buffering=0) as file:
            for start, end in zip(starts, ends, strict=True):
                file.seek(start)
                while start < end:
                    count = file.readinto(weights[start:end].data)
                    if not count:
                        raise EngineError(
                            f"{path} became shorter while it was read; copy it again."
                        )
                    start += count
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}.") from error
    except MemoryError as error:
        raise EngineError(f"{path} has {size} bytes, more memory than there is.") from error
    return weights


@dataclass(frozen=True, eq=False)
class _Step:
    """A step of the native executor."""

    native: _native.Rows
    tokens: int
    kept: int
    states: tuple[ProgramState, ...]


class _Native:
    def __init__(
        self,
        program: Program,
        file: Path,
        weights: np.ndarray,
        variant: str,
        threads: int,
        wires: Collection[str] | None,
    ):
        self._table, self._pools = program, dict[int, BlockPool]()
        places = plan(program, wires)
        self.row_bytes, self.kept_bytes = places.step, places.kept
        self._index = {b.name: i for i, b in enumerate(program.buffers)}
        self._shape = {b.name: b.shape for b in program.buffers if b.name in places.crossing}
        left = left_in_file(program)
        self._vocabulary = min((constant.shape[0] for _, constant, _ in left), default=2**31)
        program = without(program, [op for op, _, _ in left])
        try:
            self._program = native_program(
                weights,
                flatten.buffers(program, places),
                flatten.constants(program),
                flatten.states(program),
                flatten.recurrent(program),
                flatten.segments(program),
                variant,
                threads,
            )
        except ValueError as error:
            raise EngineError(f"{error} Copy the bundle again, or build it again.") from error
        self.scratch_bytes = places.scratch * self._program.block + self._program.kernel_scratch
        self.scratch_bytes += places.scan * self._program.scans
        self._embeddings = {
            buffer.name: EmbeddingFile(file, constant, (op.numbers or {})["scale"])
            for op, constant, buffer in left
        }

    def state(self, context: int, kind: str) -> ProgramState:
        return ProgramState(StateLayout.of(self._table, kind), context, self._pools)

    def begin(self, spans: Spans, keep: np.ndarray) -> Rows:
        ids = np.concatenate([np.zeros(0, np.int64), *(new for _, _, new in spans)])
        beyond = ids[(ids < 0) | (ids >= self._vocabulary)]
        if len(beyond):
            raise EngineError(
                f"Token id {beyond[0]} is not one of the program's {self._vocabulary}."
            )
        for state, past, new in spans:
            state.reserve(past, past + len(new))
        given = [(state.bound(_bound), past, new) for state, past, new in spans]
        try:
            native = self._program.begin(given, keep)
        except ValueError as error:
            raise EngineError(str(error)) from error
        for name, embedding in self._embeddings.items():
            embedding.rows(ids, native.array(self._index[name]))
        return _Step(native, native.tokens, len(keep), tuple(state for state, _, _ in spans))

    def run(self, rows: Rows, segment: int) -> None:
        self._run(rows, segment, 0, rows.tokens)

    def parts(self, rows: Rows, segment: int) -> Iterator[None]:
        for first in range(0, rows.tokens, PART):
            self._run(rows, segment, first, min(first + PART, rows.tokens))
            if rows.tokens > PART:
                yield

    def _run(self, rows: Rows, segment: int, first: int, end: int) -> None:
        assert isinstance(rows, _Step)
        try:
            self._program.run(rows.native, segment, first, end)
        except (ValueError, RuntimeError) as error:  # the latter: no thread from the system
            raise EngineError(str(error)) from error

    def read(self, rows: Rows, name: str) -> np.ndarray:
        assert isinstance(rows, _Step)
        flat = rows.native.array(self._index[name])
        return flat.reshape(len(flat), *self._shape[name])

    def write(self, rows: Rows, name: str, value: np.ndarray) -> None:
        assert isinstance(rows, _Step)
        flat = rows.native.array(self._index[name])
        flat[...] = value.reshape(flat.shape)

    def mixture(self, layers: Sequence[LayerExperts], records: np.ndarray) -> object | None:
        about = []
        for one in layers:
            part = native_part(one.kernel)
            if part is None:
                return None
            assert one.where.dtype == np.int64 and one.where.flags.c_contiguous  # it is not copied
            names = (one.hidden, one.ids, one.weights, one.output)
            wired = [self._index[name] for name in names]
            about.append((part, one.level, one.where, one.segment, *wired))
        return native_mixture(self._program, about, records)

    def steps(self, rows: Rows, mixture: object, first: int) -> int:
        assert isinstance(rows, _Step)
        try:
            return self._program.steps(rows.native, mixture, first)
        except (ValueError, RuntimeError) as error:
            raise EngineError(str(error)) from error

    def release(self) -> None:
        for embedding in self._embeddings.values():
            embedding.close()


def _bound(state: ProgramState) -> _native.State:
    sizes = [array.size for array in state.before]
    return native_state(state.tables, state.layouts, state.context, state.recurrent_at, sizes)
