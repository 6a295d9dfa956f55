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
    ids = np.stack([random.permutation(experts + 1)[:k] for _ in range(tokens)])  # the last id is no expert
    resident = set(random.permutation(experts)[: experts // 2].tolist())
    tasks = decide(ids, experts, resident.__contains__)
    seen = np.full(ids.shape, experts)
    for task in tasks:
        assert (seen[task.tokens, task.ranks] == experts).all()
        seen[task.tokens, task.ranks] = task.expert
    assert np.array_equal(seen, ids)
    order = [task.expert in resident for task in tasks]
    assert order == sorted(order, reverse=True)


def _ask(residency, key) -> tuple[int, bool]:
    """(frame, hit), as the engine asks."""
    frame = residency.get(key)
    if frame is not None:
        return frame, True
    frame = residency.reserve()
    residency.put(key)
    return frame, False


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=80))
def test_residency_is_least_recently_used(capacity, requests):
    residency = Residency(capacity)
    held: list[int] = []  # least recently used first
    where: dict[int, int] = {}
    for expert in requests:
        frame, hit = _ask(residency, (0, expert))
        assert hit == (expert in held)
        if hit:
            held.remove(expert)
            assert where[expert] == frame
        elif len(held) == capacity:
            assert where.pop(held.pop(0)) == frame  # the victim's frame is taken over
        held.append(expert)
        where[expert] = frame
        assert len(set(where.values())) == len(where) and 0 <= frame < capacity
        assert {e for e in range(10) if (0, e) in residency} == set(held)


def test_a_frame_that_was_not_filled_claims_nothing_and_is_the_next_to_be_filled():
    residency = Residency(2)
    _ask(residency, (0, 1))
    frame = residency.reserve()  # the read fails: no put
    assert len(residency) == 1 and residency.reserve() == frame
    assert _ask(residency, (0, 3)) == (frame, False) and (0, 1) in residency


def test_below_one_cycle_least_recently_used_never_hits():
    residency = Residency(3)
    assert not any(_ask(residency, (0, e))[1] for _ in range(20) for e in range(4))
