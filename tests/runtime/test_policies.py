"""Policies in the engine: lossless ones change no bit, lossy ones do what their rule says, and misuse is a sentence."""

import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parts import accounted, decoded, greedy, make_parts, prompted, routed_step, step

from smoe.artifacts import open_bundle
from smoe.artifacts.manifest import Routing
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import plan_memory
from smoe.runtime.cache.eviction import EVICTIONS
from smoe.runtime.cache.predict import Predicted, Previous, TopScore, Transition
from smoe.runtime.choose.substitution import Buddy, CachePrior, Smoe, ThresholdControls
from smoe.runtime.options import SUBSTITUTIONS, make_predictor, tables_bytes
from smoe.runtime.routing import Available, Routed, as_routed, gate_scores, weigh
from smoe.runtime.step import Step

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
        assert stats.misses > 0 and stats.substituted == 0
        assert stats.hits + stats.misses == stats.wanted
        if policies.prefetch == "none":  # a guess may arrive just after the router's word
            assert stats.hits == stats.wanted_hits


class _Spy:
    """The router's word, and what was resident when it was spoken."""

    def __init__(self):
        self.seen: list[tuple[int, np.ndarray]] = []

    def __call__(self, routed: Routed, available: Available):
        self.seen.append((routed.layer, available.resident))
        return as_routed(routed, available)


def test_shares_change_no_bit_and_keep_every_layer_to_its_part(golden, answer, budget, wanted):
    spy = _Spy()
    policies = Policies(shares=True, substitution=spy)
    with Engine.open(golden, memory=budget(8), policies=policies) as engine:
        assert np.array_equal(np.stack(list(engine.score(answer["prompt"][:40]))), wanted[1])
    counts = {layer: [int(r.sum()) for at, r in spy.seen if at == layer] for layer in (0, 1)}
    assert max(counts[0]) <= 4 and max(counts[1]) <= 4
    assert counts[0][-1] == counts[1][-1] == 4
    with Engine.open(golden, memory=budget(8), policies=Policies(shares=True)) as engine:
        assert np.array_equal(np.stack(list(engine.score(answer["prompt"][:40]))), wanted[1])


def test_a_warm_start_holds_what_calibration_used_most(golden, budget):
    counts = open_bundle(golden).tables.column("counts")
    share = np.concatenate([c / c.sum() for c in counts])
    with make_parts(golden, experts=5) as parts:
        parts.cache.warm(counts, 5, 1)
        held = np.concatenate([parts.resident(layer) for layer in (0, 1)])
        assert held.sum() == 5 and share[held].min() >= share[~held].max()
    for warm, wanted in ((True, held[:7]), (False, np.zeros(7, bool))):
        spy = _Spy()
        policies = Policies(warm=warm, substitution=spy)
        with Engine.open(golden, memory=budget(5), policies=policies) as engine:
            engine.step(Step((decoded(engine.new_sequence(), 3),)))
        assert spy.seen[0][0] == 0 and np.array_equal(spy.seen[0][1], wanted)


@pytest.mark.parametrize("prefetch", ["previous", "transition", "smoe:0"])
def test_guesses_are_read_counted_and_used(golden, answer, prefetch):
    bundle = open_bundle(golden)
    predict = make_predictor(prefetch, bundle.manifest, bundle.tables)
    # Whether a guess comes in time is chance with threads on a model this small; without them it is read at once.
    with make_parts(golden, experts=5, predict=predict, threads=0) as parts:
        sequence = parts.sequence()
        for token in answer["prompt"].tolist():
            step(parts.model, decoded(sequence, token))
        stats = parts.stats
        assert 0 < stats.guesses_used <= stats.guesses_read
        assert (stats.foresight_seconds > 0) == prefetch.startswith("smoe")
        most = stats.misses + stats.guesses_read
        assert stats.misses <= stats.bytes_read // parts.sizes[0][-1] == stats.loads <= most
    with Engine.open(golden, policies=Policies()) as engine:
        exact = np.stack(list(engine.score(answer["prompt"][:3])))
    with make_parts(golden, experts=5, predict=predict, threads=0) as parts:
        sequence = parts.sequence()
        (first,) = step(parts.model, prompted(sequence, answer["prompt"][:1]))
        later = [step(parts.model, decoded(sequence, t))[0] for t in answer["prompt"][1:3].tolist()]
        assert np.array_equal(np.concatenate([first, *later]), exact)


# -- lossy ---------------------------------------------------------------------------------------------------------


def _choice(random, rule, tokens=3, experts=7, k=3, resident=None) -> tuple[Routed, Available]:
    scores = random.standard_normal((tokens, experts)).astype(np.float32)
    if rule.normaliser != "softmax":
        scores = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    resident = random.random(experts) < 0.5 if resident is None else resident
    return routed_step(ids, weigh(rule, scores, ids), scores, rule), _available(resident)


