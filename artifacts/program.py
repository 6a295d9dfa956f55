"""The program of a backbone: its segments as a table of operations on rows, which a device runs
without ONNX Runtime.

A program is data. Every operation works on the rows of a step (a row is a token) one by one; only
`attention` looks at other tokens, and only at those of its own sequence before it, and `RECURRENT`
ones at what these have left. So the bits of a token depend on its own past alone. What an operation
computes is in FORMAT.md ("Programs"); who runs it is not said here.

A *buffer* holds `shape` numbers for every row. A *view* is what an operation sees of a buffer or of
a constant: `offset` and `strides` in elements of a row, 0 along an axis that repeats. Reshaping,
splitting, slicing, transposing and broadcasting are views and cost nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from smoe.artifacts import schema, tiles

PROGRAM = "backbone/program.json"
PROGRAM_WEIGHTS = "backbone/program.data"

KINDS = {"f32": 4, "i64": 8, "bool": 1}  # of buffers: bytes a number
FORMS = ("f32", "bf16", "int8", "int4")  # of constants
GROUPS = (32, 64, 128)  # columns that share a scale
ALIGN = 64  # bytes: every constant starts on a multiple


@dataclass(frozen=True)
class Buffer:
    """Numbers of every row. `kept` where its rows are those tokens of a step whose logits are
    wanted, and not all. One name in the whole program; those that another segment reads live as
    long as the step, the others as long as their segment."""

    name: str
    kind: str
    shape: tuple[int, ...]
    kept: bool = False

    @property
    def numbers(self) -> int:
        """Of a row."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of a row. `kind` must be one of `KINDS`."""
        return self.numbers * KINDS[self.kind]


@dataclass(frozen=True)
class Constant:
    """A weight in the weight file: `offset`, a multiple of 64, and `nbytes`.

    `form` "f32" or "bf16": `shape`, row-major. "int8" or "int4": a matrix `[n_out, n_in]` in tiles
    of 16 rows by blocks of 32 columns, codes first, then a scale for every row and `group` of
    columns (32, 64 or 128), in tiles as the codes are: bfloat16, or float32 where `wide`
    (`tiles`). The value of an int4 code is the code less 8.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    group: int = 0
    wide: bool = False

    @property
    def wanted(self) -> int:
        """The bytes that form, shape and group need. They must be possible ones."""
        if self.form in ("f32", "bf16"):
            return math.prod(self.shape) * (4 if self.form == "f32" else 2)
        n_out, n_in = self.shape
        codes = tiles.code_bytes(self.form, n_out, n_in)
        return codes + tiles.scale_bytes(n_out, n_in, self.group, self.wide)


@dataclass(frozen=True)
class View:
    """`source` is a buffer's name or a constant's (f32). Element (i, j, ..) of a row lies at
    `offset` + i * strides[0] + j * strides[1] + ..; a constant is the same for every row."""

    source: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def absent(self) -> bool:
        """Whether it stands for an optional input that is not there."""
        return not self.source

    @property
    def end(self) -> int:
        """One behind the last element of a row that it reaches."""
        last = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((size - 1) * stride for size, stride in last) + 1


ABSENT = View("", 0, (), ())


@dataclass(frozen=True)
class Op:
    """`kind` is one of `OPS`. `weight` names the constant of products and embeddings; `numbers` and
    `names` are what else the kind takes, `OPS` says which."""

    kind: str
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]
    weight: str = ""
    numbers: dict[str, float] | None = None
    names: dict[str, str] | None = None


@dataclass(frozen=True)
class KeyValues:
    """What an `attention` remembers: of every token `heads` keys of `key_width` numbers and values
    of `value_width`. `keys` and `values` are the inputs of the manifest's state that they stand
    for.

    Where `latent` (heads is 1), values are not kept: a token's is the first `value_width` numbers
    of its key. `keys` is then the state of those numbers, and `values` that of the others."""

    keys: str
    values: str
    segment: int
    heads: int
    key_width: int
    value_width: int
    latent: bool = dataclasses.field(default=False, metadata={"since": 7})


@dataclass(frozen=True)
class Recurrent:
    """Numbers of a sequence that every token replaces: float32 `shape`, zero before the first.
    `name` is the input of the manifest's state that it stands for, of as many numbers; in which
    order they lie is the program's."""

    name: str
    segment: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A segment: its operations in order; where it is not known whole, None and the `reason`, and
    ONNX Runtime runs it."""

    ops: tuple[Op, ...] | None
    reason: str = ""


@dataclass(frozen=True)
class Program:
    """All of program.json. `parts` are as many as the manifest's segments, and in their order. What
    a known part shares with experts (the manifest's wires), with a part that is not known, or with
    whoever asks for "logits", is a buffer of its name."""

    buffers: tuple[Buffer, ...]
    constants: tuple[Constant, ...]
    states: tuple[KeyValues, ...]
    parts: tuple[Part, ...]
    recurrent: tuple[Recurrent, ...] = dataclasses.field(default=(), metadata={"since": 7})

    def to_json(self) -> str:
        """The text of program.json."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")) + "\n"

    @classmethod
    def parse(cls, text: str, where: str) -> Program:
        """Read program.json; `where` names the file in errors. A wrong field or type is a
        `BundleError`; what the table says is the word of `program_checks.problems`."""
        return schema.parse(cls, schema.load(text, where), where)

    def operations(self) -> Iterator[tuple[int, Op]]:
        """All, with the part of each, in the order in which they run."""
        for number, part in enumerate(self.parts):
            for op in part.ops or ():
                yield number, op


