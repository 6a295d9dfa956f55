"""What a program reads: constants by name, packed only once it is written.

Products in few bits have the experts' tiles (artifacts/tiles.py); float matrices are rows, in
bfloat16 where that holds every value. Equal constants are one, so that a vocabulary's table that is
also the last product's matrix is stored once."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import tiles
from smoe.artifacts.bfloat16 import to_bf16
from smoe.artifacts.program import ALIGN, Constant, View
from smoe.prep.program.values import Known
from smoe.prep.program.views import whole

ROWS = 4096  # looked at together


@dataclass(frozen=True)
class Coded:
    """A matrix `[n_out, n_in]` in few bits: codes uint8 `[n_out, n_in]`, of value code - 2^(bits -
    1), and float32 scales `[n_out, groups]`."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    group: int


Matrix = np.ndarray | Coded  # float32 [n_out, n_in], or in few bits


class Weights:
    """The constants that a program may read."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[tuple[int, ...], Callable[[], Matrix], bool]] = {}
        self._vectors: dict[bytes, str] = {}

    def matrix(self, name: str, shape: tuple[int, ...], read: Callable[[], Matrix]) -> str:
        """The name of a matrix `[n_out, n_in]`, which is read when it is written."""
        self._made.setdefault(name, (shape, read, True))
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a matrix."""
        return self._made[name][0]

    def read(self, name: str) -> Matrix:
        """A matrix, to make others of it."""
        return self._made[name][1]()

    def vector(self, known: Known) -> View:
        """A float constant that operations take, in its own shape."""
        array = np.ascontiguousarray(known.array)
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
        if digest not in self._vectors:
            name = known.name or f"constant.{len(self._vectors)}"
            while name in self._made:
                name += ".vector"
            self._vectors[digest] = name
            self._made[name] = ((array.size,), lambda: array.reshape(-1), False)
        return whole(self._vectors[digest], array.shape)

    def joined(self, views: Sequence[View]) -> View:
        """Dense views of constants, one after another, as a constant."""
        arrays = []
        for view in views:
            numbers = np.asarray(self._made[view.source][1]())
            arrays.append(numbers[view.offset : view.offset + math.prod(view.shape)])
        return self.vector(Known(np.concatenate(arrays)))

    def write(self, path: Path, used: Collection[str]) -> tuple[list[Constant], dict[str, str]]:
        """Write those that are `used` to a new file; what is there, and which constant each name
        has become."""
        constants: dict[str, Constant] = {}
        became: dict[str, str] = {}
        with open(path, "wb") as file:
            for name in sorted(used, key=list(self._made).index):
                constant, parts = _packed(name, *self._made[name])
                digest = hashlib.sha256(repr(dataclasses.replace(constant, name="")).encode())
                for part in parts:
                    digest.update(part.data)
                if digest.hexdigest() not in constants:
                    file.write(b"\0" * (-file.tell() % ALIGN))
                    placed = dataclasses.replace(constant, offset=file.tell())
                    constants[digest.hexdigest()] = placed
                    file.writelines(part.data for part in parts)
                became[name] = constants[digest.hexdigest()].name
        return list(constants.values()), became


def _packed(
    name: str, shape: tuple[int, ...], read: Callable[[], Matrix], packs: bool
) -> tuple[Constant, list[np.ndarray]]:
    """A constant, but for its place, and its bytes one after another."""
    matrix, group, wide = read(), 0, False
    if isinstance(matrix, Coded):
        group, wide = matrix.group, not _is_bfloat16(matrix.scales)
        if matrix.bits == 4:
            form, codes = "int4", tiles.pack_int4(matrix.codes)
        else:
            form, codes = "int8", tiles.pack_int8((matrix.codes ^ np.uint8(128)).view(np.int8))
        parts = [codes, tiles.pack_scales(matrix.scales, wide)]
    elif packs and _is_bfloat16(matrix):
        form, parts = "bf16", [to_bf16(matrix)]
    else:
        form, parts = "f32", [np.ascontiguousarray(matrix)]
    flat = [part.reshape(-1).view(np.uint8) for part in parts]
    nbytes = sum(part.nbytes for part in flat)
    return Constant(name, form, shape, 0, nbytes, group, wide), flat


def _is_bfloat16(values: np.ndarray) -> bool:
    """Whether no value has more than bfloat16 holds."""
    few = range(0, len(values), ROWS)
    return all(tiles.is_bf16(values[start : start + ROWS]) for start in few)
