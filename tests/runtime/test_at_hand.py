"""Experts that are all here: the short way gives what the long way gives, and counts as much."""

import numpy as np
import pytest
from support.parts import Parts, decoded, greedy, make_parts, step
from support.prices import add_prices

from smoe.artifacts import open_bundle
from smoe.runtime.cache.cache import ExpertCache
from smoe.runtime.cache.eviction import LeastRecentlyUsed, NextUse, eviction_named
from smoe.runtime.cache.residency import Residency
from smoe.runtime.choose.priced import Priced
from smoe.runtime.choose.prices import PRICE_TABLES, Prices
from smoe.runtime.choosers import substitution_named
from smoe.runtime.experts import Held, LocalExperts
from smoe.runtime.kernels import Work
from smoe.runtime.ledger import LossLedger
from smoe.runtime.model import Model
from smoe.runtime.options import level_sizes
from smoe.runtime.routing import combine
from smoe.runtime.stats import Stats
from smoe.runtime.step import Sequence

PROMPT = np.arange(3, 12)


class TheLongWay(LocalExperts):
    """Brings what is here as if it were not."""

    def at_hand(self, routed, assignment, available):
        return None


def _counts(stats: Stats) -> dict[str, float | int | str]:
    return {name: n for name, n in stats.as_dict().items() if not name.endswith("seconds")}


def _state(parts: Parts) -> list[list[int]]:
    return [parts.residency.levels(layer).tolist() for layer in range(2)]


@pytest.mark.parametrize("eviction", ["next-use", "lru", "lfu", "decay:4", "score"])
@pytest.mark.parametrize("experts", [14, 9])
def test_the_short_way_gives_counts_and_evicts_what_the_long_way_does(golden, eviction, experts):
    done = []
    for long in (False, True):
        with make_parts(golden, experts, eviction=eviction, threads=0) as parts:
            if long:
                kernels = parts.model.experts.kernels
                parts.model.experts = TheLongWay(parts.cache, kernels, parts.bundle.levels)
            sequences = [parts.sequence() for _ in range(3)]
            tokens, states = [], []
            for sequence in sequences:
                tokens.append(greedy(parts, PROMPT, 12, sequence))
                states.append(_state(parts))
            logits = step(
                parts.model, *[decoded(s, t[-1]) for s, t in zip(sequences, tokens, strict=True)]
            )
            values = parts.residency.eviction.values(np.arange(14))
            done.append((tokens, states, np.stack(logits).tolist(), _counts(parts.stats)))
            done[-1] += (values.tolist(),)
    assert done[0] == done[1]
    assert (done[0][3]["misses"] > 14) == (experts == 9)


def _priced(path, level: int) -> tuple[Priced, LossLedger]:
    bundle = open_bundle(path)
    prices = Prices.of(bundle.tables.layers(*PRICE_TABLES))
    return Priced(prices, level_sizes(bundle, level), 1e-8), LossLedger(0.02, 2, 1e-8)


@pytest.mark.parametrize("choose", ["priced", "smoe", "zero"])
def test_shortcuts_to_what_is_here_go_the_short_way_too(goldens, tmp_path, choose):
    """Experts in fewer planes, others in their place, nothing in their place."""
    path, done, shortened = add_prices(goldens[2], tmp_path / "b.smoe"), [], 0
    tokens = np.random.default_rng(3).integers(3, 40, 60).tolist()
    for long in (False, True):
        chooser, ledger = _priced(path, 3)
        if choose != "priced":
            chooser, ledger = substitution_named(f"{choose}:0.5", lambda name: []), None
        with make_parts(path, 8, choose=chooser, threads=0) as parts:
            kernels = parts.model.experts.kernels
            way = TheLongWay if long else Counting
            parts.model.experts = experts = way(parts.cache, kernels, 3)
            sequence = Sequence(parts.backbone.new_state(300), ledger)
            logits = [step(parts.model, decoded(sequence, token))[0] for token in tokens]
            values = parts.residency.eviction.values(np.arange(14)).tolist()
            done.append((np.stack(logits).tolist(), _state(parts), values, _counts(parts.stats)))
            shortened += 0 if long else experts.shortened
    assert done[0] == done[1] and done[0][3]["misses"] and shortened > 5


class Counting(LocalExperts):
    """Knows how often a shortcut was at hand."""

    shortened = 0

    def at_hand(self, routed, assignment, available):
        outputs = super().at_hand(routed, assignment, available)
        self.shortened += outputs is not None and assignment.ids is not routed.ids
        return outputs