def _available(resident) -> Available:
    return Available(level=np.array(resident, np.int64), full=1)


def algorithm_1(routed: Routed, available: Available, alpha: float) -> list[set[int]]:
    """The paper's listing word for word, with sets: what each token computes."""
    score = gate_scores(routed.rule, routed.scores)
    tokens, experts = score.shape
    k, cached = routed.ids.shape[1], {e for e in range(experts) if available.resident[e]}
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
    routed, available = _choice(np.random.default_rng(seed), rule, tokens)
    chosen = Smoe(alpha)(routed, available)
    assert [set(row.tolist()) for row in chosen.ids] == algorithm_1(routed, available, alpha)
    # A stand-in has its own score's weight.
    assert np.allclose(chosen.weights, weigh(rule, routed.raw, chosen.ids))
    same = (chosen.ids == routed.ids).all(1)
    assert np.array_equal(chosen.weights[same], routed.weights[same])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(RULES))
def test_every_substitution_leaves_k_different_experts_and_residents_alone(seed, rule):
    random = np.random.default_rng(seed)
    routed, available = _choice(random, rule)
    errors = random.random((7, 7))
    counts = random.integers(0, 9, (7, 7))
    resident = available.resident
    for chooser in (
        Smoe(0.5),
        CachePrior(0.5),
        Buddy([counts], entropy=0),
        ThresholdControls("live", 2),
        ThresholdControls("zero", 2),
        ThresholdControls("random", 2),
        ThresholdControls("similar", 2, [errors]),
    ):
        chosen = chooser(routed, available)
        assert chosen.ids.shape == chosen.weights.shape == routed.ids.shape
        assert np.isfinite(chosen.weights).all() and chosen.levels is None
        for old, new in zip(routed.ids, chosen.ids, strict=True):
            real = new[new < 7]
            assert len(set(real.tolist())) == len(real)
            # CachePrior also prefers residents to residents of lower score.
            if not isinstance(chooser, CachePrior):
                kept = resident[old]
                assert np.array_equal(old[kept], new[kept])
                assert all(resident[e] or e in old or isinstance(chooser, Smoe) for e in real)


def test_nothing_changes_where_all_is_resident():
    random = np.random.default_rng(0)
    for rule in RULES:
        routed, available = _choice(random, rule, resident=np.ones(7, bool))
        for chooser in (
            Smoe(1),
            CachePrior(0.3),
            Buddy([np.ones((7, 7))], 0),
            ThresholdControls("live", 9),
            ThresholdControls("zero", 9),
        ):
            chosen = chooser(routed, available)
            assert np.array_equal(chosen.ids, routed.ids)
            assert np.array_equal(chosen.weights, routed.weights)


def test_cache_prior_by_eye():
    """Logits 4 3 2 1 0, k = 2, range 4: with lambda .3 residents gain 1.2. The best one is always taken."""
    scores, ids = np.array([[4.0, 3, 2, 1, 0]], np.float32), np.array([[0, 1]])
    rule = Routing("softmax", 1, 0)
    routed = routed_step(ids, weigh(rule, scores, ids), scores, rule)
    available = _available([False, False, True, False, False])
    chosen = CachePrior(0.3, always=1)(routed, available)
    assert chosen.ids.tolist() == [[0, 2]]
    assert np.allclose(chosen.weights, [[np.e**2 / (1 + np.e**2), 1 / (1 + np.e**2)]])
    assert CachePrior(0.2, always=1)(routed, available).ids.tolist() == [[0, 1]]
    assert CachePrior(9, always=2)(routed, available).ids.tolist() == [[0, 1]]


def test_buddies_by_eye():
    """Expert 1 is missing; it was active with 3 (six times), 4 (three times) and 2 (once)."""
    rule, scores = Routing("none", 1, 0), np.array([[0.5, 0.4, 0.03, 0.04, 0.03]], np.float32)
    counts, ids = np.zeros((5, 5)), np.array([[0, 1]])
    counts[1] = [0, 10, 1, 6, 3]
    routed = routed_step(ids, weigh(rule, scores, ids), scores, rule)
    available = _available([True, False, True, False, True])

    def chosen(**how) -> list[list[int]]:
        return Buddy([counts], **how)(routed, available).ids.tolist()

    assert chosen(entropy=0.9) == [[0, 4]]
    weights = Buddy([counts], entropy=0.9)(routed, available).weights
    assert weights.tolist() == routed.weights.tolist()
    assert chosen(entropy=0.9999) == [[0, 1]]  # not equal enough
    assert chosen(entropy=0, mass=0.5) == [[0, 1]]  # 3 alone is a buddy, and not resident
    assert chosen(entropy=0, most_missing=0.5) == [[0, 1]]


