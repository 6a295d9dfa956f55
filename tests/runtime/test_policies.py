"""Policies in the engine: lossless ones change no bit, lossy ones do what their rule says, and misuse is a sentence."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe.artifacts import open_bundle
from smoe.artifacts.manifest import Routing
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import plan_memory
from smoe.runtime.cache.eviction import EVICTIONS
from smoe.runtime.cache.predict import Predicted, Previous, TopScore, Transition
from smoe.runtime.choose.substitution import Below, Buddy, CachePrior, Choice, Smoe
from smoe.runtime.options import SUBSTITUTIONS, tables_bytes
from smoe.runtime.routing import gate_scores, weigh

RULES = [Routing("sum", 1, 0), Routing("none", 1, 0), Routing("softmax", 1, 0)]


@pytest.fixture(scope="module")
def budget(golden):
    """Bytes that leave room for so many experts of 14."""
    plan = plan_memory(open_bundle(golden), None, 300)
    return lambda experts: plan.total - (plan.capacity - experts) * plan.record


@pytest.fixture(scope="module")
def wanted(golden, answer):
    with Engine.open(golden) as engine:
        return engine.logits(answer["prompt"]), np.stack(list(engine.score(answer["prompt"][:40])))


# -- lossless ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [3, 6, 11])
@pytest.mark.parametrize("policies, io", [
    *[(Policies(eviction=name), "buffered") for name in EVICTIONS],
    (Policies(warm=False), "direct"),
    (Policies(prefetch="previous"), "direct"),
    (Policies(prefetch="transition"), "buffered"),
    (Policies(prefetch="smoe:0.1", warm=False), "buffered"),
])  # fmt: skip
def test_lossless_policies_change_no_bit(golden, answer, budget, wanted, experts, policies, io):
    prefill, decoded = wanted
    kept = tables_bytes(policies, open_bundle(golden))
    with Engine.open(golden, memory=budget(experts) + kept, policies=policies, io=io) as engine:
        assert np.array_equal(engine.logits(answer["prompt"]), prefill)
        assert np.array_equal(np.stack(list(engine.score(answer["prompt"][:40]))), decoded)
        stats = engine.stats
        assert stats.misses > 0 and stats.substituted == 0 and stats.hits == stats.wanted_hits
        assert stats.hits + stats.misses == stats.wanted


def test_shares_change_no_bit_and_keep_every_layer_to_its_part(golden, answer, budget, wanted):
    with Engine.open(golden, memory=budget(8), policies=Policies(shares=True)) as engine:
        assert np.array_equal(np.stack(list(engine.score(answer["prompt"][:40]))), wanted[1])
        assert [engine._experts._residency.resident(layer).sum() for layer in (0, 1)] == [4, 4]


def test_a_warm_start_holds_what_calibration_used_most(golden, budget):
    from smoe.artifacts.tables import load_tables

    counts = [tables["counts"] for tables in load_tables(golden / "tables.safetensors", [7, 7])]
    share = np.concatenate([c / c.sum() for c in counts])
    with Engine.open(golden, memory=budget(5)) as engine:
        held = np.concatenate([engine._experts._residency.resident(layer) for layer in (0, 1)])
        assert held.sum() == 5 and share[held].min() >= share[~held].max()
    with Engine.open(golden, memory=budget(5), policies=Policies(warm=False)) as engine:
        assert len(engine._experts._residency) == 0


@pytest.mark.parametrize("prefetch", ["previous", "transition", "smoe:0"])
def test_guesses_are_read_counted_and_used(golden, answer, budget, prefetch, monkeypatch):
    with Engine.open(golden, memory=budget(7), policies=Policies(prefetch=prefetch)) as engine:
        reader = engine._experts._reader
        guess = reader.guess

        def patient(*arguments):  # whether a guess comes in time is chance on a model this small
            request = guess(*arguments)
            reader.wait([request])
            return request

        monkeypatch.setattr(reader, "guess", patient)
        list(engine.score(answer["prompt"]))
        stats = engine.stats
        assert 0 < stats.guesses_used <= stats.guesses_read
        assert (stats.foresight_seconds > 0) == prefetch.startswith("smoe")
        most = stats.misses + stats.guesses_read
        assert stats.misses <= stats.bytes_read // engine.plan.record <= most


# -- lossy ---------------------------------------------------------------------------------------------------------


def _choice(random, rule, tokens=3, experts=7, k=3, resident=None) -> Choice:
    scores = random.standard_normal((tokens, experts)).astype(np.float32)
    if rule.normaliser != "softmax":
        scores = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    here = random.random(experts) < 0.5 if resident is None else resident
    return Choice(0, rule, ids, weigh(rule, scores, ids), scores, scores, here)


def algorithm_1(choice: Choice, alpha: float) -> list[set[int]]:
    """The paper's listing word for word, with sets: what each token computes."""
    score = gate_scores(choice.rule, choice.scores)
    tokens, experts = score.shape
    k, cached = choice.ids.shape[1], {e for e in range(experts) if choice.resident[e]}
    ranked = [sorted(range(experts), key=lambda e: -score[t, e]) for t in range(tokens)]
    out: list[set[int]] = []
    computed: set[int] = set()
    for t in range(tokens):
        limit = score[t, ranked[t][k]]
        out.append({e for e in ranked[t][:k] if score[t, e] >= (1 + alpha) * limit})
        computed |= out[t]
    for t in range(tokens):
        limit = score[t, ranked[t][k]]
        low = [e for e in ranked[t][:k] if e not in out[t]]
        kept = [e for e in low if e in cached | computed]
        candidates = [
            e
            for e in ranked[t][k:]
            if score[t, e] >= (1 - alpha) * limit and e in cached | computed
        ]
        n = len(low) - len(kept)
        taken = candidates[:n]
        rest = [e for e in low if e not in kept][
            : n - len(taken)
        ]  # ranked: the highest score is kept first
        out[t] |= {*kept, *taken, *rest}
    return out


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.sampled_from(RULES),
    st.sampled_from([0, 0.1, 0.35, 0.9, 1.5]),
)
def test_smoe_is_algorithm_1(seed, tokens, rule, alpha):
    choice = _choice(np.random.default_rng(seed), rule, tokens)
    ids, weights = Smoe(alpha)(choice)
    assert [set(row.tolist()) for row in ids] == algorithm_1(choice, alpha)
    assert np.allclose(
        weights, weigh(rule, choice.raw, ids)
    )  # a stand-in has its own score's weight
    same = (ids == choice.ids).all(1)
    assert np.array_equal(weights[same], choice.weights[same])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(RULES))
