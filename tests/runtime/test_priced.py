"""The priced scheduler against brute force, its account, and the engine that obeys it: levels, bytes, failures, misuse."""

import dataclasses
import itertools
import os
import shutil

import numpy as np
import pytest

from smoe.artifacts import open_bundle, safetensors_file
from smoe.artifacts.tables import load_tables, save_tables
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import plan_memory
from smoe.runtime.cache.eviction import NextUse
from smoe.runtime.choose.priced import CAP, KEEP, LossBudget, PlaneWorth, Priced
from smoe.runtime.choose.prices import Prices
from smoe.runtime.choose.substitution import Choice, Chosen
from smoe.runtime.options import _usual_weights

E, J = 6, 3
SIZES = np.array([0, 500_000, 700_000, 900_000])


def _tables(random, experts=E, levels=J, size=1e-2) -> dict[str, np.ndarray]:
    products = random.standard_normal((experts, 30, experts)) * np.sqrt(size)
    cross = np.stack([(products[e, :, [e]].T * products[e]).mean(0) for e in range(experts)])
    level = np.sort(random.random((experts, levels)), 1)[:, ::-1] * size
    level[:, -1] = 0
    fit = np.array([[1.1, 0.002], [0.9, 0.003], [1.0, 0.001]])
    found = {"cross": cross, "standin": np.square(products).mean(1), "level": level, "fit": fit}
    return {f"price_{name}": table.astype(np.float32) for name, table in found.items()}


def _choice(random, tokens: int) -> Choice:
    ids = np.stack([random.permutation(E + 1)[:3] for _ in range(tokens)])  # E is no expert
    weights = random.random((tokens, 3)).astype(np.float32)
    levels = random.integers(0, J + 1, E)
    return Choice(0, None, ids, weights, None, None, levels > 0, levels, J)


def _cheapest_slot(prices, choice, e, w) -> float:
    found = [float(prices.skip(e, w))]
    for s in range(E):
        if choice.here[s] == J:
            found.append(
                float(prices.stand_in(e, w, s, prices.best_weight(np.array(e), w, np.array(s))))
            )
    return min(found)


def _brute_force(prices, choice, worth) -> float:
    """The least of nats + worth x bytes over all alternatives of every expert."""
    total = 0.0
    for e in np.unique(choice.ids[choice.ids < E]).tolist():
        here = int(choice.here[e])
        weights = choice.weights[choice.ids == e].tolist()
        if here == J:
            continue
        found = [sum(_cheapest_slot(prices, choice, e, w) for w in weights)]
        for level in range(max(1, here), J + 1):
            read = SIZES[level] - SIZES[here]
            found.append(sum(float(prices.at_level(e, w, level)) for w in weights) + worth * read)
        total += min(found)
    return total


def _cost(prices, choice, chosen, worth) -> tuple[float, float]:
    """Nats, and those with worth x bytes, of what was chosen."""
    nats, read = 0.0, {}
    for slot in itertools.product(range(len(choice.ids)), range(3)):
        e, new, w = int(choice.ids[slot]), int(chosen.ids[slot]), float(choice.weights[slot])
        if e == E:
            assert new == E
        elif new == e:
            assert chosen.weights[slot] == choice.weights[slot] and 1 <= chosen.levels[slot] <= J
            level, here = int(chosen.levels[slot]), int(choice.here[e])
            nats += float(prices.at_level(e, w, level))
            assert level >= here, "what is here costs nothing"
            read[e] = SIZES[level] - SIZES[here]
        elif new == E:
            assert chosen.weights[slot] == 0
            nats += float(prices.skip(e, w))
        else:
            assert choice.here[new] == J, "a stand-in is here, whole"
            nats += float(prices.stand_in(e, w, new, float(chosen.weights[slot])))
    return nats, nats + worth * sum(float(size) for size in read.values())


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_choice_is_the_best_of_all(tokens):
    random = np.random.default_rng(tokens)
    (prices,) = Prices.of([_tables(random)]).layers
    shortcuts = 0
    for _ in range(60):
        choice = _choice(random, tokens)
        account = LossBudget(1e9, 1, worth=10 ** random.uniform(-10, -7))
        chosen = Priced(Prices((prices,)), [SIZES], account)(choice)
        worth = account.worth
        nats, cost = _cost(prices, choice, chosen, worth)
        assert np.isclose(cost, _brute_force(prices, choice, worth), rtol=1e-5)
        assert np.isclose(account.collect(), nats, rtol=1e-5, atol=1e-12)
        shortcuts += nats > 0
    assert 20 < shortcuts < 60


