"""A pico program with every kind of operation, and the manifest that it belongs to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np

from smoe.artifacts import BundleError, Manifest, tiles
from smoe.artifacts.manifest import (
    FORMAT,
    VERSION,
    Backbone,
    ExpertActivation,
    Experts,
    Layer,
    Model,
    Routing,
    Segment,
    State,
    Wires,
)
from smoe.artifacts.program import (
    ABSENT,
    ALIGN,
    Buffer,
    Constant,
    KeyValues,
    Op,
    Part,
    Program,
    Recurrent,
    View,
)
from smoe.artifacts.program_checks import problems

VOCABULARY, HIDDEN, EXPERTS, TOP_K, LAYERS = 37, 40, 7, 3, 2
HEADS, GROUPS, KEY, VALUE = 6, 2, 10, 8
SCALE = 0x3C24  # .01 in bfloat16
LATENTS, SHARED, OWN = 8, 4, 6  # of the first layer's attention over latents; of a query's head
DELTA, TAPS, MEAN = (2, 5, 4), 3, 6  # heads, keys, values; tokens; numbers
# Of the second layer, as the program has them.
CARRIED = [("delta", 2, DELTA), ("taps", 2, (TAPS + 1, MEAN)), ("mean", 2, (MEAN,))]


def view(source: str, *shape: int, at: int = 0, strides: Sequence[int] | None = None) -> View:
    """Of `shape`; dense, unless `strides` say otherwise."""
    dense = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return View(source, at, shape, dense if strides is None else tuple(strides))


class Writer:
    """A program that is being written, and the bytes of its weights."""

    def __init__(self, seed: int = 0):
        self._random = np.random.default_rng(seed)
        self.buffers: list[Buffer] = []
        self.constants: list[Constant] = []
        self.data = bytearray()
        self.parts: list[list[Op]] = []

    def buffer(self, name: str, *shape: int, kind: str = "f32", kept: bool = False) -> View:
        """A new buffer, whole."""
        self.buffers.append(Buffer(name, kind, shape, kept))
        return view(name, *shape)

    def constant(self, name: str, *shape: int, form: str = "f32", group: int = 0) -> View:
        """A new constant of small random values, whole."""
        constant = Constant(name, form, shape, len(self.data), 0, group)
        constant = dataclasses.replace(constant, nbytes=constant.wanted)
        values = self._random.normal(0, 0.3, shape).astype(np.float32)
        if form == "f32":
            written = values.tobytes()
        elif form == "bf16":
            written = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            codes = tiles.code_bytes(form, *shape)
            scales = np.full((constant.nbytes - codes) // 2, SCALE, np.uint16)
            written = self._random.bytes(codes) + scales.tobytes()
        assert len(written) == constant.nbytes
        self.constants.append(constant)
        self.data += written + bytes(-len(written) % ALIGN)
        return view(name, *shape)

    def op(
        self, kind: str, inputs: Sequence[View], *outputs: View, weight: str = "", **more
    ) -> None:
        """One more of the last part; `more` are its numbers and names."""
        names = {name: value for name, value in more.items() if isinstance(value, str)}
        numbers = {name: float(value) for name, value in more.items() if name not in names}
        self.parts[-1].append(
            Op(kind, tuple(inputs), outputs, weight, numbers or None, names or None)
        )

    def program(self, states: Sequence[KeyValues], carried: Sequence[Recurrent]) -> Program:
        last = max(constant.offset + constant.nbytes for constant in self.constants)
        del self.data[last:]  # the file ends where its last constant does
        parts = tuple(Part(tuple(ops)) for ops in self.parts)
        kept = (tuple(states), parts, tuple(carried))
        return Program(tuple(self.buffers), tuple(self.constants), *kept)


def pico() -> tuple[Program, bytes, Manifest]:
    """The program, its weights, and its manifest, whose files are none."""
    write = Writer()
    _prelude(write)
    for layer in range(LAYERS):
        _layer(write, layer)
    _head(write)
    states = [
        KeyValues(f"keys.{layer}", f"values.{layer}", layer + 1, GROUPS, KEY, VALUE)
        for layer in range(LAYERS)
    ]
    latent = KeyValues("latents", "shared", 1, 1, LATENTS + SHARED, LATENTS, latent=True)
    states.insert(1, latent)
    program = write.program(states, [Recurrent(*about) for about in CARRIED])
    return program, bytes(write.data), _manifest(len(program.parts))


def _prelude(write: Writer) -> None:
    write.parts.append([])
    write.constant("embedding", VOCABULARY, HIDDEN, form="int8", group=32)
    write.op("embedding", (), write.buffer("residual.0", HIDDEN), weight="embedding", scale=1.5)
    position = write.buffer("position")
    write.op("position", (), position)
    turn = write.buffer("turn", KEY // 2)
    frequencies = write.constant("frequencies", KEY // 2)
    everywhere = view("position", KEY // 2, strides=(0,))
    write.op("binary", (everywhere, frequencies), turn, how="mul")
    for how in ("cos", "sin"):
        write.op("unary", (turn,), write.buffer(how, KEY // 2), how=how)


def _layer(write: Writer, layer: int) -> None:
    """Attention, then a router in the way of ERNIE: a correction decides, and does not weigh."""

    def named(name: str) -> str:
        return f"{name}.{layer}"

    write.parts.append([])
    residual = _residual(write, layer)
    weight = write.constant(named("norm"), HIDDEN)
    x = write.buffer(named("normed"), HIDDEN)
    write.op("norm", (residual, weight, ABSENT), x, how="rms", epsilon=1e-6)
    sizes = (HEADS * KEY, GROUPS * KEY, GROUPS * VALUE)
    write.constant(named("qkv_weight"), sum(sizes), HIDDEN, form="int4", group=32)
    bias = write.constant(named("bias"), sum(sizes))
    qkv = write.buffer(named("qkv"), sum(sizes))
    write.op("product", (x, bias), qkv, weight=named("qkv_weight"))
    q, k = (write.buffer(named(name), n, KEY) for name, n in (("q", HEADS), ("k", GROUPS)))
    tables = (view("cos", KEY // 2), view("sin", KEY // 2))
    write.op("rotary", (view(qkv.source, HEADS, KEY), *tables), q, pairs="halves")
    keys = view(qkv.source, GROUPS, KEY, at=sizes[0])
    write.op("rotary", (keys, *tables), k, pairs="neighbours")
    v = view(qkv.source, GROUPS, VALUE, at=sizes[0] + sizes[1])
    seen = write.buffer(named("seen"), HEADS, VALUE)
    sinks = write.constant(named("sinks"), HEADS) if layer else ABSENT
    numbers = {"scale": KEY**-0.5, "window": 3 * layer, "softcap": 30.0 * layer}
    write.op("attention", (q, k, v, sinks), seen, state=named("keys"), **numbers)
    write.constant(named("o_weight"), HIDDEN, HEADS * VALUE, form="int8", group=64)
    out = write.buffer(named("out"), HIDDEN)
    seen = _carried(write, seen) if layer else _latent(write, seen)
    flat = view(seen.source, HEADS * VALUE)
    write.op("product", (flat, ABSENT), out, weight=named("o_weight"))
    hidden, total = write.buffer(named("hidden"), HIDDEN), write.buffer(named("total"), HIDDEN)
    scale = write.constant(named("scale"), HIDDEN)
    inputs = (out, residual, scale, ABSENT, ABSENT)
    write.op("add_norm", inputs, hidden, total, how="rms", epsilon=1e-5)
    _router(write, layer, hidden)
    write.buffer(named("output"), HIDDEN)  # the experts'


def _latent(write: Writer, x: View) -> View:
    """Heads of x attend to latents, and a part beside that all of them share."""
    size, rows = LATENTS + SHARED, tiles.head_rows(1)
    write.constant("latents", HEADS * rows, OWN, form="int8", group=32)
    query, key = write.buffer("query", HEADS, size), write.buffer("latent", 1, size)
    own = view(x.source, HEADS, OWN, strides=(VALUE, 1))
    to = view(query.source, HEADS, LATENTS, strides=(size, 1))
    write.op("head_product", (own,), to, weight="latents")
    rest = view(x.source, HEADS, SHARED, at=VALUE - SHARED, strides=(VALUE, 1))
    to = view(query.source, HEADS, SHARED, at=LATENTS, strides=(size, 1))
    write.op("unary", (rest,), to, how="copy")
    write.op("unary", (view(x.source, 1, size),), key, how="tanh")
    mean, y = write.buffer("latent.mean", HEADS, LATENTS), write.buffer("latent.seen", HEADS, VALUE)
    numbers = {"scale": OWN**-0.5, "window": 0, "softcap": 0}
    write.op("attention", (query, key, ABSENT, ABSENT), mean, state="latents", **numbers)
    write.constant("values", HEADS * rows, LATENTS)
    write.op("head_product", (mean,), y, weight="values")
    return y


def _carried(write: Writer, x: View) -> View:
    """What is carried from token to token, each in its way, added to the first numbers of x."""
    heads, keys, values = DELTA
    sums = write.buffer("sums", HEADS * VALUE)
    write.op("unary", (view(x.source, HEADS * VALUE),), sums, how="copy")
    parts = [view(x.source, heads, n, at=at) for n, at in ((keys, 0), (keys, 9), (values, 20))]
    factors = [view(x.source, heads, at=at) for at in (30, 34)]
    for place, part in enumerate(factors):
        write.op("unary", (part,), write.buffer(f"factor.{place}", heads), how="sigmoid")
    factors = [view(f"factor.{place}", heads) for place in (0, 1)]
    given = write.buffer("found", heads, values)
    write.op("delta_rule", (*parts, *factors), given, state="delta")
    weight, bias = write.constant("taps.weight", TAPS, MEAN), write.constant("taps.bias", MEAN)
    smooth = write.buffer("smooth", MEAN)
    write.op("convolution", (view(given.source, MEAN), weight, bias), smooth, state="taps")
    before, half = write.buffer("before", MEAN), write.buffer("half", MEAN)
    mean = write.buffer("mean.new", MEAN)
    write.op("recall", (), before, state="mean")
    write.op("unary", (before,), half, how="tanh")
    write.op("binary", (half, smooth), mean, how="add")
    write.op("store", (mean,), state="mean")
    turned = write.buffer("turned.mean", heads, MEAN // heads)
    write.constant("heads", heads * tiles.head_rows(MEAN // heads), values)
    write.op("head_product", (given,), turned, weight="heads")
    write.op("binary", (mean, view(turned.source, MEAN)), mean, how="mul")
    total = write.buffer("carried", HEADS * VALUE)
    ends = [(0, MEAN), (MEAN, HEADS * VALUE - MEAN)]
    first, rest = (view(total.source, n, at=at) for at, n in ends)
    write.op("binary", (mean, view(sums.source, MEAN)), first, how="add")
    write.op("unary", (view(sums.source, ends[1][1], at=MEAN),), rest, how="copy")
    return view(total.source, HEADS, VALUE)


def _residual(write: Writer, layer: int) -> View:
    """The hidden state before a layer."""
    if layer == 0:
        return view("residual.0", HIDDEN)
    sum_ = write.buffer(f"residual.{layer}", HIDDEN)
    before = view(f"total.{layer - 1}", HIDDEN), view(f"output.{layer - 1}", HIDDEN)
    write.op("binary", before, sum_, how="add")
    return sum_


def _router(write: Writer, layer: int, hidden: View) -> None:
    def named(name: str) -> str:
        return f"{name}.{layer}"

    write.constant(named("router"), EXPERTS, HIDDEN)
    logits, raw = (write.buffer(named(name), EXPERTS) for name in ("router_logits", "raw"))
    write.op("product", (hidden, ABSENT), logits, weight=named("router"))
    write.op("softmax", (logits,), raw)
    low = write.buffer(named("low"), EXPERTS, kind="bool")
    floor = write.constant(named("floor"), 1)
    write.op("binary", (raw, view(floor.source, EXPERTS, strides=(0,))), low, how="less")
    least = write.buffer(named("least"), 1)
    write.op("fill", (), least, value=0.0)
    scores = write.buffer(named("scores"), EXPERTS)
    write.op("where", (low, view(least.source, EXPERTS, strides=(0,)), raw), scores)
    best = write.buffer(named("best"), TOP_K)
    ids = write.buffer(named("ids"), TOP_K, kind="i64")
    write.op("top_k", (scores,), best, ids)
    chosen, sum_ = write.buffer(named("chosen"), TOP_K), write.buffer(named("sum"))
    write.op("gather", (raw, ids), chosen)
    write.op("reduce", (chosen,), sum_, how="sum")
    weights = write.buffer(named("weights"), TOP_K)
    write.op("binary", (chosen, view(sum_.source, TOP_K, strides=(0,))), weights, how="div")
    mask = write.buffer(named("mask"), 2, EXPERTS)  # written by halves, then changed
    write.op("fill", (), view(mask.source, EXPERTS), value=-math.inf)
    write.op("unary", (logits,), view(mask.source, EXPERTS, at=EXPERTS), how="sigmoid")
    write.op("scatter", (ids, weights), view(mask.source, EXPERTS))
    write.op("unary", (mask,), mask, how="abs")  # in place


def _head(write: Writer) -> None:
    write.parts.append([])
    residual = _residual(write, LAYERS)
    kept = write.buffer("kept", HIDDEN, kept=True)
    write.op("keep", (residual,), kept)
    weights = write.constant("last.weight", HIDDEN), write.constant("last.bias", HIDDEN)
    last = write.buffer("last", HIDDEN, kept=True)
    write.op("norm", (kept, *weights), last, how="layer", epsilon=1e-5)
    write.constant("head", VOCABULARY, HIDDEN, form="bf16")
    logits = write.buffer("logits", VOCABULARY, kept=True)
    write.op("product", (last, ABSENT), logits, weight="head")


def _manifest(parts: int) -> Manifest:
    layers, states = [], []
    for n in range(LAYERS):
        names = ("hidden", "ids", "weights", "output", "scores", "raw")
        wires = Wires(*(f"{name}.{n}" for name in names))
        routing = Routing("sum", 1.0, 0.0)
        layers.append(Layer(f"layers.{n}", EXPERTS, TOP_K, HIDDEN, 24, wires, routing, ""))
        for name, width in (("keys", KEY), ("values", VALUE)):
            shape = (1, GROUPS, 5, width)
            states.append(State(n + 1, f"{name}.{n}", f"new.{name}.{n}", "F32", shape, 2, True))
    for name, width in (("latents", LATENTS), ("shared", SHARED)):
        states.append(State(1, name, f"new.{name}", "F32", (1, 1, 5, width), 2, True))
    for name, segment, shape in CARRIED:
        states.append(State(segment, name, f"new.{name}", "F32", (1, *shape[::-1]), -1, False))
    segments = tuple(Segment(f"backbone/segment-{n:02d}.onnx", (), (), ()) for n in range(parts))
    backbone = Backbone("int4", HEADS, "backbone/weights.data", segments, (), tuple(states))
    return Manifest(
        FORMAT,
        VERSION,
        Model("pico", "Pico", VOCABULARY, 300, ()),
        tuple(layers),
        Experts("f32", 512, ExpertActivation("gated", "silu"), False),
        dataclasses.replace(backbone, prelude=True),
        {},
        {},
    )


def opened(table: dict) -> Program:
    """What the door makes of a table beside the pico program's manifest and weights; a
    `BundleError` where that is not a program."""
    _, data, manifest = pico()
    program = Program.parse(json.dumps(table), "program.json")
    wrong = list(problems(program, manifest, len(data)))
    if wrong:
        raise BundleError("\n".join(wrong))
    return program
