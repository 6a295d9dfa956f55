"""Slots at levels and loss budgets in the engine: bits, bytes, planes that come and go, failures,
misuse."""

import os

import numpy as np
import pytest
from support.parts import accounted, decoded, make_parts, step
from support.prices import add_prices

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.choose.priced import Priced
from smoe.runtime.choose.prices import PRICE_TABLES, Prices
from smoe.runtime.ledger import SAVINGS_TOKENS, LossLedger
from smoe.runtime.routing import Assignment, Available, Routed
from smoe.runtime.step import Sequence


@pytest.fixture(scope="module")
def priced_bundle(goldens, tmp_path_factory):
    """The golden bundle with planes, and prices."""
    return add_prices(goldens[2], tmp_path_factory.mktemp("priced") / "b.smoe")


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(3).integers(3, 40, 40)


def _budget(bundle, experts: int, level: int | None = None) -> int:
    return memory_for(open_bundle(bundle), experts, 300, level)


def _scored(engine, ids):
    return np.stack(list(engine.score(ids, 8)))


def _decoded(engine, ids, sequence: Sequence | None = None) -> np.ndarray:
    """Logits after every token, none of which is a prompt's, by an engine or a model."""
    sequence = engine.new_sequence() if sequence is None else sequence
    return np.concatenate([step(engine, decoded(sequence, token))[0] for token in ids.tolist()])


@pytest.mark.parametrize("level", [2, 3])
def test_a_loss_budget_below_the_full_level(priced_bundle, prompt, level):
    with Engine.open(priced_bundle, context=300, level=level) as engine:
        wanted = _scored(engine, prompt)
    budget = _budget(priced_bundle, 8, level)
    for loss, same in ((1e-9, True), (0.05, False)):
        policies = Policies(loss=loss)
        with Engine.open(
            priced_bundle, beside=budget, context=300, level=level, policies=policies
        ) as engine:
            assert np.allclose(_scored(engine, prompt), wanted, atol=1e-4) == same
            assert "(lossy)" in "\n".join(engine.mode_lines())


@pytest.mark.parametrize("level", [2, 3])
def test_a_loss_budget_holds_no_more_planes_than_it_may(priced_bundle, prompt, level):
    bundle = open_bundle(priced_bundle)
    prices = Prices.of(bundle.tables.layers(*PRICE_TABLES))
    sizes = [np.array([0, *layout.levels[:level]]) for layout in bundle.layouts]
    chooser = Priced(prices, sizes, 1e-8)
    with make_parts(priced_bundle, experts=8, choose=chooser, level=level) as parts:
        sequence = Sequence(parts.backbone.new_state(300), LossLedger(0.05, 2, 1e-8))
        _decoded(parts.model, prompt, sequence)
        assert max(parts.residency.levels(layer).max() for layer in (0, 1)) <= level
        assert parts.residency.total <= parts.residency.capacity
        assert 0 < parts.stats.nats_spent <= 0.05 * (len(prompt) + SAVINGS_TOKENS / 2)
        assert np.isclose(parts.stats.nats_spent, sequence.ledger.spent)


def test_a_budget_buys_bytes_and_no_budget_changes_no_bit(priced_bundle, prompt):
    exact, read = [], []
    for loss in (0.0, 0.003, 0.03):
        policies = Policies(loss=loss)
        with Engine.open(
            priced_bundle, beside=_budget(priced_bundle, 6), context=300, policies=policies
        ) as engine:
            assert engine.lossless == (loss == 0)
            exact.append(_scored(engine, prompt))
            read.append(engine.stats.bytes_read)
            assert (engine.stats.nats_spent > 0) == (loss > 0)
            assert engine.stats.nats_spent <= loss * (len(prompt) + SAVINGS_TOKENS / 2)
            lines = "\n".join(engine.mode_lines())
            assert (f"at most {loss} nats per token" in lines) == (loss > 0)
    with Engine.open(priced_bundle, context=300) as engine:
        assert np.array_equal(exact[0], _scored(engine, prompt))
    assert read[0] > read[1] > read[2] and not np.array_equal(exact[0], exact[2])


def test_a_prompt_takes_no_shortcut_and_leaves_the_ledger_alone(priced_bundle, prompt):
    policies = Policies(loss=0.03)
    with Engine.open(priced_bundle, context=300) as engine:
        wanted = engine.prefill(engine.new_sequence(), prompt, len(prompt)).finish()
    with Engine.open(
        priced_bundle, beside=_budget(priced_bundle, 6), context=300, policies=policies
    ) as engine:
        sequence = engine.new_sequence()
        _decoded(engine, prompt[:3], sequence)
        ledger = sequence.ledger
        before = ledger.balance, ledger.spent, ledger.nats_per_byte
        engine.prefill(sequence, prompt).finish()
        assert (ledger.balance, ledger.spent, ledger.nats_per_byte) == before
        spent = engine.stats.nats_spent
        logits = engine.prefill(engine.new_sequence(), prompt, len(prompt)).finish()
        assert np.array_equal(logits, wanted) and engine.stats.nats_spent == spent


def test_sequences_of_an_engine_have_ledgers_of_their_own(priced_bundle, prompt):
    policies = Policies(loss=0.03)
    with Engine.open(
        priced_bundle, beside=_budget(priced_bundle, 6), context=300, policies=policies
    ) as engine:
        one, other = engine.new_sequence(), engine.new_sequence()
        assert one.ledger is not other.ledger
        _decoded(engine, prompt, one)
        assert one.ledger.spent > 0 == other.ledger.spent