def test_levels_without_a_price_are_not_taken():
    random = np.random.default_rng(5)
    tables = _tables(random)
    del tables["price_level"]
    prices, nowhere = Prices.of([tables]), np.zeros(E, np.int64)
    for _ in range(20):
        choice = dataclasses.replace(_choice(random, 2), levels=nowhere, resident=nowhere > 0)
        chosen = Priced(prices, [SIZES], LossBudget(1e9, 1, 1e-8))(choice)
        assert (chosen.levels == J).all()


def test_nothing_is_spent_that_is_not_there():
    random = np.random.default_rng(0)
    prices = Prices.of([_tables(random)] * 2)
    for rate in (1e-6, 1e-4, 1e-3):
        account = LossBudget(rate, 2, worth=1e-6)  # would buy everything
        priced, spent, steps = Priced(prices, [SIZES] * 2, account), 0.0, 200
        for step in range(2 * steps):
            priced(dataclasses.replace(_choice(random, 1), layer=step % 2))
            spent += account.collect()
            assert (
                -1e-12 <= account.balance <= rate * CAP
                and spent <= rate * ((step + 1) / 2 + CAP / 2) + 1e-12
            )
        assert spent > 0.5 * rate * steps


def test_worth_follows_what_is_spent():
    random = np.random.default_rng(1)
    prices = Prices.of([_tables(random)])
    found = []
    for start in (1e-12, 1e-6):  # far too stingy, far too generous
        account = LossBudget(1e-3, 1, start)
        priced = Priced(prices, [SIZES], account)
        for _ in range(400):
            priced(_choice(random, 1))
        found.append(account.worth)
    assert 0.3 < found[0] / found[1] < 3


def test_worth_stays_finite_where_nothing_can_be_spent_and_comes_back():
    random = np.random.default_rng(2)
    prices = Prices.of([_tables(random)])
    account = LossBudget(1e-3, 1, 1e-9)
    for _ in range(20_000):
        account.begin(0, 1)
    assert np.isfinite(account.worth) and account.balance == 1e-3 * CAP
    priced = Priced(prices, [SIZES], account)
    for _ in range(300):
        priced(_choice(random, 1))
    fresh = LossBudget(1e-3, 1, 1e-9)
    priced = Priced(prices, [SIZES], fresh)
    for _ in range(300):
        priced(_choice(random, 1))
    assert 0.3 < account.worth / fresh.worth < 3


def test_a_long_prompt_saves_up_no_more_than_the_cap():
    account = LossBudget(0.01, 3, 1e-9)
    for layer in range(3):
        account.begin(layer, 10_000)
    assert account.balance == 0.01 * CAP and account.worth == 1e-9


