"""The table of a program as plain numbers, which the native module takes (native/program.h).

It wants the operands of products side by side, and biases that are constants: `lowered` copies and
adds where a table has them otherwise."""

from __future__ import annotations

from dataclasses import replace

from smoe.artifacts.program import Buffer, Constant, Op, Part, Program, View
from smoe.runtime.program.plan import Plan, elements

ABSENT = View("", 0, (), ())

# Of every kind: how many inputs and outputs the native operation has, absent ones too. A norm is
# one with nothing to add.
_OPERANDS = {
    "embedding": (0, 1), "position": (0, 1), "product": (2, 1), "norm": (5, 2), "add_norm": (5, 2),
    "rotary": (3, 1), "attention": (4, 1), "softmax": (1, 1), "top_k": (1, 2), "reduce": (1, 1),
    "unary": (1, 1), "binary": (2, 1), "where": (3, 1), "fill": (0, 1), "gather": (2, 1),
    "scatter": (2, 1), "keep": (1, 1),
}  # fmt: skip
_NUMBERS = {
    "embedding": ("scale",),
    "norm": ("epsilon",),
    "add_norm": ("epsilon",),
    "attention": ("scale", "window", "softcap"),
    "fill": ("value",),
}
_STRAIGHT = {"product": 1, "embedding": 0, "attention": 3}  # first inputs that lie side by side


def absent(view: View) -> bool:
    """Whether an optional operand is not there."""
    return view.source in ("", "-")


def operands(op: Op) -> tuple[list[View], list[View]]:
    """Inputs and outputs in their places, absent ones too: those of `add_norm` for both norms."""
    inputs, outputs = list(op.inputs), list(op.outputs)
    if op.kind == "norm":
        inputs.insert(1, ABSENT)
    count_in, count_out = _OPERANDS[op.kind]
    inputs += [ABSENT] * (count_in - len(inputs))
    outputs += [ABSENT] * (count_out - len(outputs))
    return inputs, outputs


def contiguous(view: View) -> bool:
    """Whether its elements lie side by side, in their order."""
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def lowered(program: Program) -> Program:
    """The same program in operations as the native module has them."""
    return _Lowering(program).program()


class _Lowering:
    def __init__(self, program: Program):
        self._program = program
        self._buffers = {b.name: b for b in program.buffers}
        self._ops: list[Op] = []

    def program(self) -> Program:
        parts = []
        for part in self._program.parts:
            self._ops = []
            for op in part.ops or ():
                self._lower(op)
            parts.append(Part(None if part.ops is None else tuple(self._ops), part.reason))
        return replace(self._program, buffers=tuple(self._buffers.values()), parts=tuple(parts))

    def _lower(self, op: Op) -> None:
        if op.kind not in _STRAIGHT:
            self._ops.append(op)
            return
        whole, inputs, bias = op.kind != "attention", list(op.inputs), ABSENT
        if op.kind == "product" and len(inputs) > 1 and not self._constant(inputs[1]):
            bias = inputs.pop()
        for i in range(_STRAIGHT[op.kind]):
            if not self._side_by_side(inputs[i], whole):
                room = self._room(inputs[i])
                self._copy(inputs[i], room)
                inputs[i] = room
        (y,) = op.outputs
        room = y if self._side_by_side(y, whole) else self._room(y)
        self._ops.append(replace(op, inputs=tuple(inputs), outputs=(room,)))
        if not absent(bias):
            names = {"how": "add"}
            self._ops.append(Op("binary", (room, _shaped(bias, room)), (room,), names=names))
        if room is not y:
            self._copy(room, y)

    def _constant(self, bias: View) -> bool:
        return absent(bias) or (bias.source not in self._buffers and contiguous(bias))

    def _side_by_side(self, view: View, whole: bool) -> bool:
        if whole:
            return contiguous(view)
        return (view.shape[-1] == 1 or view.strides[-1] == 1) and view.strides[0] >= 0

    def _room(self, view: View) -> View:
        """A new buffer of the view's shape."""
        source = self._buffers[view.source]
        name = f"{view.source} copy {len(self._buffers)}"
        self._buffers[name] = Buffer(name, source.kind, view.shape, source.kept)
        strides, step = [], 1
        for size in reversed(view.shape):
            strides.append(step)
            step *= size
        return View(name, 0, view.shape, tuple(reversed(strides)))

    def _copy(self, x: View, y: View) -> None:
        self._ops.append(Op("unary", (x,), (y,), names={"how": "copy"}))


def _shaped(bias: View, y: View) -> View:
    """A row `[n]`, as flat as `y` is."""
    return bias if bias.shape == y.shape else replace(bias, shape=y.shape)


def buffers(program: Program, plan: Plan) -> list[tuple[object, ...]]:
    """kind, size, kept, crossing, offset of each."""
    return [
        (b.kind, elements(b.shape), b.kept, b.name in plan.crossing, plan.offsets.get(b.name, 0))
        for b in program.buffers
    ]


def constants(program: Program) -> list[tuple[object, ...]]:
    """form, n_out, n_in, group, wide, offset of each; one that is no matrix is a row."""
    return [(c.form, *_matrix(c), c.group, c.wide, c.offset) for c in program.constants]


def _matrix(constant: Constant) -> tuple[int, int]:
    if len(constant.shape) == 2:
        return constant.shape[0], constant.shape[1]
    return 1, elements(constant.shape)


def states(program: Program) -> list[tuple[int, int, int]]:
    """heads, key_width, value_width of each."""
    return [(s.heads, s.key_width, s.value_width) for s in program.states]


def segments(program: Program) -> list[list[tuple[object, ...]]]:
    """kind, how, operands, weight, state, numbers of every operation; nothing of a segment that is
    not known."""
    names = [*(b.name for b in program.buffers), *(c.name for c in program.constants)]
    source = {name: index for index, name in enumerate(names)}
    weight = {c.name: index for index, c in enumerate(program.constants)}
    state = {s.keys: index for index, s in enumerate(program.states)}

    def flat(view: View) -> tuple[object, ...]:
        where = -1 if absent(view) else source[view.source]
        return where, view.offset, view.shape, view.strides

    def numbers(op: Op) -> list[float]:
        return [float((op.numbers or {})[name]) for name in _NUMBERS.get(op.kind, ())]

    def one(op: Op) -> tuple[object, ...]:
        inputs, outputs = operands(op)
        said = op.names or {}
        return (
            "norm" if op.kind == "add_norm" else op.kind,
            said.get("how", said.get("pairs", "")),
            [flat(view) for view in (*inputs, *outputs)],
            weight[op.weight] if op.weight else -1,
            state[said["state"]] if "state" in said else 0,
            numbers(op),
        )

    return [[one(op) for op in part.ops or ()] for part in program.parts]