def _at_level(level: int):
    def choose(routed: Routed, available: Available) -> Assignment:
        levels = np.full(routed.ids.shape, level)
        return Assignment(ids=routed.ids, weights=routed.weights, levels=levels)

    return choose


def test_levels_are_those_of_the_slots(priced_bundle, prompt):
    with Engine.open(priced_bundle, context=300, level=2) as engine:
        wanted = _decoded(engine, prompt)
    own = Policies(substitution=_at_level(2), warm=False)
    with Engine.open(
        priced_bundle, beside=_budget(priced_bundle, 14) - 1, context=300, policies=own
    ) as engine:
        assert np.array_equal(_decoded(engine, prompt), wanted)


def test_a_higher_level_reads_only_what_is_missing(priced_bundle, prompt):
    level = 1

    def choose(routed, available):
        return _at_level(level)(routed, available)

    with make_parts(priced_bundle, experts=13, choose=choose) as parts:
        ends, stats = parts.bundle.layouts[0].levels, parts.stats

        def read_by_a_token() -> int:
            before = stats.bytes_read
            _decoded(parts.model, prompt[:1], parts.sequence())
            return stats.bytes_read - before

        assert read_by_a_token() == 6 * ends[0] and ends[0] < ends[2]
        level = 3
        # The first layer chooses as before; the second may choose others after a more exact first.
        again = read_by_a_token()
        assert 3 * (ends[2] - ends[0]) <= again <= 3 * (ends[2] - ends[0]) + 3 * ends[2]
        assert sorted(np.unique(parts.residency.levels(0))) == [0, 3]
        level = 2
        # What is resident at a higher level is not read again.
        assert read_by_a_token() <= 3 * ends[2]


class _AtRandom:
    """Levels at random, the same in every engine."""

    def __init__(self, full: int):
        self.random, self.full = np.random.default_rng(4), full

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        levels = self.random.integers(1, self.full + 1, routed.ids.max() + 1)
        return Assignment(ids=routed.ids, weights=routed.weights, levels=levels[routed.ids])


def test_planes_come_and_go_and_change_no_bit(priced_bundle, prompt):
    logits, most = [], []
    full = open_bundle(priced_bundle).levels
    for by_planes in (False, True):
        with make_parts(priced_bundle, experts=6, choose=_AtRandom(full)) as parts:
            residency, random = parts.residency, np.random.default_rng(5)
            if by_planes:
                residency.eviction.plane_value = lambda keys, levels, random=random: random.random(
                    len(keys)
                )
            scored, count, sequence = [], [], parts.sequence()
            for token in prompt.tolist():
                scored += step(parts.model, decoded(sequence, token))
                count.append(len(residency))
                assert accounted(residency, parts.sizes)
                assert residency.total <= residency.capacity
                for layer, layout in enumerate(parts.bundle.layouts):
                    for expert, level in enumerate(residency.levels(layer)):
                        if level:  # what is resident is what is in the shard up to its level
                            frame, end = residency.find((layer, expert)), layout.levels[level - 1]
                            assert residency.frame_bytes[frame] == end
                            record = np.zeros(layout.levels[-1], np.uint8)
                            parts.shards.read(layer, expert, record, level=int(level))
                            assert np.array_equal(parts.frames.rows[frame, :end], record[:end])
                            assert not parts.frames.rows[frame, end:].any()  # and nothing else
            logits.append(np.concatenate(scored))
            most.append(max(count))
    assert np.array_equal(*logits) and most[1] > most[0] >= 6


def test_a_failed_refinement_keeps_what_was_there(priced_bundle, prompt):
    level, broken = 1, False

    def choose(routed, available):
        return _at_level(level)(routed, available)

    def read(layer, expert, into, since, upto):
        if since and broken:
            raise EngineError("the disk is gone")
        return parts.shards.read(layer, expert, into, since, upto)

    with make_parts(priced_bundle, experts=13, choose=choose, read=read) as parts:
        wanted = _decoded(parts.model, prompt, parts.sequence())
        level, broken = 3, True
        with pytest.raises(EngineError, match="the disk is gone"):
            _decoded(parts.model, prompt, parts.sequence())
        level = 1
        assert np.array_equal(_decoded(parts.model, prompt, parts.sequence()), wanted)
        level, broken = 4, False
        with Engine.open(priced_bundle, context=300) as full:
            assert np.array_equal(
                _decoded(parts.model, prompt, parts.sequence()), _decoded(full, prompt)
            )
    assert accounted(parts.residency, parts.sizes)


@pytest.mark.parametrize("policies, sentence", [
    (Policies(loss=-0.1), "-0.1 nats per token was asked for; it goes from 0 to 1"),
    (Policies(loss=7), "7 nats per token"),
    (Policies(loss=float("nan")), "nan nats per token"),
    (Policies(loss=0.01, substitution="zero"), "exclude each other"),
])  # fmt: skip
def test_misuse_is_a_sentence(priced_bundle, policies, sentence):
    with pytest.raises(EngineError, match=sentence):
        Engine.open(priced_bundle, beside=_budget(priced_bundle, 6), context=300, policies=policies)


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
            Engine.open(goldens[2], beside=_budget(goldens[2], 6), context=300, policies=policies)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_bundle_without_prices_takes_no_loss_budget(goldens):
    with pytest.raises(EngineError, match=r"This bundle has no prices.*--prices"):
        Engine.open(
            goldens[2], beside=_budget(goldens[2], 6), context=300, policies=Policies(loss=0.01)
        )


def test_a_loss_budget_where_all_fits_has_no_effect_and_is_refused(priced_bundle):
    with pytest.raises(EngineError, match="have no effect"):
        Engine.open(priced_bundle, context=300, policies=Policies(loss=0.01))