def test_a_plane_is_worth_what_uses_cost_more_without_it():
    """Against the definition, expert by expert."""
    random = np.random.default_rng(3)
    prices = Prices.of([_tables(random), _tables(random)])
    sizes, weights = [SIZES, SIZES // 2], [random.random(E), random.random(E)]
    account = LossBudget(1, 2, 1e-8)
    worth = PlaneWorth(prices, weights, sizes, account)
    for byte in (1e-8, 3e-9, 1e-7):
        account.worth = byte
        for layer, expert, level in itertools.product(range(2), range(E), range(1, J + 1)):
            of, w, ends = prices.layers[layer], weights[layer][expert], sizes[layer]
            nats = [
                float(of.skip(expert, w)),
                *(float(of.at_level(expert, w, j)) for j in range(1, J)),
                0.0,
            ]
            cost = [
                min(nats[j] + KEEP * byte * (ends[j] - ends[here]) for j in range(here, J + 1))
                for here in range(J + 1)
            ]
            found = worth(np.array([layer * E + expert]), np.array([level]))[0]
            assert np.isclose(
                found, (cost[level - 1] - cost[level]) / (ends[level] - ends[level - 1])
            )


def test_an_expert_that_calibration_never_reached_counts_as_its_layer_does():
    found = _usual_weights(np.array([4, 0, 1]), np.array([2.0, 0.0, 0.25]))
    assert found.tolist() == [0.5, 2.25 / 5, 0.25]
    assert _usual_weights(np.zeros(2, int), np.zeros(2)).tolist() == [0, 0]


def test_what_is_wanted_sooner_and_worth_more_stays():
    eviction = NextUse([E])
    for expert in (0, 0, 0, 1):
        eviction.begin(0, 1, None)
        eviction.use(expert)
    keys, levels = np.array([0, 1, 2]), np.array([1, 2, 1])
    assert not eviction.by_planes and np.array_equal(
        eviction.planes(keys, levels), eviction.values(keys)
    )
    eviction.worth = lambda keys, levels: np.where(levels == 1, 1.0, 0.01)
    assert eviction.by_planes and eviction.planes(keys, levels).argsort().tolist() == [2, 1, 0]
    eviction.worth = lambda keys, levels: np.where(levels == 1, 1.0, 100.0)
    assert eviction.planes(keys, levels).argmax() == 1


# -- in the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def priced_bundle(goldens, tmp_path_factory):
    """The golden bundle with planes, and prices."""
    out = shutil.copytree(goldens[2], tmp_path_factory.mktemp("priced") / "b.smoe")
    manifest, file = open_bundle(out).manifest, out / "tables.safetensors"
    levels = len(manifest.experts.encoding.split("+"))
    tables = load_tables(file, [7, 7])
    random = np.random.default_rng(0)
    save_tables(
        file,
        [of | _tables(random, 7, levels) for of in tables],
        safetensors_file.read_header(file).metadata,
    )
    about = dataclasses.replace(manifest.files["tables.safetensors"], size=file.stat().st_size)
    files = manifest.files | {"tables.safetensors": about}
    (out / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    return out


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(3).integers(3, 40, 40)


def _budget(bundle, experts: int) -> int:
    plan = plan_memory(open_bundle(bundle), None, 300)
    return plan.total - (plan.capacity - experts) * plan.record


def _scored(engine, ids):
    return np.stack(list(engine.score(ids, 8)))


@pytest.mark.parametrize("level", [2, 3])
def test_a_loss_budget_below_the_full_level(priced_bundle, prompt, level):
    with Engine.open(priced_bundle, context=300, level=level) as engine:
        wanted = _scored(engine, prompt)
    plan = plan_memory(open_bundle(priced_bundle), None, 300, level)
    budget = plan.total - (plan.capacity - 8) * plan.record
    for loss, same in ((1e-9, True), (0.05, False)):
        with Engine.open(
            priced_bundle, budget, 300, level=level, policies=Policies(loss=loss)
        ) as engine:
            assert np.allclose(_scored(engine, prompt), wanted, atol=1e-4) == same
            assert engine._experts._residency.levels(0).max() <= level
            assert engine._experts._residency.total <= engine.plan.capacity * engine.plan.record


def test_a_budget_buys_bytes_and_no_budget_changes_no_bit(priced_bundle, prompt):
    exact, read = [], []
    for loss in (0.0, 0.003, 0.03):
        with Engine.open(
            priced_bundle, _budget(priced_bundle, 6), 300, policies=Policies(loss=loss)
        ) as engine:
            assert engine.lossless == (loss == 0)
            exact.append(_scored(engine, prompt))
            read.append(engine.stats.bytes_read)
            assert (engine.stats.nats_spent > 0) == (loss > 0)
            assert engine.stats.nats_spent <= loss * (len(prompt) + CAP / 2)
            assert (f"at most {loss} nats per token" in "\n".join(engine.mode_lines())) == (
                loss > 0
            )
    with Engine.open(priced_bundle, context=300) as engine:
        assert np.array_equal(exact[0], _scored(engine, prompt))
    assert read[0] > read[1] > read[2] and not np.array_equal(exact[0], exact[2])


def _at_level(level):
    return lambda choice: Chosen(choice.ids, choice.weights, np.full(choice.ids.shape, level))


def test_levels_are_those_of_the_slots(priced_bundle, prompt):
    with Engine.open(priced_bundle, context=300, level=2) as engine:
        wanted = _scored(engine, prompt)
    own = Policies(substitution=_at_level(2), warm=False)
    with Engine.open(priced_bundle, _budget(priced_bundle, 14) - 1, 300, policies=own) as engine:
        assert np.array_equal(_scored(engine, prompt), wanted)


def test_a_higher_level_reads_only_what_is_missing(priced_bundle, prompt):
    level = 1
    own = Policies(substitution=lambda choice: _at_level(level)(choice), warm=False)
    with Engine.open(priced_bundle, _budget(priced_bundle, 13), 300, policies=own) as engine:
        ends = engine._shards.layouts[0].levels
        engine.step(engine._sequence, prompt[:1], np.array([0]))
        first = engine.stats.bytes_read
        assert first == 6 * ends[0] and ends[0] < ends[2]
        engine._sequence.reset()
        level = 3
        engine.step(engine._sequence, prompt[:1], np.array([0]))
        again = engine.stats.bytes_read - first
        # The first layer chooses as before; the second may choose others after a more exact first.
        assert 3 * (ends[2] - ends[0]) <= again <= 3 * (ends[2] - ends[0]) + 3 * ends[2]
        assert sorted(np.unique(engine._experts._residency.levels(0))) == [0, 3]
        engine._sequence.reset()
        level, before = 2, engine.stats.bytes_read
        engine.step(engine._sequence, prompt[:1], np.array([0]))
        assert engine.stats.bytes_read - before <= 3 * ends[2], (
            "what is here at a higher level is not read again"
        )


class _AtRandom:
    """Levels at random, the same in every engine."""

    def __init__(self):
        self.random = np.random.default_rng(4)

    def __call__(self, choice):
        levels = self.random.integers(1, J + 2, choice.ids.max() + 1)
        return Chosen(choice.ids, choice.weights, levels[choice.ids])


def test_planes_come_and_go_and_change_no_bit(priced_bundle, prompt):
    found, most = [], []
    for by_planes in (False, True):
        own = Policies(substitution=_AtRandom())
        with Engine.open(priced_bundle, _budget(priced_bundle, 6), 300, policies=own) as engine:
            residency, random = engine._experts._residency, np.random.default_rng(5)
            if by_planes:
                residency.eviction.worth = lambda keys, levels, random=random: random.random(
                    len(keys)
                )
            scored, count = [], []
            for logits in engine.score(prompt, 8):
                scored.append(logits)
                count.append(len(residency))
                assert residency.held.sum() <= engine.plan.capacity * engine.plan.record
                for layer, layout in enumerate(engine._shards.layouts):
                    for expert, level in enumerate(residency.levels(layer)):
                        place = residency.find((layer, expert))
                        if level:  # what is here is what is in the shard, up to its level, and nothing else
                            assert residency.held[place] == layout.levels[level - 1]
                            assert not engine._experts.places.rows[
                                place, layout.levels[level - 1] :
                            ].any()
            found.append(np.stack(scored))
            most.append(max(count))
    assert np.array_equal(*found) and most[1] > most[0] >= 6


def test_a_failed_refinement_keeps_what_was_there(priced_bundle, prompt, monkeypatch):
    level = 1
    own = Policies(substitution=lambda choice: _at_level(level)(choice), warm=False)
    with Engine.open(priced_bundle, _budget(priced_bundle, 13), 300, policies=own) as engine:
        wanted = _scored(engine, prompt)
        read = engine._experts._reader._read

        def failing(layer, expert, into, since, upto):
            if since:
                raise EngineError("the disk is gone")
            return read(layer, expert, into, since, upto)

        monkeypatch.setattr(engine._experts._reader, "_read", failing)
        level = 3
        with pytest.raises(EngineError, match="the disk is gone"):
            _scored(engine, prompt)
        level = 1
        assert np.array_equal(_scored(engine, prompt), wanted)
        monkeypatch.setattr(engine._experts._reader, "_read", read)
        level = 4
        with Engine.open(priced_bundle, context=300) as full:
            assert np.array_equal(_scored(engine, prompt), _scored(full, prompt))


@pytest.mark.parametrize("policies, sentence", [
    (Policies(loss=-0.1), "-0.1 nats per token was asked for; it goes from 0 to 1"),
    (Policies(loss=7), "7 nats per token"),
    (Policies(loss=float("nan")), "nan nats per token"),
    (Policies(loss=0.01, substitution="zero"), "exclude each other"),
])  # fmt: skip
def test_misuse_is_a_sentence(priced_bundle, policies, sentence):
    with pytest.raises(EngineError, match=sentence):
        Engine.open(priced_bundle, _budget(priced_bundle, 6), 300, policies=policies)


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="this system does not say which files are open"
)
def test_an_engine_that_is_refused_leaves_no_file_open(goldens):
    before = len(os.listdir("/proc/self/fd"))
    for policies in (
        Policies(loss=0.01),
        Policies(eviction="mru"),
        Policies(prefetch="predicted:1"),
    ):
        with pytest.raises(EngineError):
            Engine.open(goldens[2], _budget(goldens[2], 6), 300, policies=policies)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_bundle_without_prices_takes_no_loss_budget(goldens):
    with pytest.raises(EngineError, match=r"This bundle has no prices.*--prices"):
        Engine.open(goldens[2], _budget(goldens[2], 6), 300, policies=Policies(loss=0.01))


@pytest.mark.parametrize(
    "name, value",
    [("price_fit", np.nan), ("price_fit", -1), ("price_standin", np.inf), ("price_level", -1e-3)],
)
def test_values_that_are_no_prices_are_refused(name, value):
    tables = [_tables(np.random.default_rng(0)) for _ in range(2)]
    assert len(Prices.of(tables).layers) == 2
    tables[1][name] = np.full_like(tables[1][name], value)
    with pytest.raises(EngineError, match=f"{name} holds values that are no prices"):
        Prices.of(tables)


def test_a_loss_budget_where_all_fits_has_no_effect_and_is_refused(priced_bundle):
    with pytest.raises(EngineError, match="have no effect"):
        Engine.open(priced_bundle, context=300, policies=Policies(loss=0.01))