# -- operations: what each computes is in FORMAT.md ("Operations") ---------------------------------

LARGEST = 3.4028234e38  # float32


@dataclass(frozen=True)
class Limits:
    """Of a number of an operation, which may also be 0 where it may be that low."""

    low: float = -LARGEST
    high: float = LARGEST
    least: float = 0.0  # its magnitude
    whole: bool = False


@dataclass(frozen=True)
class Kind:
    """What an operation takes and gives. An input whose name ends with "?" may be absent; it is
    listed all the same. `names` has the values that are allowed; of "state" none are listed, since
    it is the keys of one of `Program.states`, or the name of one of `Program.recurrent`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("y",)
    numbers: dict[str, Limits] = dataclasses.field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    weight: bool = False


UNARY = (
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "erf", "silu",
    "gelu", "gelu_tanh", "relu", "relu2", "softplus", "sin", "cos", "not", "floor", "sign", "copy",
)  # fmt: skip
ARITHMETIC = ("add", "sub", "mul", "div", "max", "min", "pow")
LOGIC = ("and", "or")
COMPARISONS = ("equal", "less", "less_equal", "greater", "greater_equal")
REDUCTIONS = ("sum", "max", "mean", "argmax")

_POSITIVE = Limits(low=0.0)
OPS: dict[str, Kind] = {
    "embedding": Kind((), numbers={"scale": Limits()}, weight=True),
    "position": Kind(()),
    "product": Kind(("x", "bias?"), weight=True),
    "head_product": Kind(("x",), weight=True),
    "norm": Kind(
        ("x", "weight?", "bias?"),
        numbers={"epsilon": _POSITIVE},
        names={"how": ("rms", "layer")},
    ),
    "add_norm": Kind(
        ("x", "residual", "weight", "bias?", "added?"),
        ("y", "sum"),
        numbers={"epsilon": _POSITIVE},
        names={"how": ("rms", "layer")},
    ),
    "rotary": Kind(("x", "cos", "sin"), names={"pairs": ("halves", "neighbours")}),
    "attention": Kind(
        ("q", "k", "v?", "sinks?"),
        numbers={
            "scale": Limits(),
            "window": Limits(0, 2**31 - 1, whole=True),
            "softcap": Limits(0.0, 1e6, least=1e-6),
        },
        names={"state": ()},
    ),
    "softmax": Kind(("x",)),
    "top_k": Kind(("x",), ("values", "ids")),
    "reduce": Kind(("x",), names={"how": REDUCTIONS}),
    "unary": Kind(("x",), names={"how": UNARY}),
    "binary": Kind(("a", "b"), names={"how": ARITHMETIC + LOGIC + COMPARISONS}),
    "where": Kind(("condition", "a", "b")),
    "fill": Kind((), numbers={"value": Limits(-math.inf, math.inf)}),
    "gather": Kind(("x", "at")),
    "scatter": Kind(("at", "values")),
    "keep": Kind(("x",)),
    "recall": Kind((), names={"state": ()}),
    "store": Kind(("x",), (), names={"state": ()}),
    "delta_rule": Kind(("q", "k", "v", "decay", "beta"), names={"state": ()}),
    "convolution": Kind(("x", "weight", "bias?"), names={"state": ()}),
}
RECURRENT = ("recall", "store", "delta_rule", "convolution")  # of `Program.recurrent`
# What may lie between a `recall` and its `store`: operations that see a single row.
SCANNED = (
    "norm", "add_norm", "rotary", "softmax", "top_k", "reduce", "unary", "binary", "where", "fill",
    "gather", "scatter",
)  # fmt: skip


def scans(ops: Sequence[Op]) -> Iterator[range]:
    """Which of a part's operations run row by row, all of them for a row before any for the next:
    from a `recall` on, until all that was recalled is stored."""
    open_: set[str] = set()
    first = 0
    for place, op in enumerate(ops):
        state = (op.names or {}).get("state", "")
        if op.kind == "recall":
            first = first if open_ else place
            open_.add(state)
        elif op.kind == "store" and state in open_:
            open_.remove(state)
            if not open_:
                yield range(first, place + 1)