def test_every_substitution_leaves_k_different_experts_and_residents_alone(seed, rule):
    random = np.random.default_rng(seed)
    choice = _choice(random, rule)
    errors = random.random((7, 7))
    counts = random.integers(0, 9, (7, 7))
    for policy in (Smoe(0.5), CachePrior(0.5), Buddy([counts], entropy=0), Below("live", 2), Below("zero", 2),
                   Below("random", 2), Below("similar", 2, [errors])):  # fmt: skip
        ids, weights = policy(choice)
        assert ids.shape == weights.shape == choice.ids.shape and np.isfinite(weights).all()
        for old, new in zip(choice.ids, ids, strict=True):
            real = new[new < 7]
            assert len(set(real.tolist())) == len(real)
            if not isinstance(
                policy, CachePrior
            ):  # which also prefers residents to residents of lower score
                kept = choice.resident[old]
                assert np.array_equal(old[kept], new[kept])
                assert all(choice.resident[e] or e in old or isinstance(policy, Smoe) for e in real)


def test_nothing_changes_where_all_is_resident():
    random = np.random.default_rng(0)
    for rule in RULES:
        choice = _choice(random, rule, resident=np.ones(7, bool))
        for policy in (
            Smoe(1),
            CachePrior(0.3),
            Buddy([np.ones((7, 7))], 0),
            Below("live", 9),
            Below("zero", 9),
        ):
            ids, weights = policy(choice)
            assert np.array_equal(ids, choice.ids) and np.array_equal(weights, choice.weights)


def test_cache_prior_by_eye():
    """Logits 4 3 2 1 0, k = 2, range 4: with lambda .3 residents gain 1.2. The best one is always taken."""
    scores = np.array([[4.0, 3, 2, 1, 0]], np.float32)
    rule = Routing("softmax", 1, 0)
    here = np.array([False, False, True, False, False])
    choice = Choice(
        0, rule, np.array([[0, 1]]), weigh(rule, scores, np.array([[0, 1]])), scores, scores, here
    )
    ids, weights = CachePrior(0.3, always=1)(choice)
    assert ids.tolist() == [[0, 2]] and np.allclose(
        weights, [[np.e**2 / (1 + np.e**2), 1 / (1 + np.e**2)]]
    )
    assert CachePrior(0.2, always=1)(choice)[0].tolist() == [[0, 1]]
    assert CachePrior(9, always=2)(choice)[0].tolist() == [[0, 1]]


