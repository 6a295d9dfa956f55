"""Evictions against their definitions, written out naively from the whole history, and Belady
against all that is possible."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe.runtime import EngineError
from smoe.runtime.cache.eviction import CHUNK, Belady, eviction_named
from smoe.runtime.cache.residency import Residency

EXPERTS = [3, 5, 4]


@st.composite
def histories(draw) -> list[tuple[int, list[list[int]]]]:
    """Steps in order: (layer, the experts of every token). Layers take turns, as in a model."""
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        tokens = draw(st.integers(1, 12))
        for layer, count in enumerate(EXPERTS):
            chosen = st.permutations(range(count)).map(lambda p: p[:2])
            steps.append((layer, [draw(chosen) for _ in range(tokens)]))
    return steps[: draw(st.integers(1, len(steps)))]


def _replayed(name: str, history, scores=None, warm=None):
    eviction = eviction_named(name, EXPERTS)
    if warm is not None:
        eviction.warm(warm)
    for step, (layer, tokens) in enumerate(history):
        eviction.observe(layer, np.array(tokens), None if scores is None else scores[step])
    return eviction


def _keys():
    return [(layer, expert) for layer, count in enumerate(EXPERTS) for expert in range(count)]


@settings(deadline=None, max_examples=30)
@given(histories())
def test_least_recently_used_is_the_order_of_last_uses(history):
    """As steps reach layers: a prompt layer after layer, in each token after token, of a token's
    experts rank after rank. What was never used is the first to go."""
    uses = [(layer, expert) for layer, tokens in history for ids in tokens for expert in ids]
    last = {key: i for i, key in enumerate(uses)}
    values = _replayed("lru", history).values(np.arange(12))
    by_value = [key for key, _ in sorted(zip(_keys(), values, strict=True), key=lambda kv: kv[1])]
    assert [key for key in by_value if key in last] == sorted(last, key=last.__getitem__)
    assert all(values[i] <= 0 for i, key in enumerate(_keys()) if key not in last)


@settings(deadline=None, max_examples=30)
@given(histories())
def test_a_slot_without_an_expert_is_no_use(history):
    none = [(layer, [[*ids, EXPERTS[layer]] for ids in tokens]) for layer, tokens in history]
    for name in ("lru", "lfu", "decay:4", "next-use"):
        found = _replayed(name, none).values(np.arange(12))
        wanted = _replayed(name, history).values(np.arange(12))
        assert np.array_equal(found.argsort(kind="stable"), wanted.argsort(kind="stable"))


@given(histories())
def test_frequencies(history):
    uses = {
        key: [
            i
            for i, (layer, tokens) in enumerate(history)
            if layer == key[0] and any(key[1] in ids for ids in tokens)
        ]
        for key in _keys()
    }
    found = _replayed("lfu", history).values(np.arange(12))
    assert np.array_equal(np.floor(found), [len(uses[key]) for key in _keys()])
    found = _replayed("decay:4", history).values(np.arange(12))
    for i, (layer, expert) in enumerate(_keys()):
        after = [
            sum(len(t) for lay, t in history[step + 1 :] if lay == layer)
            for step in uses[layer, expert]
        ]
        assert found[i] == pytest.approx(sum(2 ** (-a / 4) for a in after), abs=1e-9)


@given(histories(), st.integers(0, 2**32 - 1))
def test_scores_are_means_over_a_window_of_tokens(history, seed):
    random = np.random.default_rng(seed)
    scores = [random.random((len(tokens), EXPERTS[layer])) for layer, tokens in history]
    found = _replayed("score:3", history, scores).values(np.arange(12))
    for i, (layer, expert) in enumerate(_keys()):
        seen = [s[:, expert] for (lay, _), s in zip(history, scores, strict=True) if lay == layer]
        wanted = np.concatenate(seen)[-3:].mean() if seen else 0
        assert found[i] == pytest.approx(wanted, abs=1e-9)


@settings(deadline=None)
@given(histories())
def test_next_use_is_its_docstring(history):
    """Everything from the history, nothing kept on the way. Every token of a step counts alike, and
    a step as at most 8."""
    found = _replayed("next-use:16", history).values(np.arange(12))
    now = history[-1][0]
    for i, (layer, expert) in enumerate(_keys()):
        mine = [tokens for lay, tokens in history if lay == layer]
        used, seen, last = 0.0, 0.0, 0.0
        for tokens in mine:
            fade = 2 ** (-min(len(tokens), 8) / 16)
            weight = (1 - fade) / (1 - 2 ** (-1 / 16))
            share = sum(expert in ids for ids in tokens) / len(tokens)
            used, seen, last = used * fade + weight * share, seen * fade + weight, float(share > 0)
        p = 0.8 * used / seen + 0.2 * last if mine else 0.0
        d = ((layer - now - 1) % 3 + 1) / 3
        assert found[i] == pytest.approx(-(d + 1 / max(p, 1e-6)), rel=1e-9)


def test_a_warm_start_is_evidence_that_wears_off():
    share = np.array([0.6, 0.3, 0.1, *[0.2] * 5, *[0.25] * 4])
    for name in ("lru", "decay", "score", "next-use"):
        cold = eviction_named(name, EXPERTS)
        cold.warm(share)
        assert np.argsort(-cold.values(np.arange(3))).tolist() == [0, 1, 2]
    history = [(layer, [[2, 1]]) for _ in range(60) for layer in range(3)]
    assert np.argmin(_replayed("next-use", history, warm=share).values(np.arange(3))) == 0


def _misses(requests: list[int], capacity: int) -> int:
    """The least misses by trying every choice of what goes."""
    held = {frozenset(): 0}
    for wanted in requests:
        after: dict[frozenset, int] = {}
        for kept, misses in held.items():
            if wanted in kept:
                choices, cost = [kept], 0
            elif len(kept) < capacity:
                choices, cost = [kept | {wanted}], 1
            else:
                choices, cost = [(kept - {gone}) | {wanted} for gone in kept], 1
            for choice in choices:
                after[choice] = min(misses + cost, after.get(choice, 10**9))
        held = after
    return min(held.values())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=24), st.integers(1, 4))
def test_belady_is_the_least_there_is(requests, capacity):
    eviction = Belady([6], [(0, np.array([[expert]])) for expert in requests])
    residency = Residency([6], capacity, eviction)
    misses = 0
    for expert in requests:
        eviction.observe(0, np.array([[expert]]), None)
        residency.use(0, np.arange(6) == expert)
        if residency.find((0, expert)) is None:
            misses += 1
            residency.commit((0, expert), residency.reserve((0, expert), 1), 1)
    assert misses == _misses(requests, capacity)
    assert all(
        _misses(requests, n) >= _misses(requests, n + 1) for n in itertools.chain(range(1, 4))
    )


@pytest.mark.parametrize("name, sentence", [
    ("mru", "no eviction 'mru'; there are lru"),
    ("decay:x", "takes half_life from 1 to 1000000"),
    ("decay:0", "takes half_life"),
    ("lru:3", "takes no parameter"),
])  # fmt: skip
def test_evictions_that_do_not_exist(name, sentence):
    with pytest.raises(EngineError, match=sentence):
        eviction_named(name, EXPERTS)


def test_a_very_long_prompt_overflows_nothing():
    policy = eviction_named("decay:1", [4, 4])
    for layer in (0, 1):
        policy.observe(layer, np.array([[0]]), None)
    policy.observe(0, np.ones((100_000, 1), np.int64), None)
    values = policy.values(np.arange(8))
    assert np.isfinite(values).all() and values[1] > values[4] > values[0]


def test_a_prompt_in_one_step_counts_as_in_chunks():
    """What a policy keeps of a prompt does not depend on how many of its chunks share a read."""
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(5)[:2] for _ in range(500)])
    scores = random.random((500, 5))
    for name in ("lfu", "decay:4", "score", "next-use"):
        whole, parts = eviction_named(name, [5]), eviction_named(name, [5])
        whole.observe(0, ids, scores)
        for start in range(0, 500, CHUNK):
            parts.observe(0, ids[start : start + CHUNK], scores[start : start + CHUNK])
        assert np.allclose(whole.values(np.arange(5)), parts.values(np.arange(5)), atol=1e-9)
