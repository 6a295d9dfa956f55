"""Attention over what sequences remember: every instruction set against the NumPy twin bit for bit,
and the twin against a softmax in float64."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from support.remembered import Blocks

from smoe.runtime import kernels
from smoe.runtime.kernels import attention as twin
from smoe.runtime.kernels.blocks import GROUP, KINDS, TOKENS, BlockLayout
from smoe.runtime.kernels.reference import quantise

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
    kind: str = "f16"
    latent: bool = False
    scale: float = 0.25
    softcap: float = 0.0
    window: int = 0
    sinks: bool = False

    @property
    def layout(self):
        return BlockLayout(self.kind, self.kv_heads, self.key_width, self.value_width, self.latent)

    def begin(self, past):
        return max(0, past + 1 - self.window) if self.window else 0

    def make(self, seed=0, spread=1.0):
        random = np.random.default_rng(seed)

        def numbers(*shape):
            return (random.standard_normal(shape) * spread).astype(np.float32)

        rows = sum(new for _, new in self.parts)
        states = []
        for past, new in self.parts:
            state = Blocks(self.layout, past + new + 3, self.begin(past))
            for token in range(state.first * TOKENS, past):
                state.put("key", token, numbers(self.kv_heads, self.key_width))
                if not self.latent:
                    state.put("value", token, numbers(self.kv_heads, self.value_width))
            states.append(state)
        q = numbers(rows, self.heads, self.key_width)
        k = numbers(rows, self.kv_heads, self.key_width)
        v = None if self.latent else numbers(rows, self.kv_heads, self.value_width)
        sinks = numbers(self.heads) if self.sinks else None
        return states, q, k, v, sinks

    @property
    def how(self):
        return self.scale, self.softcap, self.window


CASES = [
    Case(((0, 1),), 1, 1, 1, 1),
    Case(((0, 19), (5, 2)), 4, 2, 16, 24),
    Case(((130, 1), (0, 3), (255, 2)), 6, 2, 40, 7),
    Case(((300, 1),), 10, 1, 72, 130, softcap=3.0),
    Case(((120, 40),), 6, 3, 33, 64, window=9),
    Case(((500, 3), (17, 1)), 3, 3, 64, 64, window=200, sinks=True),
    Case(((90, 70),), 40, 1, 20, 18, sinks=True, softcap=5.0),
    Case(((0, 150),), 2, 2, 128, 128, window=1),
    Case(((140, 2), (31, 1)), 16, 1, 576, 512, latent=True, scale=0.05),
    Case(((95, 1), (200, 33)), 5, 1, 150, 131, latent=True, window=70),
    Case(((100, 1), (260, 2)), 3, 1, 1411, 700, latent=True, scale=0.03, sinks=True),
    Case(((40, 3),), 7, 1, 1290, 90, scale=0.03),
]
KINDED = [replace(case, kind=kind) for case in CASES for kind in KINDS]


def reference(case, states, q, k, v, sinks):
    parts = [
        twin.Part(case.layout, state.block, past, rows)
        for state, (past, rows) in zip(states, case.parts, strict=True)
    ]
    return twin.attention(parts, q, k, v, *case.how, sinks)


def attend(variant, case, states, q, k, v, sinks, threads=1, parts=None):
    sequences = [
        (case.kind, state.table, past, rows)
        for state, (past, rows) in zip(states, parts or case.parts, strict=True)
    ]
    y = np.full((*q.shape[:2], case.value_width), 7, np.float32)
    native.attention(variant, sequences, q, k, v, y, *case.how, sinks, threads)
    return y


def copied(states):
    return [state.copy() for state in states]


def assert_same(variant, case, given, threads=(1, 3)):
    states, *new = given
    wanted_states = copied(states)
    wanted = reference(case, wanted_states, *new)
    for count in threads:
        mine = copied(states)
        found = attend(variant, case, mine, *new, threads=count)
        assert np.array_equal(found, wanted, equal_nan=True)
        for state, wanted_state in zip(mine, wanted_states, strict=True):
            assert np.array_equal(state.bytes, wanted_state.bytes)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("case", KINDED, ids=str)
def test_every_variant_gives_the_bits_of_the_twin(variant, case):
    assert_same(variant, case, case.make())


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("seed", range(25))
def test_every_variant_gives_the_bits_of_the_twin_at_random_sizes(variant, seed):
    random = np.random.default_rng(seed)
    latent = bool(random.random() < 0.3)
    kv_heads = 1 if latent else int(random.integers(1, 4))
    key_width = int(random.integers(1, 300))
    case = Case(
        parts=tuple(
            (int(random.integers(0, 300)), int(random.choice([1, 1, 2, 5, 20])))
            for _ in range(random.integers(1, 5))
        ),
        heads=kv_heads * int(random.choice([1, 2, 3, 4, 8, 9, 35])),
        kv_heads=kv_heads,
        key_width=key_width,
        value_width=int(random.integers(1, key_width + 1 if latent else 300)),
        kind=str(random.choice(list(KINDS))),
        latent=latent,
        scale=0.1,
        softcap=float(random.choice([0, 0, 2.5])),
        window=int(random.choice([0, 0, 1, 33, 128, 150])),
        sinks=bool(random.random() < 0.5),
    )
    assert_same(variant, case, case.make(seed), threads=(int(random.integers(1, 4)),))


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("window", [0, 150])
def test_cuts_company_and_threads_do_not_change_a_bit(variant, kind, latent, window):
    # So many rows, heads and blocks that results of all rows at once find no room.
    length, groups = 700, 1 if latent else 2
    case = Case(((0, length),), 8, groups, 50, 48, kind, latent, window=window, sinks=True)
    states, q, k, v, sinks = case.make()
    whole = attend(variant, case, copied(states), q, k, v, sinks, threads=4)
    mine, first = copied(states), 0
    for rows in (1, 2, 126, 1, 3, 250, 1, 316):
        cut = slice(first, first + rows)
        found = attend(
            variant, case, mine, q[cut], k[cut], None if latent else v[cut], sinks,
            threads=1 + first % 4, parts=[(first, rows)],
        )  # fmt: skip
        assert np.array_equal(found, whole[cut])
        first += rows
    # Beside others, each of them as alone.
    several = replace(case, parts=((0, 30), (0, 1), (0, 200)))
    states, *_ = several.make()
    rows = np.concatenate([np.arange(30), np.arange(1), np.arange(200)])
    new = (q[rows], k[rows], None if latent else v[rows])
    assert np.array_equal(attend(variant, several, states, *new, sinks, threads=2), whole[rows])


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_rounds_give_the_bits_of_the_twin(variant, kind):
    # Results of so many heads have no room for all blocks at once.
    case = Case(((4500, 1),), 16, 1, 530, 512, kind, latent=True, scale=0.05, sinks=True)
    assert 16 * 512 * 4 * (4500 // twin.BLOCK_KEYS) > 1 << 20
    assert_same(variant, case, case.make(), threads=(2,))


@pytest.mark.parametrize("case", KINDED, ids=str)
def test_the_twin_is_attention(case):
    states, q, k, v, sinks = case.make()
    found, row = reference(case, states, q, k, v, sinks), 0
    name = "key" if case.latent else "value"
    for state, (past, rows) in zip(states, case.parts, strict=True):
        for r in range(rows):
            end = past + r + 1
            seen = range(case.begin(end - 1), end)
            keys = np.stack([state.get("key", token) for token in seen], 1)
            values = np.stack([state.get(name, token)[:, : case.value_width] for token in seen], 1)
            for head in range(case.heads):
                shared = head // (case.heads // case.kv_heads)
                score = keys[shared] @ query(case, q[row + r, head]) * case.scale
                if case.softcap:
                    score = case.softcap * np.tanh(score / case.softcap)
                weight = np.exp(score - score.max())
                total = weight.sum()
                if sinks is not None:
                    total += np.exp(sinks[head] - score.max())
                wanted = weight / total @ values[shared]
                assert np.allclose(found[row + r, head], wanted, rtol=1e-5, atol=4e-6)
        row += rows


def query(case, q):
    """As keys see it: rounded where they are."""
    if case.kind != "int8":
        return q.astype(float)
    codes, step = quantise(q[None], GROUP)
    return (codes * step[..., None].astype(float)).reshape(-1)[: len(q)]


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("spread", [1e-42, 1e-31, 1e-6, 300.0, 3e38])
def test_extremes_keep_their_bits(variant, kind, latent, spread):
    # Numbers that float16 has no room for, denormal ones, scores far apart, what is not finite.
    groups = 1 if latent else 2
    case = Case(((140, 9), (3, 2)), 4, groups, 19, 17, kind, latent, sinks=True)
    with np.errstate(all="ignore"):
        states, q, k, v, sinks = case.make(spread=spread)
        k[4, :, 2], k[3, 0, 0], q[6, 1, 3] = np.nan, np.inf, np.inf
        if not latent:
            v[4, 1, 2], v[0, 0, 3] = np.nan, -np.inf
        states[0].put("key", 5, k[4])
        assert_same(variant, case, (states, q, k, v, sinks), threads=(1,))


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_see_what_comes_after_it(variant, kind):
    case = Case(((0, 40),), 4, 2, 16, 16, kind, window=20)
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
        numbers = np.concatenate([numbers, -numbers]).reshape(-1, 1, 6)
        wanted = numbers.astype(np.float16)
    state = Blocks(BlockLayout("f16", 1, 6, 6), len(numbers))
    y = np.zeros_like(numbers)
    sequences = [("f16", state.table, 0, len(numbers))]
    native.attention(variant, sequences, numbers, numbers, numbers, y, 1.0, 0.0, 1, None, 1)
    for token in range(len(numbers)):
        found = state.cell("keys", token)
        assert np.array_equal(found, wanted[token], equal_nan=True)
        signs = np.signbit(found) == np.signbit(wanted[token])
        assert (signs | np.isnan(found)).all()


@pytest.mark.skipif(not NATIVE, reason="built without native kernels")
def test_the_binding_refuses_what_does_not_fit():
    states, q, k, v, _ = Case(((3, 2),), 4, 2, 8, 6).make()
    table = states[0].table
    good = {
        "variant": NATIVE[0], "sequences": [("f16", table, 3, 2)], "q": q, "k": k, "v": v,
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
    with pytest.raises(ValueError):  # latent values are not wider than keys
        native.attention(**good | {"v": None, "y": np.zeros((2, 4, 9), np.float32)})
    for sequences in (
        [], [("f16", table, 31, 2)], [("f16", table, 1 << 63, 2)], [("f64", table, 3, 2)],
        [("f16", table.astype(np.int32), 3, 2)], [("f16", table * 0, 3, 2)],
        [("f16", table + 4, 3, 2)], [("f16", table, 3, 1)],
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            native.attention(**good | {"sequences": sequences})
