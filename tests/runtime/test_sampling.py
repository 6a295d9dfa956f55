import numpy as np
import pytest

from smoe.runtime import EngineError
from smoe.runtime.sampling import Sampler, Sampling

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