class Below:
    """A backbone's loop below Python, written in Python: it goes on as long as all is here."""

    def __init__(self, model: Model):
        self.model, self.passed = model, 0

    def __call__(self, layer: int, flow, held: Held) -> list[np.ndarray]:
        passed = []
        while layer < self.model.layers:
            routed = self.model.backbone.route(layer, flow)  # it may run again
            frames = held.where[layer][routed.ids]
            if frames.min() < 0:
                break
            outputs = np.stack([self._outputs(layer, held, frames, routed.hidden, t)
                                for t in range(len(frames))])  # fmt: skip
            self.model.backbone.mix(layer, flow, combine(outputs, routed.weights))
            passed.append(routed.ids)
            layer += 1
        self.passed += len(passed)
        return passed

    def _outputs(self, layer, held, frames, hidden, token) -> np.ndarray:
        k = frames.shape[1]
        work = Work(frames[token], np.full(k, held.level), np.arange(k + 1), np.full(k, token))
        return held.kernels[layer](held.rows, work, hidden)


@pytest.mark.parametrize("experts, least, most", [(14, 24, 24), (9, 4, 20), (5, 0, 4)])
def test_a_loop_below_python_gives_and_counts_the_same(golden, experts, least, most):
    done = []
    for below in (False, True):
        with make_parts(golden, experts, threads=0) as parts:
            if experts == 14:
                parts.cache.fill([(layer, e) for layer in (0, 1) for e in range(7)], 1)
            loop = Below(parts.model)
            parts.model.advance = loop if below else None
            tokens = greedy(parts, PROMPT, 12)
            done.append((tokens, _state(parts), _counts(parts.stats)))
    assert done[0] == done[1]
    assert least <= loop.passed <= most


def test_nothing_is_held_while_something_is_read():
    residency = Residency([4], 4, LeastRecentlyUsed([4]))
    reading = []

    def read(layer, expert, into, since, level):
        reading.append(cache.still)
        return 1

    cache = ExpertCache(residency, None, read, 2, Stats(), threads=0)
    experts = LocalExperts(cache, [None], 1)
    assert cache.still
    cache.fill([(0, 2), (0, 1)], 1)
    assert reading == [False, False] and cache.still
    frames = residency.frames(0, np.arange(4)).tolist()
    assert cache.where(0).tolist() == [*frames, -1] and frames[0] == frames[3] == -1
    assert len({*frames}) == 3 and experts.cache is cache
    scored = Residency([4], 4, eviction_named("score", [4]))
    assert not ExpertCache(scored, None, read, 2, Stats(), threads=0).still


@pytest.mark.parametrize("name", ["next-use", "lru", "lfu", "decay:4"])
@pytest.mark.parametrize("experts", [[9, 9, 9, 9], [5, 9, 9, 7]])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_policy_learns_several_layers_at_once_to_the_bit(name, experts, tokens):
    random = np.random.default_rng(0)
    one, many = eviction_named(name, experts), eviction_named(name, experts)
    share = random.random(sum(experts))
    for policy in (one, many):
        policy.warm(share)
    for turn in range(700):  # `decay` and `next-use` have to start over meanwhile
        first = int(random.integers(0, 4))
        layers = range(first, int(random.integers(first, 4)) + 1)
        ids = np.stack([_ids(random, experts[layer] + turn % 2, tokens) for layer in layers])
        for layer, chosen in zip(layers, ids, strict=True):
            one.observe(layer, chosen, None)
        many.observe_layers(first, ids)
        keys = np.arange(sum(experts))
        assert np.array_equal(one.values(keys), many.values(keys))


def _ids(random: np.random.Generator, experts: int, tokens: int) -> np.ndarray:
    return np.stack([random.permutation(experts)[:4] for _ in range(tokens)])


def test_what_is_noted_is_known_before_anything_goes():
    """Expert 0 of layer 0 was used last, and so 1 goes for 2, though the step has not ended."""
    residency = Residency([3, 3], 2, NextUse([3, 3]))
    cache = ExpertCache(residency, None, lambda *how: 1, 1, Stats(), threads=0)
    cache.fill([(0, 0), (0, 1)], 1)
    cache.used(0, np.array([[0]]))
    cache.fill([(0, 2)], 1)
    assert residency.levels(0).tolist() == [1, 0, 1]
    assert cache.stats.hits == cache.stats.wanted == 1
    cache.used(0, np.array([[2]]))
    cache.used(1, np.array([[3]]))  # no expert; the step ends
    assert cache.stats.hits == cache.stats.wanted_hits == 2
