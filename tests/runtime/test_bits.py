"""Levels by bits: each rule against brute force over all levels, means that come out as asked, and
the engine's word."""

import itertools
import shutil

import numpy as np
import pytest
from support.parts import StateOfNothing, routed_step
from support.prices import price_tables
from support.routers import add_routers

from smoe.artifacts import BundleError, open_bundle
from smoe.artifacts.nested import parse
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.bits import scale_of
from smoe.runtime.budget import memory_for
from smoe.runtime.choose.bits import (
    ByBits,
    LevelNats,
    PricedLevels,
    RandomLevels,
    Scale,
    TrainedLevels,
)
from smoe.runtime.choose.prices import LayerPrices
from smoe.runtime.ledger import BitLedger
from smoe.runtime.options import tables_bytes
from smoe.runtime.routing import Available
from smoe.runtime.step import Phase, Sequence, Span

E, K, J, H = 6, 3, 3, 8
SCALE = Scale(bits=np.array([2.0, 3.0, 4.0]), weight=np.array([0.5, 1.5]))


def _routed(random, tokens=4, layer=1):
    """Slots of random experts and weights, of which the last is no expert."""
    ids = np.stack([random.permutation(E)[:K] for _ in range(tokens)])
    ids[-1, -1] = E
    weights = random.random((tokens, K)).astype(np.float32)
    weights[ids == E] = 0
    hidden = random.standard_normal((tokens, H)).astype(np.float32)
    return routed_step(ids, weights, layer=layer, hidden=hidden)


def _nats(random):
    tables = [price_tables(random, E, J) for _ in SCALE.weight]
    return tables, [LevelNats(t["price_level"], t["price_fit"], J) for t in tables]


def test_priced_levels_are_the_cheapest_of_all():
    random = np.random.default_rng(0)
    tables, nats = _nats(random)
    rule, routed = PricedLevels(nats, SCALE), _routed(random)
    prices = LayerPrices(np.zeros((E, E, 2)), tables[1]["price_level"].astype(float),
                         tables[1]["price_fit"].astype(float))  # fmt: skip
    for price in np.linspace(-14, -2, 25):
        levels = rule(routed, np.full(4, price), np.arange(4))
        for token, rank in itertools.product(range(4), range(K)):
            e, w = routed.ids[token, rank], float(routed.weights[token, rank])
            if e == E:
                continue
            costs = [
                float(prices.at_level(e, w, level)) + np.exp(price) * 1.5 * SCALE.bits[level - 1]
                for level in range(1, J + 1)
            ]
            assert costs[levels[token, rank] - 1] == pytest.approx(min(costs), rel=1e-9)
    assert set(np.unique(rule(routed, np.full(4, -30.0), np.arange(4))[:-1])) == {J}
    assert set(np.unique(rule(routed, np.full(4, 9.0), np.arange(4)))) == {1}


def test_trained_levels_are_those_of_largest_logit_less_the_price_of_their_bits():
    random = np.random.default_rng(1)
    routers = [
        (
            random.standard_normal((E, J, H)).astype(np.float16),
            random.standard_normal((E, J)),
            mixing,
        )
        for mixing in (0.3, 1.4)
    ]
    rule = TrainedLevels(routers, SCALE)
    routed, price = _routed(random, tokens=40), np.linspace(-3, 3, 40)
    levels = rule(routed, price, np.arange(40))
    weight, bias, mixing = routers[1]
    for token, rank in itertools.product(range(40), range(K)):
        e = routed.ids[token, rank]
        if e < E:
            logits = weight[e].astype(float) @ routed.hidden[token] + bias[e]
            of_a_bit = mixing * np.log(routed.weights[token, rank].astype(float)) - price[token]
            assert levels[token, rank] == 1 + np.argmax(logits + of_a_bit * SCALE.bits)


def test_random_levels_are_as_many_as_their_share():
    random = np.random.default_rng(2)
    routed = _routed(random, tokens=2000)
    levels = RandomLevels(2, np.array([0.0, 0.3]))(routed, np.zeros(2000), np.arange(2000))
    assert set(np.unique(levels)) == {2, 3}
    assert (levels == 3).mean() == pytest.approx(0.3, abs=0.02)


