"""The encoding `nested`: every weight is a code whose bits lie in slices, most significant first,
so that a prefix of the record is the same expert in fewer bits.

`nested:2+1+1:128` has a base plane of 2 bits, two planes of 1 bit, and one scale per row and 128
columns; `nested:2+1+1/3+1+1:64` gives `down` a split of its own; `nested:2+1+1:32:fp4` has the
values of FP4, so that it can hold a checkpoint's own codes. At a level that has read n bits of
every code

    weight[r, c] = scale[r, c // group] * VALUES[r's split][n][first n bits of the code]

What the values are, and how slices are laid out for the kernels, is in FORMAT.md ("nested"). This
file is the specification in NumPy: it quantises by rounding; `smoe-prep` does better, with
calibration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.errors import BundleError
from smoe.artifacts.safetensors_file import TensorSpec

ROWS, COLUMNS = 16, 32  # of a block: 512 codes, of which one bit each is a slice of 64 bytes
GROUPS = (32, 64, 128)

# Codes of up to 4 bits, by the name of their values; a value of fewer bits is the mean of its cell
# for weights that are normally distributed.
TABLES: dict[str, dict[int, tuple[int, ...]]] = {
    # A tree: the 4 cells of the best 2-bit quantiser, each split in two where that is best, each of
    # those again, in units of 1/127 of the outermost.
    "": {
        2: (-73, -22, 22, 73),
        3: (-102, -62, -34, -11, 11, 34, 62, 102),
        4: (-127, -94, -72, -55, -41, -29, -17, -6, 6, 17, 29, 41, 55, 72, 94, 127),
    },
    # FP4 (E2M1) in units of 1/16, both of its zeros.
    "fp4": {
        2: (-51, -13, 13, 51),
        3: (-75, -39, -20, -5, 5, 20, 39, 75),
        4: (-96, -64, -48, -32, -24, -16, -8, 0, 0, 8, 16, 24, 32, 48, 64, 96),
    },
    # Integers of 4 bits in units of 1/16.
    "int4": {
        2: (-97, -35, 21, 83),
        3: (-119, -86, -55, -23, 8, 39, 70, 105),
        4: tuple(range(-128, 128, 16)),
    },
}


@dataclass(frozen=True)
class Split:
    """Bits per plane, base plane first: `Split((2, 1, 1))`, and the name of the values of codes
    that have up to 4 bits."""

    planes: tuple[int, ...]
    table: str = ""

    def bits(self, level: int) -> int:
        """Bits of a code that have been read at `level`, from 1 to the number of planes."""
        return sum(self.planes[:level])

    @property
    def total(self) -> int:
        """Bits of a whole code."""
        return sum(self.planes)

    @property
    def outermost(self) -> int:
        """The largest magnitude of a value, about, in units of the scale."""
        return max(map(abs, TABLES[self.table][self.total])) if self.total <= 4 else 127

    def values(self, level: int) -> np.ndarray:
        """What a code's first `bits(level)` bits stand for, in units of the scale: int8
        `[2**bits]`, rising.

        Longer codes than the tree's are cells of one uniform grid: 8 bits are -128 .. 127, fewer
        the middles of theirs.
        """
        n = self.bits(level)
        if self.total <= 4:
            return np.array(TABLES[self.table][n], np.int8)
        middle = 1 << (7 - n) if n < 8 else 0
        return ((np.arange(1 << n) << (8 - n)) + middle - 128).astype(np.int8)


@dataclass(frozen=True)
class Nested:
    """A parsed name: the split of gate and up, that of down, and columns per scale."""

    split: Split
    down: Split
    group: int

    @property
    def name(self) -> str:
        """The one spelling that a manifest has."""
        first, down = ("+".join(map(str, s.planes)) for s in (self.split, self.down))
        values = f":{self.split.table}" if self.split.table else ""
        return f"nested:{first}{'' if first == down else '/' + down}:{self.group}{values}"

    @property
    def levels(self) -> int:
        """Planes of every matrix."""
        return len(self.split.planes)

    def bits(self, level: int, matrices: Mapping[str, tuple[int, int]]) -> float:
        """Of a weight at `level`, scales not counted: the mean over `matrices` of these sizes."""
        sizes = {name: rows * columns for name, (rows, columns) in matrices.items()}
        read = sum(self.of(name).bits(level) * size for name, size in sizes.items())
        return read / sum(sizes.values())

    def of(self, matrix: str) -> Split:
        """The split of a matrix: gate, up or down."""
        return self.down if matrix == "down" else self.split


def parse(name: str) -> Nested:
    """`nested:2+1+1`, `nested:2+1+1:64`, `nested:2+1+1/3+1+1:64` or `nested:2+1+1:32:fp4`; a
    `BundleError` says what is wrong with another."""
    match = re.fullmatch(
        r"nested:([0-9+]{1,20})(?:/([0-9+]{1,20}))?(?::([0-9]{1,4}))?(?::([a-z0-9]{1,8}))?", name
    )
    if not match:
        raise BundleError(
            f"{name[:80]!r} is no nested encoding; write it like nested:2+1+1 or nested:5+1+1+1:64."
        )
    table = match[4] or ""
    splits = [_split(text, table, name) for text in (match[1], match[2] or match[1])]
    group = int(match[3] or 128)
    if group not in GROUPS:
        raise BundleError(
            f"{name} has groups of {group} columns; {', '.join(map(str, GROUPS))} are possible."
        )
    if len(splits[0].planes) != len(splits[1].planes):
        raise BundleError(
            f"{name}: both splits need the same number of planes, since a level is a number of "
            "planes."
        )
    return Nested(splits[0], splits[1], group)


def _split(text: str, table: str, name: str) -> Split:
    bits = tuple(int(part or 0) for part in text.split("+"))
    if not 2 <= bits[0] <= 5 or any(b != 1 for b in bits[1:]) or sum(bits) > 8:
        raise BundleError(
            f"{name}: a split is a base of 2 to 5 bits and planes of 1 bit, 8 in all; {text} is "
            "not."
        )
    if table not in TABLES or (table and sum(bits) != 4):
        raise BundleError(
            f"{name}: the values of 4 bits may be {' or '.join(filter(None, TABLES))}, and without "
            f"a name are smoe's own; {table} with {text} is not possible."
        )
    return Split(bits, table)


def matrix_planes(encoding: Nested, name: str, dims: tuple[int, int]) -> list[list[TensorSpec]]:
    """The tensors of one matrix, by plane. `NAME_scale` BF16 `[tiles, groups, 16]` is in the base
    plane; the slices of plane p are `NAME_plane{p}` U8 `[tiles, blocks, slices, 64]`."""
    tiles, blocks = _tiles(dims)
    planes = [
        [TensorSpec(f"{name}_plane{p}", "U8", (tiles, blocks, bits, ROWS * 4))]
        for p, bits in enumerate(encoding.of(name).planes)
    ]
    scale = TensorSpec(f"{name}_scale", "BF16", (tiles, -(-dims[1] // encoding.group), ROWS))
    return [[scale, *planes[0]], *planes[1:]]


def pack_matrix(
    encoding: Nested, name: str, codes: np.ndarray, scale: np.ndarray
) -> dict[str, np.ndarray]:
    """The tensors of a matrix from its codes uint8 `[n_out, n_in]` and scales float32 `[n_out,
    groups]`, which must be values of bfloat16."""
    split, out = encoding.of(name), {f"{name}_scale": tiled_scale(scale)}
    quads, first = _quads(codes), 0
    for p, bits in enumerate(split.planes):
        positions = range(first, first + bits)
        out[f"{name}_plane{p}"] = np.stack(
            [_slice(quads >> (split.total - 1 - t), t) for t in positions], axis=2
        )
        first += bits
    return out


def unpack_matrix(
    encoding: Nested, name: str, tensors: dict[str, np.ndarray], dims: tuple[int, int], level: int
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse at a level: the first bits of every code, uint8 `[n_out, n_in]`, and scales
    float32 `[n_out, groups]`."""
    slices = np.concatenate([tensors[f"{name}_plane{p}"] for p in range(level)], axis=2)
    codes = np.zeros(dims, np.uint8)
    for t in range(slices.shape[2]):
        codes = codes << 1 | _unsliced(slices[:, :, t], t)[: dims[0], : dims[1]]
    scale = from_bf16(tensors[f"{name}_scale"]).swapaxes(1, 2)
    return codes, scale.reshape(-1, scale.shape[2])[: dims[0]]


