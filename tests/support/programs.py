"""Small programs, written by hand."""

import math
from pathlib import Path

import numpy as np

from smoe.artifacts import tiles
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.program import (
    PROGRAM_WEIGHTS,
    Buffer,
    Constant,
    KeyValues,
    Op,
    Part,
    Program,
    Recurrent,
    View,
)
from smoe.runtime import kernels
from smoe.runtime.program import Executable, open_program

ABSENT = View("", 0, (), ())


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a row-major array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def bits(array: np.ndarray) -> np.ndarray:
    """What must be equal; a NaN is a NaN."""
    if array.dtype != np.float32:
        return array
    return np.where(np.isnan(array), 0x7FC00000, array.view(np.uint32))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, but for which NaN it is."""
    return a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


class Table:
    """A program on its way: buffers, constants and operations, one after another."""

    def __init__(self, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.buffers: list[Buffer] = []
        self.constants: list[Constant] = []
        self.states: list[KeyValues] = []
        self.recurrent: list[Recurrent] = []
        self.parts: list[list[Op]] = [[]]
        self.data = bytearray()

    def buffer(
        self, name: str, *shape: int, kind: str = "f32", kept: bool = False, spread: bool = False
    ) -> View:
        """A buffer and the view of all of it; `spread`: with gaps, and turned around."""
        if not spread or not shape:
            self.buffers.append(Buffer(name, kind, shape, kept))
            return View(name, 0, shape, strides_of(shape))
        self.buffers.append(Buffer(name, kind, (2 * math.prod(shape) + 3,), kept))
        order = self.random.permutation(len(shape))
        strides, step = [0] * len(shape), 2
        for axis in order:
            strides[axis], step = step, step * shape[axis]
        return View(name, 1, shape, tuple(strides))

    def constant(self, array: np.ndarray) -> View:
        """A float32 constant and the view of it."""
        name = self._add("f32", array.shape, array.astype(np.float32).tobytes())
        return View(name, 0, array.shape, strides_of(array.shape))

    def matrix(self, form: str, n_out: int, n_in: int, group: int = 32, wide: bool = False) -> str:
        """A random matrix in one of the forms; its name."""
        values = self.random.standard_normal((n_out, n_in)).astype(np.float32) / 4
        if form == "f32":
            return self._add(form, (n_out, n_in), values.tobytes())
        if form == "bf16":
            return self._add(form, (n_out, n_in), to_bf16(values).tobytes())
        scales = self.random.uniform(0.001, 0.02, (n_out, -(-n_in // group))).astype(np.float32)
        scales = scales if wide else from_bf16(to_bf16(scales))
        if form == "int8":
            codes = tiles.pack_int8(self.random.integers(-127, 128, (n_out, n_in), np.int8))
        else:
            codes = tiles.pack_int4(self.random.integers(0, 16, (n_out, n_in), np.uint8))
        packed = np.concatenate([codes, tiles.pack_scales(scales, wide)])
        return self._add(form, (n_out, n_in), packed.tobytes(), group, wide)

    def _add(
        self, form: str, shape: tuple[int, ...], data: bytes, group: int = 0, wide: bool = False
    ) -> str:
        self.data += bytes(-len(self.data) % 64)
        name = f"constant {len(self.constants)}"
        about = Constant(name, form, shape, len(self.data), len(data), group, wide)
        self.constants.append(about)
        self.data += data
        return name

    def state(self, heads: int, key_width: int, value_width: int, latent: bool = False) -> str:
        """What an attention of this segment remembers; its name."""
        keys = f"keys {len(self.states)}"
        segment = len(self.parts) - 1
        values = f"values {len(self.states)}"
        about = KeyValues(keys, values, segment, heads, key_width, value_width, latent)
        self.states.append(about)
        return keys

    def carried(self, *shape: int) -> str:
        """What every token of this segment replaces; its name."""
        name = f"carried {len(self.recurrent)}"
        self.recurrent.append(Recurrent(name, len(self.parts) - 1, shape))
        return name

    def op(self, kind: str, inputs: list[View], *outputs: View, weight: str = "", **said) -> None:
        """An operation of the segment at hand; numbers and names by their names."""
        numbers = {n: float(v) for n, v in said.items() if not isinstance(v, str)}
        names = {n: v for n, v in said.items() if isinstance(v, str)}
        self.parts[-1].append(Op(kind, tuple(inputs), outputs, weight, numbers, names))

    def next_segment(self) -> None:
        self.parts.append([])

    @property
    def program(self) -> Program:
        parts = tuple(Part(tuple(ops)) for ops in self.parts)
        kept = (tuple(self.states), parts, tuple(self.recurrent))
        return Program(tuple(self.buffers), tuple(self.constants), *kept)

    def open(self, path: Path, name: str, threads: int = 1, wires=None) -> Executable:
        """The program in a folder, on the kernels of this name."""
        file = path / PROGRAM_WEIGHTS
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(self.data) or bytes(64))
        chosen = kernels.choose(name, threads)
        return open_program(path, self.program, chosen, threads, wires)


class Layers(Table):
    """A whole backbone: a prelude with embedding and rotary tables, a segment per layer, and one
    for the logits. Every dimension is another. `window` is that of all layers, or of each; where
    `latent`, all heads read one key, whose first numbers are the value; where it `carries`, every
    other layer has a convolution along tokens and a delta rule instead of attention."""

    VOCABULARY, HIDDEN, HEADS, GROUPS, WIDTH, EXPERTS, TOP_K = 50, 72, 6, 2, 20, 7, 3
    LATENT = 12

    def __init__(
        self,
        form: str = "f32",
        layers: int = 2,
        window: int | tuple[int, ...] = 0,
        softcap: float = 0,
        sinks: bool = False,
        latent: bool = False,
        carries: bool = False,
    ):
        super().__init__()
        self.form, self.layers, self.latent, self.carries = form, layers, latent, carries
        self.windows = window if isinstance(window, tuple) else (window,) * layers
        self.softcap, self.sinks = softcap, sinks
        residual, cos, sin = self._prelude()
        for layer in range(layers):
            self.next_segment()
            residual = self._layer(layer, residual, cos, sin)
        self.next_segment()
        self._logits(self._mixed(layers, residual))

    @property
    def wires(self) -> list[str]:
        """What passes to experts and back."""
        names = ("hidden", "ids", "weights", "output")
        return [f"{name} {layer}" for layer in range(self.layers) for name in names]

    def product(self, x: View, n_out: int, name: str, bias: bool = False, kept=False) -> View:
        (n_in,) = x.shape
        y = self.buffer(name, n_out, kept=kept)
        added = [self.constant(self.random.standard_normal(n_out))] if bias else []
        self.op("product", [x, *added], y, weight=self.matrix(self.form, n_out, n_in))
        return y

    def _prelude(self) -> tuple[View, View, View]:
        residual = self.buffer("residual 0", self.HIDDEN)
        weight = self.matrix(self.form, self.VOCABULARY, self.HIDDEN)
        self.op("embedding", [], residual, weight=weight, scale=2)
        half = self.WIDTH // 2
        position, angles = self.buffer("position"), self.buffer("angles", half)
        self.op("position", [], position)
        frequency = self.constant(100.0 ** -(np.arange(half) / half))
        everywhere = View("position", 0, (half,), (0,))
        self.op("binary", [everywhere, frequency], angles, how="mul")
        cos, sin = self.buffer("cos", half), self.buffer("sin", half)
        self.op("unary", [angles], cos, how="cos")
        self.op("unary", [angles], sin, how="sin")
        return residual, cos, sin

    def _mixed(self, layer: int, residual: View) -> View:
        """The residual with what the experts of the layer before gave."""
        if layer == 0:
            return residual
        output = self.buffer(f"output {layer - 1}", self.HIDDEN)
        total = self.buffer(f"residual {layer}", self.HIDDEN)
        self.op("binary", [residual, output], total, how="add")
        return total

    def _layer(self, layer: int, residual: View, cos: View, sin: View) -> View:
        residual = self._mixed(layer, residual)
        normed = self.buffer(f"normed {layer}", self.HIDDEN)
        scale = self.constant(1 + 0.1 * self.random.standard_normal(self.HIDDEN))
        self.op("norm", [residual, scale], normed, how="rms", epsilon=1e-6)
        if self.carries and layer % 2:
            attended = self._delta_rule(layer, normed)
        else:
            attended = self._attention(layer, normed, cos, sin)
        hidden, total = (self.buffer(f"{n} {layer}", self.HIDDEN) for n in ("hidden", "sum"))
        given = self.product(attended, self.HIDDEN, f"o {layer}")
        self.op("add_norm", [given, residual, scale], hidden, total, how="rms", epsilon=1e-6)
        scores = self.product(hidden, self.EXPERTS, f"scores {layer}")
        self.op("softmax", [scores], scores)
        weights = self.buffer(f"weights {layer}", self.TOP_K)
        ids = self.buffer(f"ids {layer}", self.TOP_K, kind="i64")
        self.op("top_k", [scores], weights, ids)
        return total

    def _attention(self, layer: int, x: View, cos: View, sin: View) -> View:
        groups, width = (1, self.LATENT) if self.latent else (self.GROUPS, self.WIDTH)
        sizes = [self.HEADS * self.WIDTH, groups * self.WIDTH, groups * self.WIDTH]
        joined = self.product(x, sum(sizes), f"qkv {layer}", bias=True)
        heads, first = [], 0
        for size in sizes:
            shape = (size // self.WIDTH, self.WIDTH)
            heads.append(View(joined.source, first, shape, (self.WIDTH, 1)))
            first += size
        q, k, v = heads
        for x in (q, k):
            self.op("rotary", [x, cos, sin], x, pairs="halves")
        y = self.buffer(f"attended {layer}", self.HEADS * width)
        out = View(y.source, 0, (self.HEADS, width), (width, 1))
        state = self.state(groups, self.WIDTH, width, self.latent)
        said = dict(scale=self.WIDTH**-0.5, window=self.windows[layer], softcap=self.softcap)
        sinks = [self.constant(self.random.standard_normal(self.HEADS))] if self.sinks else []
        given = [q, k, ABSENT if self.latent else v, *sinks]
        self.op("attention", given, out, state=state, **said)
        return y

    def _delta_rule(self, layer: int, x: View) -> View:
        heads, keys, values = 3, 5, 4
        sizes = (heads * keys, heads * keys, heads * values, 2 * heads)
        joined = self.product(x, sum(sizes), f"joined {layer}", bias=True)
        mixed = self.buffer(f"convolved {layer}", sum(sizes))
        taps = self.constant(self.random.standard_normal((3, sum(sizes))) / 2)
        self.op("convolution", [joined, taps], mixed, state=self.carried(2, sum(sizes)))
        starts = [sum(sizes[:n]) for n in range(4)]
        q, k, v = (
            View(mixed.source, start, (heads, width), (width, 1))
            for start, width in zip(starts, (keys, keys, values), strict=False)
        )
        normed, gates = self.buffer(f"keys {layer}", heads, keys), self.buffer(f"g {layer}", 6)
        self.op("softmax", [k], normed)
        self.op("unary", [View(mixed.source, starts[3], (6,), (1,))], gates, how="sigmoid")
        decay, beta = (View(gates.source, n * heads, (heads,), (1,)) for n in range(2))
        y = self.buffer(f"found {layer}", heads * values)
        out = View(y.source, 0, (heads, values), (values, 1))
        state = self.carried(heads, keys, values)
        self.op("delta_rule", [q, normed, v, decay, beta], out, state=state)
        return y

    def _logits(self, residual: View) -> None:
        last = self.buffer("last", self.HIDDEN, kept=True)
        self.op("keep", [residual], last)
        self.op("norm", [last], last, how="layer", epsilon=1e-5)
        self.product(last, self.VOCABULARY, "logits", kept=True)

    def logits(self, executable: Executable, spans, keep: np.ndarray) -> np.ndarray:
        """A step through all layers, with experts that scale what they get."""
        rows = executable.begin(spans, keep)
        executable.run(rows, 0)
        for layer in range(self.layers):
            executable.run(rows, layer + 1)
            hidden = executable.read(rows, f"hidden {layer}")
            ids = executable.read(rows, f"ids {layer}").astype(np.float32)
            weights = executable.read(rows, f"weights {layer}")
            factor = weights[:, 0] + weights[:, 1] * ids[:, 1]
            executable.write(rows, f"output {layer}", hidden * factor[:, None])
        executable.run(rows, self.layers + 1)
        return executable.read(rows, "logits").copy()
