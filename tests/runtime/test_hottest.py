"""D²MoE's order and memory with many sequences at once: every slot at its own level, once, whatever
is read first and whatever goes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parts import accounted, decoded, make_parts, prefilled, step

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.cache.cache import ORDERS
from smoe.runtime.cache.eviction import HighPlanesFirst, NextUse
from smoe.runtime.cache.planes import HALF_LIFE, PRIOR, PlaneUses
from smoe.runtime.cache.residency import PINNED, Residency
from smoe.runtime.routing import Assignment, Available, Routed

SEQUENCES, STEPS = 6, 5


class PerSlot:
    """A level for every slot, the same in every engine; fewer planes are likelier."""

    def __init__(self, seed: int = 7):
        self.random = np.random.default_rng(seed)

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        share = 1.0 / np.arange(1, available.full + 1)
        levels = self.random.choice(available.full, routed.ids.shape, p=share / share.sum()) + 1
        return Assignment(ids=routed.ids, weights=routed.weights, levels=levels)


def _logits(parts) -> np.ndarray:
    """After every token of some sequences that advance together, `[steps, sequences, vocabulary]`;
    memory is looked at after each."""
    tokens = np.random.default_rng(3).integers(3, 40, (STEPS, SEQUENCES)).tolist()
    sequences = [parts.sequence() for _ in range(SEQUENCES)]
    logits = []
    for row in tokens:
        spans = [decoded(sequence, token) for sequence, token in zip(sequences, row, strict=True)]
        logits.append(np.concatenate(step(parts.model, *spans)))
        assert accounted(parts.residency, parts.sizes)
        assert parts.residency.total <= parts.residency.capacity
    return np.stack(logits)


@pytest.fixture(scope="module")
def wanted(goldens):
    """Where nothing is ever missing."""
    with make_parts(goldens[2], 14, PerSlot()) as parts:
        parts.cache.fill([(layer, e) for layer in (0, 1) for e in range(7)], parts.bundle.levels)
        return _logits(parts)


@pytest.mark.parametrize("experts", [3, 5, 9])
@pytest.mark.parametrize("order", ["hottest", "expert"])
@pytest.mark.parametrize("eviction", ["lru", "planes", "next-use"])
def test_every_slot_runs_at_its_own_level_and_runs_repeat(
    goldens, wanted, experts, order, eviction
):
    counted = []
    for _ in range(2):
        how = {"eviction": eviction, "order": order}
        with make_parts(goldens[2], experts, PerSlot(), **how) as parts:
            if isinstance(parts.residency.eviction, NextUse):
                parts.residency.eviction.learn_planes(parts.bundle.levels)
            assert np.array_equal(_logits(parts), wanted)
            levels = [parts.residency.levels(layer).tolist() for layer in (0, 1)]
            counted.append((parts.stats.bytes_read, parts.stats.loads, levels))
    assert counted[0] == counted[1]


def _story(path, seed: int, whole: bool) -> list[np.ndarray]:
    """Logits of sequences that come, are given up, and advance together between the parts of one
    another's prompts, by `seed`; in memory for all experts, or for some."""
    random = np.random.default_rng(seed)
    experts = int(random.integers(3, 10))
    how = {"eviction": str(random.choice(["lru", "planes", "next-use"]))}
    how |= {"order": str(random.choice(ORDERS))}
    with make_parts(path, 14 if whole else experts, PerSlot(seed), **how) as parts:
        if how["eviction"] == "next-use":
            parts.residency.eviction.learn_planes(parts.bundle.levels)
        sequences, logits = [parts.sequence() for _ in range(3)], []
        for _ in range(8):
            newcomer, prompt = parts.sequence(), random.integers(3, 40, random.integers(4, 60))
            prefill = prefilled(parts.model, newcomer, prompt, parts.backbone.chunk)
            for _ in range(random.integers(0, 4)):
                prefill.advance()
                tokens = random.integers(3, 40, len(sequences)).tolist()
                both = zip(sequences, tokens, strict=True)
                spans = [decoded(*pair) for pair in both if random.random() < 0.7]
                logits += step(parts.model, *spans) if spans else []
                assert parts.residency.total <= parts.residency.capacity
            if random.random() < 0.3:
                prefill.discard()
                continue
            logits.append(prefill.finish())
            sequences = [*sequences[-4:], newcomer]
        assert accounted(parts.residency, parts.sizes)
        return logits


@pytest.mark.parametrize("seed", range(6))
def test_prompts_and_steps_that_take_turns_say_what_they_would_in_enough_memory(goldens, seed):
    found, wanted = (_story(goldens[2], seed, whole) for whole in (False, True))
    assert len(found) == len(wanted)
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))


