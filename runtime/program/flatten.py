"""The table of a program as plain numbers, which the native module takes (native/program.h)."""

from __future__ import annotations

from smoe.artifacts.program import ABSENT, Buffer, Constant, Op, Program, View
from smoe.runtime.program.plan import Plan, elements

# Of every kind: how many inputs and outputs the native operation has, absent ones too. A norm is
# one with nothing to add.
_OPERANDS = {
    "embedding": (0, 1), "position": (0, 1), "product": (2, 1), "norm": (5, 2), "add_norm": (5, 2),
    "rotary": (3, 1), "attention": (4, 1), "softmax": (1, 1), "top_k": (1, 2), "reduce": (1, 1),
    "unary": (1, 1), "binary": (2, 1), "where": (3, 1), "fill": (0, 1), "gather": (2, 1),
    "scatter": (2, 1), "keep": (1, 1), "head_product": (1, 1), "recall": (0, 1),
    "store": (1, 0), "delta_rule": (5, 1), "convolution": (3, 1),
}  # fmt: skip
_NUMBERS = {
    "embedding": ("scale",),
    "norm": ("epsilon",),
    "add_norm": ("epsilon",),
    "attention": ("scale", "window", "softcap"),
    "fill": ("value",),
}


def operands(op: Op) -> tuple[list[View], list[View]]:
    """Inputs and outputs in their places, absent ones too: those of `add_norm` for both norms."""
    inputs, outputs = list(op.inputs), list(op.outputs)
    if op.kind == "norm":
        inputs.insert(1, ABSENT)
    count_in, count_out = _OPERANDS[op.kind]
    inputs += [ABSENT] * (count_in - len(inputs))
    outputs += [ABSENT] * (count_out - len(outputs))
    return inputs, outputs


def buffers(program: Program, plan: Plan) -> list[tuple[object, ...]]:
    """kind, size, kept, crossing, scanned, offset of each."""

    def one(b: Buffer) -> tuple[object, ...]:
        where = (b.name in plan.crossing, b.name in plan.scanned, plan.offsets.get(b.name, 0))
        return (b.kind, elements(b.shape), b.kept, *where)

    return [one(b) for b in program.buffers]


def constants(program: Program) -> list[tuple[object, ...]]:
    """form, n_out, n_in, group, wide, offset of each; one that is no matrix is a row."""
    return [(c.form, *_matrix(c), c.group, c.wide, c.offset) for c in program.constants]


def _matrix(constant: Constant) -> tuple[int, int]:
    if len(constant.shape) == 2:
        return constant.shape[0], constant.shape[1]
    return 1, elements(constant.shape)


def states(program: Program) -> list[tuple[int, int, int, bool]]:
    """heads, key_width, value_width, latent of each."""
    return [(s.heads, s.key_width, s.value_width, s.latent) for s in program.states]


def recurrent(program: Program) -> list[int]:
    """How many numbers each has."""
    return [elements(state.shape) for state in program.recurrent]


def segments(program: Program) -> list[list[tuple[object, ...]]]:
    """kind, how, operands, weight, state, numbers of every operation; nothing of a segment that is
    not known."""
    names = [*(b.name for b in program.buffers), *(c.name for c in program.constants)]
    source = {name: index for index, name in enumerate(names)}
    weight = {c.name: index for index, c in enumerate(program.constants)}
    state = {s.keys: index for index, s in enumerate(program.states)}
    state |= {s.name: index for index, s in enumerate(program.recurrent)}

    def flat(view: View) -> tuple[object, ...]:
        where = -1 if view.absent else source[view.source]
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
