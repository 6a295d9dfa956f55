"""What a sequence carries from token to token: the NumPy twin against plain loops in float64, and
every instruction set against the twin bit for bit, over any cut of the rows, sequences beside each
other, and threads."""

import numpy as np
import pytest
from support.programs import Table, View, same

from smoe.runtime import kernels
from smoe.runtime.kernels import recurrent

VARIANTS = kernels.available()
NATIVE = VARIANTS[:-1]
# heads, keys, values: one of each, strips and parts of one
SIZES = [(1, 1, 1), (3, 5, 7), (2, 16, 33), (2, 24, 150)]
ROWS = 300  # more than go through a segment together


def random_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def delta_inputs(rows: int, size: tuple[int, int, int], decays: bool) -> dict[str, np.ndarray]:
    heads, keys, values = size
    given = {"q": keys, "k": keys, "v": values}
    made = {
        name: random_of(seed, rows, heads, width) / width
        for seed, (name, width) in enumerate(given.items())
    }
    shape = (rows, heads, keys) if decays else (rows, heads)
    made["decay"] = np.exp(-np.abs(random_of(4, *shape)))
    return made | {"beta": 1 / (1 + np.exp(random_of(5, rows, heads)))}


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_delta_rule_is_what_a_loop_says(size, decays):
    given = delta_inputs(40, size, decays)
    state = random_of(9, *size)
    exact = state.astype(np.float64)
    found = recurrent.delta_rule(state, **given)
    for r in range(40):
        q, k, v, decay, beta = (given[n][r].astype(np.float64) for n in given)
        for h in range(size[0]):
            exact[h] *= decay[h][:, None] if decays else decay[h]
            change = (v[h] - k[h] @ exact[h]) * beta[h]
            exact[h] += np.outer(k[h], change)
            assert np.allclose(found[r, h], q[h] @ exact[h], rtol=1e-4, atol=1e-5)
    assert np.allclose(state, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps, tokens", [(1, 1), (3, 2), (3, 3), (4, 4), (2, 5)])
def test_a_convolution_is_what_numpy_says(taps, tokens):
    x, weight, bias = random_of(0, 20, 6), random_of(1, taps, 6), random_of(2, 6)
    state = random_of(3, tokens, 6)
    before = np.concatenate([state, x])
    found = recurrent.convolution(state, x, weight, bias)
    for number in range(6):
        whole = np.convolve(before[:, number], weight[::-1, number])[: len(before)]
        assert np.allclose(found[:, number], whole[tokens:] + bias[number], atol=1e-5)
    assert same(state, before[-tokens:])


# -- programs: a buffer x of every row, and y of it ------------------------------------------------


def given_by(table: Table, widths: list[tuple[int, ...]]) -> list[View]:
    """Parts of buffer x, with gaps between their heads."""
    views, at = [], 3
    for shape in widths:
        strides = (shape[1] + 2, 1) if len(shape) == 2 else (1,)
        views.append(View("x", at, shape, strides))
        at = views[-1].end
    table.buffer("x", at)
    return views


def delta_program(size: tuple[int, int, int], decays: bool) -> Table:
    heads, keys, values = size
    table = Table()
    decay = (heads, keys) if decays else (heads,)
    inputs = given_by(table, [(heads, keys), (heads, keys), (heads, values), decay, (heads,)])
    y = table.buffer("y", heads, values)
    table.op("delta_rule", inputs, y, state=table.carried(*size))
    return table


def convolution_program(taps: int, tokens: int, width: int) -> Table:
    table = Table(taps)
    (x,) = given_by(table, [(width,)])
    weight = table.constant(table.random.standard_normal((taps, width)))
    bias = [table.constant(table.random.standard_normal(width))] if taps % 2 else []
    y = table.buffer("y", width)
    table.op("convolution", [x, weight, *bias], y, state=table.carried(tokens, width))
    return table


def scan_program(heads: int, n: int) -> Table:
    """Two states, each replaced by way of the other: S = tanh(S) * m + x x', and m = m / 2 + the
    largest tanh(S)."""
    table = Table()
    x, _ = given_by(table, [(heads, n), (heads,)])
    outer, mean = table.carried(heads, n, n), table.carried(heads)
    before, bent, scaled, new, products = (
        table.buffer(name, heads, n, n) for name in ("S", "bent", "scaled", "new", "products")
    )
    m, half, most, sums = (table.buffer(name, heads) for name in ("m", "half", "most", "sums"))
    inner = table.buffer("inner", heads, n)
    halves = table.constant(np.full(1, 0.5))
    table.op("recall", [], before, state=outer)
    table.op("recall", [], m, state=mean)
    table.op("unary", [before], bent, how="tanh")
    table.op("binary", [bent, View("m", 0, (heads, n, n), (1, 0, 0))], scaled, how="mul")
    column, row = ((x.strides[0], *strides) for strides in ((1, 0), (0, 1)))
    both = [View("x", x.offset, (heads, n, n), strides) for strides in (column, row)]
    table.op("binary", both, products, how="mul")
    table.op("binary", [scaled, products], new, how="add")
    table.op("binary", [m, View(halves.source, 0, (heads,), (0,))], half, how="mul")
    table.op("reduce", [bent], inner, how="max")
    table.op("reduce", [inner], most, how="max")
    table.op("binary", [half, most], sums, how="add")
    table.op("store", [new], state=outer)
    table.op("store", [sums], state=mean)
    y = table.buffer("y", heads, n)
    table.op("binary", [inner, View("sums", 0, (heads, n), (1, 0))], y, how="sub")
    return table


PROGRAMS = {
    **{f"delta {s} {d}": lambda s=s, d=d: delta_program(s, d) for s in SIZES for d in (0, 1)},
    "taps": lambda: convolution_program(3, 3, 70),
    "few taps": lambda: convolution_program(2, 5, 7),
    "wide taps": lambda: convolution_program(4, 4, 2500),
    "scan": lambda: scan_program(3, 6),
}


def step(executable, spans: list[tuple[object, int]], x: np.ndarray) -> np.ndarray:
    """y of rows x `[rows, ..]` of sequences (state, tokens before, rows), one behind the other."""
    ids = [(state, past, np.zeros(count, np.int64)) for state, past, count in spans]
    rows = executable.begin(ids, np.zeros(0, np.int64))
    executable.write(rows, "x", x)
    executable.run(rows, 0)
    return executable.read(rows, "y").copy()


def whole(executable, x: np.ndarray) -> np.ndarray:
    return step(executable, [(executable.state(len(x), "f32"), 0, len(x))], x)


def numbers(table: Table, rows: int, seed: int = 0) -> np.ndarray:
    """x, most of it within -1 and 1."""
    (buffer,) = [b for b in table.buffers if b.name == "x"]
    return np.tanh(random_of(seed, rows, buffer.numbers)) * np.float32(0.9)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_instruction_set_gives_the_bits_of_the_twin(tmp_path, name):
    table = PROGRAMS[name]()
    x = numbers(table, ROWS)
    wanted = whole(table.open(tmp_path, "reference", wires=["x", "y"]), x)
    assert np.isfinite(wanted).all() and wanted.std() > 0.01
    for variant in NATIVE:
        for threads in (1, 3):
            assert same(whole(table.open(tmp_path, variant, threads, ["x", "y"]), x), wanted)


@pytest.mark.parametrize("variant", [VARIANTS[0], "reference"])
@pytest.mark.parametrize("name", ["delta (3, 5, 7) 1", "taps", "few taps", "scan"])
def test_sequences_in_any_cuts_are_the_same(tmp_path, name, variant):
    """Each goes its own way, however many rows of which others are in a step."""
    table, random = PROGRAMS[name](), np.random.default_rng(7)
    executable = table.open(tmp_path, variant, 4, ["x", "y"])
    lengths = [1, 70, 33, 12, 55, 40]
    all_ = [numbers(table, length, seed) for seed, length in enumerate(lengths)]
    wanted = [whole(executable, x) for x in all_]
    states = [executable.state(max(lengths), "f32") for _ in lengths]
    done, found = [0] * len(lengths), [[] for _ in lengths]
    while any(n < length for n, length in zip(done, lengths, strict=True)):
        spans, parts, owners = [], [], []
        for i in random.permutation(len(lengths)):
            count = min(int(random.integers(0, 30)), lengths[i] - done[i])
            if count:
                spans.append((states[i], done[i], count))
                parts.append(all_[i][done[i] : done[i] + count])
                owners.append(i)
                done[i] += count
        if not spans:
            continue
        y = step(executable, spans, np.concatenate(parts))
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        for i, part in zip(owners, np.split(y, cuts), strict=True):
            found[i].append(part)
    assert all(same(np.concatenate(f), w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("variant", [VARIANTS[0], "reference"])
def test_a_segment_that_runs_again_begins_where_the_step_did(tmp_path, variant):
    table = scan_program(3, 6)
    executable = table.open(tmp_path, variant, 1, ["x", "y"])
    x, other = numbers(table, 9), numbers(table, 4, 1)
    state = executable.state(9, "f32")
    step(executable, [(state, 0, 5)], x[:5])
    rows = executable.begin([(state, 5, np.zeros(4, np.int64))], np.zeros(0, np.int64))
    for given in (other, x[5:]):
        executable.write(rows, "x", given)
        executable.run(rows, 0)
    assert same(executable.read(rows, "y"), whole(executable, x)[5:])


def test_what_is_as_large_as_a_state_has_room_for_one_row(tmp_path):
    small, large = (
        scan_program(2, n).open(tmp_path, NATIVE[0], 1, ["x", "y"]).scratch_bytes for n in (4, 64)
    )
    assert large - small < 10 * 2 * 64 * 64 * 4
