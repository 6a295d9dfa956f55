"""Attention over what sequences remember: every instruction set against the NumPy twin bit for bit,
and the twin against a softmax in float64."""

from dataclasses import dataclass

import numpy as np
import pytest

from smoe.runtime import kernels
from smoe.runtime.kernels import attention as twin

NATIVE = kernels.available()[:-1]
native = pytest.importorskip("smoe.runtime.kernels._native") if NATIVE else None


@dataclass
class Case:
    """Some sequences with (past, new rows) each, and new rows for them."""

    parts: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    half: bool = True
    scale: float = 0.25
    softcap: float = 0.0
    window: int = 0
    sinks: bool = False

    def make(self, seed=0, spread=1.0):
        random = np.random.default_rng(seed)

        def numbers(*shape):
            return (random.standard_normal(shape) * spread).astype(np.float32)

        kind, rows = np.float16 if self.half else np.float32, sum(r for _, r in self.parts)
        states = []
        for past, new in self.parts:
            pair = []
            for width in (self.key_width, self.value_width):
                state = np.full((self.kv_heads, past + new + 3, width), np.nan, kind)
                state[:, :past] = numbers(self.kv_heads, past, width)
                pair.append(state)
            states.append(pair)
        q = numbers(rows, self.heads, self.key_width)
        k = numbers(rows, self.kv_heads, self.key_width)
        v = numbers(rows, self.kv_heads, self.value_width)
        sinks = numbers(self.heads) if self.sinks else None
        return states, q, k, v, sinks

    @property
    def how(self):
        return self.scale, self.softcap, self.window


CASES = [
    Case(((0, 1),), 1, 1, 1, 1),
    Case(((0, 19), (5, 2)), 4, 2, 16, 24),
    Case(((130, 1), (0, 3), (255, 2)), 6, 2, 40, 7, half=False),
    Case(((300, 1),), 10, 1, 72, 130, softcap=3.0),
    Case(((120, 40),), 6, 3, 33, 64, window=9),
    Case(((500, 3), (17, 1)), 3, 3, 64, 64, window=200, sinks=True),
    Case(((90, 70),), 40, 1, 20, 18, sinks=True, softcap=5.0),
    Case(((0, 150),), 2, 2, 128, 128, half=False, window=1),
]


def reference(case, states, q, k, v, sinks):
    parts = [
        twin.Part(keys, values, past, rows)
        for (keys, values), (past, rows) in zip(states, case.parts, strict=True)
    ]
    return twin.attention(parts, q, k, v, *case.how, sinks)


def attend(variant, case, states, q, k, v, sinks, threads=1, parts=None):
    sequences = [
        (keys, values, past, rows)
        for (keys, values), (past, rows) in zip(states, parts or case.parts, strict=True)
    ]
    y = np.full((*q.shape[:2], v.shape[2]), 7, np.float32)
    native.attention(variant, sequences, q, k, v, y, *case.how, sinks, threads)
    return y


def copied(states):
    return [[array.copy() for array in pair] for pair in states]


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_variant_gives_the_bits_of_the_twin(variant, case):
    states, *new = case.make()
    wanted_states = copied(states)
    wanted = reference(case, wanted_states, *new)
    for threads in (1, 3):
        mine = copied(states)
        assert np.array_equal(attend(variant, case, mine, *new, threads=threads), wanted)
        for pair, wanted_pair in zip(mine, wanted_states, strict=True):
            for array, wanted_array in zip(pair, wanted_pair, strict=True):
                assert np.array_equal(array, wanted_array, equal_nan=True)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("window", [0, 150])
