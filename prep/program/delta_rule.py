"""The gated delta rule (arXiv:2412.06464), found in what a graph writes out for one token: a state
that decays, what it holds for a key, a change of it, and what it holds for a query."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from smoe.artifacts.program import Buffer, Op, View
from smoe.prep.program.biases import Segments
from smoe.prep.program.tidy import needed
from smoe.prep.program.views import (
    is_dense,
    reshaped,
    view_of,
    whole,
    with_last_axes_turned,
)


def with_delta_rules(
    segments: Sequence[Sequence[Op]], buffers: dict[str, Buffer], asked: Collection[str]
) -> Segments:
    """The same operations, one in place of those of each delta rule; `buffers` may grow."""
    done = [list(ops) for ops in segments]
    for index, ops in enumerate(segments):
        for store in ops:
            found = _Segment(done[index], buffers).rule(store) if store.kind == "store" else None
            if found is None:
                continue
            tried = _replaced(done[index], store, found, buffers)
            (left,) = needed([*done[:index], tried, *done[index + 1 :]], asked)[index : index + 1]
            state = {"state": found.state}
            if not any(op.kind == "recall" and op.names == state for op in left):
                done[index] = tried
    return done


@dataclass(frozen=True)
class _Rule:
    """Of heads h, keys d, values e: q `[h, d]`, k `[h, d]`, v `[h, e]`, decay `[h]` or `[h, d]`,
    beta `[h]`; `reads` gives what queries find."""

    state: str
    q: View
    k: View
    v: View
    decay: View
    beta: View
    reads: Op


class _Segment:
    """The operations of a segment, by what they write and read."""

    def __init__(self, ops: Sequence[Op], buffers: dict[str, Buffer]):
        self._ops, self._buffers = ops, buffers
        self._writers: dict[str, list[Op]] = {}
        for op in ops:
            for view in op.outputs:
                self._writers.setdefault(view.source, []).append(op)

    def rule(self, store: Op) -> _Rule | None:
        """The delta rule that ends with a `store`."""
        (new,) = store.inputs
        for decayed, outer in self._pairs(new, "add"):
            for state, decay in self._pairs(decayed, "mul"):
                recall = self._maker(state, "recall")
                if recall is None or recall.names != store.names:
                    continue
                for k, change in self._pairs(outer, "mul"):
                    rule = self._with(new, decayed, decay, k, change)
                    if rule is not None:
                        return dataclasses.replace(rule, state=(store.names or {})["state"])
        return None

    def _with(self, new: View, decayed: View, decay: View, k: View, change: View) -> _Rule | None:
        """Once change is (v - what the decayed state holds for k) * beta."""
        keys, values = _for_keys(k), _for_values(change)
        reads = list(self._reads(new))
        if keys is None or values is None or len(reads) != 1:
            return None
        for difference, beta in self._pairs(values, "mul"):
            for v, held in self._pairs(difference, "sub")[:1]:
                heads, wide = _tail(beta, 2), _tail(v, 2)
                single = heads is not None and (heads.shape[1] == 1 or heads.strides[1] == 0)
                factor = _for_head(decay) or _for_keys(decay)
                if heads is None or wide is None or not single or factor is None:
                    continue
                if self._holds(held, decayed, keys):
                    beta_ = view_of(heads.source, heads.offset, heads.shape[:1], heads.strides[:1])
                    q, op = reads[0]
                    return _Rule("", q, keys, wide, factor, beta_, op)
        return None

    def _reads(self, state: View) -> Iterator[tuple[View, Op]]:
        """Queries of a state, and what sums up what it holds for them."""
        for op in self._ops:
            if op.kind == "reduce" and op.names == {"how": "sum"}:
                for one, x in self._pairs(with_last_axes_turned(op.inputs[0]), "mul"):
                    q = _for_keys(x)
                    if one.source == state.source and is_dense(one) and q is not None:
                        yield q, op

    def _holds(self, view: View, state: View, k: View) -> bool:
        """Whether a view is the sum of a state's values for k."""
        reduce = self._maker(view, "reduce")
        if reduce is None or reduce.names != {"how": "sum"}:
            return False
        pairs = self._pairs(with_last_axes_turned(reduce.inputs[0]), "mul")
        whole_ = [x for one, x in pairs if one.source == state.source and is_dense(one)]
        return any(_for_keys(x) == k for x in whole_)

    def _pairs(self, view: View, how: str) -> list[tuple[View, View]]:
        """Both inputs of what alone made a view, in both orders."""
        op = self._maker(view, "binary")
        if op is None or op.names != {"how": how}:
            return []
        a, b = op.inputs
        return [(a, b), (b, a)]

    def _maker(self, view: View, kind: str) -> Op | None:
        """The operation that alone wrote a buffer, of which a view is all."""
        ops, buffer = self._writers.get(view.source, []), self._buffers.get(view.source)
        whole_ = is_dense(view) and not view.offset and buffer is not None
        whole_ = whole_ and buffer is not None and buffer.numbers == math.prod(view.shape)
        return ops[0] if len(ops) == 1 and whole_ and ops[0].kind == kind else None


def _tail(view: View, axes: int) -> View | None:
    """Its last axes, if those before are of one number."""
    if len(view.shape) < axes or math.prod(view.shape[:-axes]) != 1:
        return None
    return view_of(view.source, view.offset, view.shape[-axes:], view.strides[-axes:])


def _for_keys(view: View) -> View | None:
    """`[h, d]` of a view `[.., h, d, e]` that is the same for all values."""
    tail = _tail(view, 3)
    if tail is None or (tail.shape[2] > 1 and tail.strides[2]):
        return None
    return view_of(tail.source, tail.offset, tail.shape[:2], tail.strides[:2])


def _for_values(view: View) -> View | None:
    """`[h, e]` of one that is the same for all keys."""
    tail = _tail(view, 3)
    if tail is None or (tail.shape[1] > 1 and tail.strides[1]):
        return None
    return view_of(tail.source, tail.offset, tail.shape[::2], tail.strides[::2])


def _for_head(view: View) -> View | None:
    """`[h]` of one that is the same for both."""
    keys = _for_keys(view)
    if keys is None or (keys.shape[1] > 1 and keys.strides[1]):
        return None
    return view_of(keys.source, keys.offset, keys.shape[:1], keys.strides[:1])


def _replaced(ops: Sequence[Op], store: Op, rule: _Rule, buffers: dict[str, Buffer]) -> list[Op]:
    """The operation in place of what reads the state last; `store` goes."""
    heads, values = rule.v.shape
    y = reshaped(rule.reads.outputs[0], (heads, values))
    if y is None:
        return list(ops)
    copies: list[Op] = []
    inputs = []
    for view in (rule.q, rule.k, rule.v, rule.decay, rule.beta):
        if len(view.shape) == 2 and view.shape[1] > 1 and view.strides[1] != 1:
            made = _fresh(view, buffers)
            copies.append(Op("unary", (view,), (made,), names={"how": "copy"}))
            view = made
        inputs.append(view)
    one = Op("delta_rule", tuple(inputs), (y,), names={"state": rule.state})
    done = []
    for op in ops:
        if op is rule.reads:
            done += [*copies, one]
        elif op is not store:
            done.append(op)
    return done


def _fresh(view: View, buffers: dict[str, Buffer]) -> View:
    name = f"{view.source}.beside"
    while name in buffers:
        name += "."
    buffers[name] = Buffer(name, "f32", view.shape)
    return whole(name, view.shape)
