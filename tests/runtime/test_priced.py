"""The priced scheduler against brute force, and the ledgers that it spends from."""

import itertools

import numpy as np
import pytest
from support.parts import StateOfNothing, routed_step
from support.prices import price_tables

from smoe.runtime import EngineError
from smoe.runtime.cache.eviction import NextUse
from smoe.runtime.choose.priced import RETENTION, PlaneValue, Priced
from smoe.runtime.choose.prices import Prices, usual_weights
from smoe.runtime.ledger import SAVINGS_TOKENS, LossLedger
from smoe.runtime.routing import Available, Routed
from smoe.runtime.step import Phase, Sequence, Span

E, J = 6, 3
SIZES = np.array([0, 500_000, 700_000, 900_000])


def _span(tokens: int, ledger: LossLedger | None = None, phase: Phase = Phase.DECODE) -> Span:
    ids = np.zeros(tokens, np.int64)
    return Span(Sequence(StateOfNothing(), ledger), ids, ids[:0], phase)


def _routed(random, *spans: Span, layer: int = 0) -> Routed:
    tokens = sum(len(span.ids) for span in spans)
    ids = np.stack([random.permutation(E + 1)[:3] for _ in range(tokens)])  # E is no expert
    weights = random.random((tokens, 3)).astype(np.float32)
    return routed_step(ids, weights, layer=layer, spans=spans)


def _available(random) -> Available:
    return Available(level=random.integers(0, J + 1, E), full=J)


def _priced(prices: Prices, layers: int = 1) -> Priced:
    return Priced(prices, [SIZES] * layers, 1.0)


def _cheapest_slot(prices, level, e, w) -> float:
    costs = [float(prices.skip(e, w))]
    for s in np.flatnonzero(level == J).tolist():
        best = prices.best_weight(np.array(e), w, np.array(s))
        costs.append(float(prices.stand_in(e, w, s, best)))
    return min(costs)


def _brute_force(prices, routed, level, nats_per_byte) -> float:
    """The least of nats + nats_per_byte x bytes over all alternatives of every expert."""
    total = 0.0
    for e in np.unique(routed.ids[routed.ids < E]).tolist():
        resident = int(level[e])
        weights = routed.weights[routed.ids == e].tolist()
        if resident == J:
            continue
        costs = [sum(_cheapest_slot(prices, level, e, w) for w in weights)]
        for upto in range(max(1, resident), J + 1):
            read = SIZES[upto] - SIZES[resident]
            nats = sum(float(prices.at_level(e, w, upto)) for w in weights)
            costs.append(nats + nats_per_byte * read)
        total += min(costs)
    return total


def _cost(prices, routed, level, chosen, nats_per_byte) -> tuple[np.ndarray, float]:
    """Nats by token, and all of them with nats_per_byte x bytes, of what was chosen."""
    nats, read = np.zeros(routed.tokens), {}
    levels = np.full(routed.ids.shape, J) if chosen.levels is None else chosen.levels
    for slot in itertools.product(range(len(routed.ids)), range(3)):
        e, new, w = int(routed.ids[slot]), int(chosen.ids[slot]), float(routed.weights[slot])
        if e == E:
            assert new == E
        elif new == e:
            assert chosen.weights[slot] == routed.weights[slot] and 1 <= levels[slot] <= J
            upto, resident = int(levels[slot]), int(level[e])
            nats[slot[0]] += float(prices.at_level(e, w, upto))
            assert upto >= resident, "what is resident costs nothing"
            read[e] = SIZES[upto] - SIZES[resident]
        elif new == E:
            assert chosen.weights[slot] == 0
            nats[slot[0]] += float(prices.skip(e, w))
        else:
            assert level[new] == J, "a stand-in is resident, whole"
            nats[slot[0]] += float(prices.stand_in(e, w, new, float(chosen.weights[slot])))
    return nats, nats.sum() + nats_per_byte * sum(float(size) for size in read.values())


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_choice_is_the_best_of_all(tokens):
    random = np.random.default_rng(tokens)
    prices = Prices.of([price_tables(random, E, J)])
    layer = prices.layers[0]
    shortcuts = 0
    for _ in range(60):
        ledger = LossLedger(1e9, 1, nats_per_byte=10 ** random.uniform(-10, -7))
        routed, available = _routed(random, _span(tokens, ledger)), _available(random)
        chosen = _priced(prices)(routed, available)
        nats, cost = _cost(layer, routed, available.level, chosen, ledger.nats_per_byte)
        wanted = _brute_force(layer, routed, available.level, ledger.nats_per_byte)
        assert np.isclose(cost, wanted, rtol=1e-5)
        assert np.isclose(ledger.spent, nats.sum(), rtol=1e-5, atol=1e-12)
        if chosen.nats is not None:
            assert np.allclose(chosen.nats, nats, rtol=1e-5, atol=1e-12)
        shortcuts += nats.sum() > 0
    assert 20 < shortcuts < 60