def test_cuts_company_and_threads_do_not_change_a_bit(variant, half, window):
    # So many rows, heads and blocks that results of all rows at once find no room.
    length = 700
    case = Case(((0, length),), 8, 2, 32, 48, half=half, window=window, sinks=True)
    states, q, k, v, sinks = case.make()
    whole = attend(variant, case, copied(states), q, k, v, sinks, threads=4)
    mine, first = copied(states), 0
    for rows in (1, 2, 126, 1, 3, 250, 1, 316):
        cut = slice(first, first + rows)
        found = attend(
            variant, case, mine, q[cut], k[cut], v[cut], sinks,
            threads=1 + first % 4, parts=[(first, rows)],
        )  # fmt: skip
        assert np.array_equal(found, whole[cut])
        first += rows
    # Beside others, each of them as alone.
    several = Case(((0, 30), (0, 1), (0, 200)), 8, 2, 32, 48, half=half, window=window, sinks=True)
    states, *_ = several.make()
    rows = np.concatenate([np.arange(30), np.arange(1), np.arange(200)])
    found = attend(variant, several, states, q[rows], k[rows], v[rows], sinks, threads=2)
    assert np.array_equal(found, whole[rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_twin_is_attention(case):
    states, q, k, v, sinks = case.make()
    found, row = reference(case, states, q, k, v, sinks), 0
    for (keys, values), (past, rows) in zip(states, case.parts, strict=True):
        for r in range(rows):
            end = past + r + 1
            seen = slice(max(0, end - case.window) if case.window else 0, end)
            for head in range(case.heads):
                shared = head // (case.heads // case.kv_heads)
                score = keys[shared, seen].astype(float) @ q[row + r, head].astype(float)
                score *= case.scale
                if case.softcap:
                    score = case.softcap * np.tanh(score / case.softcap)
                weight = np.exp(score - score.max())
                total = weight.sum()
                if sinks is not None:
                    total += np.exp(sinks[head] - score.max())
                wanted = weight / total @ values[shared, seen].astype(float)
                assert np.allclose(found[row + r, head], wanted, rtol=1e-5, atol=3e-6)
        row += rows


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("spread", [1e-42, 1e-6, 300.0, 3e38])
def test_extremes_keep_their_bits(variant, half, spread):
    # Numbers that float16 has no room for, denormal ones, scores far apart, what is not finite.
    case = Case(((140, 9), (3, 2)), 4, 2, 17, 19, half=half, sinks=True, softcap=0.0)
    with np.errstate(all="ignore"):
        states, q, k, v, sinks = case.make(spread=spread)
        states[0][0][0, 5], states[0][1][0, 20, 3] = np.nan, np.inf
        states[1][0][1, 1, 0], k[3, 0, 0], v[4, 1, 2] = -np.inf, np.inf, np.nan
        mine = copied(states)
        wanted = reference(case, states, q, k, v, sinks)
    assert np.array_equal(attend(variant, case, mine, q, k, v, sinks), wanted, equal_nan=True)


@pytest.mark.parametrize("variant", NATIVE)
def test_a_row_does_not_see_what_comes_after_it(variant):
    case = Case(((0, 40),), 4, 2, 16, 16, window=20)
    states, q, k, v, sinks = case.make()
    before = attend(variant, case, copied(states), q, k, v, sinks)
    k[25:], v[25:], k[0], v[0] = np.nan, np.inf, np.nan, np.inf
    after = attend(variant, case, copied(states), q, k, v, sinks)
    assert np.array_equal(before[20:25], after[20:25])


FAR = np.float32([65519.99, 65520, 65536, 1e9, 3e38, np.inf, 1e-8, 2.0**-25, 3e-8, 1e-45])


@pytest.mark.parametrize("variant", NATIVE)
def test_float16_is_rounded_as_numpy_rounds(variant):
    # Every float16, what lies half way between two, and a little beside that, both signs.
    every = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    ahead = np.append(every[1:], np.float32(np.inf))
    with np.errstate(all="ignore"):
        middle = (every + ahead) / 2
        numbers = np.concatenate(
            [every, middle, np.nextafter(middle, every), np.nextafter(middle, ahead), FAR]
        )
        numbers = np.concatenate([numbers, -numbers])[:, None, None]
        wanted = numbers.astype(np.float16)
    keys, values = np.zeros((2, 1, len(numbers), 1), np.float16)
    y = np.zeros_like(numbers)
    sequences = [(keys, values, 0, len(numbers))]
    native.attention(variant, sequences, numbers, numbers, numbers, y, 1.0, 0.0, 1, None, 1)
    assert np.array_equal(keys[0], wanted[:, 0], equal_nan=True)
    signs = np.signbit(keys[0]) == np.signbit(wanted[:, 0])
    assert (signs | np.isnan(wanted[:, 0])).all()


@pytest.mark.skipif(not NATIVE, reason="built without native kernels")
def test_the_binding_refuses_what_does_not_fit():
    states, q, k, v, _ = Case(((3, 2),), 4, 2, 8, 6).make()
    keys, values = states[0]
    good = {
        "variant": NATIVE[0], "sequences": [(keys, values, 3, 2)], "q": q, "k": k, "v": v,
        "y": np.zeros((2, 4, 6), np.float32), "scale": 1.0, "softcap": 0.0, "window": 0,
        "sinks": None, "threads": 1,
    }  # fmt: skip
    native.attention(**good)
    for name, bad in {
        "variant": "abacus", "q": q[:, :3].copy(), "k": k[:1], "v": v[:, :, :5].copy(),
        "y": np.zeros((2, 4, 8), np.float32), "sinks": np.zeros(3, np.float32),
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            native.attention(**good | {name: bad})
    for sequences in (
        [], [(keys, values, 7, 2)], [(keys, values, 1 << 63, 2)], [(keys, values[:1], 3, 2)],
        [(keys, values.astype(np.float32), 3, 2)], [(keys.view(np.int16), values, 3, 2)],
        [(keys, values, 3, 1)],
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            native.attention(**good | {"sequences": sequences})
