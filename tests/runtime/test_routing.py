"""The pure parts of a step: routing rules by hand, dispatches against brute force, phase and owner
as data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.parts import StateOfNothing, routed_step

from smoe.artifacts.manifest import Routing
from smoe.runtime.backbone import BackboneState
from smoe.runtime.routing import (
    Assignment,
    Available,
    Dispatch,
    Routed,
    assign,
    combine,
    route,
    weigh,
)
from smoe.runtime.step import Phase, Sequence, Span, Step

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


def test_a_chooser_hears_of_others_tokens_alone_that_what_they_use_is_here():
    """Prompts and exact sequences take the router's word, and pay for no shortcut."""
    ids = np.array([[0, 1], [2, 3], [4, 1], [5, 2]])
    phases = [(Phase.DECODE, False), (Phase.DECODE, True), (Phase.PREFILL, False)]
    spans = tuple(
        Span(Sequence(StateOfNothing(), exact=exact), np.zeros(n, np.int64), np.zeros(0), phase)
        for (phase, exact), n in zip(phases, (1, 1, 2), strict=True)
    )
    seen: list[tuple[list, list]] = []

    def nothing(routed: Routed, available: Available) -> Assignment:
        seen.append((routed.ids.tolist(), available.level.tolist()))
        none = np.full_like(routed.ids, len(available.level))
        return Assignment(none, routed.weights, np.ones_like(none), np.ones(len(none)))

    level = np.array([1, 0, 1, 0, 0, 0, 0])
    routed = routed_step(ids, np.ones(ids.shape, np.float32), spans=spans)
    made = assign(nothing, routed, Available(level=level, full=2))
    assert seen == [([[0, 1]], [1, 2, 2, 2, 2, 2, 0])]
    assert made.ids.tolist() == [[7, 7], *ids[1:].tolist()]
    assert made.levels.tolist() == [[1, 1], *[[2, 2]] * 3] and made.nats.tolist() == [1, 0, 0, 0]
    assert level.tolist() == [1, 0, 1, 0, 0, 0, 0]


