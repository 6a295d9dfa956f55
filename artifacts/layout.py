"""Where every byte of an expert lies in its record: a pure function of geometry and encoding.

A record is one expert. Its tensors are grouped in planes, base plane first, so that reading a
longer prefix of the record gives more precision: *level* n is the prefix that ends with plane n
(FORMAT.md, "Records").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.safetensors_file import DTYPES, TensorSpec

# bytes: every tensor of a record starts on a multiple, so that vector loads never straddle two
ALIGN = 64


@dataclass(frozen=True)
class ExpertShape:
    """The matrices of one expert: gate and up `[width, hidden]`, down `[hidden, width]`.

    `gated` is False where the expert is down(act(up(x))); `biased` adds a vector per matrix,
    `normed` one that scales the output before it is normalised.
    """

    hidden: int
    width: int
    gated: bool = True
    biased: bool = False
    normed: bool = False

    def matrices(self) -> dict[str, tuple[int, int]]:
        """`[n_out, n_in]` of each matrix, in the order in which a record has them."""
        gate = {"gate": (self.width, self.hidden)} if self.gated else {}
        return gate | {"up": (self.width, self.hidden), "down": (self.hidden, self.width)}


@dataclass(frozen=True)
class Field:
    """One tensor of a record: `offset` counts bytes from the record's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Without padding."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class RecordLayout:
    """`levels[n]` is the number of bytes to read for level n+1, a multiple of the page; the last is
    `nbytes`, the whole record."""

    fields: tuple[Field, ...]
    levels: tuple[int, ...]
    nbytes: int

    def views(self, record: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of a record as views of it, by name; nothing is copied. `record` uint8 may
        end with any level; then the tensors are those of its planes."""
        return {
            f.name: record[f.offset : f.offset + f.nbytes].view(DTYPES[f.dtype]).reshape(f.shape)
            for f in self.fields
            if f.offset + f.nbytes <= len(record)
        }

    def tensors(self, expert: int) -> list[TensorSpec]:
        """What a shard's header says of this expert's record: its tensors, and the padding between
        them."""
        planned, end = [], 0
        for index, field in enumerate(self.fields):
            if field.offset > end:
                planned.append(
                    TensorSpec(f"expert.{expert:04d}.pad.{index}", "U8", (field.offset - end,))
                )
            planned.append(
                TensorSpec(f"expert.{expert:04d}.{field.name}", field.dtype, field.shape)
            )
            end = field.offset + field.nbytes
        if self.nbytes > end:
            planned.append(TensorSpec(f"expert.{expert:04d}.pad.end", "U8", (self.nbytes - end,)))
        return planned


def lay_out(planes: list[list[TensorSpec]], page: int) -> RecordLayout:
    """Place the tensors of each plane one after another, aligned to 64 bytes; each plane starts on
    a page."""
    fields: list[Field] = []
    levels: list[int] = []
    offset = 0
    for plane in planes:
        for tensor in plane:
            offset += -offset % ALIGN
            fields.append(Field(tensor.name, tensor.dtype, tensor.shape, offset))
            offset += tensor.nbytes
        offset += -offset % page
        levels.append(offset)
    return RecordLayout(tuple(fields), tuple(levels), offset)