def test_controls_by_eye():
    scores, ids = np.array([[0.4, 0.3, 0.05, 0.15, 0.1]], np.float32), np.array([[0, 1]])
    rule = Routing("sum", 1, 0)
    routed = routed_step(ids, weigh(rule, scores, ids), scores, rule)
    available = _available([True, False, True, False, True])
    errors = [np.array([[9, 9, 9, 9, 9], [9, 9, 1, 0, 2], *[[9] * 5] * 3])]

    def chosen(pick: str, below: float = 0.5, **how):
        return ThresholdControls(pick, below, **how)(routed, available)

    assert chosen("live").ids.tolist() == [[0, 4]]
    assert np.allclose(chosen("live").weights, [[4 / 7, 1 / 7]])  # .1 where the sum was .7
    assert chosen("zero").ids.tolist() == [[0, 5]] and chosen("zero").weights[0, 1] == 0
    assert chosen("similar", errors=errors).ids.tolist() == [[0, 2]]
    assert {int(chosen("random", seed=s).ids[0, 1]) for s in range(20)} == {2, 4}
    for pick in ("live", "zero", "random"):
        assert chosen(pick, 0.4).ids.tolist() == [[0, 1]]  # its weight is 3/7


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
        assert "(lossy; prompts are not)" in "\n".join(engine.mode_lines())


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


def _routed(layer: int, ids: list[list[int]], hidden=None, scores=None, rule=None) -> Routed:
    weights = np.ones(np.shape(ids), np.float32)
    hidden = None if hidden is None else np.array(hidden, np.float32)
    return routed_step(np.array(ids), weights, scores, rule, layer, hidden)


def test_what_prefetches_guess():
    previous = Previous(2)
    assert previous(_routed(0, [[4, 1]])) == []
    assert previous(_routed(1, [[2, 3]])) == [(0, 4), (0, 1)]
    assert previous(_routed(0, [[5, 6]])) == [(1, 2), (1, 3)]
    counts = np.array([[8, 1, 1], [0, 0, 10]])
    transition = Transition([None, counts], [2, 2])
    assert transition(_routed(0, [[0, 1]])) == [(1, 2), (1, 0)]
    assert transition(_routed(1, [[0]])) == []
    assert transition(_routed(0, [[0, 2]])) == [(1, 0), (1, 1)]  # 2 is no expert
    weights, bias = np.array([[3, 0, 1], [-4, 1, 1]], np.float32), np.array([0, 0, 0.5], np.float32)
    predicted = Predicted(2, [None, None, (weights, bias)], [2, 2, 2])
    # Every token's first choice, then every token's second.
    assert predicted(_routed(0, [[0], [0]], [[9, 0], [1, 1]])) == [(2, 0), (2, 2), (2, 1)]
    assert predicted(_routed(0, [[0]], [[1, 1]])) == [(2, 2), (2, 1)]
    assert predicted(_routed(1, [[0]])) == []  # beyond the last layer
    assert Predicted(1, [None, None], [1, 1])(_routed(0, [[0]])) == []
    scores = np.array([[0.5, 0.1, 0.12, 0.28]], np.float32)
    looked = _routed(1, [[0, 3]], scores=scores, rule=Routing("none", 1, 0))
    assert TopScore(0.1).foresee(looked) == [(1, 0), (1, 3)]
    assert TopScore(2).foresee(looked) == [(1, 0)]
    assert TopScore(0.1)(looked) == []


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
    """The request ends with a sentence, the engine lives, and no frame is lost."""
    shard = copied / "experts" / "layer-01.safetensors"
    whole = shard.read_bytes()

    def broken_and_mended() -> Iterator[None]:
        for _, at in itertools.product(range(3), (20000, len(whole) // 2, len(whole) - 40000)):
            os.truncate(shard, at)
            yield
            with open(shard, "r+b") as file:
                file.write(whole)
            yield

    policies = Policies(prefetch=prefetch)
    with Engine.open(copied, memory=budget(5), policies=policies, io="buffered") as engine:
        faults = broken_and_mended()
        for _ in faults:
            with pytest.raises(EngineError, match="ends inside expert"):
                for _ in range(3):
                    list(engine.score(answer["prompt"]))
            next(faults)
            tokens = [token.id for token in engine.generate(answer["prompt"], max_new_tokens=24)]
            assert tokens == answer["greedy"].tolist()
    bundle = open_bundle(copied)
    predict = make_predictor(prefetch, bundle.manifest, bundle.tables)
    with make_parts(copied, experts=5, predict=predict) as parts:
        faults = broken_and_mended()
        for _ in faults:
            with pytest.raises(EngineError, match="ends inside expert"):
                for _ in range(3):
                    greedy(parts, answer["prompt"], 24)
            next(faults)
            assert greedy(parts, answer["prompt"], 24) == answer["greedy"].tolist()
    assert accounted(parts.residency, parts.sizes) and len(parts.residency) == 5
