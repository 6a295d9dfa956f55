"""How much a program remembers of a sequence, and in which blocks. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smoe.artifacts.program import Program
from smoe.runtime.kernels.blocks import TOKENS, BlockLayout
from smoe.runtime.program.plan import ROWS

REWIND = 256  # tokens by which every sequence can be rewound, windows or not
KEPT = 2  # lengths of a sequence for which recurrent state is kept, beside where it is


def blocks_of(tokens: int) -> int:
    """As many as that takes."""
    return -(-tokens // TOKENS)


@dataclass(frozen=True)
class StateLayout:
    """What the attentions of a program remember, numbers of `kind` ("f32", "f16", "int8"), of each
    the last `windows` tokens (0: all), and the shapes of its recurrent state, which is float32."""

    kind: str
    attentions: tuple[BlockLayout, ...]
    windows: tuple[int, ...]
    recurrent: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, program: Program, kind: str) -> StateLayout:
        """That of `program`."""
        windows: dict[str, list[int]] = {state.keys: [] for state in program.states}
        for _, op in program.operations():
            if op.kind == "attention":
                windows[(op.names or {})["state"]].append(int((op.numbers or {})["window"]))
        return cls(
            kind=kind,
            attentions=tuple(
                BlockLayout(kind, s.heads, s.key_width, s.value_width, s.latent)
                for s in program.states
            ),
            windows=tuple(max(w) if w and all(w) else 0 for w in windows.values()),
            recurrent=tuple(one.shape for one in program.recurrent),
        )

    def first_seen(self, attention: int, length: int) -> int:
        """The first of `length` tokens that the one after them sees."""
        window = self.windows[attention]
        return max(0, length - window + 1) if window else 0

    def first_kept(self, attention: int, length: int) -> int:
        """The first that is seen after a rewind of up to `REWIND` tokens."""
        return self.first_seen(attention, max(0, length - REWIND)) if self.windows[attention] else 0

    def ring(self, attention: int) -> int:
        """How many blocks the new tokens of a step take in turn, where there is a window: what is
        seen and kept of the last ones, and the rows of a segment that are on their way."""
        return blocks_of(self.windows[attention] + REWIND + ROWS) + 1

    def blocks(self, attention: int, context: int) -> int:
        """The most blocks that a sequence of up to `context` tokens needs at once: with a window,
        what a prompt's first token sees, which stays as long as the prompt may be thrown away, what
        the first token of its last step sees, and the ring."""
        every, window = blocks_of(context), self.windows[attention]
        return min(every, 2 * (blocks_of(window) + 1) + self.ring(attention)) if window else every

    def nbytes(self, context: int) -> int:
        """The most of a sequence of up to `context` tokens: blocks, and recurrent state at the
        lengths that are kept, after a step, and before it or before a prompt of many."""
        blocks = sum(
            self.blocks(number, context) * layout.nbytes
            for number, layout in enumerate(self.attentions)
        )
        numbers = sum(math.prod(shape) for shape in self.recurrent)
        return blocks + numbers * 4 * (KEPT + 2)
