"""Policies in the engine: lossless ones change no bit, lossy ones do what their rule says, and
misuse is a sentence."""

import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
import pytest
from support.parts import accounted, decoded, greedy, make_parts, prompted, step

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.cache.eviction import EVICTIONS, PLANES
from smoe.runtime.choosers import SUBSTITUTIONS
from smoe.runtime.options import make_predictor, tables_bytes
from smoe.runtime.routing import Available, Routed, as_routed
from smoe.runtime.step import Step


@pytest.fixture(scope="module")
def budget(golden):
    """Bytes that leave room for so many experts of 14."""
    opened = open_bundle(golden)
    return lambda experts: memory_for(opened, experts, 300)


@pytest.fixture(scope="module")
def wanted(golden, answer):
    with Engine.open(golden) as engine:
        return engine.logits(answer["prompt"]), np.stack(list(engine.score(answer["prompt"][:40])))


# -- lossless --------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [3, 6, 11])
@pytest.mark.parametrize("policies, io", [
    *[(Policies(eviction=name), "buffered") for name in EVICTIONS if name != PLANES],
    (Policies(warm=False), "direct"),
    (Policies(prefetch="none"), "buffered"),
    (Policies(prefetch="auto"), "direct"),
    (Policies(prefetch="previous"), "direct"),
    (Policies(prefetch="transition"), "buffered"),
    (Policies(prefetch="smoe:0.1", warm=False), "buffered"),
])  # fmt: skip
def test_lossless_policies_change_no_bit(golden, answer, budget, wanted, experts, policies, io):
    prefill, decoded = wanted
    kept = tables_bytes(policies, open_bundle(golden))
    with Engine.open(golden, beside=budget(experts) + kept, policies=policies, io=io) as engine:
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
    with Engine.open(golden, beside=budget(8), policies=policies) as engine:
        assert np.array_equal(np.stack(list(engine.score(answer["prompt"][:40]))), wanted[1])
    counts = {layer: [int(r.sum()) for at, r in spy.seen if at == layer] for layer in (0, 1)}
    assert max(counts[0]) <= 4 and max(counts[1]) <= 4
    assert counts[0][-1] == counts[1][-1] == 4
    with Engine.open(golden, beside=budget(8), policies=Policies(shares=True)) as engine:
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
        with Engine.open(golden, beside=budget(5), policies=policies) as engine:
            engine.step(Step((decoded(engine.new_sequence(), 3),)))
        assert spy.seen[0][0] == 0 and np.array_equal(spy.seen[0][1], wanted)


@pytest.mark.parametrize("prefetch", ["previous", "transition", "smoe:0"])
def test_guesses_are_read_counted_and_used(golden, answer, prefetch):
    bundle = open_bundle(golden)
    predict = make_predictor(prefetch, bundle.manifest, bundle.tables)
    # Whether a guess comes in time is chance with threads on a model this small; without them it is
    # read at once.
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


# -- lossy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBSTITUTIONS)
def test_every_substitution_runs_and_is_counted(golden, answer, budget, wanted, name):
    number = {"smoe": 1.5, "cache-prior": 1, "buddy": 0}.get(name, 1)
    with Engine.open(
        golden, beside=budget(6), policies=Policies(substitution=f"{name}:{number}")
    ) as engine:
        logits = np.stack(list(engine.score(answer["prompt"][:40])))
        stats = engine.stats
        assert np.isfinite(logits).all() and not np.array_equal(logits, wanted[1])
        assert 0 < stats.substituted < stats.slots and stats.hit_rate > stats.wanted_hit_rate
        assert "(lossy; prompts are not)" in "\n".join(engine.mode_lines())


def test_fewer_planes_are_lossy_whatever_the_policies(goldens):
    for level, said in ((1, "(lossy)"), (None, "(lossless)")):
        half = memory_for(open_bundle(goldens[2]), 7, 300, level)
        with Engine.open(goldens[2], beside=half, context=300, level=level) as engine:
            assert f"substitution none {said}" in "\n".join(engine.mode_lines())
            assert engine.lossless == (level is None)


def test_smoe_at_zero_is_lossless(golden, answer, budget, wanted):
    with Engine.open(golden, beside=budget(6), policies=Policies(substitution="smoe:0")) as engine:
        assert np.array_equal(np.stack(list(engine.score(answer["prompt"][:40]))), wanted[1])
        assert engine.stats.substituted == 0


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policies, sentence", [
    (Policies(eviction="mru"), "no eviction 'mru'; there are lru"),
    (Policies(substitution="smo:1"), "no substitution 'smo'; there are none, smoe"),
    (
        Policies(substitution="smoe:x"),
        "'smoe:x': after the colon comes the alpha, a number from 0 to 10",
    ),
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
        Engine.open(golden, beside=budget(6), policies=policies)


def test_policies_without_effect_or_room_are_refused(golden, budget):
    with pytest.raises(
        EngineError, match="All 14 experts fit into memory, so that policies .* have no effect"
    ):
        Engine.open(golden, policies=Policies(substitution="smoe"))
    with pytest.raises(
        EngineError, match="Shares by layer cannot work with 5 resident experts: 2 for each of 2"
    ):
        Engine.open(golden, beside=budget(5), policies=Policies(shares=True))
    with pytest.raises(
        EngineError, match="no way to read called 'mapped'; there are direct and buffered"
    ):
        Engine.open(golden, beside=budget(5), io="mapped")


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
            Engine.open(copied, beside=budget(6), policies=policies)
    with Engine.open(copied, beside=budget(6), policies=Policies(eviction="lru")) as engine:
        assert len(list(engine.generate([1, 2, 3], max_new_tokens=4))) == 4


# -- faults ----------------------------------------------------------------------------------------


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
    with Engine.open(copied, beside=budget(5), policies=policies, io="buffered") as engine:
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


def test_what_may_lose_something_reads_nothing_on_a_guess_unless_told(golden, budget):
    for policies, said in (
        (Policies(), "prefetch auto ("),
        (Policies(substitution="zero:1"), "prefetch none"),
        (Policies(substitution="zero:1", prefetch="previous"), "prefetch previous"),
    ):
        with Engine.open(golden, beside=budget(5), context=300, policies=policies) as engine:
            assert said in "\n".join(engine.mode_lines())


def test_a_lossy_run_repeats(golden, answer):
    """What stands in depends on what is resident, and that never on when reads arrive."""
    budget = memory_for(open_bundle(golden), 5, 300)
    runs = []
    for _ in range(4):
        with Engine.open(
            golden, beside=budget, context=300, policies=Policies(substitution="zero:1")
        ) as engine:
            runs.append(np.stack(list(engine.score(answer["prompt"][:60], 8))))
    assert all(np.array_equal(runs[0], run) for run in runs[1:])