def test_planes_that_go_apart_are_read_apart(goldens):
    """The same demand in the same memory: fewer bytes where high planes go alone."""
    read = {}
    for eviction in ("lru", "planes"):
        with make_parts(goldens[2], 6, PerSlot(), eviction=eviction) as parts:
            _logits(parts)
            read[eviction] = parts.stats.bytes_read
    assert read["planes"] < read["lru"]


# -- which planes go -------------------------------------------------------------------------------

ENDS = np.array([4, 6, 7])  # bytes of the first planes


def _filled(capacity: int) -> Residency:
    """Three layers of four experts, of which each used its first two with all planes."""
    eviction = HighPlanesFirst([4] * 3)
    residency = Residency([4] * 3, capacity, eviction, [ENDS] * 3)
    for layer in range(3):
        for expert in range(2):
            key = layer, expert
            residency.commit(key, residency.reserve(key, 3), 3)
        eviction.observe(layer, np.array([[0, 1]]), None)
    return residency


def test_high_planes_go_first_and_of_the_layer_that_was_passed_last():
    residency = _filled(6 * 7)
    gone = []
    while len(residency) > 1:
        frame = residency.victim(0, 1, None, None)
        before = [residency.levels(layer) for layer in range(3)]
        residency.shrink(frame)
        (change,) = np.argwhere(before - np.array([residency.levels(n) for n in range(3)])).tolist()
        gone.append((*change, int(before[change[0]][change[1]])))
    high = [(layer, e, level) for layer in (2, 1, 0) for level in (3, 2) for e in (0, 1)]
    lowest = [(layer, e, 1) for layer in (2, 1, 0) for e in (0, 1)]
    assert gone == (high + lowest)[: len(gone)] and len(gone) == len(high + lowest) - 1


def test_a_layer_that_needs_room_leaves_the_lowest_planes_of_the_others():
    residency = _filled(6 * 7)
    pins = np.zeros(12, np.int8)
    pins[8:] = PINNED  # the step is in the last layer
    residency.commit((2, 2), residency.reserve((2, 2), 3, pins), 3)
    assert residency.levels(1).tolist() == [1, 1, 0, 0] and residency.levels(0)[:2].max() == 3
    residency.commit((2, 3), residency.reserve((2, 3), 3, pins), 3)
    assert [residency.levels(layer)[:2].tolist() for layer in (0, 1)] == [[1, 1], [0, 1]]
    assert residency.total <= residency.capacity


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=5),
        ),
        max_size=12,
    )
)
def test_what_planes_are_used_for_is_counted_from_the_whole_history(history):  # fmt: skip
    uses, fade = PlaneUses([3, 3], 3), 2 ** (-1 / HALF_LIFE)
    needs: dict[tuple[int, int], list[int]] = {(la, e): [] for la in (0, 1) for e in range(3)}
    layers: dict[int, np.ndarray] = {0: np.ones(3), 1: np.ones(3)}
    for layer, slots in history:
        uses.need(layer, *np.array(slots).T)
        highest = {e: max(level for other, level in slots if other == e) for e, _ in slots}
        for expert, level in highest.items():
            needs[layer, expert].append(level)
        layers[layer] = layers[layer] * fade ** len(highest) + [
            sum(level > plane for level in highest.values()) for plane in range(3)
        ]
    for (layer, expert), levels in needs.items():
        for plane in range(1, 4):
            weights = [fade**age for age in range(len(levels))][::-1]
            needed = sum(w for w, level in zip(weights, levels, strict=True) if level >= plane)
            usual = layers[layer][plane - 1] / layers[layer][0]
            share = (needed + PRIOR * usual) / (sum(weights) + PRIOR)
            found = uses(np.array([3 * layer + expert]), np.array([plane]))
            assert found == pytest.approx([share])


# -- what users ask for ----------------------------------------------------------------------------


def _open(path, policies: Policies) -> Engine:
    budget = memory_for(open_bundle(path), 6, 300)
    return Engine.open(path, beside=budget, context=300, policies=policies)


def test_an_engine_takes_order_and_eviction_and_says_so(goldens):
    own = Policies("planes", substitution=PerSlot(), order="expert")
    with _open(goldens[2], own) as engine:
        said = "\n".join(engine.mode_lines())
        assert "eviction planes" in said and "one expert after another" in said
        list(engine.score(np.arange(3, 20), 4))
    with _open(goldens[2], Policies()) as engine:
        assert "hottest planes first" in "\n".join(engine.mode_lines())


@pytest.mark.parametrize("version, policies, sentence", [
    (2, Policies(order="coldest"), "no order 'coldest'; there are hottest and expert"),
    (2, Policies("planes"), "every expert is used with all of its planes; use another"),
    (0, Policies("planes", substitution=PerSlot()), "every expert is used with all of its planes"),
])  # fmt: skip
def test_misuse_is_a_sentence(goldens, version, policies, sentence):
    with pytest.raises(EngineError, match=sentence):
        _open(goldens[version], policies)