def test_levels_without_a_price_are_not_taken():
    random = np.random.default_rng(5)
    tables = price_tables(random, E, J)
    del tables["price_level"]
    priced, nothing = _priced(Prices.of([tables])), Available(np.zeros(E, np.int64), J)
    for _ in range(20):
        chosen = priced(_routed(random, _span(2, LossLedger(1e9, 1, 1e-8))), nothing)
        assert (chosen.levels == J).all()


def test_nothing_is_spent_that_is_not_there():
    random = np.random.default_rng(0)
    prices = Prices.of([price_tables(random, E, J)] * 2)
    for rate in (1e-6, 1e-4, 1e-3):
        ledger = LossLedger(rate, 2, nats_per_byte=1e-6)  # would buy everything
        span, priced, steps = _span(1, ledger), _priced(prices, 2), 200
        for i in range(2 * steps):
            priced(_routed(random, span, layer=i % 2), _available(random))
            assert -1e-12 <= ledger.balance <= rate * SAVINGS_TOKENS
            assert ledger.spent <= rate * ((i + 1) / 2 + SAVINGS_TOKENS / 2) + 1e-12
        assert ledger.spent > 0.5 * rate * steps


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_multiplier_follows_what_is_spent_in_steps_of_any_length(tokens):
    random = np.random.default_rng(1)
    prices = Prices.of([price_tables(random, E, J)])
    ends = []
    for start in (1e-12, 1e-6):  # far too stingy, far too generous
        ledger = LossLedger(1e-3, 1, start)
        span, priced = _span(tokens, ledger), _priced(prices)
        for _ in range(400):
            priced(_routed(random, span), _available(random))
        assert ledger.nats_per_byte != start
        ends.append(ledger.nats_per_byte)
    assert 0.3 < ends[0] / ends[1] < 3


def test_the_multiplier_stays_finite_where_nothing_can_be_spent_and_comes_back():
    random = np.random.default_rng(2)
    prices = Prices.of([price_tables(random, E, J)])
    ledger, fresh = LossLedger(1e-3, 1, 1e-9), LossLedger(1e-3, 1, 1e-9)
    for _ in range(20_000):
        ledger.begin(0, 1)
    assert np.isfinite(ledger.nats_per_byte) and ledger.balance == 1e-3 * SAVINGS_TOKENS
    for each in (ledger, fresh):
        span, priced = _span(1, each), _priced(prices)
        for _ in range(300):
            priced(_routed(random, span), _available(random))
    assert 0.3 < ledger.nats_per_byte / fresh.nats_per_byte < 3


def test_a_long_step_saves_up_no_more_than_the_cap():
    ledger = LossLedger(0.01, 3, 1e-9)
    for layer in range(3):
        ledger.begin(layer, 10_000)
    assert ledger.balance == 0.01 * SAVINGS_TOKENS and ledger.nats_per_byte == 1e-9


def test_a_step_of_several_tokens_is_compared_with_as_many_tokens_rates():
    """At exactly its rate the multiplier moves as it does token by token: by the savings alone."""
    by_token, by_step = LossLedger(0.01, 1, 1.0), LossLedger(0.01, 1, 1.0)
    for _ in range(40):
        by_token.begin(0, 1)
        by_token.spend(0, 0.01)
    for _ in range(10):
        by_step.begin(0, 4)
        by_step.spend(0, 0.04)
    assert by_step.nats_per_byte > 1
    assert np.isclose(by_step.nats_per_byte, by_token.nats_per_byte, rtol=0.1)


def test_two_sequences_in_a_step_do_not_spend_each_others_nats():
    random = np.random.default_rng(6)
    prices = Prices.of([price_tables(random, E, J)])
    layer, alike, apart = prices.layers[0], 0, 0
    for _ in range(40):
        rich, poor = LossLedger(1e9, 1, 1e-7), LossLedger(1e-5, 1, 1e-7)
        spans = _span(2, rich), _span(3, poor)
        routed, available = _routed(random, *spans), _available(random)
        before = poor.balance + poor.rate * 3
        chosen = _priced(prices)(routed, available)
        nats, _ = _cost(layer, routed, available.level, chosen, 0)
        assert np.isclose(rich.spent, nats[:2].sum(), rtol=1e-5, atol=1e-12)
        assert np.isclose(poor.spent, nats[2:].sum(), rtol=1e-5, atol=1e-12)
        assert poor.spent <= before + 1e-12 and poor.balance >= -1e-12
        apart += rich.spent > before
        alike += poor.spent > 0
    assert apart and alike


