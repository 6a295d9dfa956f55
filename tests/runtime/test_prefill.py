"""A prompt layer after layer: the same bits whatever shares a read, paused, thrown away or failing
on the way."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.parts import (
    CONTEXT,
    accounted,
    decoded,
    make_backbone,
    make_parts,
    prefilled,
    prompted,
    step,
)

from smoe.artifacts import open_bundle, safetensors_file
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.backbone.sessions import TwoValued
from smoe.runtime.budget import MemoryPlan, chunk_tokens, memory_for, plan_memory
from smoe.runtime.routing import Assignment
from smoe.runtime.step import Phase, Sequence

LENGTHS = {
    128: 290,
    1: 75,
}  # tokens by the chunk's: three units of a group, the last of which is cut


@pytest.fixture(params=[0, 1, 2, None], ids=["v1", "v2", "v3", "program"])
def bundle(request, goldens, programmed) -> Path:
    """v2 takes one token at a time and replaces its state; v3 has planes; the last needs no ONNX
    Runtime."""
    return programmed if request.param is None else goldens[request.param]


@cache
def _chunk(bundle: Path) -> int:
    return chunk_tokens(open_bundle(bundle).manifest)


def _unit(bundle: Path) -> int:
    """Tokens of which a group may have one, two or three: where tokens run one by one, so many of
    them."""
    return 30 if _chunk(bundle) == 1 else 128


@cache
def _prompt(bundle: Path) -> np.ndarray:
    answer = bundle.with_suffix(".answer.safetensors")
    random = np.random.default_rng(1).integers(0, 37, 150)
    ids = safetensors_file.load(answer)["prompt"] if answer.exists() else random
    return np.concatenate([ids, ids[::-1]])[: LENGTHS[_chunk(bundle)]]


@cache
def _plan(bundle: Path) -> MemoryPlan:
    return plan_memory(open_bundle(bundle), None, CONTEXT)


def _budget(bundle: Path, experts: int, prefill: float) -> int:
    """Bytes that leave room for so many experts, and for a part of what a prompt likes to keep."""
    plan = _plan(bundle)
    fixed = plan.fixed + int(prefill * plan.prefill)
    return fixed + experts * plan.record


@cache
def _by_chunks(bundle: Path, keep: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """The reference, chunk by chunk with all experts resident: logits at up to so many last
    positions of every chunk (one row is another product than many), and those of two more
    tokens."""
    ids, logits, chunk = _prompt(bundle), [], _chunk(bundle)
    with Engine.open(bundle, context=CONTEXT) as engine:
        sequence = engine.new_sequence()
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            logits += step(engine, prompted(sequence, part, keep=min(keep, len(part))))
        more = _more(engine, sequence)
    return np.concatenate(logits), more


def _more(model, sequence: Sequence) -> np.ndarray:
    return np.concatenate([step(model, decoded(sequence, token))[0] for token in (5, 7)])


@pytest.mark.parametrize("experts", [3, 8])
@pytest.mark.parametrize("prefill", [0, 0.4, 1])
def test_a_prompt_gives_the_same_bits_under_every_budget(bundle, experts, prefill):
    logits, more = _by_chunks(bundle)
    with Engine.open(bundle, beside=_budget(bundle, experts, prefill), context=CONTEXT) as engine:
        sequence = engine.new_sequence()
        found = engine.prefill(sequence, _prompt(bundle), len(logits)).finish()
        assert np.array_equal(found, logits)
        assert np.array_equal(_more(engine, sequence), more)
        assert sequence.ids == [*_prompt(bundle).tolist(), 5, 7]


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("keep", [1, 40])
def test_how_many_chunks_share_a_read_changes_no_bit(bundle, chunks, keep):
    logits, more = _by_chunks(bundle, keep)
    with make_parts(bundle, experts=3) as parts:
        sequence, group = parts.sequence(), chunks * _unit(bundle)
        prefill = prefilled(parts.model, sequence, _prompt(bundle), group, keep)
        assert np.array_equal(prefill.finish(), logits[-keep:]) and prefill.done
        assert np.array_equal(_more(parts.model, sequence), more)


def test_a_prompt_pauses_within_a_layer(programmed):
    """Also where nothing has to be read: whoever generates meanwhile waits for a part alone."""
    ids = _prompt(programmed)
    with Engine.open(programmed, context=CONTEXT) as engine:
        prefill, parts = engine.prefill(engine.new_sequence(), ids), 0
        while not prefill.done:
            prefill.advance()
            parts += 1
        layers = engine.manifest.layers
        assert parts >= sum(-(-len(ids) // 64) + len(ids) * one.top_k // 256 for one in layers)


@pytest.mark.parametrize("experts", [3, 5])
def test_an_expert_is_read_once_for_all_chunks_that_share_the_read(bundle, experts):
    ids = _prompt(bundle)
    for group in (_unit(bundle), 2 * _unit(bundle), 300):
        with make_parts(bundle, experts) as parts:
            groups = -(-len(ids) // group)
            every = sum(7 * int(sizes[-1]) for sizes in parts.sizes)
            prefilled(parts.model, parts.sequence(), ids, group).finish()
            assert 0 < parts.stats.bytes_read <= groups * every


def test_a_prompt_of_an_engine_reads_every_expert_once(bundle):
    ids, opened = _prompt(bundle)[:150], open_bundle(bundle)
    level = 1 if opened.levels > 1 else None  # where records are small beside what a chunk keeps
    whole = plan_memory(opened, None, CONTEXT, level)
    budgets = range(whole.minimum, whole.total, whole.record)
    plans = (plan_memory(opened, budget, CONTEXT, level) for budget in budgets)
    count = -(-len(ids) // _chunk(bundle))
    piece = make_backbone(opened).piece_bytes(len(ids))
    budget = next(plan.budget for plan in plans if plan.pieces(count, piece) == count)
    with Engine.open(bundle, beside=budget, context=CONTEXT, level=level) as engine:
        assert engine.plan.capacity < 14 and engine.plan.lent
        engine.prefill(engine.new_sequence(), ids).finish()
        every = sum(7 * layout.levels[(level or opened.levels) - 1] for layout in opened.layouts)
        assert 0 < engine.stats.bytes_read <= every


def test_a_prompt_that_is_paused_after_every_part_changes_no_bit_of_either(bundle):
    logits, more = _by_chunks(bundle)
    with Engine.open(bundle, context=CONTEXT) as engine:
        alone = engine.new_sequence()
        wanted = [step(engine, prompted(alone, np.array([9])))[0]]
        wanted += [step(engine, decoded(alone, token % 37))[0] for token in range(40)]
    for experts, group in ((3, _unit(bundle)), (5, 300)):
        with make_parts(bundle, experts) as parts:
            one, other = parts.sequence(), parts.sequence()
            found = [step(parts.model, prompted(other, np.array([9])))[0]]
            prefill, tokens = prefilled(parts.model, one, _prompt(bundle), group, 300), range(40)
            for token in tokens:
                if not prefill.done:
                    prefill.advance()
                found += step(parts.model, decoded(other, token % 37))
            assert np.array_equal(prefill.finish(), logits)
            assert np.array_equal(np.concatenate(found), np.concatenate(wanted))
            assert np.array_equal(_more(parts.model, one), more)
        assert accounted(parts.residency, parts.sizes)


@pytest.mark.parametrize("lent", [1, 3, 99])
def test_experts_lend_a_prompt_memory_and_have_it_back(bundle, lent):
    logits, more = _by_chunks(bundle)
    with make_parts(bundle, experts=6) as parts:
        record, whole = parts.cache.rows.shape[1], parts.residency.capacity
        one, other = parts.sequence(), parts.sequence()
        step(parts.model, prompted(other, np.array([9])))
        unit, ids = _unit(bundle), _prompt(bundle)
        prefill = prefilled(parts.model, one, ids, 2 * unit, 300, memory=lent * record, chunk=unit)
        left = whole - lent * record if lent < 6 else whole  # all of it cannot be had
        while not prefill.done:
            prefill.advance()
            step(parts.model, decoded(other, 5))
            assert prefill.done or parts.residency.total <= parts.residency.capacity == left
        prefill.advance()  # nothing is left to do
        assert np.array_equal(prefill.logits, logits)
        assert np.array_equal(_more(parts.model, one), more)
        assert parts.residency.capacity == whole
    assert accounted(parts.residency, parts.sizes)


@pytest.mark.parametrize("parts_done", [0, 1, 2, 5, 9])
def test_a_prompt_that_is_thrown_away_leaves_its_sequence_as_it_was(bundle, parts_done):
    with make_parts(bundle, experts=3) as parts:
        sequence = parts.sequence()
        prefilled(parts.model, sequence, _prompt(bundle)[:20], 300).finish()
        wanted = _more(parts.model, sequence.fork())
        prefill = prefilled(parts.model, sequence, _prompt(bundle)[20:220], _unit(bundle), memory=1)
        for _ in range(parts_done):
            prefill.advance()
        prefill.discard()
        assert parts.residency.capacity == 3 * parts.cache.rows.shape[1]
        assert prefill.done and sequence.ids == _prompt(bundle)[:20].tolist()
        assert np.array_equal(_more(parts.model, sequence), wanted)
    assert accounted(parts.residency, parts.sizes)


@pytest.mark.parametrize("after", [0, 3, 9, 17])
def test_a_read_that_fails_in_the_middle_leaves_the_sequence_as_it_was(bundle, after):
    reads, broken = 0, False

    def read(layer, expert, into, since, level):
        nonlocal reads
        reads += broken
        if broken and reads > after:
            raise EngineError("the disk is gone")
        return parts.shards.read(layer, expert, into, since, level)

    with make_parts(bundle, experts=3, read=read) as parts:
        sequence = parts.sequence()
        prefilled(parts.model, sequence, _prompt(bundle)[:20], 300).finish()
        wanted, rest = _more(parts.model, sequence.fork()), _prompt(bundle)[20:]
        broken = True
        with pytest.raises(EngineError, match="the disk is gone"):
            prefilled(parts.model, sequence, rest, _unit(bundle)).finish()
        broken = False
        assert sequence.ids == _prompt(bundle)[:20].tolist()
        assert np.array_equal(_more(parts.model, sequence.fork()), wanted)
        logits, more = _by_chunks(bundle)
        if parts.backbone.chunk == 1:  # elsewhere other chunks are other bits
            found = prefilled(parts.model, sequence, rest, 30, len(rest)).finish()
            assert np.array_equal(found, logits[20:])
            assert np.array_equal(_more(parts.model, sequence), more)
    assert accounted(parts.residency, parts.sizes)


# -- steps of several spans ----------------------------------------------------------------------


def _begun(model, sequence: Sequence, ids: np.ndarray) -> Sequence:
    prefilled(model, sequence, ids, 300).finish()
    return sequence


@pytest.mark.parametrize("experts", [3, 14])
def test_two_sequences_that_decode_in_one_step_have_the_bits_they_have_alone(bundle, experts):
    ids = _prompt(bundle)
    with make_parts(bundle, experts) as parts:
        one = _begun(parts.model, parts.sequence(), ids[:30])
        other = _begun(parts.model, parts.sequence(), ids[30:37])
        alone = [
            np.concatenate([step(parts.model, decoded(s, token))[0] for token in range(8)])
            for s in (one.fork(), other.fork())
        ]
        together = [
            step(parts.model, decoded(one, token), decoded(other, token)) for token in range(8)
        ]
        for index in (0, 1):
            found = np.concatenate([logits[index] for logits in together])
            assert np.array_equal(found, alone[index])
        assert one.ids == [*ids[:30].tolist(), *range(8)]
        assert other.ids == [*ids[30:37].tolist(), *range(8)]


@pytest.mark.parametrize("experts", [3, 14])
def test_a_step_that_decodes_and_reads_a_prompt_gives_each_its_own_bits(bundle, experts):
    ids = _prompt(bundle)
    with make_parts(bundle, experts) as parts:
        length = 1 if parts.backbone.chunk == 1 else 50  # no longer than a chunk
        one = _begun(parts.model, parts.sequence(), ids[:30])
        other = _begun(parts.model, parts.sequence(), ids[30:37])
        rest = ids[37 : 37 + length]
        (first,) = step(parts.model, decoded(one.fork(), 5))
        (second,) = step(parts.model, prompted(other.fork(), rest, keep=length))
        found = step(parts.model, decoded(one, 5), prompted(other, rest, keep=length))
        assert np.array_equal(found[0], first) and np.array_equal(found[1], second)
        assert (one.length, other.length) == (31, 7 + length)
        again = step(parts.model, prompted(one, rest), decoded(other, 5))  # the other way round
        assert [len(logits) for logits in again] == [1, 1]


def test_a_prompt_beside_a_chooser_takes_the_routers_word(bundle):
    """What stands in for a missing expert is for tokens that are decoded, whoever they share the
    step with."""
    seen: list[tuple[int, int]] = []

    def choose(routed, available):
        seen.append((routed.tokens, len(set(routed.owner.tolist()))))
        ids, weights = routed.ids.copy(), routed.weights.copy()
        ids[:, -1], weights[:, -1] = len(available.level), 0  # no expert
        return Assignment(ids=ids, weights=weights)

    ids = _prompt(bundle)
    with make_parts(bundle, experts=14) as exact:
        (wanted,) = step(exact.model, prompted(exact.sequence(), ids[:1]))
        (decoded_exactly,) = step(exact.model, decoded(exact.sequence(), 5))
    with make_parts(bundle, experts=14, choose=choose) as parts:
        spans = prompted(parts.sequence(), ids[:1]), decoded(parts.sequence(), 5)
        first, second = step(parts.model, *spans)
        assert np.array_equal(first, wanted) and not np.array_equal(second, decoded_exactly)
        assert seen == [(1, 1), (1, 1)]
        seen.clear()
        prefilled(parts.model, parts.sequence(), ids[:20], 300).finish()
        assert not seen
        prefilled(parts.model, parts.sequence(), ids[:20], 300, 20, Phase.VERIFY).finish()
        assert seen[0][0] == 20


def test_many_logits_at_once_look_ahead_nowhere(bundle):
    """Their pieces wait for one another, and keep no more than they need."""
    ids = _prompt(bundle)
    opened = open_bundle(bundle)
    with Engine.open(bundle, None, CONTEXT) as engine:
        logits = engine.logits(ids)
    for experts in (7, 9, 12):
        for prefetch in ("auto", "smoe:0"):
            budget, policies = memory_for(opened, experts, CONTEXT), Policies(prefetch=prefetch)
            with Engine.open(bundle, beside=budget, context=CONTEXT, policies=policies) as engine:
                assert np.array_equal(engine.logits(ids), logits)


def test_a_prompt_of_nothing_is_done(bundle):
    with Engine.open(
        bundle, beside=memory_for(open_bundle(bundle), 7, CONTEXT), context=CONTEXT
    ) as engine:
        prefill = engine.prefill(engine.new_sequence(), np.zeros(0, np.int64))
        assert prefill.done and prefill.finish().size == 0
        prefill.discard()
        assert prefill.finish().size == 0


def test_a_mask_that_waits_is_a_bit_for_each_pair_of_tokens():
    random = np.random.default_rng(4)
    lowest = np.finfo(np.float32).min
    for low, high in ((0.0, lowest), (-0.0, -np.inf), (np.float32(np.nan), 1.0), (0.0, -0.0)):
        mask = np.where(random.random((1, 1, 5, 13)) < 0.4, low, high).astype(np.float32)
        packed = TwoValued.of(mask)
        assert packed.bits.nbytes == 9
        assert packed.value().numpy().tobytes() == mask.tobytes()
        assert packed.value().numpy().shape == mask.shape
    same = np.full((2, 3), 7, np.float32)
    assert np.array_equal(TwoValued.of(same).value().numpy(), same)
    assert TwoValued.of(np.arange(3, dtype=np.float32)) is None
    assert TwoValued.of(np.zeros((0, 4), np.float32)) is None


def test_what_waits_keeps_a_bit_of_each_mask(bundle):
    """Pieces of 300 tokens would keep 154 KB of a mask in float32, and 5 KB in bits."""
    backbone = make_backbone(open_bundle(bundle))
    short, long = (backbone.piece_bytes(length) for length in (150, 300))
    if backbone.chunk > 1:
        assert 0 <= long - short < 128 * 150  # a program keeps none
