"""Products of heads, each with a matrix of its own: every instruction set against the NumPy twin to
the bit, and the twin against the product of every head alone."""

import numpy as np
import pytest
from support.programs import Table, same

from smoe.artifacts import program_ops, tiles
from smoe.artifacts.bfloat16 import from_bf16
from smoe.artifacts.program import View
from smoe.runtime import EngineError, kernels
from smoe.runtime.kernels import products

VARIANTS = kernels.available()
NATIVE = VARIANTS[:-1]
FORMS = [("f32", 0, False), ("bf16", 0, False)]
FORMS += [(f, g, w) for f in tiles.BITS for g, w in ((32, False), (64, True), (128, False))]
# rows, heads, n_in, n_out: one and many, whole tiles and parts of one, more rows than go together
SIZES = [(1, 1, 5, 3), (1, 4, 130, 16), (3, 5, 64, 33), (5, 2, 700, 48), (300, 6, 40, 17)]
BEFORE = 7  # what lies in y before


def heads_of(form: tuple[str, int, bool], heads: int, n_in: int, n_out: int) -> Table:
    """A program of one such product, with gaps between the heads of x and of y."""
    kind, group, wide = form
    table, views = Table(n_in), []
    weight = table.matrix(kind, heads * tiles.head_rows(n_out), n_in, group, wide)
    for name, width, gap in (("x", n_in, 3), ("y", n_out, 5)):
        table.buffer(name, heads * (width + gap))
        views.append(View(name, gap, (heads, width), (width + gap, 1)))
    table.op("head_product", views[:1], views[1], weight=weight)
    return table


def multiplied(table: Table, path, x: np.ndarray, name: str, threads: int = 1) -> np.ndarray:
    """Buffer y `[rows, heads, gap and n_out]` after x `[rows, heads, gap and n_in]`."""
    executable = table.open(path, name, threads)
    rows = len(x)
    spans = [(executable.state(rows, "f32"), 0, np.zeros(rows, np.int64))]
    step = executable.begin(spans, np.arange(rows))
    executable.write(step, "x", x)
    executable.write(step, "y", np.full_like(executable.read(step, "y"), BEFORE))
    executable.run(step, 0)
    return executable.read(step, "y").reshape(*x.shape[:2], -1).copy()


def numbers(*shape: int) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    x[: len(x) // 2, :, : shape[-1] // 3] = 0  # groups of zeros
    return x


def one_head(table: Table, head: int, n_out: int) -> products.Weight:
    """The matrix of a head, packed alone."""
    (constant,) = table.constants
    w = products.weight(constant, np.frombuffer(bytes(table.data), np.uint8))
    first = head * tiles.head_rows(n_out)
    own = slice(first, first + n_out)
    if w.form not in tiles.BITS:
        data, scales = w.dense[own].view(np.uint8).reshape(-1), np.zeros(0, np.uint8)
    else:
        int8 = w.form == "int8"
        codes = w.codes[own] if int8 else (w.codes[own] + 8).view(np.uint8)
        data = tiles.pack_int8(codes) if int8 else tiles.pack_int4(codes)
        scales = tiles.pack_scales(w.scale[own], w.wide)
    return products.Weight(w.form, n_out, w.n_in, w.group, w.wide, data, scales)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_variant_gives_the_bits_of_each_head_alone(tmp_path, form, size):
    rows, heads, n_in, n_out = size
    table, x = heads_of(form, heads, n_in, n_out), numbers(rows, heads, n_in + 3)
    found = [multiplied(table, tmp_path, x, name, 2) for name in VARIANTS]
    for name, y in zip(VARIANTS, found, strict=True):
        assert same(y, found[-1]), name
    assert (found[-1][..., :5] == BEFORE).all()
    for head in range(heads):
        given = np.ascontiguousarray(x[:, head, 3:])
        wanted = products.product(one_head(table, head, n_out), given)
        assert same(np.ascontiguousarray(found[-1][:, head, 5:]), wanted)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("form", [("f32", 0, False), ("int8", 32, False), ("int4", 64, True)])
def test_neither_company_nor_threads_change_a_bit(tmp_path, name, form):
    heads = 9
    table, x = heads_of(form, heads, 520, 70), numbers(140, heads, 523)
    whole = multiplied(table, tmp_path, x, name)
    for threads in (2, 3):
        assert same(multiplied(table, tmp_path, x, name, threads), whole)
    first = 0
    for rows in (1, 2, 5, 37, 95):
        part = x[first : first + rows]
        assert same(multiplied(table, tmp_path, part, name, 2), whole[first : first + rows])
        first += rows


def test_the_twin_is_a_product_of_each_head():
    """Against float64."""
    table, x = heads_of(("bf16", 0, False), 3, 90, 21), numbers(4, 3, 90)
    w = products.weight(table.constants[0], np.frombuffer(bytes(table.data), np.uint8))
    matrices = from_bf16(w.dense).reshape(3, 32, 90)[:, :21].astype(np.float64)
    wanted = np.einsum("rhi,hoi->rho", x.astype(np.float64), matrices)
    assert np.abs(products.head_product(w, x, 21) - wanted).max() < 1e-4


@pytest.mark.parametrize("n_out, ok", [(17, True), (32, True), (16, False), (33, False)])
def test_matrices_of_heads_begin_on_tiles(tmp_path, n_out, ok):
    """A matrix of 3 heads of 32 rows is that of heads of 17 to 32 numbers."""
    table = Table()
    x, y = table.buffer("x", 3, 40), table.buffer("y", 3, n_out)
    table.op("head_product", [x], y, weight=table.matrix("f32", 96, 40))
    names = {b.name: b for b in table.buffers}, {c.name: c for c in table.constants}
    wrong = list(program_ops.problems(table.parts[0][0], program_ops.Table(*names, {}, {}, 0)))
    assert (not wrong) == ok and all("rows of 40 were wanted" in text for text in wrong)
    if NATIVE and not ok:
        with pytest.raises(EngineError, match="on tiles of its own"):
            table.open(tmp_path, NATIVE[0])