def test_a_ledger_counts_and_its_price_follows():
    ledger = BitLedger(3.0, -1.0, SCALE.levels)
    for _ in range(2):
        ledger.begin(0, 1)
        ledger.spend(0, np.array([0, 0, 0, 4]), 16 * 0.5, 4 * 0.5)
        ledger.begin(1, 1)
        ledger.spend(1, np.array([0, 0, 0, 4]), 16 * 1.5, 4 * 1.5)
    other = ledger.fork()
    ledger.begin(0, 1)
    # A bit too many, twice: of each token, and of all so far.
    assert ledger.price == pytest.approx(-1 + 2 * 0.1 + (1 + 2) * 0.001)
    assert ledger.levels.tolist() == [[0, 0, 0, 8]] * 2 and ledger.tokens == 3
    assert other.price == pytest.approx(-1 + 0.1 + 0.001) and other.tokens == 2
    other.levels += 1
    assert ledger.levels.sum() == 16


@pytest.mark.parametrize("average", [2.3, 3.0, 3.7])
def test_each_sequence_has_the_mean_that_it_asks_for(average):
    random = np.random.default_rng(3)
    _, nats = _nats(random)
    rule = PricedLevels(nats, SCALE)
    chooser = ByBits(rule, SCALE, nats)
    ledgers = [
        BitLedger(average, -9.0, SCALE.levels),
        BitLedger(4.5 - average / 2, -6.0, SCALE.levels),
    ]
    available = Available(np.zeros(E, np.int64), J)
    spent = np.zeros((2, 2))
    for _ in range(400):
        hard = float(np.exp(random.standard_normal()))  # some tokens matter more
        for layer in range(2):
            routed = _two(random, ledgers, layer, hard)
            assigned = chooser(routed, available)
            assert assigned.ids is routed.ids and assigned.weights is routed.weights
            bits = SCALE.bits[assigned.levels - 1].sum(1) * SCALE.weight[layer]
            spent += np.stack([bits, np.full(2, K * SCALE.weight[layer])])
            costs = [
                nats[layer](routed.ids[t], routed.weights[t])[
                    range(K), assigned.levels[t] - 1
                ].sum()
                for t in range(2)
            ]
            assert assigned.nats == pytest.approx(costs)
    means = spent[0] / spent[1]
    assert means == pytest.approx([ledger.average for ledger in ledgers], rel=0.02)
    for ledger, mean in zip(ledgers, means, strict=True):
        slots = ledger.levels[:, 1:] * SCALE.weight[:, None]
        assert (slots @ SCALE.bits).sum() / slots.sum() == pytest.approx(mean)
        assert ledger.mean == pytest.approx(mean)


def _two(random, ledgers, layer, hard):
    """A token of each of two sequences."""
    ids = np.stack([random.permutation(E)[:K] for _ in range(2)])
    weights = (random.random((2, K)) * hard).astype(np.float32)
    one, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
    spans = tuple(
        Span(Sequence(StateOfNothing(), ledger), one, none, Phase.DECODE) for ledger in ledgers
    )
    return routed_step(ids, weights, layer=layer, spans=spans)


def test_sequences_without_a_ledger_are_whole():
    random = np.random.default_rng(4)
    _, nats = _nats(random)
    chooser, available = ByBits(PricedLevels(nats, SCALE), SCALE), Available(np.zeros(E), J)
    ledger = BitLedger(2.0, 9.0, SCALE.levels)
    assigned = chooser(_two(random, [None, ledger], 0, 1.0), available)
    assert assigned.levels.tolist() == [[J] * K, [1] * K] and assigned.nats is None
    assert ledger.levels[0].tolist() == [0, K, 0, 0]
    alone = chooser(_two(random, [None, None], 0, 1.0), available)
    assert alone.levels is None


# -- in the engine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed_bundle(goldens, tmp_path_factory):
    """Planes 5+1+1+1, prices, and random routers of levels."""
    return add_routers(goldens[6], tmp_path_factory.mktemp("bits") / "routed.smoe")


IDS = np.random.default_rng(5).integers(1, 307, 120)