def decode_matrix(
    encoding: Nested, name: str, tensors: dict[str, np.ndarray], dims: tuple[int, int], level: int
) -> np.ndarray:
    """Float32 `[n_out, n_in]` at a level."""
    codes, scale = unpack_matrix(encoding, name, tensors, dims, level)
    values = encoding.of(name).values(level)[codes].astype(np.float32)
    return values * np.repeat(scale, encoding.group, axis=1)[:, : dims[1]]


def round_matrix(encoding: Nested, name: str, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float32 `w` `[n_out, n_in]`, each weight rounded to the nearest value of
    the full level.

    A group's scale is the best of a few around its spread, all levels weighing the same; sums are
    NumPy's, of eight running sums over a group. The control that calibration has to beat.
    """
    split, (n_out, n_in) = encoding.of(name), w.shape
    groups = -(-n_in // encoding.group)
    padded = np.pad(w, ((0, 0), (0, groups * encoding.group - n_in))).reshape(
        n_out, groups, encoding.group
    )
    codes = np.zeros(padded.shape, np.uint8)
    scale, best = (
        np.zeros((n_out, groups), np.float32),
        np.full((n_out, groups), np.inf, np.float32),
    )
    for candidate in scale_candidates(split, padded, n_in):
        rounded = nearest(split, padded / np.where(candidate > 0, candidate, 1)[..., None])
        cost = sum(
            np.square(
                padded
                - candidate[..., None] * split.values(n)[rounded >> (split.total - split.bits(n))]
            ).sum(-1)
            * level_weight(split, n)
            for n in range(1, len(split.planes) + 1)
        )
        better = cost < best
        codes[better], scale[better] = rounded[better], candidate[better]
        best[better] = cost[better]
    return codes.reshape(n_out, -1)[:, :n_in], scale


def scale_candidates(split: Split, groups: np.ndarray, n_in: int) -> list[np.ndarray]:
    """Scales to try for the groups `[n_out, groups, group]` of rows of `n_in` columns: float32
    `[n_out, groups]`, values of bfloat16. For a table around the spread, for a uniform grid around
    the largest magnitude; 0 for zeros. Up to the last rounding in float64."""
    if split.total <= 4:
        real = np.minimum(groups.shape[-1], n_in - np.arange(groups.shape[1]) * groups.shape[-1])
        middle = np.sqrt(np.square(groups).sum(-1) / real)
    else:
        middle = np.abs(groups).max(-1).astype(np.float64)
    around = [k / split.outermost for k in tried_scales(split)]
    return [from_bf16(to_bf16((middle * k).astype(np.float32))) for k in around]


def tried_scales(split: Split) -> list[float]:
    """What the outermost value may stand for, in units of a group's spread: its root mean square
    for a table, its largest magnitude for a uniform grid."""
    return (np.linspace(1.8, 3.0, 9) if split.total <= 4 else np.linspace(0.7, 1.1, 9)).tolist()


def nearest(split: Split, x: np.ndarray) -> np.ndarray:
    """The full code, uint8, whose value is nearest to `x`."""
    return nearest_of(split.values(len(split.planes)), x)


def nearest_of(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The places, uint8, of those of the rising `values` that are nearest to `x`."""
    wide = values.astype(np.float32)
    return np.searchsorted((wide[1:] + wide[:-1]) / 2, x).astype(np.uint8)


def level_weight(split: Split, level: int) -> float:
    """One over what a level's error is expected to be (four times less per bit), so that all levels
    count."""
    return 4.0 ** (split.bits(level) - split.total)


def _tiles(dims: tuple[int, int]) -> tuple[int, int]:
    return -(-dims[0] // ROWS), -(-dims[1] // COLUMNS)


def _quads(codes: np.ndarray) -> np.ndarray:
    """Codes uint8 `[n_out, n_in]` as uint8 `[tiles, blocks, row, column of a quad, quad]`."""
    tiles, blocks = _tiles(codes.shape)
    padded = np.zeros((tiles * ROWS, blocks * COLUMNS), np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    quads = padded.reshape(tiles, ROWS, blocks, 8, 4).transpose(0, 2, 1, 4, 3)
    return np.ascontiguousarray(quads)


def _slice(quads: np.ndarray, t: int) -> np.ndarray:
    """Bit t (0 the most significant) of all codes, the last bit of each of `quads`, as uint8
    `[tiles, blocks, 64]`.

    The bits of a byte's eight quads are bytes of one integer; a product brings them together at its
    top, each at its place, and no two of what it makes besides are at the same place.
    """
    apart = (quads & np.uint8(1)).view("<u8")[..., 0]
    places = (56 - 8 * quad + int(place) for quad, place in enumerate(_places(t)))
    gathered = apart * np.uint64(sum(1 << place for place in places)) >> np.uint64(56)
    return gathered.astype(np.uint8).reshape(*quads.shape[:2], ROWS * 4)


def _unsliced(packed: np.ndarray, t: int) -> np.ndarray:
    """The inverse of `_slice`, with the rows and columns of whole blocks."""
    tiles, blocks, _ = packed.shape
    quads = packed.reshape(tiles, blocks, 1, ROWS, 4) >> _places(t)[:, None, None] & 1
    return quads.transpose(0, 3, 1, 2, 4).reshape(tiles * ROWS, blocks * COLUMNS)


def _places(t: int) -> np.ndarray:
    """At which bit of a byte slice t holds each of a block's 8 quads: uint8 `[8]`.

    Two quads of one code lie four apart, and from slice to slice everything moves by one: picking
    bit j of every byte from slice (j - m) mod 4 then gives the codes of quads 2m and 2m+1 in the
    halves of each byte, without a shift.
    """
    quad = np.arange(8)
    return ((quad // 2 + t) % 4 + 4 * (quad % 2)).astype(np.uint8)


def tiled_scale(scale: np.ndarray) -> np.ndarray:
    """Scales float32 `[n_out, groups]`, values of bfloat16, as a record has them: uint16 `[tiles,
    groups, 16]`."""
    tiles = -(-scale.shape[0] // ROWS)
    padded = np.zeros((tiles * ROWS, scale.shape[1]), np.uint16)
    padded[: scale.shape[0]] = to_bf16(scale)
    return padded.reshape(tiles, ROWS, -1).swapaxes(1, 2)
