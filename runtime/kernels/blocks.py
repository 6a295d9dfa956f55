"""How what an attention remembers lies in memory: blocks of some tokens of one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TOKENS = 32  # of a block
GROUP = 128  # numbers of a head that share a scale, the last of a head perhaps fewer
ALIGN = 64  # bytes: each piece of a block starts on a multiple
KINDS: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}


@dataclass(frozen=True)
class BlockLayout:
    """A block: keys `[heads, TOKENS, key_width]`, then values `[heads, TOKENS, value_width]` (none
    where `latent`: they are the first numbers of keys), of `kind`. Where that is int8, the scales
    of both come behind, float32 `[heads, TOKENS, groups of GROUP numbers]`: a number is its code
    times its scale."""

    kind: str
    heads: int
    key_width: int
    value_width: int
    latent: bool = False

    @cached_property
    def pieces(self) -> dict[str, tuple[int, tuple[int, ...], np.dtype]]:
        """Offset in bytes, shape and kind of `keys`, `values`, `key_scales`, `value_scales`, as far
        as there are such."""
        widths = {"key": self.key_width} | ({} if self.latent else {"value": self.value_width})
        shapes = {f"{n}s": ((self.heads, TOKENS, w), KINDS[self.kind]) for n, w in widths.items()}
        if self.kind == "int8":
            shapes |= {
                f"{n}_scales": ((self.heads, TOKENS, -(-w // GROUP)), np.dtype(np.float32))
                for n, w in widths.items()
            }
        pieces: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        offset = 0
        for name, (shape, kind) in shapes.items():
            pieces[name] = offset, shape, kind
            offset += -(-int(np.prod(shape)) * kind.itemsize // ALIGN) * ALIGN
        return pieces

    @property
    def nbytes(self) -> int:
        """Of a block, a multiple of ALIGN."""
        offset, shape, kind = list(self.pieces.values())[-1]
        return offset + -(-int(np.prod(shape)) * kind.itemsize // ALIGN) * ALIGN

    def views(self, block: np.ndarray) -> dict[str, np.ndarray]:
        """The pieces of a block, uint8 `[nbytes]`, as arrays."""
        return {
            name: block[offset : offset + int(np.prod(shape)) * kind.itemsize]
            .view(kind)
            .reshape(shape)
            for name, (offset, shape, kind) in self.pieces.items()
        }
