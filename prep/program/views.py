"""Views of a row, as NumPy has them of an array: what moves no number is a change of shape and
strides. An axis of one number has stride 0, so that equal views are equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from smoe.artifacts.program import View


def view_of(source: str, offset: int, shape: Sequence[int], strides: Sequence[int]) -> View:
    """A view in the one form that each has."""
    kept = (0 if n == 1 else s for n, s in zip(shape, strides, strict=True))
    return View(source, offset, tuple(shape), tuple(kept))


def whole(source: str, shape: Sequence[int]) -> View:
    """All of a buffer or a constant, row-major."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return view_of(source, 0, shape, strides)


def is_dense(view: View) -> bool:
    """Whether its numbers lie one after another, in order."""
    return view.strides == whole(view.source, view.shape).strides


def reshaped(view: View, shape: Sequence[int]) -> View | None:
    """The same numbers in the same order in another shape; None where that takes a copy."""
    if math.prod(shape) != math.prod(view.shape):
        raise ValueError(f"{view.shape} cannot become {tuple(shape)}")
    runs, strides = _runs(view), []
    left = step = 1  # what the axes to come divide of the first run
    for size in shape:
        if size == 1:
            strides.append(0)
            continue
        if left == 1:
            left, step = runs.pop(0)
        if left % size:
            return None
        left //= size
        strides.append(left * step)
    return view_of(view.source, view.offset, shape, strides)


def _runs(view: View) -> list[tuple[int, int]]:
    """Its axes as (count, stride), those joined that are one."""
    runs: list[tuple[int, int]] = []
    for count, stride in zip(view.shape, view.strides, strict=True):
        if count == 1:
            continue
        if runs and runs[-1][1] == count * stride:
            runs[-1] = (runs[-1][0] * count, stride)
        else:
            runs.append((count, stride))
    return runs


def transposed(view: View, order: Sequence[int]) -> View:
    """Its axes in another order."""
    shape, strides = ([list(part)[axis] for axis in order] for part in (view.shape, view.strides))
    return view_of(view.source, view.offset, shape, strides)


def with_last_axes_turned(view: View) -> View:
    """Its last two axes the other way round."""
    axes = list(range(len(view.shape)))
    return transposed(view, [*axes[:-2], *axes[-2:][::-1]])


def sliced(view: View, axis: int, start: int, count: int, step: int = 1) -> View:
    """`count` numbers of an axis, from `start` on."""
    shape, strides = list(view.shape), list(view.strides)
    offset = view.offset + start * strides[axis]
    shape[axis], strides[axis] = count, strides[axis] * step
    return view_of(view.source, offset, shape, strides)


def broadcast(view: View, shape: Sequence[int]) -> View:
    """Repeated to a shape with as many axes or more; a `ValueError` where it does not fit."""
    more = len(shape) - len(view.shape)
    sizes, strides = (1,) * more + view.shape, (0,) * more + view.strides
    if more < 0 or any(n not in (1, want) for n, want in zip(sizes, shape, strict=True)):
        raise ValueError(f"{view.shape} does not fit into {tuple(shape)}")
    kept = [0 if n == 1 else s for n, s in zip(sizes, strides, strict=True)]
    return view_of(view.source, view.offset, shape, kept)


def squeezed(view: View) -> View:
    """Without its axes of one number: what two views of the same numbers agree in."""
    axes = [axis for axis, size in enumerate(view.shape) if size != 1]
    shape, strides = ([part[axis] for axis in axes] for part in (view.shape, view.strides))
    return view_of(view.source, view.offset, shape, strides)


def inside(view: View, part: View, target: View) -> View | None:
    """`part`, a view of the buffer that `view` is all of, once that buffer lies at `target`; None
    where no view says it."""
    if part == view:
        return target if part.shape == target.shape else reshaped(target, part.shape)
    if not is_dense(target):
        return None
    return view_of(target.source, target.offset + part.offset, part.shape, part.strides)
