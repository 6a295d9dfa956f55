"""The checks of what a program carries from token to token: its states, the operations that replace
them, and what lies between a `recall` and its `store`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from smoe.artifacts.manifest import Manifest, State
from smoe.artifacts.program import RECURRENT, SCANNED, Op, Program, Recurrent

if TYPE_CHECKING:
    from smoe.artifacts.program_ops import Operands


def states(program: Program, m: Manifest) -> Iterator[str]:
    """Each is one of the manifest's that keep their shape, of a segment that is known."""
    listed = {state.input: state for state in m.backbone.state}
    taken = Counter(state.name for state in program.recurrent)
    taken += Counter(name for s in program.states for name in (s.keys, s.values))
    for state in program.recurrent:
        known = 0 <= state.segment < len(program.parts)
        if not known or program.parts[state.segment].ops is None:
            yield f"state {state.name[:60]!r} is of part {state.segment}, which is not known"
        elif taken[state.name] > 1 or not _is_state(listed.get(state.name), state):
            yield (
                f"state {state.name[:60]!r}, {list(state.shape[:9])} in segment {state.segment}, "
                "is not one of the manifest's"
            )


def _is_state(spec: State | None, state: Recurrent) -> bool:
    """Whether the manifest's state keeps its shape, and has as many numbers."""
    if spec is None or spec.segment != state.segment or spec.growing >= 0 or spec.dtype != "F32":
        return False
    sizes = all(size >= 1 for size in state.shape)
    return bool(state.shape) and sizes and math.prod(spec.shape) == math.prod(state.shape)


class Uses:
    """Whether the operations of a program, one after another, replace each state once, in its
    segment."""

    def __init__(self, recurrent: Mapping[str, Recurrent]):
        self._recurrent = recurrent
        self._used: set[str] = set()
        self._recalled: set[str] = set()

    def step(self, op: Op, part: int) -> Iterator[str]:
        """One operation that is right by itself, of this part."""
        if op.kind in RECURRENT:
            name = (op.names or {})["state"]
            stores = op.kind == "store"
            if self._recurrent[name].segment != part:
                yield f"the state {name[:60]!r} is of another segment"
            elif stores != (name in self._recalled) or (not stores and name in self._used):
                yield f"the state {name[:60]!r} is not recalled, or used twice"
            (self._recalled.discard if stores else self._used.add)(name)
            if op.kind == "recall":
                self._recalled.add(name)
        if self._recalled and op.kind not in (*SCANNED, "recall", "store"):
            yield "it lies between a recall and its store, and is of more than one row"

    @property
    def scanning(self) -> bool:
        """Whether something is recalled and not yet stored."""
        return bool(self._recalled)

    def behind(self, part: int) -> Iterator[str]:
        """The end of a part."""
        for name in self._recalled:
            yield f"part {part} does not store the state {name[:60]!r}"

    def end(self) -> Iterator[str]:
        """The end of all."""
        for name in self._recurrent.keys() - self._used:
            yield f"nothing replaces the state {name[:60]!r}"


# -- what the operations ask of their operands -----------------------------------------------------


def _recall(o: Operands) -> Iterator[str]:
    yield from o.wanted("y", "f32", o.recurrent)
    yield from o.dense(None, "y")


def _store(o: Operands) -> Iterator[str]:
    yield from o.wanted("x", "f32", o.recurrent)
    yield from o.dense(None, "x")
    yield from o.buffers("x")


def _delta_rule(o: Operands) -> Iterator[str]:
    if len(o.recurrent) != 3:
        yield f"its state has {len(o.recurrent)} axes, heads of keys by values were wanted"
        return
    heads, keys, values = o.recurrent
    for name, width in (("q", keys), ("k", keys), ("v", values), ("y", values)):
        yield from o.wanted(name, "f32", (heads, width))
    yield from o.wanted("decay", "f32", (heads,), (heads, keys))
    yield from o.wanted("beta", "f32", (heads,))
    yield from o.dense(1, "q", "k", "v", "y", *(["decay"] if len(o.shape("decay")) == 2 else []))
    yield from o.buffers("q", "k", "v", "decay", "beta")


def _convolution(o: Operands) -> Iterator[str]:
    if len(o.recurrent) != 2:
        yield f"its state has {len(o.recurrent)} axes, a vector for each token was wanted"
        return
    tokens, width = o.recurrent
    taps = (*o.shape("weight"), 0)[0]
    if not 1 <= taps <= tokens + 1:
        yield f"it takes {taps} tokens, and its state has {tokens} of those before"
    yield from o.wanted("weight", "f32", (taps, width))
    for name in ("x", "bias", "y"):
        yield from o.wanted(name, "f32", (width,))
    yield from o.dense(None, "x", "weight", "bias", "y")
    yield from o.buffers("x")
    yield from o.constant("weight")
    yield from o.constant("bias")


RULES: dict[str, Callable[[Operands], Iterator[str]]] = {
    "recall": _recall, "store": _store, "delta_rule": _delta_rule, "convolution": _convolution,
}  # fmt: skip
