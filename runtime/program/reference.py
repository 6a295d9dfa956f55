"""The executor of programs in NumPy: the specification of native/program.h, readable and slow.

Every operation takes all rows of a step at once; what it computes is in kernels/rows.py,
products.py, attention.py and recurrent.py. A scan takes one row of a sequence after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from smoe.artifacts.program import Constant, Op, Program, View, scans
from smoe.runtime.errors import EngineError
from smoe.runtime.kernels import attention, products, recurrent
from smoe.runtime.kernels import rows as row_kernels
from smoe.runtime.program.flatten import operands
from smoe.runtime.program.layout import StateLayout
from smoe.runtime.program.plan import BYTES, elements
from smoe.runtime.program.pool import BlockPool
from smoe.runtime.program.seam import LayerExperts, Rows, Spans
from smoe.runtime.program.state import ProgramState

_KINDS = {"f32": np.dtype(np.float32), "i64": np.dtype(np.int64), "bool": np.dtype(bool)}


@dataclass(frozen=True, eq=False)
class _Span:
    """`first`: its row of the step."""

    state: ProgramState
    past: int
    first: int
    tokens: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.tokens)


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
        self._recurrent = {s.name: i for i, s in enumerate(program.recurrent)}
        self._pools: dict[int, BlockPool] = {}
        sizes = [(elements(b.shape) * BYTES[b.kind], b.kept) for b in program.buffers]
        self.row_bytes = sum(size for size, kept in sizes if not kept)
        self.kept_bytes = sum(size for size, kept in sizes if kept)
        self.scratch_bytes = 0
        self._vocabulary = min(
            (self._constants[op.weight].shape[0] for op in self._ops("embedding")), default=2**31
        )

    def _ops(self, kind: str) -> list[Op]:
        return [op for part in self._program.parts for op in part.ops or () if op.kind == kind]

    def state(self, context: int, kind: str) -> ProgramState:
        """An empty one."""
        return ProgramState(StateLayout.of(self._program, kind), context, self._pools)

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
        parts: list[_Span] = []
        for state, past, new in spans:
            state.reserve(past, past + len(new))
            first = sum(part.tokens for part in parts)
            parts.append(_Span(state, past, first, len(new)))
        positions = np.concatenate([past + np.arange(len(new)) for _, past, new in spans])
        values = {
            b.name: np.zeros((len(keep) if b.kept else len(ids), elements(b.shape)), _KINDS[b.kind])
            for b in self._program.buffers
        }
        return _Step(len(ids), len(keep), ids, positions, keep, tuple(parts), values)

    def run(self, rows: Rows, segment: int) -> None:
        """All operations of a segment, in their order."""
        step, ops = _step(rows), self._program.parts[segment].ops or ()
        for span in step.spans:
            for index, state in enumerate(self._program.recurrent):
                if state.segment == segment:
                    span.state.recurrent[index][...] = span.state.before[index]
        begun = {scan.start: scan for scan in scans(ops)}
        scanned = {place for scan in begun.values() for place in scan}
        with np.errstate(all="ignore"):
            for place, op in enumerate(ops):
                if place in begun:
                    self._scan(step, [ops[inner] for inner in begun[place]])
                elif place not in scanned and (step.kept or not self._is_kept(op)):
                    _RUN[op.kind](self, step, op)

    def parts(self, rows: Rows, segment: int) -> Iterator[None]:
        """In one."""
        yield from ()
        self.run(rows, segment)

    def _is_kept(self, op: Op) -> bool:
        return self._buffers[op.outputs[0].source].kept

    def _scan(self, step: _Step, ops: Sequence[Op]) -> None:
        """All of them for a row before any for the next."""
        names = {view.source for op in ops for view in (*op.inputs, *op.outputs)}
        for span in step.spans:
            for r in range(span.first, span.first + span.tokens):
                values = {n: step.values[n][r : r + 1] for n in names & step.values.keys()}
                row = dataclasses.replace(step, spans=(span,), values=values)
                for op in ops:
                    _RUN[op.kind](self, row, op)

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

    def release(self) -> None:
        """It has no files."""

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

    def head_product(self, step: _Step, op: Op) -> None:
        (y,) = op.outputs
        given = products.head_product(self._matrix(op.weight), self._one(step, op), y.shape[-1])
        self._put(step, y, given)

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
        assert q is not None and k is not None
        index = self._state[_name(op, "state")]
        parts = [
            attention.Part(
                layout=span.state.layouts[index],
                block=partial(span.state.block, index),
                past=span.past,
                rows=span.tokens,
            )
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

    def recall(self, step: _Step, op: Op) -> None:
        self._put(step, op.outputs[0], self._carried(step.spans[0], op))

    def store(self, step: _Step, op: Op) -> None:
        self._carried(step.spans[0], op)[...] = self._one(step, op)[0]

    def _carried(self, span: _Span, op: Op) -> np.ndarray:
        return span.state.recurrent[self._recurrent[_name(op, "state")]]

    def delta_rule(self, step: _Step, op: Op) -> None:
        given = [self._view(step, view) for view in op.inputs]
        for span in step.spans:
            mine = [array[span.rows] for array in given]
            y = recurrent.delta_rule(self._carried(span, op), *mine)
            self._view(step, op.outputs[0])[span.rows] = y

    def convolution(self, step: _Step, op: Op) -> None:
        x, weight, bias = self._given(step, op)
        assert x is not None and weight is not None
        for span in step.spans:
            state, added = self._carried(span, op), None if bias is None else bias[0]
            y = recurrent.convolution(state, x[span.rows], weight[0], added)
            self._view(step, op.outputs[0])[span.rows] = y

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
            "reduce", "unary", "binary", "where", "fill", "gather", "scatter", "keep", "recall",
            "store", "delta_rule", "convolution",
            "head_product",
        )
    },
}  # fmt: skip