def test_buddies_by_eye():
    """Expert 1 is missing; it was active with 3 (six times), 4 (three times) and 2 (once)."""
    rule, scores = Routing("none", 1, 0), np.array([[0.5, 0.4, 0.03, 0.04, 0.03]], np.float32)
    counts = np.zeros((5, 5))
    counts[1] = [0, 10, 1, 6, 3]
    ids = np.array([[0, 1]])
    here = np.array([True, False, True, False, True])
    choice = Choice(0, rule, ids, weigh(rule, scores, ids), scores, scores, here)
    found, weights = Buddy([counts], entropy=0.9)(choice)
    assert found.tolist() == [[0, 4]] and weights.tolist() == choice.weights.tolist()
    assert Buddy([counts], entropy=0.9999)(choice)[0].tolist() == [[0, 1]]  # not equal enough
    assert Buddy([counts], entropy=0, mass=0.5)(choice)[0].tolist() == [
        [0, 1]
    ]  # 3 alone is a buddy, and not here
    assert Buddy([counts], entropy=0, most_missing=0.5)(choice)[0].tolist() == [[0, 1]]


def test_controls_by_eye():
    scores = np.array([[0.4, 0.3, 0.05, 0.15, 0.1]], np.float32)
    rule, here = Routing("sum", 1, 0), np.array([True, False, True, False, True])
    ids = np.array([[0, 1]])
    choice = Choice(0, rule, ids, weigh(rule, scores, ids), scores, scores, here)
    errors = [np.array([[9, 9, 9, 9, 9], [9, 9, 1, 0, 2], *[[9] * 5] * 3])]
    found, weights = Below("live", 0.5)(choice)
    assert found.tolist() == [[0, 4]] and np.allclose(
        weights, [[4 / 7, 1 / 7]]
    )  # .1 where the sum was .7
    assert (
        Below("zero", 0.5)(choice)[0].tolist() == [[0, 5]]
        and Below("zero", 0.5)(choice)[1][0, 1] == 0
    )
    assert Below("similar", 0.5, errors)(choice)[0].tolist() == [[0, 2]]
    assert {int(Below("random", 0.5, seed=s)(choice)[0][0, 1]) for s in range(20)} == {2, 4}
    for name in ("live", "zero", "random"):
        assert Below(name, 0.4)(choice)[0].tolist() == [[0, 1]]  # its weight is 3/7


@pytest.mark.parametrize("name", SUBSTITUTIONS)
def test_every_substitution_runs_and_is_counted(golden, answer, budget, wanted, name):
    number = {"smoe": 1.5, "cache-prior": 1, "buddy": 0}.get(name, 1)
    with Engine.open(
        golden, memory=budget(6), policies=Policies(substitution=f"{name}:{number}")
    ) as engine:
        logits = np.stack(list(engine.score(answer["prompt"][:40])))
        stats = engine.stats
        assert np.isfinite(logits).all() and not np.array_equal(logits, wanted[1])
        assert 0 < stats.substituted < stats.slots and stats.hit_rate > stats.wanted_hit_rate
        assert "(lossy)" in "\n".join(engine.mode_lines())


