"""What sequences remember, in blocks that lie anywhere in memory, for tests of attention."""

import numpy as np

from smoe.runtime.kernels.blocks import ALIGN, GROUP, TOKENS, BlockLayout
from smoe.runtime.kernels.reference import quantise


class Blocks:
    """Memory for one sequence of up to `context` tokens: `table` int64, the addresses of its blocks
    (from the last to the first), 0 for those before token `begin`. What was not written is no
    number."""

    def __init__(self, layout: BlockLayout, context: int, begin: int = 0):
        self.layout, self.first = layout, begin // TOKENS
        count = -(-context // TOKENS)
        memory = np.full(layout.nbytes * count + ALIGN, 255, np.uint8)
        start = -memory.ctypes.data % ALIGN
        self.bytes = memory[start : start + layout.nbytes * count].reshape(count, layout.nbytes)
        self.table = np.array([self.bytes[~i].ctypes.data for i in range(count)], np.int64)
        self.table[: self.first] = 0

    def block(self, index: int) -> np.ndarray:
        assert index >= self.first, "a block that was dropped"
        return self.bytes[~index]

    def copy(self) -> "Blocks":
        other = Blocks(self.layout, len(self.table) * TOKENS, self.first * TOKENS)
        other.bytes[:] = self.bytes
        return other

    def cell(self, name: str, token: int) -> np.ndarray:
        """A view of a piece of a token, `[heads, n]`."""
        return self.layout.views(self.block(token // TOKENS))[name][:, token % TOKENS]

    def put(self, name: str, token: int, numbers: np.ndarray) -> None:
        """Numbers float32 `[heads, width]` of "key" or "value"."""
        if self.layout.kind == "int8":
            codes, step = quantise(numbers, GROUP)
            self.cell(f"{name}_scales", token)[:] = step
            numbers = codes.reshape(len(codes), -1)[:, : numbers.shape[1]]
        self.cell(f"{name}s", token)[:] = numbers

    def get(self, name: str, token: int) -> np.ndarray:
        """Float64 `[heads, width]` of "key" or "value"."""
        cells = self.cell(f"{name}s", token).astype(float)
        if self.layout.kind != "int8":
            return cells
        scales = np.repeat(self.cell(f"{name}_scales", token).astype(float), GROUP, axis=1)
        return cells * scales[:, : cells.shape[1]]
