"""The pure parts: routing rules by hand, tasks that cover every slot, residency against a brute-force model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe.artifacts.manifest import Routing
from smoe.runtime.cache.eviction import LeastRecentlyUsed
from smoe.runtime.cache.residency import Residency
from smoe.runtime.routing import route, weigh
from smoe.runtime.scheduler import decide

SCORES = np.array([[0.1, 0.4, 0.2, 0.3]], np.float32)


@pytest.mark.parametrize("rule, weights", [
    (Routing("none", 1, 0), [0.4, 0.3]),
    (Routing("sum", 1, 0), [4 / 7, 3 / 7]),
    (Routing("sum", 2.5, 0.3), [1.0, 0.75]),
    (Routing("softmax", 1, 0), [1 / (1 + np.exp(-0.1)), 1 / (1 + np.exp(0.1))]),
])  # fmt: skip
def test_routing_by_eye(rule, weights):
    ids, found = route(rule, SCORES, SCORES, 2)
    assert ids.tolist() == [[1, 3]]
    assert np.allclose(found, [weights], atol=1e-6)


def test_any_choice_of_experts_can_be_weighed():
    raw = np.array([[1, 2, 3, 4]], np.float32)
    assert np.allclose(weigh(Routing("sum", 1, 0), raw, np.array([[0, 2]])), [[0.25, 0.75]])


@given(st.integers(1, 12), st.integers(1, 5), st.integers(5, 9), st.integers(0, 2**32 - 1))
def test_tasks_cover_every_slot_once_residents_first(tokens, k, experts, seed):
    random = np.random.default_rng(seed)
    ids = np.stack(
        [random.permutation(experts + 1)[:k] for _ in range(tokens)]
    )  # the last id is no expert
    here = random.integers(0, 4, experts)
    levels = random.integers(1, 4, ids.shape)
    tasks = decide(ids, levels, here)
    seen = np.full(ids.shape, experts)
    for task in tasks:
        assert (seen[task.tokens, task.ranks] == experts).all()
        seen[task.tokens, task.ranks] = task.expert
        assert np.array_equal(task.levels, np.sort(levels[task.tokens, task.ranks]))
    assert np.array_equal(seen, ids)
    order = [here[task.expert] >= task.level for task in tasks]
    assert order == sorted(order, reverse=True)


def _lru(capacity: int, experts: int = 10, **how) -> Residency:
    return Residency([experts], capacity, LeastRecentlyUsed([experts]), **how)


def _ask(residency, key, shield=()) -> tuple[int, bool]:
    """(place, hit), as the engine asks."""
    residency.use(key)
    place = residency.find(key)
    if place is not None:
        return place, True
    place = residency.reserve(key, shield)
    residency.put(key, place)
    return place, False


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=80))
def test_residency_is_least_recently_used(capacity, requests):
    residency = _lru(capacity)
    held: list[int] = []  # least recently used first
    where: dict[int, int] = {}
    for expert in requests:
        place, hit = _ask(residency, (0, expert))
        assert hit == (expert in held)
        if hit:
            held.remove(expert)
            assert where[expert] == place
        elif len(held) == capacity:
            assert where.pop(held.pop(0)) == place  # the victim's place is taken over
        held.append(expert)
        where[expert] = place
        assert len(set(where.values())) == len(where) and 0 <= place < capacity
        assert {e for e in range(10) if (0, e) in residency} == set(held)
        assert residency.resident(0).tolist() == [e in held for e in range(10)] and len(
            residency
        ) == len(held)


def test_a_place_that_was_not_filled_claims_nothing_and_is_free_again():
    residency = _lru(2)
    _ask(residency, (0, 1))
    place = residency.reserve((0, 2))
    assert len(residency) == 1 and (0, 2) not in residency
    residency.cancel((0, 2), place)  # the read failed
    assert _ask(residency, (0, 3)) == (place, False) and (0, 1) in residency


def test_below_one_cycle_least_recently_used_never_hits():
    residency = _lru(3)
    assert not any(_ask(residency, (0, e))[1] for _ in range(20) for e in range(4))


def test_what_a_step_is_about_to_use_is_shielded():
    residency = _lru(2)
    _ask(residency, (0, 1))
    _ask(residency, (0, 2))
    assert residency.reserve((0, 3), shield=[(0, 1), (0, 2)]) is None
    place = residency.reserve((0, 3), shield=[(0, 1)])
    assert (0, 1) in residency and (0, 2) not in residency
    residency.put((0, 3), place)


def test_a_guess_goes_first_once_its_layer_has_passed_without_it():
    residency = _lru(3)
    for expert, guessed in ((1, True), (2, True), (3, False)):
        residency.put((0, expert), residency.reserve((0, expert)), guessed)
    residency.use((0, 2))
    residency.use((0, 3))
    residency.end(0)
    _ask(residency, (0, 4))
    assert [e for e in range(5) if (0, e) in residency] == [2, 3, 4]
    residency.use((0, 2))
    _ask(residency, (0, 5))  # no expired guess is left: least recently used again
    assert (0, 3) not in residency


def test_bytes_and_shares():
    """Records of 2 and 3 bytes in 12; with shares each of two layers keeps to 6."""
    for shares, kept in ((False, (1, 3)), (True, (3, 2))):
        residency = Residency([6, 6], 12, LeastRecentlyUsed([6, 6]), [2, 3], shares)
        for key in [(0, e) for e in range(4)] + [(1, e) for e in range(3)]:
            _ask(residency, key)
        assert (residency.resident(0).sum(), residency.resident(1).sum()) == kept


class _ByPlanes(LeastRecentlyUsed):
    """Goes by planes: the highest of whatever was used least recently."""

    by_planes = True


ENDS = [[5, 7, 10], [6, 7, 9]]  # of records of two layers, by level


@given(
    st.integers(20, 60),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(1, 3)), max_size=60),
)
def test_planes_are_held_and_let_go_one_by_one(capacity, requests):
    residency = Residency([5, 5], capacity, _ByPlanes([5, 5]), ENDS)
    held: dict[tuple[int, int], int] = {}  # level by key, least recently used first
    for layer, expert, level in requests:
        key = (layer, expert)
        residency.use(key)
        if key in held:
            held[key] = held.pop(key)
        if residency.levels(layer)[expert] < level:
            place = residency.reserve(key, level=level)
            while sum(ENDS[of][at - 1] for (of, _), at in (held | {key: level}).items()) > capacity:
                victim = next(k for k in held if k != key)
                held[victim] -= 1
                if not held[victim]:
                    del held[victim]
            residency.put(key, place, level=level)
            held[key] = level
        for of in (0, 1):
            assert residency.levels(of).tolist() == [held.get((of, e), 0) for e in range(5)]
        assert residency.held.sum() == residency.total <= capacity
        places = {residency.find(k) for k in held}
        assert {residency.held[residency.find(k)] for k in held} <= {
            end for of in ENDS for end in of
        }
        assert len(places) == len(held)


def test_planes_that_were_not_added_claim_nothing():
    residency = Residency([5, 5], 30, _ByPlanes([5, 5]), ENDS)
    residency.put((0, 1), residency.reserve((0, 1), level=1), level=1)
    place = residency.reserve((0, 1), level=3)
    assert residency.total == 10 and residency.levels(0)[1] == 1
    residency.cancel((0, 1), place)  # the read failed
    assert residency.total == 5 and residency.levels(0)[1] == 1 and residency.find((0, 1)) == place


def test_what_grows_is_not_let_go_for_it():
    residency = Residency([5, 5], 12, _ByPlanes([5, 5]), ENDS)
    for expert in (0, 1):
        residency.put((0, expert), residency.reserve((0, expert), level=1), level=1)
    residency.put((0, 0), residency.reserve((0, 0), level=3), level=3)
    assert residency.levels(0).tolist() == [3, 0, 0, 0, 0]
    assert residency.reserve((0, 1), shield=[(0, 0)], level=1) is None
