"""Embeddings that stay in their file: a token needs one row of a matrix that nothing else reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from smoe.artifacts import tiles
from smoe.artifacts.nested import ROWS
from smoe.artifacts.program import Buffer, Constant, Op, Program, View
from smoe.artifacts.program_ops import dense
from smoe.runtime import kernels
from smoe.runtime.cache.shard_file import ShardFile
from smoe.runtime.errors import EngineError
from smoe.runtime.kernels import products

TOGETHER = 32  # tokens whose rows are read before they are used
READ_AT_LEAST = 1 << 20  # bytes of a matrix for which it is worth it


def left_in_file(program: Program) -> list[tuple[Op, Constant, Buffer]]:
    """The `embedding` operations whose matrices need not be in memory, with matrix and buffer: no
    other operation reads any of its bytes (a head that is tied to it does)."""
    buffers = {b.name: b for b in program.buffers}
    constants = {c.name: c for c in program.constants}
    used = [c for _, op in program.operations() for c in _constants(op, constants)]
    found = []
    for _, op in program.operations():
        if op.kind == "embedding":
            constant, (y,) = constants[op.weight], op.outputs
            alone = sum(_meet(constant, other) for other in used) == 1
            if alone and constant.nbytes >= READ_AT_LEAST and _whole(y, buffers[y.source]):
                found.append((op, constant, buffers[y.source]))
    return found


def without(program: Program, gone: Collection[Op]) -> Program:
    """The program less these operations."""
    parts = (
        part
        if part.ops is None
        else dataclasses.replace(part, ops=tuple(op for op in part.ops if op not in gone))
        for part in program.parts
    )
    return dataclasses.replace(program, parts=tuple(parts))


def _constants(op: Op, constants: dict[str, Constant]) -> Iterator[Constant]:
    for name in {op.weight, *(view.source for view in op.inputs)} & constants.keys():
        yield constants[name]


def _meet(one: Constant, other: Constant) -> bool:
    return one.offset < other.offset + other.nbytes and other.offset < one.offset + one.nbytes


def _whole(view: View, buffer: Buffer) -> bool:
    return dense(view) and int(np.prod(view.shape)) == buffer.numbers and not buffer.kept


class EmbeddingFile:
    """The matrix `constant` of the weight file at `path`, and its rows times `scale`. An
    `EngineError` where the file cannot be read."""

    def __init__(self, path: Path, constant: Constant, scale: float):
        self._path, self._constant, self._times = path, constant, scale
        try:
            self._file = ShardFile(path, direct=False, refused=_never)
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error.strerror}.") from error

    def rows(self, ids: np.ndarray, y: np.ndarray) -> None:
        """Rows `ids` int64 `[n]`, which the matrix has, into `y` float32 `[n, n_in]`."""
        for first in range(0, len(ids), TOGETHER):
            some = slice(first, first + TOGETHER)
            matrix, places = self._matrix(ids[some])
            kernels.embedding(matrix, places, self._times, y[some])

    def _matrix(self, ids: np.ndarray) -> tuple[products.Weight, np.ndarray]:
        """Those of its tiles that hold these rows, as a matrix, and where the rows are in it. Float
        rows are tiles of one."""
        c = self._constant
        packed = c.form in tiles.BITS
        height = ROWS if packed else 1
        wanted, places = np.unique(ids // height, return_inverse=True)
        n_out, n_in = c.shape
        codes = tiles.code_bytes(c.form, n_out, n_in) if packed else c.nbytes
        data = self._pieces(wanted, codes // -(-n_out // height), c.offset)
        scales = np.empty((0, 0), np.uint8)
        if packed:
            each = (c.nbytes - codes) // -(-n_out // height)
            scales = self._pieces(wanted, each, c.offset + codes)
        matrix = products.Weight(
            c.form,
            len(wanted) * height,
            n_in,
            c.group,
            c.wide,
            data.reshape(-1),
            scales.reshape(-1),
        )
        return matrix, places * height + ids % height

    def _pieces(self, wanted: np.ndarray, nbytes: int, start: int) -> np.ndarray:
        """Pieces `wanted` of the file, of so many bytes each from `start` on: uint8 `[n,
        nbytes]`."""
        pieces = np.empty((len(wanted), nbytes), np.uint8)
        for piece, number in zip(pieces, wanted.tolist(), strict=True):
            try:
                got = self._file.read(piece.data, start + number * nbytes)
            except OSError as error:
                raise EngineError(f"{self._path} cannot be read: {error.strerror}.") from error
            if got < nbytes:
                raise EngineError(f"{self._path} became shorter while it was read; copy it again.")
        return pieces

    def close(self) -> None:
        """It cannot be read afterwards."""
        self._file.close()


def _never(path: Path, reason: str) -> None:
    """Nothing is read past the page cache."""
