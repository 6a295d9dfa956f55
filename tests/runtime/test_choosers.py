"""Choosers and predictors, each against its rule: word for word, by eye, and by what all of them
must keep."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parts import routed_step

from smoe.artifacts.manifest import Routing
from smoe.runtime.cache.predict import Predicted, Previous, TopScore, Transition, WhileItPays
from smoe.runtime.choose.substitution import Buddy, CachePrior, Smoe, ThresholdControls
from smoe.runtime.routing import Available, Routed, gate_scores, weigh

RULES = [Routing("sum", 1, 0), Routing("none", 1, 0), Routing("softmax", 1, 0)]


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
    """Logits 4 3 2 1 0, k = 2, range 4: with lambda .3 residents gain 1.2. The best one is always
    taken."""
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
    looked = _looked()
    assert TopScore(0.1).foresee(looked) == [(1, 0), (1, 3)]
    assert TopScore(2).foresee(looked) == [(1, 0)]
    assert TopScore(0.1)(looked) == []


def _looked() -> Routed:
    scores = np.array([[0.5, 0.1, 0.12, 0.28]], np.float32)
    return _routed(1, [[0, 3]], scores=scores, rule=Routing("none", 1, 0))


def test_looking_ahead_goes_on_while_waits_outlast_it():
    """Seconds of waiting and of looking ahead, as the engine counts them: a look of 1 in waits of
    10, of 1 and of 10 again."""
    predict, stalled, looked = WhileItPays(), 0.0, 0.0
    shares = []
    for wait in (10.0, 1.0, 10.0):
        looks = 0
        for _ in range(640):
            looking = predict.pays(stalled, looked)
            looks += looking
            looked += looking
            stalled += max(0.0, wait - looking)
        shares.append(looks / 640)
    assert shares[0] > 0.95 and shares[1] < 0.1 and shares[2] > 0.95
    assert predict.pays(0.0, 0.0)  # counting may begin again
    assert WhileItPays().foresee(_looked()) == TopScore(0.35).foresee(_looked())
