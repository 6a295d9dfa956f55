"""What a program remembers of one sequence (`step.SequenceState`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np

from smoe.runtime.errors import EngineError
from smoe.runtime.kernels.blocks import TOKENS
from smoe.runtime.program.layout import StateLayout, blocks_of
from smoe.runtime.program.pool import BlockPool, BlockTable
from smoe.runtime.program.saved import Kinds, check, named
from smoe.runtime.program.versions import Version, Versions

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A state at `length`: the blocks that a step from there sees, where later ones are dropped
    behind a window."""

    length: int
    blocks: BlockTable
    recurrent: Version


class ProgramState:
    """What a sequence of up to `context` tokens leaves behind: blocks of `blocks.TOKENS` tokens for
    each attention, as `layouts` say, taken from `pools` (by size) as tokens come, shared between
    forks until they are written to, and dropped behind a window; and recurrent state.

    `tables` int64 `[attentions, blocks of the context]` are the addresses of blocks, 0 where there
    is none. A segment's rows are written to blocks and then looked at, `plan.ROWS` at a time: where
    a step is longer than a window, its blocks take turns. `recurrent_at` int64 `[states, 2]` are
    the addresses of `before` and `recurrent`, which are others for every step. Both arrays are
    filled in place.

    It has no length of its own, since a step may be given up: every call says how many tokens the
    sequence has, and what lies behind is written before it is read."""

    def __init__(self, layout: StateLayout, context: int, pools: dict[int, BlockPool]):
        self.layouts, self.kind, self.context = layout.attentions, layout.kind, context
        self._layout, self._pools = layout, pools
        mine = [pools.setdefault(one.nbytes, BlockPool(one.nbytes)) for one in layout.attentions]
        self._table = BlockTable(mine, blocks_of(context))
        self.tables = self._table.addresses
        self._versions = Versions(layout.recurrent)
        self.recurrent_at = self._versions.addresses
        self._past = self._end = 0  # of the last step
        self._ready = 0  # tokens for which blocks are there and nobody else's
        self._bound: object = None

    def bound(self, bind: Callable[[ProgramState], T]) -> T:
        """What an executor makes of it: once."""
        if self._bound is None:
            self._bound = bind(self)
        return cast(T, self._bound)

    @property
    def before(self) -> list[np.ndarray]:
        """Recurrent state before the step, float32 of each, read only."""
        return self._versions.before

    @property
    def recurrent(self) -> list[np.ndarray]:
        """That of the step, which `before` is copied to whenever its segment begins: operations
        replace it in place, row after row."""
        return self._versions.after

    @property
    def nbytes(self) -> int:
        """Of what it holds now, shared or not, each block once."""
        rows = zip(self.tables, self.layouts, strict=True)
        blocks = sum(len(np.unique(row[row > 0])) * layout.nbytes for row, layout in rows)
        return blocks + self._versions.nbytes

    def block(self, attention: int, index: int) -> np.ndarray:
        """The bytes of a block, uint8 `[nbytes]`, which must be there."""
        return self._table.pools[attention].view(int(self.tables[attention, index]))

    # -- steps -------------------------------------------------------------------------------------

    def reserve(self, past: int, end: int) -> None:
        """Before a step that makes a sequence of `past` tokens one of `end`, also if another one
        was given up. An `EngineError` where memory ends, it is not told of that many tokens, or
        there is no room."""
        if end > self.context:
            raise EngineError(
                f"A sequence of {past} tokens and {end - past} new ones is longer than its state "
                f"of {self.context}; make one of a longer context."
            )
        if past != self._end or end > self._ready:
            self._check(past)
            self._cut(past)
            try:
                self._extend(past, end)
            except MemoryError as error:
                self._cut(past)
                raise EngineError(
                    f"There is no memory for what a sequence of {end} tokens remembers; state less "
                    "memory, or a shorter context."
                ) from error
            self._ready = blocks_of(end) * TOKENS
        self._past, self._end = past, end
        self._versions.begin(past, end)

    def _extend(self, past: int, end: int) -> None:
        """Blocks for new tokens; those that they may not share become own ones."""
        partial, first, stop = past // TOKENS, blocks_of(past), blocks_of(end)
        for number, (row, pool) in enumerate(zip(self.tables, self._table.pools, strict=True)):
            window, ring = self._layout.windows[number], self._layout.ring(number)
            self._drop(number, past, end)
            if partial < first:
                row[partial] = pool.own(int(row[partial]))
            for at in range(first, stop):
                if window and at - first >= ring:
                    pool.share([int(row[at - ring])])
                    row[at] = row[at - ring]
                else:
                    row[at] = pool.take()

    def _drop(self, attention: int, past: int, end: int) -> None:
        """What neither a step from `past` to `end` sees nor a rewind after it needs."""
        seen = self._layout.first_seen(attention, past)
        kept = min(seen, self._layout.first_kept(attention, end))
        self._table.clear(attention, 0, kept // TOKENS)

    # -- lengths -----------------------------------------------------------------------------------

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` tokens, or as many of them as there is a way back to:
        how many are left. `layout.REWIND` tokens are always possible without recurrent state."""
        length = min(length, self._end)
        self._settle(length)
        best = next(n for n in self._versions.lengths(length) if self._sees(n))
        self._cut(best)
        return best

    def fork(self, length: int) -> ProgramState:
        """One that goes its own way from the first `length` tokens on. Nothing is copied but what
        one of them writes to. An `EngineError` where it does not remember them."""
        self._check(length)
        other = ProgramState(self._layout, self.context, self._pools)
        other._table = self._table.shared([0] * len(self.layouts), blocks_of(length))
        other._versions = self._versions.fork(length)
        other.tables, other.recurrent_at = other._table.addresses, other._versions.addresses
        other._past = other._end = length
        return other

    def snapshot(self, length: int) -> Snapshot:
        """What `restore` needs to undo the steps after `length` tokens, as long as nothing is
        rewound before them."""
        self._check(length)
        self._cut(length)
        return Snapshot(length, self._seen(length), self._versions.snapshot())

    def restore(self, snapshot: object) -> None:
        """Back to where `snapshot` was taken."""
        assert isinstance(snapshot, Snapshot)
        end = blocks_of(snapshot.length)
        rows = zip(self.tables, snapshot.blocks.addresses, self._table.pools, strict=True)
        for row, held, pool in rows:
            dropped = np.flatnonzero((row[:end] == 0) & (held[:end] != 0))
            pool.share(held[dropped].tolist())
            row[dropped] = held[dropped]
        self._versions.restore(snapshot.recurrent)
        self._cut(snapshot.length)

    def _seen(self, length: int) -> BlockTable:
        """What windows may drop of the blocks that a step from `length` sees."""
        end = blocks_of(length)
        firsts = [
            self._layout.first_seen(number, length) // TOKENS if window else end
            for number, window in enumerate(self._layout.windows)
        ]
        return self._table.shared(firsts, end)

    def _check(self, length: int) -> None:
        """An `EngineError` where it does not remember `length` tokens."""
        self._settle(length)
        there = length <= self._end and length in self._versions.lengths(length)
        if not (there and self._sees(length)):
            raise EngineError(
                f"This state does not remember the first {length} tokens of a sequence (any more); "
                "read them again."
            )

    def _settle(self, length: int) -> None:
        """The last step counts where the sequence is longer than before it: blocks that took turns
        are those of its last tokens then."""
        if self._past < length <= self._end:
            for number in range(len(self.layouts)):
                self._drop(number, self._end, self._end)

    def _sees(self, length: int) -> bool:
        """Whether all blocks are there that a step from `length` looks at."""
        return all(
            row[self._layout.first_seen(number, length) // TOKENS : blocks_of(length)].all()
            for number, row in enumerate(self.tables)
        )

    def _cut(self, length: int) -> None:
        """Be at `length`, which it remembers."""
        for number in range(len(self.layouts)):
            self._table.clear(number, blocks_of(length), self.tables.shape[1])
        self._versions.go_to(length)
        self._past = self._end = length
        self._ready = 0

    # -- files -------------------------------------------------------------------------------------

    def arrays(self, length: int) -> Iterator[tuple[str, np.ndarray]]:
        """What the first `length` tokens left, for a file (`saved`), one after another; an
        `EngineError` where it does not remember them."""
        self._check(length)
        for number, layout in enumerate(self.layouts):
            row, end = self.tables[number], blocks_of(length)
            low = self._layout.first_kept(number, length) // TOKENS
            low += 1 + int(max(np.flatnonzero(row[low:end] == 0), default=-1))
            views = [layout.views(self.block(number, at)) for at in range(low, end)]
            for name, (_, (heads, _, width), kind) in layout.pieces.items():
                nothing = np.zeros((heads, 0, width), kind)
                tokens = np.concatenate([nothing, *(view[name] for view in views)], axis=1)
                yield f"{number}.{name}", tokens[:, : length - low * TOKENS]
        for number, array in enumerate(self._versions.at(length)):
            yield f"recurrent.{number}.value", array

    def check(self, kinds: Kinds, length: int) -> None:
        """An `EngineError` where arrays of such kinds and shapes are not those of `length`
        tokens."""
        check(kinds, self._layout, length)

    def load(self, arrays: Mapping[str, np.ndarray], length: int) -> None:
        """Be what `arrays` says, which come from anywhere and are asked for once. An `EngineError`,
        and nothing is remembered, where that cannot be."""
        self._cut(0)
        try:
            for number in range(len(self.layouts)):
                self._fill(number, arrays, length)
            states = range(len(self._layout.recurrent))
            recurrent = [named(arrays, f"recurrent.{number}.value") for number in states]
            self._versions.load(length, recurrent)
            self._past = self._end = length
        except MemoryError as error:
            raise EngineError("There is no memory for this state; state less memory.") from error
        finally:
            self._cut(self._end)

    def _fill(self, number: int, arrays: Mapping[str, np.ndarray], length: int) -> None:
        """The blocks of an attention."""
        layout, end = self.layouts[number], blocks_of(length)
        pieces = {name: named(arrays, f"{number}.{name}") for name in layout.pieces}
        low = (length - pieces["keys"].shape[1]) // TOKENS
        for at in range(low, end):
            self.tables[number, at] = self._table.pools[number].take()
            tokens = slice((at - low) * TOKENS, (at - low + 1) * TOKENS)
            for name, view in layout.views(self.block(number, at)).items():
                part = pieces[name][:, tokens]
                view[:, : part.shape[1]] = part