def test_fewer_planes_are_lossy_whatever_the_policies(goldens):
    for level, said in ((1, "(lossy)"), (None, "(lossless)")):
        plan = plan_memory(open_bundle(goldens[2]), None, 300, level)
        with Engine.open(
            goldens[2], plan.total - plan.record * (plan.capacity // 2), 300, level=level
        ) as engine:
            assert f"substitution none {said}" in "\n".join(engine.mode_lines())
            assert engine.lossless == (level is None)


def test_smoe_at_zero_is_lossless(golden, answer, budget, wanted):
    with Engine.open(golden, memory=budget(6), policies=Policies(substitution="smoe:0")) as engine:
        assert np.array_equal(np.stack(list(engine.score(answer["prompt"][:40]))), wanted[1])
        assert engine.stats.substituted == 0


# -- guesses -------------------------------------------------------------------------------------------------------


def test_what_prefetches_guess():
    x = np.ones((1, 2), np.float32)
    previous = Previous(2)
    assert previous.ahead(0, np.array([[4, 1]]), x) == []
    assert previous.ahead(1, np.array([[2, 3]]), x) == [(0, 4), (0, 1)]
    assert previous.ahead(0, np.array([[5, 6]]), x) == [(1, 2), (1, 3)]
    counts = np.array([[8, 1, 1], [0, 0, 10]])
    transition = Transition([None, counts], [2, 2])
    assert transition.ahead(0, np.array([[0, 1]]), x) == [(1, 2), (1, 0)]
    assert transition.ahead(1, np.array([[0]]), x) == []
    assert transition.ahead(0, np.array([[0, 2]]), x) == [(1, 0), (1, 1)]  # 2 is no expert
    weights, bias = np.array([[3, 0, 1], [-4, 1, 1]], np.float32), np.array([0, 0, 0.5], np.float32)
    predicted = Predicted(2, [None, None, (weights, bias)], [2, 2, 2])
    assert predicted.ahead(0, np.array([[0]]), np.array([[9, 0], [1, 1]], np.float32)) == [
        (2, 2),
        (2, 1),
    ]
    assert predicted.ahead(1, np.array([[0]]), x) == []  # beyond the last layer
    assert Predicted(1, [None, None], [1, 1]).ahead(0, np.array([[0]]), x) == []
    scores = np.array([[0.5, 0.1, 0.12, 0.28]], np.float32)
    rule = Routing("none", 1, 0)
    assert TopScore(0.1).foresee(1, rule, np.array([[0, 3]]), scores) == [(1, 0), (1, 3)]
    assert TopScore(2).foresee(1, rule, np.array([[0, 3]]), scores) == [(1, 0)]


# -- misuse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policies, sentence", [
    (Policies(eviction="mru"), "no eviction 'mru'; there are lru"),
    (Policies(substitution="smo:1"), "no substitution 'smo'; there are none, smoe"),
    (Policies(substitution="smoe:x"), "'smoe:x': after the colon comes the alpha, a number from 0 to 10"),
    (Policies(substitution="smoe:"), "after the colon comes the alpha"),
    (Policies(substitution="smoe:-1"), "the alpha is -1.0; it goes from 0 to 10"),
    (Policies(substitution="zero:nan"), "the weight below is nan"),
    (Policies(prefetch="next"), "no prefetch 'next'"),
    (Policies(prefetch="previous:2"), "takes no number"),
    (Policies(prefetch="predicted"), "no linear predictor at distance 1"),
    (Policies(prefetch="predicted:4"), "the distance is 4.0; it goes from 1 to 3"),
])  # fmt: skip
def test_policies_that_do_not_exist_are_sentences(golden, budget, policies, sentence):
    with pytest.raises(EngineError, match=sentence):
        Engine.open(golden, memory=budget(6), policies=policies)


def test_policies_without_effect_or_room_are_refused(golden, budget):
    with pytest.raises(
        EngineError, match="All 14 experts fit into memory, so that policies .* have no effect"
    ):
        Engine.open(golden, policies=Policies(substitution="smoe"))
    with pytest.raises(
        EngineError, match="Shares by layer cannot work with 5 resident experts: 2 for each of 2"
    ):
        Engine.open(golden, memory=budget(5), policies=Policies(shares=True))
    with pytest.raises(
        EngineError, match="no way to read called 'mapped'; there are direct and buffered"
    ):
        Engine.open(golden, memory=budget(5), io="mapped")


def test_a_model_whose_routing_is_not_known_takes_no_substitution(copied, budget):
    import json

    file = copied / "manifest.json"
    text = json.loads(file.read_text())
    text["layers"][1] |= {"routing": None, "routing_refusal": "no pattern fits"}
    text["layers"][1]["wires"] |= {"scores": "", "raw": ""}
    file.write_text(json.dumps(text))
    for policies in (
        Policies(substitution="smoe"),
        Policies(eviction="score"),
        Policies(prefetch="smoe"),
    ):
        with pytest.raises(EngineError, match="is not possible with this model: no pattern fits"):
            Engine.open(copied, memory=budget(6), policies=policies)
    with Engine.open(copied, memory=budget(6), policies=Policies(eviction="lru")) as engine:
        assert len(list(engine.generate([1, 2, 3], max_new_tokens=4))) == 4


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", ["none", "previous"])
def test_a_shard_that_shrinks_and_comes_back(copied, answer, budget, prefetch):
    """The request ends with a sentence, the engine lives, and no place is lost."""
    import os

    shard = copied / "experts" / "layer-01.safetensors"
    whole = shard.read_bytes()
    with Engine.open(
        copied, memory=budget(5), policies=Policies(prefetch=prefetch), io="buffered"
    ) as engine:
        for _, at in itertools.product(range(3), (20000, len(whole) // 2, len(whole) - 40000)):
            os.truncate(shard, at)
            with pytest.raises(EngineError, match="ends inside expert"):
                for _ in range(3):
                    list(engine.score(answer["prompt"]))
            with open(shard, "r+b") as file:
                file.write(whole)
            tokens = [token.id for token in engine.generate(answer["prompt"], max_new_tokens=24)]
            assert tokens == answer["greedy"].tolist()
        residency = engine._experts._residency
        assert len(residency) + len(residency._free) + len(engine._experts._guesses) == 5
