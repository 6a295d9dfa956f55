"""The executor of programs in NumPy: the specification of native/program.h, readable and slow.

Every operation takes all rows of a step at once; what it computes is in kernels/rows.py,
products.py and attention.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.program import Constant, Op, Program, View
from smoe.runtime.errors import EngineError
from smoe.runtime.kernels import attention, products
from smoe.runtime.kernels import rows as row_kernels
from smoe.runtime.program.flatten import operands
from smoe.runtime.program.plan import BYTES, elements
from smoe.runtime.program.seam import LayerExperts, Rows, Spans
from smoe.runtime.program.state import ProgramState

_KINDS = {"f32": np.dtype(np.float32), "i64": np.dtype(np.int64), "bool": np.dtype(bool)}


@dataclass(frozen=True, eq=False)
class _Span:
    state: ProgramState
    past: int
    tokens: int


@dataclass(frozen=True, eq=False)
class _Step:
    """`values[name]` `[rows, elements]` of every buffer."""

    tokens: int
    kept: int
    ids: np.ndarray
    positions: np.ndarray
    keep: np.ndarray
    spans: tuple[_Span, ...]
    values: dict[str, np.ndarray]


class ReferenceProgram:
    """Runs `program` with its `weights`, uint8 `[bytes]`."""

    def __init__(self, program: Program, weights: np.ndarray):
        self._program, self._weights = program, weights
        self._buffers = {b.name: b for b in program.buffers}
        self._constants = {c.name: c for c in program.constants}
        self._matrices: dict[str, products.Weight] = {}
        self._state = {s.keys: i for i, s in enumerate(program.states)}
        sizes = [(elements(b.shape) * BYTES[b.kind], b.kept) for b in program.buffers]
        self.row_bytes = sum(size for size, kept in sizes if not kept)
        self.kept_bytes = sum(size for size, kept in sizes if kept)
        self.scratch_bytes = 0
        self._vocabulary = min(
            (self._constants[op.weight].shape[0] for op in self._ops("embedding")), default=2**31
        )

    def _ops(self, kind: str) -> list[Op]:
        return [op for part in self._program.parts for op in part.ops or () if op.kind == kind]

    def state(self, context: int, half: bool) -> ProgramState:
        """An empty one."""
        return ProgramState(self._program.states, context, half)

    def begin(self, spans: Spans, keep: np.ndarray) -> Rows:
        """As `Executable` says."""
        ids = np.concatenate([np.zeros(0, np.int64), *(new for _, _, new in spans)])
        if not len(ids):
            raise EngineError("A step has at least one token.")
        beyond = ids[(ids < 0) | (ids >= self._vocabulary)]
        if len(beyond):
            raise EngineError(
                f"Token id {beyond[0]} is not one of the program's {self._vocabulary}."
            )
        if len(keep) and not (
            keep[0] >= 0 and keep[-1] < len(ids) and (keep[1:] > keep[:-1]).all()
        ):
            raise EngineError("Rows to keep rise, and are rows of the step.")
        parts = []
        for state, past, new in spans:
            if past + len(new) > state.context:
                raise EngineError(
                    f"A sequence of {past} tokens and {len(new)} new ones is longer than its state "
                    f"of {state.context}; make one of a longer context."
                )
            parts.append(_Span(state, past, len(new)))
        positions = np.concatenate([past + np.arange(len(new)) for _, past, new in spans])
        values = {
            b.name: np.zeros((len(keep) if b.kept else len(ids), elements(b.shape)), _KINDS[b.kind])
            for b in self._program.buffers
        }
        return _Step(len(ids), len(keep), ids, positions, keep, tuple(parts), values)

    def run(self, rows: Rows, segment: int) -> None:
        """All operations of a segment, in their order."""
        step = _step(rows)
        with np.errstate(all="ignore"):
            for op in self._program.parts[segment].ops or ():
                if step.kept or not self._buffers[op.outputs[0].source].kept:
                    _RUN[op.kind](self, step, op)

    def read(self, rows: Rows, name: str) -> np.ndarray:
        """A view `[rows, *shape]`."""
        flat = _step(rows).values[name]
        return flat.reshape(len(flat), *self._buffers[name].shape)

    def write(self, rows: Rows, name: str, value: np.ndarray) -> None:
        """Of any shape."""
        flat = _step(rows).values[name]
        flat[...] = value.reshape(flat.shape)

    def mixture(self, layers: Sequence[LayerExperts], records: np.ndarray) -> object | None:
        """There is none."""
        return None

    def steps(self, rows: Rows, mixture: object, first: int) -> int:
        """None either."""
        return first

    # -- operands

    def _view(self, step: _Step, view: View) -> np.ndarray:
        """`[rows, *shape]`, of a constant `[1, *shape]`."""
        if view.source in self._buffers:
            flat = step.values[view.source]
        else:
            flat = self._matrix(view.source).data.view(np.float32)[None]
        size = flat.itemsize
        return np.lib.stride_tricks.as_strided(
            flat[:, view.offset :],
            (len(flat), *view.shape),
            (flat.strides[0], *(stride * size for stride in view.strides)),
        )

    def _given(self, step: _Step, op: Op) -> list[np.ndarray | None]:
        inputs, _ = operands(op)
        return [None if view.absent else self._view(step, view) for view in inputs]

    def _put(self, step: _Step, view: View, value: np.ndarray) -> None:
        if not view.absent:
            place = self._view(step, view)
            place[...] = row_kernels.converted(value, place.dtype)

    def _matrix(self, name: str) -> products.Weight:
        if name not in self._matrices:
            constant: Constant = self._constants[name]
            if len(constant.shape) != 2:
                shape = (1, elements(constant.shape))
                constant = Constant(name, constant.form, shape, constant.offset, constant.nbytes)
            self._matrices[name] = products.weight(constant, self._weights)
        return self._matrices[name]

    # -- operations

    def embedding(self, step: _Step, op: Op) -> None:
        scale = _number(op, "scale")
        self._put_flat(step, op, products.embedding(self._matrix(op.weight), step.ids, scale))

    def position(self, step: _Step, op: Op) -> None:
        (y,) = op.outputs
        self._put(step, y, step.positions.reshape(-1, *(1 for _ in y.shape)))

    def product(self, step: _Step, op: Op) -> None:
        x, bias = self._given(step, op)
        assert x is not None
        y = products.product(self._matrix(op.weight), np.ascontiguousarray(x).reshape(len(x), -1))
        self._put_flat(step, op, y if bias is None else y + bias.reshape(len(bias), -1))

    def _put_flat(self, step: _Step, op: Op, value: np.ndarray) -> None:
        (y,) = op.outputs
        self._put(step, y, value.reshape(len(value), *y.shape))

    def norm(self, step: _Step, op: Op) -> None:
        x, residual, weight, bias, added = self._given(step, op)
        _, outputs = operands(op)
        assert x is not None
        total = x.copy() if residual is None else x + _led(residual, x.ndim)
        total = total if added is None else total + _led(added, x.ndim)
        how, epsilon = _name(op, "how"), _number(op, "epsilon")
        self._put(step, outputs[1], total)
        y = row_kernels.norm(
            how,
            epsilon,
            total,
            None if weight is None else _led(weight, x.ndim),
            None if bias is None else _led(bias, x.ndim),
        )
        self._put(step, outputs[0], y)

    def rotary(self, step: _Step, op: Op) -> None:
        x, cos, sin = self._given(step, op)
        assert x is not None and cos is not None and sin is not None
        y = row_kernels.rotary(_name(op, "pairs"), x, _led(cos, x.ndim), _led(sin, x.ndim))
        self._put(step, op.outputs[0], y)

    def attention(self, step: _Step, op: Op) -> None:
        q, k, v, sinks = self._given(step, op)
        assert q is not None and k is not None and v is not None
        index = self._state[_name(op, "state")]
        parts = [
            attention.Part(span.state.keys[index], span.state.values[index], span.past, span.tokens)
            for span in step.spans
        ]
        y = attention.attention(
            parts,
            q,
            k,
            v,
            scale=_number(op, "scale"),
            softcap=_number(op, "softcap"),
            window=int(_number(op, "window")),
            sinks=None if sinks is None else sinks[0],
        )
        self._put(step, op.outputs[0], y)

    def softmax(self, step: _Step, op: Op) -> None:
        self._put(step, op.outputs[0], row_kernels.softmax(self._one(step, op)))

    def top_k(self, step: _Step, op: Op) -> None:
        _, (values, ids) = operands(op)
        best, places = row_kernels.top_k(self._one(step, op), ids.shape[-1])
        self._put(step, values, best)
        self._put(step, ids, places)

    def reduce(self, step: _Step, op: Op) -> None:
        self._put(step, op.outputs[0], row_kernels.reduce(_name(op, "how"), self._one(step, op)))

    def unary(self, step: _Step, op: Op) -> None:
        self._put(step, op.outputs[0], row_kernels.unary(_name(op, "how"), self._one(step, op)))

    def binary(self, step: _Step, op: Op) -> None:
        a, b = self._given(step, op)
        assert a is not None and b is not None
        self._put(step, op.outputs[0], row_kernels.binary(_name(op, "how"), a, b))

    def where(self, step: _Step, op: Op) -> None:
        condition, a, b = self._given(step, op)
        assert condition is not None and a is not None and b is not None
        self._put(step, op.outputs[0], row_kernels.where(condition, a, b))

    def fill(self, step: _Step, op: Op) -> None:
        self._put(step, op.outputs[0], np.full((), _number(op, "value"), np.float32))

    def gather(self, step: _Step, op: Op) -> None:
        x, at = self._given(step, op)
        assert x is not None and at is not None
        axes = 1 + len(op.outputs[0].shape)
        self._put(step, op.outputs[0], row_kernels.gather(_led(x, axes), _led(at, axes)))

    def scatter(self, step: _Step, op: Op) -> None:
        at, values = self._given(step, op)
        assert at is not None and values is not None
        y = self._view(step, op.outputs[0])
        row_kernels.scatter(y, _led(at, y.ndim), _led(values, y.ndim))

    def keep(self, step: _Step, op: Op) -> None:
        self._put(step, op.outputs[0], self._one(step, op)[step.keep])

    def _one(self, step: _Step, op: Op) -> np.ndarray:
        (x,) = (self._view(step, view) for view in op.inputs)
        return x.copy()


def _step(rows: Rows) -> _Step:
    assert isinstance(rows, _Step)
    return rows


def _led(line: np.ndarray, axes: int) -> np.ndarray:
    """`[rows, n]`, the same for all axes between, as an array of so many axes."""
    missing = axes - line.ndim
    return line.reshape(len(line), *(1,) * missing, *line.shape[1:])


def _number(op: Op, name: str) -> float:
    return (op.numbers or {})[name]


def _name(op: Op, name: str) -> str:
    return (op.names or {})[name]


_RUN: dict[str, Callable[[ReferenceProgram, _Step, Op], None]] = {
    "add_norm": ReferenceProgram.norm,
    **{
        kind: getattr(ReferenceProgram, kind)
        for kind in (
            "embedding", "position", "product", "norm", "rotary", "attention", "softmax", "top_k",
            "reduce", "unary", "binary", "where", "fill", "gather", "scatter", "keep",
        )
    },
}  # fmt: skip