@pytest.mark.parametrize("name", ["trained", "priced", "uniform", "by-layer"])
@pytest.mark.parametrize("average", [5.6, 6.5])
def test_the_mean_comes_out_as_asked(routed_bundle, name, average):
    with Engine.open(routed_bundle, policies=Policies(bits=f"{name}:{average}")) as engine:
        exact = open_bundle(routed_bundle)
        logits = np.stack(list(engine.score(IDS, 8)))
        levels = engine.sequence.ledger.levels
        mean = (levels.sum(0)[1:] @ scale_of(exact.manifest, 4).bits) / levels.sum()
        assert mean == pytest.approx(average, rel=0.02)
        assert engine.stats.nats_spent > 0 and not engine.lossless
        assert any(f"bits: {name}:{average}" in line for line in engine.mode_lines())
        again = np.stack(list(engine.score(IDS[:12], 8)))
    with Engine.open(routed_bundle) as engine:
        whole = np.stack(list(engine.score(IDS, 8)))
        prompt = engine.logits(IDS)
    assert np.array_equal(logits[0], whole[0])  # a prompt is whole
    assert not np.array_equal(logits[1:], whole[1:]) and len(again) == 5 and len(prompt) == 120


def test_levels_do_not_depend_on_the_budget(routed_bundle):
    results = []
    opened = open_bundle(routed_bundle)
    policies = Policies(bits="trained:6.2")
    kept = tables_bytes(policies, opened)
    for beside in (None, memory_for(opened, 6, 300) + kept, memory_for(opened, 3, 300) + kept):
        with Engine.open(routed_bundle, beside=beside, context=300, policies=policies) as engine:
            results.append(np.stack(list(engine.score(IDS[:60], 8))))
    assert all(np.array_equal(results[0], each) for each in results[1:])


def test_no_mean_is_as_the_routers_were_trained(routed_bundle):
    with Engine.open(routed_bundle, policies=Policies(bits="trained")) as engine:
        list(engine.score(IDS, 8))
        assert engine.sequence.ledger.price == 0 and engine.sequence.ledger.levels.sum()


@pytest.mark.parametrize("policies, sentence", [
    (Policies(bits="best:3"), "There are no bits 'best'; there are none, trained, priced"),
    (Policies(bits="priced"), "Bits priced want a mean after a colon, like priced:6.5"),
    (Policies(bits="priced:4.9"), "the mean bits of a weight is 4.9; it goes from 5.0 to 8.0"),
    (Policies(bits="uniform:many"), "after the colon comes the mean bits of a weight"),
    (Policies(bits="priced:6", loss=0.1), "Levels by priced:6 and a loss budget exclude"),
])  # fmt: skip
def test_what_cannot_be_asked_is_a_sentence(routed_bundle, policies, sentence):
    opened = open_bundle(routed_bundle)
    beside = memory_for(opened, 4, 300) + tables_bytes(policies, opened)
    with pytest.raises(EngineError, match=sentence):
        Engine.open(routed_bundle, beside=beside, policies=policies)


def test_bundles_that_lack_something_say_what(goldens, tmp_path):
    with pytest.raises(EngineError, match="no routers of levels; train them with smoe-prep train"):
        Engine.open(goldens[6], policies=Policies(bits="trained:6"))
    with pytest.raises(EngineError, match="does not say what levels cost"):
        Engine.open(goldens[2], policies=Policies(bits="priced:6"))
    with pytest.raises(EngineError, match="experts in f32 are read in one plane"):
        Engine.open(goldens[0], policies=Policies(bits="uniform:3"))


def test_damaged_routers_are_a_sentence(routed_bundle, tmp_path):
    bundle = add_routers(routed_bundle, tmp_path / "nan.smoe", bias=np.nan)
    with pytest.raises(EngineError, match="bits_bias holds values that are not finite"):
        Engine.open(bundle, policies=Policies(bits="trained:6"))
    narrow = add_routers(routed_bundle, tmp_path / "narrow.smoe", hidden=5)
    with pytest.raises(BundleError, match=r"table 00.bits_weight is F16 .*\[E,J,H\].* was wanted"):
        open_bundle(narrow)
    cut = shutil.copytree(routed_bundle, tmp_path / "cut.smoe")
    file = cut / "bits.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(BundleError, match="bits.safetensors"):
        open_bundle(cut)


def test_bits_of_a_level_are_the_mean_of_all_matrices():
    encoding = parse("nested:2+1+1/3+1+1")
    matrices = {"gate": (8, 4), "up": (8, 4), "down": (4, 8)}
    assert encoding.bits(1, matrices) == pytest.approx(7 / 3)
    assert encoding.bits(3, {"up": (8, 4), "down": (4, 8)}) == 4.5