@st.composite
def dispatches(draw) -> tuple[np.ndarray, np.ndarray, Dispatch, Available]:
    """ids `[T, k]` (E: no expert), the level of every slot, and what is made of them."""
    tokens, k, experts = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(5, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.stack([random.permutation(experts + 1)[:k] for _ in range(tokens)])
    levels = random.integers(1, 4, ids.shape)
    available = Available(level=random.integers(0, 4, experts), full=3)
    assignment = Assignment(ids=ids, weights=np.ones(ids.shape, np.float32), levels=levels)
    if draw(st.booleans()):
        levels = np.full(ids.shape, 3)
        assignment = Assignment(ids=ids, weights=assignment.weights)
    return ids, levels, Dispatch.of(assignment, available), available


def _groups(dispatch: Dispatch) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """(expert, level, slots (token, rank)) of every group."""
    return [
        (
            int(dispatch.experts[g]),
            int(dispatch.levels[g]),
            [
                (int(dispatch.tokens[s]), int(dispatch.ranks[s]))
                for s in range(dispatch.starts[g], dispatch.starts[g + 1])
            ],
        )
        for g in range(len(dispatch.experts))
    ]


@given(dispatches())
def test_a_dispatch_covers_every_slot_once_and_no_slot_without_an_expert(case):
    ids, levels, dispatch, available = case
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for token, row in enumerate(ids.tolist()):
        for rank, expert in enumerate(row):
            if expert < len(available.level):
                wanted.setdefault((expert, int(levels[token, rank])), []).append((token, rank))
    assert _groups(dispatch) == [(*key, wanted[key]) for key in sorted(wanted)]
    assert dispatch.slots == sum(map(len, wanted.values()))
    assert dispatch.counts.tolist() == [len(wanted[key]) for key in sorted(wanted)]


@given(dispatches(), st.data())
def test_a_part_of_a_dispatch_has_its_groups(case, data):
    groups = _groups(case[2])
    rows = sorted(data.draw(st.sets(st.integers(0, len(groups) - 1)))) if groups else []
    part = case[2].take(np.array(rows, np.int64))
    assert _groups(part) == [groups[row] for row in rows]
    assert part.starts[0] == 0 and part.starts[-1] == part.slots


@given(dispatches(), st.integers(1, 20))
def test_batches_hold_all_slots_in_order_and_no_more_than_they_may(case, most):
    dispatch = case[2]
    slots = [(e, level, slot) for e, level, group in _groups(dispatch) for slot in group]
    batches = list(dispatch.batches(most))
    assert all(0 < batch.slots <= most for batch in batches) or not slots
    assert all(batch.slots == most for batch in batches[:-1])
    assert all(len(group) for batch in batches for _, _, group in _groups(batch))
    assert slots == [
        (e, level, slot)
        for batch in batches
        for e, level, group in _groups(batch)
        for slot in group
    ]


def test_outputs_are_added_rank_after_rank():
    random = np.random.default_rng(0)
    outputs = random.standard_normal((3, 4, 5)).astype(np.float32)
    weights = random.random((3, 4)).astype(np.float32)
    for token in range(3):
        total = outputs[token, 0] * weights[token, 0]
        for rank in (1, 2, 3):
            total = total + outputs[token, rank] * weights[token, rank]
        assert np.array_equal(combine(outputs, weights)[token], total)


def _span(tokens: int, phase: Phase) -> Span:
    return Span(Sequence(StateOfNothing()), np.zeros(tokens, np.int64), np.array([0]), phase)


def test_phase_and_owner_are_data():
    """A prompt of one token is a prompt, and a step of several decoded ones decodes."""
    spans = _span(1, Phase.PREFILL), _span(2, Phase.DECODE), _span(3, Phase.VERIFY)
    step = Step(spans)
    assert step.tokens == 6 and step.owner.tolist() == [0, 1, 1, 2, 2, 2]
    assert step.decoding.tolist() == [False] + [True] * 5
    assert step.ledgers == [None, None, None]


def test_some_tokens_of_a_layer_keep_their_owners():
    step = Step((_span(2, Phase.DECODE), _span(2, Phase.DECODE), _span(1, Phase.DECODE)))
    routed = Routed(
        layer=0,
        step=step,
        hidden=np.arange(5, dtype=np.float32)[:, None],
        ids=np.arange(5)[:, None],
        weights=np.ones((5, 1), np.float32),
    )
    part = routed.take(np.array([1, 2, 4]))
    assert part.tokens == 3 and part.owner.tolist() == [0, 1, 2]
    assert part.ids[:, 0].tolist() == part.hidden[:, 0].tolist() == [1, 2, 4]
    again = part.take(np.array([0, 2]))
    assert again.owner.tolist() == [0, 2] and again.ids[:, 0].tolist() == [1, 4]


def test_a_fork_goes_its_own_way():
    sequence = Sequence(StateOfNothing())
    sequence.ids.extend([1, 2, 3])
    fork = sequence.fork()
    fork.ids.append(4)
    sequence.rewind(1)
    assert sequence.ids == [1] and fork.ids == [1, 2, 3, 4] and fork.length == 4


class StateOfEvery(StateOfNothing):
    """That can go back to every `n`th length."""

    def __init__(self, n: int):
        self.n = n

    def rewind(self, length: int) -> int:
        return length // self.n * self.n


def test_a_rewind_goes_where_all_parts_of_a_state_can():
    for length, reached in ((44, 30), (30, 30), (29, 0)):
        sequence = Sequence(BackboneState([StateOfEvery(10), StateOfEvery(1), StateOfEvery(15)]))
        sequence.ids.extend(range(70))
        sequence.rewind(length)
        assert sequence.length == reached