def test_a_sequence_without_a_ledger_is_exact_beside_one_that_spends():
    random = np.random.default_rng(7)
    priced, spent = _priced(Prices.of([price_tables(random, E, J)])), 0.0
    for _ in range(40):
        ledger = LossLedger(1e9, 1, 1e-6)
        routed = _routed(random, _span(2), _span(2, ledger))
        chosen = priced(routed, _available(random))
        assert np.array_equal(chosen.ids[:2], routed.ids[:2])
        assert np.array_equal(chosen.weights[:2], routed.weights[:2])
        assert chosen.levels is None or (chosen.levels[:2] == J).all()
        assert chosen.nats is None or not chosen.nats[:2].any()
        spent += ledger.spent
    assert spent > 0


def test_a_fork_of_a_sequence_has_a_ledger_of_its_own():
    sequence = Sequence(StateOfNothing(), LossLedger(1e-3, 1, 1e-9))
    fork = sequence.fork()
    fork.ledger.spend(1e-4, 1e-4)
    assert sequence.ledger.spent == 0 and fork.ledger.spent == 1e-4
    assert sequence.ledger.balance - fork.ledger.balance == pytest.approx(1e-4)


def test_a_plane_is_worth_what_uses_cost_more_without_it():
    """Against the definition, expert by expert."""
    random = np.random.default_rng(3)
    prices = Prices.of([price_tables(random, E, J), price_tables(random, E, J)])
    sizes, weights = [SIZES, SIZES // 2], [random.random(E), random.random(E)]
    rates = [1e-8, 3e-9, 1e-7]
    now = rates[0]
    value = PlaneValue(prices, weights, sizes, lambda: now)
    for now in rates:
        for layer, expert, level in itertools.product(range(2), range(E), range(1, J + 1)):
            priced, w, ends = prices.layers[layer], weights[layer][expert], sizes[layer]
            nats = [
                float(priced.skip(expert, w)),
                *(float(priced.at_level(expert, w, j)) for j in range(1, J)),
                0.0,
            ]
            cost = [
                min(nats[j] + RETENTION * now * (ends[j] - ends[at]) for j in range(at, J + 1))
                for at in range(J + 1)
            ]
            (given,) = value(np.array([layer * E + expert]), np.array([level]))
            wanted = (cost[level - 1] - cost[level]) / (ends[level] - ends[level - 1])
            assert np.isclose(given, wanted)


def test_an_expert_that_calibration_never_reached_counts_as_its_layer_does():
    found = usual_weights(np.array([4, 0, 1]), np.array([2.0, 0.0, 0.25]))
    assert found.tolist() == [0.5, 2.25 / 5, 0.25]
    assert usual_weights(np.zeros(2, int), np.zeros(2)).tolist() == [0, 0]


def test_what_is_wanted_sooner_and_worth_more_stays():
    eviction = NextUse([E])
    for expert in (0, 0, 0, 1):
        eviction.observe(0, np.array([[expert]]), None)
    keys, levels = np.array([0, 1, 2]), np.array([1, 2, 1])
    assert not eviction.by_planes and np.array_equal(
        eviction.planes(keys, levels), eviction.values(keys)
    )
    eviction.plane_value = lambda keys, levels: np.where(levels == 1, 1.0, 0.01)
    assert eviction.by_planes and eviction.planes(keys, levels).argsort().tolist() == [2, 1, 0]
    eviction.plane_value = lambda keys, levels: np.where(levels == 1, 1.0, 100.0)
    assert eviction.planes(keys, levels).argmax() == 1


@pytest.mark.parametrize(
    "name, value",
    [("price_fit", np.nan), ("price_fit", -1), ("price_standin", np.inf), ("price_level", -1e-3)],
)
def test_values_that_are_no_prices_are_refused(name, value):
    tables = [price_tables(np.random.default_rng(0), E, J) for _ in range(2)]
    assert len(Prices.of(tables).layers) == 2
    tables[1][name] = np.full_like(tables[1][name], value)
    with pytest.raises(EngineError, match=f"{name} holds values that are no prices"):
        Prices.of(tables)
