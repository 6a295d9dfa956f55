"""The pure parts: routing rules by hand, tasks that cover every slot, residency against a brute-force model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe.artifacts.manifest import Routing
from smoe.runtime.residency import Residency
from smoe.runtime.scheduler import decide, route, weigh

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
    ids = np.stack([random.permutation(experts)[:k] for _ in range(tokens)])
    resident = set(random.permutation(experts)[: experts // 2].tolist())
    tasks = decide(ids, resident.__contains__)
    seen = np.full(ids.shape, -1)
    for task in tasks:
        assert (seen[task.tokens, task.ranks] == -1).all()
        seen[task.tokens, task.ranks] = task.expert
    assert np.array_equal(seen, ids)
    order = [task.expert in resident for task in tasks]
    assert order == sorted(order, reverse=True)


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=80))
def test_residency_is_least_recently_used(capacity, requests):
    residency = Residency(capacity)
    held: list[int] = []  # least recently used first
    where: dict[int, int] = {}
    for expert in requests:
        slot, hit = residency.ensure((0, expert))
        assert hit == (expert in held)
        if hit:
            held.remove(expert)
            assert where[expert] == slot
        elif len(held) == capacity:
            assert where.pop(held.pop(0)) == slot  # the victim's slot is taken over
        held.append(expert)
        where[expert] = slot
        assert len(set(where.values())) == len(where) and 0 <= slot < capacity
        assert {e for e in range(10) if (0, e) in residency} == set(held)


def test_a_slot_that_could_not_be_filled_is_free_again():
    residency = Residency(2)
    residency.ensure((0, 1))
    slot, _ = residency.ensure((0, 2))
    residency.forget((0, 2))
    assert (0, 2) not in residency and len(residency) == 1
    assert residency.ensure((0, 3)) == (slot, False) and (0, 1) in residency


def test_below_one_cycle_least_recently_used_never_hits():
    residency = Residency(3)
    hits = [residency.ensure((0, e))[1] for _ in range(20) for e in range(4)]
    assert not any(hits)
