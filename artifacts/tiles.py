"""A backbone's matrices in few bits, as `program.data` has them: tiles of 16 rows by blocks of 32
columns, those of the experts (`nested`). FORMAT.md ("Programs") says the same in words.

int8: of every block, its 8 quads of 4 columns; of a quad, the 16 rows; of a row, its 4 columns, a
byte each: the code plus 128, as the dot products of AVX-512 want it. int4: nested's plane of 4
bits, whose values are the codes less 8.

    weight[r, c] = scale[r, c // group] * code

Scales lie as nested's: `[tile][group][16 rows]`, bfloat16, or float32 where they are `wide`. What
is beyond the last row has scale 0; what is beyond the last column is multiplied by nothing. Codes
are a multiple of 256 bytes, so scales may follow at once and lie on a multiple of 64.
"""

from __future__ import annotations

import numpy as np

from smoe.artifacts import nested
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.nested import COLUMNS, ROWS

QUAD = 4  # columns
BITS = {"int8": 8, "int4": 4}
_PLANE = nested.parse("nested:4:32")  # one plane; the group does not matter to codes


def code_bytes(form: str, n_out: int, n_in: int) -> int:
    """Bytes of the codes of a matrix `[n_out, n_in]` of the form int8 or int4."""
    tiles, blocks = -(-n_out // ROWS), -(-n_in // COLUMNS)
    return tiles * blocks * ROWS * COLUMNS * BITS[form] // 8


def scale_bytes(n_out: int, n_in: int, group: int, wide: bool) -> int:
    """Bytes of its scales, one for every row and `group` of columns."""
    return -(-n_out // ROWS) * -(-n_in // group) * ROWS * (4 if wide else 2)


def head_rows(n_out: int) -> int:
    """Rows from the matrix of a head to that of the next, where several are one constant: whole
    tiles."""
    return -(-n_out // ROWS) * ROWS


def pack_int8(codes: np.ndarray) -> np.ndarray:
    """Codes int8 `[n_out, n_in]` as uint8 `[code_bytes]`."""
    n_out, n_in = codes.shape
    tiles, blocks = -(-n_out // ROWS), -(-n_in // COLUMNS)
    padded = np.full((tiles * ROWS, blocks * COLUMNS), 128, np.uint8)
    padded[:n_out, :n_in] = codes.view(np.uint8) ^ np.uint8(128)
    quads = padded.reshape(tiles, ROWS, blocks, COLUMNS // QUAD, QUAD)
    return quads.transpose(0, 2, 3, 1, 4).reshape(-1)


def unpack_int8(packed: np.ndarray, n_out: int, n_in: int) -> np.ndarray:
    """The inverse: int8 `[n_out, n_in]`."""
    tiles, blocks = -(-n_out // ROWS), -(-n_in // COLUMNS)
    quads = packed.reshape(tiles, blocks, COLUMNS // QUAD, ROWS, QUAD).transpose(0, 3, 1, 2, 4)
    codes = quads.reshape(tiles * ROWS, blocks * COLUMNS)[:n_out, :n_in]
    return (codes ^ np.uint8(128)).view(np.int8)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Codes uint8 `[n_out, n_in]`, each its value plus 8 (0 to 15), as uint8 `[code_bytes]`."""
    no_scale = np.zeros((len(codes), 1), np.float32)
    return nested.pack_matrix(_PLANE, "w", codes, no_scale)["w_plane0"].reshape(-1)


def unpack_int4(packed: np.ndarray, n_out: int, n_in: int) -> np.ndarray:
    """The inverse: uint8 `[n_out, n_in]`, 0 to 15."""
    tiles, blocks = -(-n_out // ROWS), -(-n_in // COLUMNS)
    tensors = {
        "w_plane0": packed.reshape(tiles, blocks, BITS["int4"], ROWS * QUAD),
        "w_scale": np.zeros((tiles, 1, ROWS), np.uint16),
    }
    return nested.unpack_matrix(_PLANE, "w", tensors, (n_out, n_in), 1)[0]


def pack_scales(scales: np.ndarray, wide: bool) -> np.ndarray:
    """Scales float32 `[n_out, groups]` as uint8 `[scale_bytes]`. Unless `wide` they must be values
    of bfloat16; others are a ValueError."""
    if not wide and not is_bf16(scales):
        raise ValueError("There are scales that bfloat16 does not hold; pack them wide.")
    n_out, groups = scales.shape
    padded = np.zeros((-(-n_out // ROWS) * ROWS, groups), np.float32)
    padded[:n_out] = scales
    tiled = np.ascontiguousarray(padded.reshape(-1, ROWS, groups).swapaxes(1, 2))
    return (
        (tiled.astype("<f4") if wide else to_bf16(tiled).astype("<u2")).view(np.uint8).reshape(-1)
    )


def unpack_scales(packed: np.ndarray, n_out: int, groups: int, wide: bool) -> np.ndarray:
    """The inverse: float32 `[n_out, groups]`."""
    numbers = packed.view("<f4") if wide else from_bf16(packed.view("<u2"))
    tiled = numbers.astype(np.float32, copy=False).reshape(-1, groups, ROWS)
    return tiled.swapaxes(1, 2).reshape(-1, groups)[:n_out]


def is_bf16(x: np.ndarray) -> bool:
    """Whether every number of float32 `x` is a value of bfloat16, so that its scales need not be
    `wide`."""
    return bool(np.array_equal(from_bf16(to_bf16(x)), x))
