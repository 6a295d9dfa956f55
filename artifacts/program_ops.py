"""What the operations of a program ask of their operands: how many, of which kinds and shapes
(FORMAT.md, "Operations"). `program_checks` asks it of every operation; `problems` here looks at one
alone, and not at what ran before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from smoe.artifacts import program_recurrent
from smoe.artifacts.program import (
    ABSENT,
    ARITHMETIC,
    COMPARISONS,
    KINDS,
    LOGIC,
    OPS,
    RECURRENT,
    Buffer,
    Constant,
    KeyValues,
    Kind,
    Limits,
    Op,
    Recurrent,
    View,
)
from smoe.artifacts.tiles import head_rows

MAX_RANK = 6
MAX_SIZE = 2**31  # of an axis, a stride, an offset: less than this
MAX_NUMBERS = 2**26  # of a view

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """What operations refer to, by name (states by their keys)."""

    buffers: Mapping[str, Buffer]
    constants: Mapping[str, Constant]
    states: Mapping[str, KeyValues]
    recurrent: Mapping[str, Recurrent]
    vocabulary: int


def problems(op: Op, table: Table) -> Iterator[str]:
    """Everything that is wrong with an operation by itself."""
    kind = OPS.get(op.kind)
    if kind is None:
        yield "there is no such operation"
        return
    for check in (_form, _views, _operands):
        wrong = list(check(op, kind, table))
        yield from wrong
        if wrong:  # the next check takes it for granted
            return


def _form(op: Op, kind: Kind, table: Table) -> Iterator[str]:
    """Counts, numbers, names and the weight."""
    if len(op.inputs) != len(kind.inputs) or len(op.outputs) != len(kind.outputs):
        yield (
            f"it has {len(op.inputs)} inputs and {len(op.outputs)} outputs, {len(kind.inputs)} and "
            f"{len(kind.outputs)} were wanted"
        )
        return
    for name, view in zip((*kind.inputs, *kind.outputs), (*op.inputs, *op.outputs), strict=True):
        if view.absent and (not name.endswith("?") or view != ABSENT):
            yield f"{name.rstrip('?')} is absent"
    numbers, names = op.numbers or {}, op.names or {}
    if numbers.keys() != kind.numbers.keys() or names.keys() != kind.names.keys():
        yield f"its numbers and names are not {[*kind.numbers, *kind.names]}"
        return
    for name, limits in kind.numbers.items():
        if not _within(numbers[name], limits):
            yield f"{name} is {numbers[name]!r}, a number that is not possible"
    states = table.recurrent if op.kind in RECURRENT else table.states
    for name, allowed in kind.names.items():
        if names[name] not in (allowed or states):
            whose = "the name" if op.kind in RECURRENT else "the keys"
            wanted = f"one of {', '.join(allowed)}" if allowed else f"{whose} of a state"
            yield f"{name} is {names[name][:60]!r}, {wanted} was wanted"
    if bool(op.weight) != kind.weight or (op.weight and op.weight not in table.constants):
        wanted = "a constant" if kind.weight else "none"
        yield f"its weight is {op.weight[:60]!r}, {wanted} was wanted"


def _within(number: float, limits: Limits) -> bool:
    """Not a number is not."""
    inside = limits.low <= number <= limits.high and (not number or abs(number) >= limits.least)
    return inside and (not limits.whole or number == int(number))


def _views(op: Op, kind: Kind, table: Table) -> Iterator[str]:
    """Every view lies inside what it is of, and an output reaches no number twice."""
    for name, view in zip((*kind.inputs, *kind.outputs), (*op.inputs, *op.outputs), strict=True):
        if view.absent:
            continue
        buffer, constant = table.buffers.get(view.source), table.constants.get(view.source)
        shape = buffer.shape if buffer else constant.shape if constant else ()
        if buffer is None and (constant is None or constant.form != "f32"):
            yield f"{name} is of {view.source[:60]!r}, which is no buffer and no f32 constant"
        elif not _inside(view, math.prod(shape)):
            yield (
                f"{name} is {_short(view.shape)} at {view.offset} with strides "
                f"{_short(view.strides)}, outside {view.source[:60]!r} of {_short(shape)}"
            )
        elif name in kind.outputs and (buffer is None or not _distinct(view)):
            yield (
                f"{name} is a constant, or reaches a number twice with strides "
                f"{_short(view.strides)}"
            )


def _inside(view: View, numbers: int) -> bool:
    if len(view.shape) != len(view.strides) or len(view.shape) > MAX_RANK:
        return False
    sizes = all(1 <= size < MAX_SIZE for size in view.shape)
    steps = all(0 <= step < MAX_SIZE for step in (view.offset, *view.strides))
    return sizes and steps and math.prod(view.shape) <= MAX_NUMBERS and view.end <= numbers


def _short(shape: Shape) -> str:
    more = ", …" if len(shape) > MAX_RANK else ""
    return f"[{', '.join(map(str, shape[:MAX_RANK]))}{more}]"


def _distinct(view: View) -> bool:
    """Whether every stride steps over all that the smaller ones reach."""
    reach = 0
    axes = zip(view.strides, view.shape, strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] > 1):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def dense(view: View, axes: int | None = None) -> bool:
    """Whether the last `axes` axes of a view (all) lie row-major without gaps."""
    step = 1
    pairs = list(zip(view.shape, view.strides, strict=True))
    for size, stride in reversed(pairs if axes is None else pairs[-axes:]):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


# -- one rule for each kind ------------------------------------------------------------------------


class Operands:
    """Of one operation, by the names that `OPS` has for them; absent ones are not there. What is
    asked of them yields sentences."""

    def __init__(self, op: Op, kind: Kind, table: Table):
        self.op, self.table = op, table
        names = [name.rstrip("?") for name in (*kind.inputs, *kind.outputs)]
        views = zip(names, (*op.inputs, *op.outputs), strict=True)
        self.views = {name: view for name, view in views if not view.absent}

    @property
    def how(self) -> str:
        return (self.op.names or {})["how"]

    @property
    def weight(self) -> Constant:
        return self.table.constants[self.op.weight]

    @property
    def recurrent(self) -> Shape:
        """Of the numbers that it replaces."""
        return self.table.recurrent[(self.op.names or {})["state"]].shape

    def shape(self, name: str) -> Shape:
        return self.views[name].shape

    def last(self, name: str) -> int:
        """Of its last axis; 0 where it has none."""
        return (0, *self.shape(name))[-1]

    def kind(self, name: str) -> str:
        buffer = self.table.buffers.get(self.views[name].source)
        return buffer.kind if buffer else "f32"

    def wanted(self, name: str, kind: str, *shapes: Shape) -> Iterator[str]:
        """Unless an operand is absent, or of this kind and one of these shapes."""
        if name in self.views and (self.kind(name), self.shape(name)) not in [
            (kind, shape) for shape in shapes
        ]:
            yield (
                f"{name} is {self.kind(name)} {_short(self.shape(name))}, {kind} "
                f"{' or '.join(map(_short, shapes))} was wanted"
            )

    def any_of(self, name: str, kinds: tuple[str, ...], rank: int = 0) -> Iterator[str]:
        """Unless an operand is of one of these kinds and has so many axes."""
        if self.kind(name) not in kinds or len(self.shape(name)) < rank:
            yield (
                f"{name} is {self.kind(name)} {_short(self.shape(name))}, {' or '.join(kinds)} of "
                f"{rank} axes or more was wanted"
            )

    def buffers(self, *names: str) -> Iterator[str]:
        """Unless each has numbers of its own for every row."""
        for name in names:
            if self.views[name].source not in self.table.buffers:
                yield f"{name} is a constant, a buffer was wanted"

    def constant(self, name: str) -> Iterator[str]:
        """Unless it is absent, or the same for every row."""
        if name in self.views and self.views[name].source in self.table.buffers:
            yield f"{name} is a buffer, a constant was wanted"

    def dense(self, axes: int | None, *names: str) -> Iterator[str]:
        """Unless these lie without gaps, in their last `axes` axes."""
        for name in names:
            if name in self.views and not dense(self.views[name], axes):
                yield f"{name} has strides {_short(self.views[name].strides)}, with gaps"


def _operands(op: Op, kind: Kind, table: Table) -> Iterator[str]:
    yield from RULES[op.kind](Operands(op, kind, table))


def _embedding(o: Operands) -> Iterator[str]:
    if len(o.weight.shape) != 2 or o.weight.shape[0] < o.table.vocabulary:
        yield (
            f"its weight is {_short(o.weight.shape)}, a row for each of {o.table.vocabulary} words "
            "was wanted"
        )
        return
    yield from o.wanted("y", "f32", o.weight.shape[1:])
    yield from o.dense(None, "y")


def _position(o: Operands) -> Iterator[str]:
    yield from o.wanted("y", "i64" if o.kind("y") == "i64" else "f32", ())


def _product(o: Operands) -> Iterator[str]:
    if len(o.weight.shape) != 2:
        yield f"its weight is {_short(o.weight.shape)}, which is no matrix"
        return
    n_out, n_in = o.weight.shape
    yield from o.wanted("x", "f32", (n_in,))
    yield from o.wanted("bias", "f32", (n_out,))
    yield from o.wanted("y", "f32", (n_out,))
    yield from o.dense(None, "x", "bias", "y")
    yield from o.buffers("x")
    yield from o.constant("bias")


def _head_product(o: Operands) -> Iterator[str]:
    if len(o.shape("x")) != 2 or len(o.shape("y")) != 2:
        yield f"x is {_short(o.shape('x'))}, y {_short(o.shape('y'))}, heads were wanted"
        return
    (heads, n_in), n_out = o.shape("x"), o.last("y")
    if o.weight.shape != (heads * head_rows(n_out), n_in):
        yield (
            f"its weight is {_short(o.weight.shape)}, {heads} times {head_rows(n_out)} rows of "
            f"{n_in} were wanted"
        )
    yield from o.wanted("x", "f32", (heads, n_in))
    yield from o.wanted("y", "f32", (heads, n_out))
    yield from o.dense(1, "x", "y")
    yield from o.buffers("x")


def _norm(o: Operands) -> Iterator[str]:
    yield from o.any_of("x", ("f32",), 1)
    shape = o.shape("x")
    for name in ("residual", "y", "sum"):
        yield from o.wanted(name, "f32", shape)
    for name in ("weight", "bias", "added"):
        yield from o.wanted(name, "f32", shape[-1:], shape)


def _rotary(o: Operands) -> Iterator[str]:
    if len(o.shape("x")) != 2 or o.last("x") % 2:
        yield f"x is {_short(o.shape('x'))}, heads of even width were wanted"
        return
    for name in ("x", "y"):
        yield from o.wanted(name, "f32", o.shape("x"))
    for name in ("cos", "sin"):
        yield from o.wanted(name, "f32", (o.last("x") // 2,))
    yield from o.buffers("x")


def _attention(o: Operands) -> Iterator[str]:
    state = o.table.states[(o.op.names or {})["state"]]
    heads = (*o.shape("q"), 0)[0]
    if heads % state.heads:
        yield f"q has {heads} heads, a multiple of {state.heads} was wanted"
    yield from o.wanted("q", "f32", (heads, state.key_width))
    yield from o.wanted("k", "f32", (state.heads, state.key_width))
    if ("v" in o.views) == state.latent:
        yield "v is absent, or is there where keys hold the values"
        return
    yield from o.wanted("v", "f32", (state.heads, state.value_width))
    yield from o.wanted("y", "f32", (heads, state.value_width))
    yield from o.wanted("sinks", "f32", (heads,))
    yield from o.dense(1, "q", "k", "v", "y", "sinks")
    yield from o.buffers("q", "k", *(name for name in ("v",) if name in o.views))
    yield from o.constant("sinks")


def _softmax(o: Operands) -> Iterator[str]:
    yield from o.any_of("x", ("f32",), 1)
    yield from o.wanted("y", "f32", o.shape("x"))


def _top_k(o: Operands) -> Iterator[str]:
    yield from o.any_of("x", ("f32",), 1)
    if not 1 <= o.last("values") <= o.last("x"):
        yield f"it takes {o.last('values')} of {o.last('x')}"
        return
    shape = (*o.shape("x")[:-1], o.last("values"))
    yield from o.wanted("values", "f32", shape)
    yield from o.wanted("ids", "i64", shape)


def _reduce(o: Operands) -> Iterator[str]:
    yield from o.any_of("x", ("f32",), 1)
    yield from o.wanted("y", "i64" if o.how == "argmax" else "f32", o.shape("x")[:-1])


def _unary(o: Operands) -> Iterator[str]:
    kinds = {"copy": tuple(KINDS), "not": ("bool",)}
    kinds |= dict.fromkeys(("neg", "abs", "sign"), ("f32", "i64"))
    yield from o.any_of("x", kinds.get(o.how, ("f32",)))
    yield from o.wanted("y", o.kind("y" if o.how == "copy" else "x"), o.shape("x"))


def _binary(o: Operands) -> Iterator[str]:
    if o.how in LOGIC:
        kinds: tuple[str, ...] = ("bool",)
    elif o.how in ARITHMETIC:
        kinds = ("f32",) if o.how in ("div", "pow") else ("f32", "i64")
    else:
        kinds = tuple(KINDS) if o.how == "equal" else ("f32", "i64")
    yield from o.any_of("a", kinds)
    yield from o.wanted("b", o.kind("a"), o.shape("a"))
    yield from o.wanted("y", "bool" if o.how in COMPARISONS else o.kind("a"), o.shape("a"))


def _where(o: Operands) -> Iterator[str]:
    yield from o.wanted("condition", "bool", o.shape("y"))
    for name in ("a", "b"):
        yield from o.wanted(name, o.kind("y"), o.shape("y"))


def _fill(o: Operands) -> Iterator[str]:
    value = (o.op.numbers or {})["value"]
    whole = math.isfinite(value) and abs(value) <= 2**53 and value == int(value)
    fits = {"i64": whole, "bool": value in (0, 1)}
    if not fits.get(o.kind("y"), math.isinf(value) or _within(value, Limits())):
        yield f"value is {value!r}, which y of {o.kind('y')} cannot be"


def _gather(o: Operands) -> Iterator[str]:
    yield from o.any_of("x", tuple(KINDS), 1)
    at = (*o.shape("x")[:-1], o.last("at"))
    yield from o.wanted("at", "i64", at)
    yield from o.wanted("y", o.kind("x"), at)


def _scatter(o: Operands) -> Iterator[str]:
    yield from o.any_of("y", tuple(KINDS), 1)
    at = (*o.shape("y")[:-1], o.last("at"))
    yield from o.wanted("at", "i64", at)
    yield from o.wanted("values", o.kind("y"), at)


def _keep(o: Operands) -> Iterator[str]:
    yield from o.wanted("y", o.kind("x"), o.shape("x"))


RULES: dict[str, Callable[[Operands], Iterator[str]]] = {
    "embedding": _embedding, "position": _position, "product": _product, "norm": _norm,
    "add_norm": _norm, "rotary": _rotary, "attention": _attention, "softmax": _softmax,
    "top_k": _top_k, "reduce": _reduce, "unary": _unary, "binary": _binary, "where": _where,
    "fill": _fill, "gather": _gather, "scatter": _scatter, "keep": _keep,
    "head_product": _head_product, **program_recurrent.RULES,
}  # fmt: skip
