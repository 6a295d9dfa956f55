"""Products with a backbone's matrices: every instruction set against the NumPy twin bit for bit,
and the twin against float64."""

import numpy as np
import pytest

from smoe.artifacts import tiles
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.program import Constant
from smoe.runtime import kernels
from smoe.runtime.kernels import products

NATIVE = kernels.available()[:-1]
native = pytest.importorskip("smoe.runtime.kernels._native") if NATIVE else None

# form, group, wide
FORMS = [
    ("f32", 0, False), ("bf16", 0, False),
    *((form, group, wide) for form in tiles.BITS for group in (32, 64, 128) for wide in (0, 1)),
]  # fmt: skip
# rows, n_in, n_out: one and many, whole blocks and odd ends, fewer than a tile and more, rows that
# are no multiple of what registers hold, columns of more than one chunk
SIZES = [(1, 1, 1), (1, 300, 40), (2, 31, 3), (5, 64, 33), (13, 130, 48), (31, 700, 17), (0, 33, 4)]


def make(form, group, wide, n_out, n_in, seed=0):
    """A weight of random codes, all of their values among them, or of random floats."""
    random = np.random.default_rng(seed)
    if form in ("f32", "bf16"):
        w = random.standard_normal((n_out, n_in)).astype(np.float32)
        data = w if form == "f32" else to_bf16(w)
        return products.Weight(
            form, n_out, n_in, 0, False, data.view(np.uint8).reshape(-1), np.zeros(0, np.uint8)
        )
    scale = random.standard_normal((n_out, -(-n_in // group))).astype(np.float32) / 64
    if form == "int8":
        codes = tiles.pack_int8(random.integers(-128, 128, (n_out, n_in)).astype(np.int8))
    else:
        codes = tiles.pack_int4(random.integers(0, 16, (n_out, n_in)).astype(np.uint8))
    packed = tiles.pack_scales(scale if wide else from_bf16(to_bf16(scale)), bool(wide))
    return products.Weight(form, n_out, n_in, group, bool(wide), codes, packed)


def multiply(variant, w, x, bias=None, threads=1):
    y = np.full((len(x), w.n_out), 7, np.float32)
    native.product(variant, w.about, x, bias, y, threads)
    return y


def numbers(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_variant_gives_the_bits_of_the_twin(variant, form, size):
    rows, n_in, n_out = size
    w, x = make(*form, n_out, n_in), numbers(rows, n_in)
    x[: rows // 2, : n_in // 3] = 0  # groups of zeros
    bias = numbers(n_out, seed=2)
    assert np.array_equal(multiply(variant, w, x), products.product(w, x))
    assert np.array_equal(multiply(variant, w, x, bias, 2), products.product(w, x, bias))


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("form", [("bf16", 0, 0), ("int8", 32, 0), ("int4", 64, 1)], ids=str)
def test_neither_company_nor_threads_change_a_bit(variant, form):
    # More rows of this width than are quantised together, and tiles for several threads.
    w, x = make(*form, 150, 4100), numbers(140, 4100)
    whole = multiply(variant, w, x, threads=1)
    for threads in (2, 3, 4):
        assert np.array_equal(multiply(variant, w, x, threads=threads), whole)
    first = 0
    for rows in (1, 2, 3, 6, 12, 37, 79):
        part = multiply(variant, w, x[first : first + rows], threads=1 + rows % 3)
        assert np.array_equal(part, whole[first : first + rows])
        first += rows
    for row in (0, 77, 139):
        assert np.array_equal(multiply(variant, w, x[row : row + 1], threads=2)[0], whole[row])


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("form", FORMS[::3], ids=str)
def test_rows_may_lie_apart_and_nothing_between_them_is_touched(variant, form):
    w = make(*form, 21, 70)
    x, y = numbers(5, 90), np.full((5, 40), 7, np.float32)
    native.product(variant, w.about, x[:, 10:80], None, y[:, 3:24], 2)
    wanted = products.product(w, np.ascontiguousarray(x[:, 10:80]))
    assert np.array_equal(y[:, 3:24], wanted)
    assert (y[:, :3] == 7).all() and (y[:, 24:] == 7).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_twin_is_the_product(form):
    w, x = make(*form, 9, 333), numbers(6, 333)
    if w.form in tiles.BITS:
        values = w.codes * np.repeat(w.scale.astype(np.float64), w.group, axis=1)[:, :333]
        # Half a step for each activation, whose step is 1/127 of the largest of its group.
        largest = np.abs(x).max(1)[:, None]
        bound = largest / 254 * np.abs(values).sum(1) + 1e-4
    else:
        values, bound = from_bf16(w.dense) if w.form == "bf16" else w.dense, 1e-4
    wanted = x.astype(np.float64) @ values.T.astype(np.float64)
    assert (np.abs(products.product(w, x) - wanted) <= bound).all()


EXTREMES = np.array([
    [1e-42, 3e38, 0, -3e38, 1], [1, 1e-42, 3e38, 3e38, 0], [np.inf, 1, 2, 3, 4],
    [np.nan, 1, 2, 3, 4], [1e-42, -1e-42, 1e-42, 0, 0], [1e-31, 1e-31, 0, 0, 0],
    [-127, 127, 63.5, 0.5, -0.5],
], np.float32)  # fmt: skip


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("magnitude", [1e-42, 1e30, np.inf, np.nan])
def test_extremes_keep_their_bits(variant, form, magnitude):
    kind, group, wide = form
    w = make(kind, group, wide, 3, 5)
    if kind in tiles.BITS:
        scale = numbers(3, 1) * np.float32(magnitude)
        scale = scale if wide else from_bf16(to_bf16(scale))
        changed = tiles.pack_scales(scale, True) if wide else None
        if changed is None:  # the packing refuses NaN; a kernel sees what there is
            changed = np.zeros((1, 1, 16), np.uint16)
            changed[0, 0, :3] = to_bf16(scale)[:, 0]
        w = products.Weight(kind, 3, 5, group, bool(wide), w.data, changed.view(np.uint8).ravel())
    elif kind == "f32":
        data = (w.dense * np.float32(magnitude)).view(np.uint8).ravel()
        w = products.Weight(kind, 3, 5, 0, False, data, w.scales)
    for x in (EXTREMES, EXTREMES[:1], EXTREMES[2:3]):
        found = multiply(variant, w, np.ascontiguousarray(x))
        assert np.array_equal(found, products.product(w, x), equal_nan=True)


@pytest.mark.skipif(not NATIVE, reason="built without native kernels")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_embeddings_are_rows(form):
    w = make(*form, 37, 133)
    ids = np.array([0, 36, 16, 15, 16, 1])
    y = np.zeros((6, 133), np.float32)
    native.embedding(w.about, ids, 0.3, y)
    assert np.array_equal(y, products.embedding(w, ids, 0.3))
    # A row is what the product with a column of the unit matrix picks, by another way.
    if w.form == "f32":
        assert np.array_equal(products.embedding(w, ids), w.dense[ids])
    elif w.form in tiles.BITS:
        columns = np.repeat(w.scale, w.group, axis=1)[:, :133]
        assert np.allclose(products.embedding(w, ids), (w.codes * columns)[ids])


def test_tiles_come_back_as_they_were_packed():
    random = np.random.default_rng(3)
    for n_out, n_in, group in ((1, 1, 32), (17, 33, 32), (40, 300, 64), (5, 290, 128)):
        codes = random.integers(-128, 128, (n_out, n_in)).astype(np.int8)
        packed = tiles.pack_int8(codes)
        assert packed.nbytes == tiles.code_bytes("int8", n_out, n_in)
        assert np.array_equal(tiles.unpack_int8(packed, n_out, n_in), codes)
        nibbles = random.integers(0, 16, (n_out, n_in)).astype(np.uint8)
        packed = tiles.pack_int4(nibbles)
        assert packed.nbytes == tiles.code_bytes("int4", n_out, n_in)
        assert np.array_equal(tiles.unpack_int4(packed, n_out, n_in), nibbles)
        scales = random.standard_normal((n_out, -(-n_in // group))).astype(np.float32)
        for wide, values in ((True, scales), (False, from_bf16(to_bf16(scales)))):
            packed = tiles.pack_scales(values, wide)
            assert packed.nbytes == tiles.scale_bytes(n_out, n_in, group, wide)
            assert np.array_equal(tiles.unpack_scales(packed, n_out, values.shape[1], wide), values)
        with pytest.raises(ValueError, match="pack them wide"):
            tiles.pack_scales(scales, False)
    codes = np.arange(-64, 64, dtype=np.int8).reshape(2, 64)
    packed = tiles.pack_int8(codes).reshape(1, 2, 8, 16, 4)  # tile, block, quad, row, column
    assert packed[0, 1, 2, 1].tolist() == [int(c) + 128 for c in codes[1, 40:44]]


def test_a_constant_of_a_program_is_a_weight():
    w = make("int8", 32, False, 19, 70)
    file = np.concatenate([np.zeros(64, np.uint8), w.data, w.scales])
    constant = Constant("w", "int8", (19, 70), 64, len(file) - 64, 32)
    again = products.weight(constant, file)
    assert np.array_equal(again.codes, w.codes) and np.array_equal(again.scale, w.scale)


@pytest.mark.skipif(not NATIVE, reason="built without native kernels")
def test_the_binding_refuses_what_does_not_fit():
    w = make("int8", 32, False, 19, 70)
    good = {
        "variant": NATIVE[0], "weight": w.about, "x": np.zeros((2, 70), np.float32), "bias": None,
        "y": np.zeros((2, 19), np.float32), "threads": 1,
    }  # fmt: skip
    native.product(**good)
    for name, bad in {
        "variant": "abacus", "x": np.zeros((2, 69), np.float32), "bias": np.zeros(18, np.float32),
        "y": np.zeros((3, 19), np.float32), "weight": ("int3", *w.about[1:]),
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            native.product(**good | {name: bad})
    for i, bad in ((1, 0), (1, 1 << 40), (3, 16), (4, True), (5, w.data[:-1]), (6, w.scales[1:])):
        about = (*w.about[:i], bad, *w.about[i + 1 :])
        with pytest.raises(ValueError):
            native.product(**good | {"weight": about})
    with pytest.raises(ValueError, match="no such row"):
        native.embedding(w.about, np.array([19]), 1.0, np.zeros((1, 70), np.float32))
