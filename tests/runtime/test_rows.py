"""Operations of programs on rows: native ones against their NumPy twin, bit for bit, on every
instruction set there is and views of every kind; the twin against float64."""

from dataclasses import replace

import numpy as np
import pytest
from support.programs import ABSENT, Table, same

from smoe.runtime import kernels
from smoe.runtime.kernels import rows

VARIANTS = kernels.available()
NATIVE = VARIANTS[:-1]
UNARY = (
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "erf", "silu",
    "gelu", "gelu_tanh", "relu", "relu2", "softplus", "sin", "cos", "not", "floor", "sign",
    "copy",
)  # fmt: skip
BINARY = (
    "add", "sub", "mul", "div", "max", "min", "pow", "and", "or", "equal", "less", "less_equal",
    "greater", "greater_equal",
)  # fmt: skip
EXTREMES = [
    0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, 1e-30, 3e38, -3e38, np.inf, -np.inf, np.nan, 87.5, -88.5,
    2.0, -2.0, 0.5, 7e5, -123456.7, 9.3e18, 3.0, -3.0,
]  # fmt: skip


def numbers(random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Of a kind: ordinary ones and the ends of it."""
    if kind == "bool":
        return random.random(shape) < 0.5
    if kind == "i64":
        ends = [0, 1, -1, 2**63 - 1, -(2**63), 2**24 + 1]
        return np.where(
            random.random(shape) < 0.2, random.choice(ends, shape), random.integers(-9, 9, shape)
        )
    x = random.standard_normal(shape).astype(np.float32) * 4
    return np.where(
        random.random(shape) < 0.2, random.choice(EXTREMES, shape).astype(np.float32), x
    )


def given(executable, table: Table, rows: int, values: dict[str, np.ndarray]):
    """A step with so many rows, whose buffers have these numbers."""
    step = executable.begin(
        [(executable.state(rows, "f32"), 0, np.zeros(rows, np.int64))], np.arange(rows)
    )
    for name, value in values.items():
        executable.write(step, name, value)
    return step


def outcomes(table: Table, path, rows: int, values=None, names=VARIANTS) -> list[dict]:
    """What every variant makes of the same numbers: all buffers after the first segment."""
    values = values or {
        b.name: numbers(table.random, b.kind, (rows, *b.shape)) for b in table.buffers
    }
    made = []
    for name in names:
        executable = table.open(path, name)
        step = given(executable, table, rows, values)
        executable.run(step, 0)
        made.append({b.name: executable.read(step, b.name).copy() for b in table.buffers})
    return made


def agree(made: list[dict]) -> None:
    *native, reference = made
    for variant, values in zip(NATIVE, native, strict=True):
        for name, value in values.items():
            assert same(value, reference[name]), (variant, name)


# -- operations ------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("n", [1, 5, 16, 300])
def test_norms(tmp_path, n, spread):
    table = Table(n)
    for how in ("rms", "layer"):
        for whole in (False, True):
            x = table.buffer(f"x {how} {whole}", 3, n, spread=spread)
            y = table.buffer(f"y {how} {whole}", 3, n, spread=spread)
            weight = table.constant(table.random.standard_normal(n))
            bias = table.constant(table.random.standard_normal(n))
            operands = [x, weight, bias] if whole else [x]
            table.op("norm", operands, y, how=how, epsilon=1e-5)
            residual = table.buffer(f"residual {how} {whole}", 3, n, spread=spread)
            total = table.buffer(f"sum {how} {whole}", 3, n, spread=spread)
            operands = [x, residual, weight, ABSENT] + ([bias] if whole else [])
            table.op("add_norm", operands, x, total, how=how, epsilon=1e-6)  # in place
    agree(outcomes(table, tmp_path, 4))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_rotary(tmp_path, pairs, spread):
    table = Table(2)
    for width in (2, 12, 64, 600):
        x = table.buffer(f"x {width}", 3, width, spread=spread)
        y = table.buffer(f"y {width}", 3, width, spread=spread)
        cos, sin = (table.buffer(f"{n} {width}", width // 2) for n in ("cos", "sin"))
        table.op("rotary", [x, cos, sin], y, pairs=pairs)
        table.op("rotary", [x, cos, sin], x, pairs=pairs)
    agree(outcomes(table, tmp_path, 3))


@pytest.mark.parametrize("spread", [False, True])
def test_softmax_top_k_and_reductions(tmp_path, spread):
    table = Table(3)
    for n in (1, 7, 16, 131, 300):
        x = table.buffer(f"x {n}", 2, 3, n, spread=spread)
        table.op("softmax", [x], table.buffer(f"softmax {n}", 2, 3, n, spread=spread))
        k = min(n, 5)
        values = table.buffer(f"best {n}", 2, 3, k, spread=spread)
        ids = table.buffer(f"ids {n}", 2, 3, k, kind="i64", spread=spread)
        table.op("top_k", [x], values, ids)
        for how in ("sum", "max", "mean"):
            y = table.buffer(f"{how} {n}", 2, 3, spread=spread)
            table.op("reduce", [x], y, how=how)
        argmax = table.buffer(f"argmax {n}", 2, 3, kind="i64")
        table.op("reduce", [x], argmax, how="argmax")
    agree(outcomes(table, tmp_path, 5))


def test_top_k_takes_equal_ones_by_index(tmp_path):
    table = Table()
    x, values = table.buffer("x", 6), table.buffer("values", 4)
    table.op("top_k", [x], values, table.buffer("ids", 4, kind="i64"))
    scores = np.array([[1, 3, 3, np.nan, 3, 2], [np.nan] * 5 + [-np.inf]], np.float32)
    for made in outcomes(table, tmp_path, 2, {"x": scores}):
        assert made["ids"].tolist() == [[1, 2, 4, 5], [5, 0, 1, 2]]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("kind", ["f32", "i64", "bool"])
def test_unary(tmp_path, kind, spread):
    table = Table(4)
    for how in UNARY:
        x = table.buffer(f"x {how}", 3, 200, kind=kind, spread=spread)
        for to in ("f32", "i64", "bool"):
            y = table.buffer(f"{how} {to}", 3, 200, kind=to, spread=spread)
            table.op("unary", [x], y, how=how)
    agree(outcomes(table, tmp_path, 3))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("kinds", ["f32 f32", "i64 i64", "bool bool", "f32 i64", "bool i64"])
def test_binary_and_where(tmp_path, kinds, spread):
    first, second = kinds.split()
    table = Table(5)
    for how in (*BINARY, "where"):
        a = table.buffer(f"a {how}", 5, 60, kind=first, spread=spread)
        b = table.buffer(f"b {how}", 60, kind=second)
        b = replace(b, shape=(5, 60), strides=(0, 1))
        for to in ("f32", "i64", "bool"):
            y = table.buffer(f"{how} {to}", 5, 60, kind=to, spread=spread)
            if how == "where":
                condition = table.buffer(f"condition {to}", 5, 60, kind="bool", spread=spread)
                table.op("where", [condition, a, b], y)
            else:
                table.op("binary", [a, b], y, how=how)
    agree(outcomes(table, tmp_path, 3))


def test_fill_gather_and_scatter(tmp_path):
    table = Table(6)
    for kind in ("f32", "i64", "bool"):
        x = table.buffer(f"x {kind}", 2, 9, kind=kind)
        at = table.buffer(f"at {kind}", 2, 5, kind="i64")
        once = replace(at, shape=(5,), strides=(1,))
        row = replace(x, shape=(9,), strides=(1,))
        for name, what, where in (("each", x, at), ("one", x, once), ("row", row, at)):
            y = table.buffer(f"{name} {kind}", 2, 5, kind=kind, spread=True)
            table.op("gather", [what, where], y)
        y = table.buffer(f"scattered {kind}", 2, 9, kind=kind)
        table.op("fill", [], y, value=-2.5)
        values = table.buffer(f"values {kind}", 2, 5, kind=kind, spread=True)
        table.op("scatter", [at, values], y)
    values = {b.name: numbers(table.random, b.kind, (4, *b.shape)) for b in table.buffers}
    for kind in ("f32", "i64", "bool"):
        values[f"at {kind}"] = table.random.integers(-11, 12, (4, 2, 5))
    agree(outcomes(table, tmp_path, 4, values))


@pytest.mark.parametrize("form", ["f32", "bf16", "int8", "int4"])
def test_products_and_embeddings(tmp_path, form):
    table = Table(7)
    embedded = table.buffer("embedded", 40)
    table.op("embedding", [], embedded, weight=table.matrix(form, 7, 40, 32), scale=1.5)
    weight = table.matrix(form, 21, 40, 64 if form == "int8" else 32, wide=form == "int4")
    bias = table.constant(table.random.standard_normal(21))
    y = table.buffer("y", 21)
    table.op("product", [embedded, bias], y, weight=weight)
    agree(outcomes(table, tmp_path, 3))


# -- functions against float64 -----------------------------------------------------------


def units(value: np.ndarray, truth: np.ndarray) -> float:
    """The largest error, in units of the last place."""
    nearest = truth.astype(np.float32)
    return float((np.abs(value - truth) / np.spacing(np.abs(nearest))).max())


def test_functions_are_good_to_a_unit_or_so():
    random = np.random.default_rng(0)
    angles = np.concatenate([random.uniform(-1e6, 1e6, 5000), random.uniform(-9, 9, 5000)])
    angles = angles.astype(np.float32)
    wide = angles.astype(np.float64)
    assert units(rows.unary("sin", angles), np.sin(wide)) < 0.51
    assert units(rows.unary("cos", angles), np.cos(wide)) < 0.51
    positive = np.exp(random.uniform(-80, 80, 5000)).astype(np.float32)
    assert units(rows.unary("log", positive), np.log(positive.astype(np.float64))) < 0.51
    x = random.uniform(-60, 60, 5000).astype(np.float32)
    truth = np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x.astype(np.float64))))
    assert units(rows.unary("softplus", x), truth) < 0.51
    y = random.uniform(-3, 3, 5000).astype(np.float32)
    base = np.abs(x) + np.float32(0.01)
    assert units(rows.binary("pow", base, y), base.astype(np.float64) ** y) < 0.51
    cubes = rows.binary("pow", x, np.float32([3]))
    assert units(cubes, x.astype(np.float64) ** 3) < 0.51
    x = random.uniform(-86, 86, 5000).astype(np.float32)
    np.testing.assert_allclose(rows.unary("exp", x), np.exp(x.astype(np.float64)), rtol=2e-7)


def test_norms_and_softmax_are_what_they_are_called():
    x = np.random.default_rng(1).standard_normal((4, 777)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    scale = np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rows.norm("rms", 1e-5, x), wide / scale, atol=2e-6)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rows.norm("layer", 1e-5, x), centred / scale, atol=2e-6)
    e = np.exp(wide)
    np.testing.assert_allclose(rows.softmax(x), e / e.sum(-1, keepdims=True), rtol=2e-6)
