"""Prices against explicit loops and by hand."""

import subprocess
import sys

import numpy as np
import pytest

from smoe.runtime.choose.prices import KINDS, Prices
from smoe.runtime.errors import EngineError

E, J = 5, 3


@pytest.fixture
def tables():
    """One layer whose moments are those of random products, so that every quadratic form is one."""
    random = np.random.default_rng(0)
    products = random.standard_normal((E, 40, E)) * 0.1
    cross = np.stack([(products[e, :, [e]].T * products[e]).mean(0) for e in range(E)])
    standin = np.square(products).mean(1)
    level = np.abs(random.standard_normal((E, J))) * [1e-2, 1e-3, 0]
    fit = np.array([[1.1, 0.02], [0.9, 0.03], [1.0, 0.01]])
    return [{
        "price_cross": cross.astype(np.float32), "price_standin": standin.astype(np.float32),
        "price_level": level.astype(np.float32), "price_fit": fit.astype(np.float32),
    }]  # fmt: skip


def test_every_price_is_its_formula(tables):
    (t,) = tables
    (layer,) = Prices.of(tables).layers
    for e in range(E):
        for w in (0.0, 0.1, 0.7):
            own = float(t["price_standin"][e, e])
            wanted = {"skip": w * w * own / 2}
            for s in range(E):
                p = (
                    w * w * own
                    - 2 * w * 0.3 * float(t["price_cross"][e, s])
                    + 0.09 * float(t["price_standin"][e, s])
                ) / 2
                a, b = t["price_fit"][1]
                assert np.isclose(layer.stand_in(e, w, s, 0.3), a * p + b * np.sqrt(p), rtol=1e-6)
            a, b = t["price_fit"][0]
            assert np.isclose(
                layer.skip(e, w), a * wanted["skip"] + b * np.sqrt(wanted["skip"]), rtol=1e-6
            )
            for j in range(1, J + 1):
                p, (a, b) = w * w * float(t["price_level"][e, j - 1]) / 2, t["price_fit"][2]
                assert np.isclose(layer.at_level(e, w, j), a * p + b * np.sqrt(p), rtol=1e-6)


def test_prices_broadcast(tables):
    (layer,) = Prices.of(tables).layers
    missing, weights, w_s = np.array([[3], [1]]), np.array([[0.2], [0.4]]), np.full((2, E), 0.1)
    found = layer.stand_in(missing, weights, np.arange(E), w_s)
    assert found.shape == (2, E) and found.dtype == np.float64
    assert np.isclose(found[1, 4], layer.stand_in(1, 0.4, 4, 0.1))
    assert layer.at_level(missing, weights, np.arange(1, J + 1)).shape == (2, J)
    assert layer.skip(missing[:, 0], weights[:, 0]).shape == (2,)


def test_an_expert_stands_in_for_itself_for_nothing_and_the_full_level_is_free(tables):
    (layer,) = Prices.of(tables).layers
    e = np.arange(E)
    assert np.all(layer.stand_in(e, 0.3, e, 0.3) < 1e-8)
    assert np.all(layer.at_level(e, 0.3, J) == 0)
    (plain,) = Prices.of(tables, fitted=False).layers
    assert np.allclose(plain.stand_in(e, 0.3, e[::-1], 0.0), plain.skip(e, 0.3)), (
        "a stand-in of no weight is a skip"
    )


def test_the_best_weight_is_the_best_of_many(tables):
    (layer,) = Prices.of(tables, fitted=False).layers
    tried = np.linspace(0, 1, 2001)
    for e in range(E):
        for s in range(E):
            best = layer.best_weight(np.array(e), np.array(0.5), np.array(s))
            prices = layer.stand_in(e, 0.5, s, tried)
            assert (
                layer.stand_in(e, 0.5, s, best) <= prices.min() + 1e-12
                and abs(tried[prices.argmin()] - best) < 1e-3
            )


def test_the_best_stand_in_is_the_cheapest_of_those_that_are_able(tables):
    (layer,) = Prices.of(tables, fitted=False).layers
    random, e = np.random.default_rng(1), np.arange(E)
    assert layer.best_stand_in(e, np.zeros(E, bool)) is None
    for _ in range(20):
        able = random.random(E) < 0.5
        able[random.integers(E)] = True
        best = layer.best_stand_in(e, able)
        each = layer.stand_in(e[:, None], 0.5, e, layer.best_weight(e[:, None], 0.5, e))
        assert able[best].all()
        assert np.allclose(each[e, best], np.where(able, each, np.inf).min(1), atol=1e-15)


def test_moments_that_are_no_form_cost_nothing_less_than_zero(tables):
    tables[0]["price_cross"] = tables[0]["price_cross"] + 5
    (layer,) = Prices.of(tables).layers
    assert layer.stand_in(0, 0.5, 1, 0.5) == 0


def test_tables_without_prices_are_refused_with_what_is_missing(tables):
    del tables[0]["price_fit"]
    with pytest.raises(EngineError, match=r"lack price_fit.*--prices"):
        Prices.of(tables)
    assert Prices.of(tables, fitted=False).layers[0].fit.shape == (len(KINDS), 2)
    with pytest.raises(EngineError, match="no prices"):
        Prices.of([])


def test_a_bundle_of_one_level_has_no_level_prices(tables):
    del tables[0]["price_level"]
    (layer,) = Prices.of(tables).layers
    assert layer.level.shape == (E, 0) and layer.skip(0, 0.1) > 0


def test_prices_load_numpy_and_nothing_of_prep():
    code = (
        "import sys, smoe.runtime.choose.prices;"
        "print([n for n in sys.modules if n.startswith(('torch', 'smoe.prep'))])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )
