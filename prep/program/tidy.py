"""What a program does not need is left out: operations whose results nobody reads, sums that a
product does, and copies where the numbers could have been written in their place at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from smoe.artifacts.program import Buffer, Op, View
from smoe.prep.program.biases import Segments, with_biases
from smoe.prep.program.views import inside, is_dense
from smoe.prep.program.weights import Weights

KEEPING = ("attention", "store", "delta_rule", "convolution")  # needed for what they remember
STRIDED = ("norm", "rotary", "softmax", "unary", "binary", "where")  # may write with gaps


def tidied(
    segments: Sequence[Sequence[Op]],
    buffers: dict[str, Buffer],
    asked: Collection[str],
    weights: Weights,
) -> Segments:
    """The same operations, those that are needed; `asked` are buffers that others read."""
    alive = with_biases(needed(segments, asked), buffers, asked, weights)
    readers = _readers(alive)
    placed = [_in_place(ops, buffers, readers, asked) for ops in alive]
    return needed(placed, asked)


def made_again(
    segments: Sequence[Sequence[Op]], elsewhere: Sequence[Op], given: Collection[str]
) -> Segments:
    """The same operations, before them those of `elsewhere`, which other executors run, whose
    results they read and nobody gives: tables that follow from a token's position."""
    there = set(given)
    done: Segments = []
    for ops in segments:
        there |= {view.source for op in ops for view in op.outputs}
        wanted = {view.source for op in ops for view in op.inputs} - there
        front: list[Op] = []
        for op in reversed(elsewhere):
            if any(view.source in wanted for view in op.outputs):
                front.insert(0, op)
                wanted |= {view.source for view in op.inputs} - there
        there |= {view.source for op in front for view in op.outputs}
        done.append([*front, *ops])
    return done


def needed(segments: Sequence[Sequence[Op]], asked: Collection[str]) -> Segments:
    """Those whose results are read, perhaps by way of a state."""
    alive = set(asked)
    kept: Segments = []
    for ops in reversed(segments):
        mine: list[Op] = []
        for op in reversed(ops):
            if op.kind in KEEPING or any(view.source in alive for view in op.outputs):
                mine.insert(0, op)
                alive |= {view.source for view in op.inputs}
        kept.insert(0, mine)
    return kept


def _readers(segments: Segments) -> dict[str, int]:
    """How many operations read a buffer, or write it."""
    counts: dict[str, int] = {}
    for ops in segments:
        for op in ops:
            for source in {view.source for view in op.inputs}:
                counts[source] = counts.get(source, 0) + 1
    return counts


def _in_place(
    ops: Sequence[Op], buffers: dict[str, Buffer], readers: dict[str, int], asked: Collection[str]
) -> list[Op]:
    """What is only copied is written where it is copied to."""
    done = list(ops)
    for copy in ops:
        if copy.kind != "unary" or copy.names != {"how": "copy"}:
            continue
        (view,), (target,) = copy.inputs, copy.outputs
        buffer = buffers.get(view.source)
        makers = [op for op in done if any(v.source == view.source for v in op.outputs)]
        alone = buffer is not None and readers.get(view.source) == 1 and len(makers) == 1
        if not alone or view.source in asked or buffer is None:
            continue
        moved = _moved(makers[0], view, target, buffer, buffers[target.source])
        if moved is not None:
            done[done.index(makers[0])] = moved
            done.remove(copy)
    return done


def _moved(maker: Op, view: View, target: View, buffer: Buffer, into: Buffer) -> Op | None:
    """`maker` with `target` in place of the buffer that `view` is all of."""
    same = (buffer.kind, buffer.kept) == (into.kind, into.kept)
    if (
        not same
        or not is_dense(view)
        or view.offset
        or math.prod(view.shape) != math.prod(buffer.shape)
    ):
        return None
    if not is_dense(target) and maker.kind not in STRIDED:
        return None
    if any(each.source == target.source for each in maker.inputs):
        return None
    outputs = []
    for output in maker.outputs:
        place = inside(view, output, target) if output.source == view.source else output
        if place is None or place.shape != output.shape:
            return None
        outputs.append(place)
    return dataclasses.replace(maker, outputs=tuple(outputs))
