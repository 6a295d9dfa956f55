import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe.runtime import EngineError
from smoe.runtime.sampling import Sampler, Sampling, ranked

LOGITS = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))


def _shares(how: Sampling, n: int = 4000) -> np.ndarray:
    sampler = Sampler(how)
    return np.bincount([sampler.draw(LOGITS) for _ in range(n)], minlength=4) / n


def test_greedy_takes_the_best():
    assert Sampler(Sampling()).draw(LOGITS) == 1


def test_draws_follow_the_distribution():
    # Standard error of a share of 0.5 over 4000 draws is 0.008.
    assert np.allclose(_shares(Sampling(1.0, seed=1)), [0.1, 0.5, 0.15, 0.25], atol=0.035)


def test_temperature_sharpens():
    squared = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    assert np.allclose(_shares(Sampling(0.5, seed=1)), squared / squared.sum(), atol=0.035)


@pytest.mark.parametrize("how, support", [
    (Sampling(1.0, top_k=2, seed=1), {1, 3}),
    (Sampling(1.0, top_p=0.5, seed=1), {1}),        # 0.5 is reached by the first alone
    (Sampling(1.0, top_p=0.6, seed=1), {1, 3}),     # the token that crosses the line is in
    (Sampling(1.0, top_p=0.76, seed=1), {1, 2, 3}),
    (Sampling(1.0, top_k=9, seed=1), {0, 1, 2, 3}),
    (Sampling(1.0, top_k=3, top_p=0.5, seed=1), {1}),
])  # fmt: skip
def test_filters_keep_what_they_say(how, support):
    assert set(np.flatnonzero(_shares(how, 600))) == support


def test_the_same_seed_draws_the_same():
    first, second, other = (Sampler(Sampling(1.0, seed=s)) for s in (7, 7, 8))
    a, b, c = ([s.draw(LOGITS) for _ in range(50)] for s in (first, second, other))
    assert a == b != c


@pytest.mark.parametrize("options, said", [
    (dict(temperature=-1), "temperature is -1"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(temperature=1, top_p=0), "top_p 0"),
    (dict(temperature=1, top_p=1.5), "top_p 1.5"),
    (dict(temperature=1, top_k=-1), "top_k is -1"),
    (dict(top_k=5), "no effect at temperature 0"),
    (dict(seed=5), "no effect at temperature 0"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(EngineError, match=said):
        Sampling(**options)


def _sorted_draw(logits: np.ndarray, how: Sampling, random: np.random.Generator) -> int:
    """The definition: the whole vocabulary sorted, filtered, and NumPy's own choice."""
    order = np.argsort(-logits, kind="stable")[: how.top_k or None]
    scaled = logits[order].astype(np.float64) / how.temperature
    probabilities = np.exp(scaled - scaled[0]) / np.exp(scaled - scaled[0]).sum()
    if how.top_p < 1:
        enough = int(np.searchsorted(np.cumsum(probabilities), how.top_p)) + 1
        probabilities = probabilities[:enough] / probabilities[:enough].sum()
    return int(order[random.choice(len(probabilities), p=probabilities)])


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("filters", [
    {}, {"top_k": 1}, {"top_k": 40}, {"top_k": 9000}, {"top_p": 0.3}, {"top_p": 0.999},
    {"top_k": 40, "top_p": 0.9}, {"top_k": 9000, "top_p": 0.9},
])  # fmt: skip
def test_draws_are_those_of_a_sorted_vocabulary(spread, filters):
    random = np.random.default_rng(5)
    how = Sampling(0.8, **filters, seed=3)
    sampler, reference = Sampler(how), np.random.default_rng(3)
    for _ in range(12):
        logits = (random.standard_normal(9000) * spread).astype(np.float32)
        logits = np.round(logits, 2)  # many ties
        assert sampler.draw(logits) == _sorted_draw(logits, how, reference)


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40).map(
        lambda some: np.array(some, np.float32)
    ),
    count=st.integers(1, 45),
)
def test_the_best_are_ranked_with_ties_in_order(values, count):
    assert ranked(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_give_a_token_all_the_same(filters, odd):
    sampler = Sampler(Sampling(1.0, **filters, seed=1))
    for logits in (np.full(4, odd, np.float32), np.array([1, odd, 2, 3], np.float32)):
        with np.errstate(invalid="ignore"):
            assert sampler.draw(logits) in range(4)


def test_a_token_that_is_ruled_out_is_never_drawn():
    logits = np.full(5000, -np.inf, np.float32)
    logits[[7, 4000]] = 3, 2
    for filters in ({}, {"top_k": 5}, {"top_p": 0.9999}):
        sampler = Sampler(Sampling(2.0, **filters, seed=1))
        assert {sampler.draw(logits) for _ in range(50)} == {7, 4000}


def test_a_sampler_draws_from_vocabularies_of_any_length():
    sampler = Sampler(Sampling(1.0, seed=1))
    for size in (1, 5000, 3):
        assert sampler.draw(np.zeros(size, np.float32)) in range(size)


def _fastest(call) -> float:
    def seconds() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return min(seconds() for _ in range(7))


@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_p": 0.95}])
def test_a_draw_takes_less_than_sorting_the_vocabulary(filters):
    logits = np.random.default_rng(0).standard_normal(151_936).astype(np.float32) * 6
    sampler = Sampler(Sampling(1.0, **filters, seed=1))
    sort = _fastest(lambda: np.argsort(-logits, kind="stable"))
    assert _fastest(lambda: sampler.draw(logits)) < sort / 2
