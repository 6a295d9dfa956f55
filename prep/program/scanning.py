"""What lies between a `recall` and its `store`: as few operations as can be, one after another,
since they run row by row; and no number as large as a state is kept for every row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from smoe.artifacts.manifest import State
from smoe.artifacts.program import RECURRENT, SCANNED, Buffer, Op, Recurrent
from smoe.prep.program.values import Unknown


def recurrent(ops: Sequence[Op], specs: Mapping[str, State]) -> Iterator[Recurrent]:
    """The states that operations replace, in the shape that these want; `specs` are those of the
    manifest, by input."""
    for op in ops:
        if op.kind not in RECURRENT or op.kind == "store":
            continue
        spec = specs[(op.names or {})["state"]]
        shape = spec.shape
        if op.kind == "recall":
            shape = op.outputs[0].shape
        elif op.kind == "delta_rule":
            shape = (*op.inputs[1].shape, op.inputs[2].shape[1])
        elif op.kind == "convolution":
            width = op.inputs[1].shape[1]
            shape = (math.prod(spec.shape) // width, width)
        yield Recurrent(spec.input, spec.segment, shape)


def scanned(ops: Sequence[Op], buffers: dict[str, Buffer]) -> list[Op]:
    """The same operations in another order; `Unknown` where what is to be scanned cannot be."""
    groups = _groups(ops, buffers)
    group = {place: number for number, places in enumerate(groups) for place in places}
    for place in group:
        if ops[place].kind not in (*SCANNED, "recall", "store"):
            raise Unknown(f"a state is replaced by way of a {ops[place].kind}")
    before = _before(ops)
    # Each group as one: what has to come before any of it, and is not of it.
    units: list[list[int]] = []
    for place in range(len(ops)):
        if place not in group:
            units.append([place])
        elif place == min(groups[group[place]]):
            members = sorted(groups[group[place]])
            stores = [p for p in members if ops[p].kind == "store"]
            units.append([*(p for p in members if p not in stores), *stores])
    unit = {place: number for number, places in enumerate(units) for place in places}
    wanted = [{unit[b] for place in places for b in before[place]} for places in units]
    done: list[Op] = []
    there: set[int] = set()
    while len(there) < len(units):
        ready = (n for n in range(len(units)) if n not in there and wanted[n] <= there | {n})
        n = next(ready, None)
        if n is None:
            raise Unknown("what replaces a state waits for what reads it")
        there.add(n)
        done += [ops[place] for place in units[n]]
    return done


def _before(ops: Sequence[Op]) -> list[set[int]]:
    """Which operations each has to come behind: they write what it reads or writes, or read what
    it writes."""
    writers: dict[str, list[int]] = {}
    readers: dict[str, list[int]] = {}
    before: list[set[int]] = []
    for place, op in enumerate(ops):
        mine: set[int] = set()
        for view in op.inputs:
            mine.update(writers.get(view.source, []))
        for view in op.outputs:
            mine.update(writers.get(view.source, []), readers.get(view.source, []))
        if op.kind == "store":
            mine.update(p for p in range(place) if ops[p].names == op.names and _recalls(ops[p]))
        before.append(mine)
        for view in op.inputs:
            readers.setdefault(view.source, []).append(place)
        for view in op.outputs:
            writers.setdefault(view.source, []).append(place)
    return before


def _recalls(op: Op) -> bool:
    return op.kind == "recall"


def _groups(ops: Sequence[Op], buffers: dict[str, Buffer]) -> list[set[int]]:
    """For every state that is recalled the operations from there to its store, those of states
    that share some together."""
    before, groups = _before(ops), []
    for place, op in enumerate(ops):
        if op.kind != "recall":
            continue
        follows = _closure(range(place, len(ops)), place, before)
        store = next(p for p, o in enumerate(ops) if o.kind == "store" and o.names == op.names)
        members = follows & _leading({store}, before)
        size = math.prod(op.outputs[0].shape)
        while large := _large(ops, buffers, size, members, follows):
            members |= follows & _leading(large, before)
        groups.append(members | {place, store})
    joined: list[set[int]] = []
    for members in groups:
        shared = [other for other in joined if other & members]
        joined = [other for other in joined if other not in shared]
        joined.append(members.union(*shared))
    return joined


def _closure(places: range, first: int, before: list[set[int]]) -> set[int]:
    """What follows from an operation, itself among it."""
    follows = {first}
    for place in places:
        if before[place] & follows:
            follows.add(place)
    return follows


def _leading(last: set[int], before: list[set[int]]) -> set[int]:
    """What leads to some operations, themselves among it."""
    leads, open_ = set(last), list(last)
    while open_:
        fresh = before[open_.pop()] - leads
        leads |= fresh
        open_ += fresh
    return leads


def _large(
    ops: Sequence[Op], buffers: dict[str, Buffer], size: int, members: set[int], follows: set[int]
) -> set[int]:
    """What else reads something as large as the state that members write."""
    written = {view.source for place in members for view in ops[place].outputs}
    large = {name for name in written if name in buffers and buffers[name].numbers >= size}
    return {
        place
        for place in follows - members
        if any(view.source in large for view in ops[place].inputs)
    }
