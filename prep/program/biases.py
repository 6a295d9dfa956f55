"""Biases that a graph adds to the parts of a product, added by the product itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from smoe.artifacts.program import ABSENT, Buffer, Op, View
from smoe.prep.program.views import is_dense
from smoe.prep.program.weights import Weights

Segments = list[list[Op]]
# A sum with a constant: the part of a product, the constant, and the operation.
Added = tuple[View, View, Op]


def with_biases(
    segments: Sequence[Sequence[Op]],
    buffers: dict[str, Buffer],
    asked: Collection[str],
    weights: Weights,
) -> Segments:
    """The same operations, but for sums with constants that are all that is made of a product;
    `asked` are buffers that others read."""
    readers: dict[str, list[Op]] = {}
    for ops in segments:
        for op in ops:
            for view in op.inputs:
                readers.setdefault(view.source, []).append(op)
    moved: dict[str, View] = {}  # buffers of sums, to where their numbers are now
    changed: Segments = []
    for ops in segments:
        mine = list(ops)
        for op in ops:
            parts = _parts(op, readers, buffers, asked)
            if parts and all(each in mine for _, _, each in parts):
                bias = weights.joined([constant for _, constant, _ in parts])
                mine[mine.index(op)] = dataclasses.replace(op, inputs=(op.inputs[0], bias))
                for part, _, each in parts:
                    mine.remove(each)
                    moved[each.outputs[0].source] = part
        changed.append(mine)
    return [[_reading(op, moved) for op in ops] for ops in changed]


def _parts(
    op: Op, readers: dict[str, list[Op]], buffers: dict[str, Buffer], asked: Collection[str]
) -> list[Added]:
    """The sums that a product's parts go into, in order, where they take all of it."""
    if op.kind != "product" or op.inputs[1] != ABSENT or op.outputs[0].source in asked:
        return []
    y, parts = op.outputs[0], []
    if y.offset or buffers[y.source].numbers != math.prod(y.shape):
        return []
    for reader in readers.get(y.source, []):
        part, constant = reader.inputs if reader.kind == "binary" else (ABSENT, ABSENT)
        if part.source != y.source:
            part, constant = constant, part
        added = reader.names == {"how": "add"} and constant.source not in buffers
        total = reader.outputs[0]
        whole = is_dense(part) and is_dense(constant) and is_dense(total) and not total.offset
        whole = whole and math.prod(total.shape) == math.prod(part.shape)
        own = whole and buffers[total.source].numbers == math.prod(total.shape)
        if not added or not own or total.source in asked:
            return []
        parts.append((part, constant, reader))
    parts.sort(key=lambda each: each[0].offset)
    ends = [part.offset + math.prod(part.shape) for part, _, _ in parts]
    starts = [part.offset for part, _, _ in parts]
    return parts if [0, *ends] == [*starts, math.prod(y.shape)] else []


def _reading(op: Op, moved: dict[str, View]) -> Op:
    inputs = tuple(
        dataclasses.replace(
            view,
            source=moved[view.source].source,
            offset=moved[view.source].offset + view.offset,
        )
        if view.source in moved
        else view
        for view in op.inputs
    )
    return dataclasses.replace(op, inputs=inputs)
