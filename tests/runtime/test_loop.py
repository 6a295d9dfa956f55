"""Many requests at once: each gets what it gets alone, waits where there is no room, and leaves
nothing behind."""

import contextlib
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import prices, requests
from support.parts import decoded, make_parts, step
from support.requests import CONTEXT, opened

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, Policies, StopWhen
from smoe.runtime.budget import Requests, plan_memory
from smoe.runtime.cli import cli
from smoe.runtime.evaluate import log_softmax
from smoe.runtime.model import Prefill, Prompt
from smoe.runtime.sampling import Sampling
from smoe.runtime.serve import Loop, Request

NEVER = StopWhen(ids=())


@pytest.fixture(params=["program", "onnx"])
def bundle(request, golden, programmed) -> Path:
    return programmed if request.param == "program" else golden


def _ids(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 37, count)


def _alone(engine: Engine, ids: np.ndarray, count: int) -> list[int]:
    return [token.id for token in engine.generate(ids, count, stop=NEVER)]


def _asked(ids: np.ndarray, count: int, **how) -> Request:
    return Request(ids, count, stop=NEVER, **how)


def _got(generation) -> list[int]:
    return [token.id for token in generation]


@pytest.mark.parametrize("experts", [None, 3])
def test_a_request_gets_what_it_gets_alone(bundle, experts):
    done, wrong = requests.many(bundle, 4, seed=1, experts=experts)
    assert done["requests"] == 4 * requests.PROMPTS and not wrong


def test_prompts_that_are_read_together_give_the_bits_of_each(bundle):
    prompts = [_ids(seed, count) for seed, count in enumerate((140, 1, 30, 290))]
    with make_parts(bundle, experts=4) as parts:
        alone, more = [], []
        for ids in prompts:
            sequence = parts.sequence()
            prefill = Prefill(parts.model, [Prompt(sequence, ids, min(3, len(ids)))], 512)
            alone.append(prefill.finish())
            more.append(step(parts.model, decoded(sequence, 5))[0])
        for group in (128, 256, 512):
            sequences = [parts.sequence() for _ in prompts]
            asked = [
                Prompt(sequence, ids, min(3, len(ids)))
                for sequence, ids in zip(sequences, prompts, strict=True)
            ]
            logits = Prefill(parts.model, asked, group, chunk=128).finish()
            assert np.array_equal(logits, np.concatenate(alone))
            for sequence, ids, wanted in zip(sequences, prompts, more, strict=True):
                assert sequence.ids == ids.tolist()
                assert np.array_equal(step(parts.model, decoded(sequence, 5))[0], wanted)


def test_a_request_without_loss_is_exact_among_others(goldens, tmp_path):
    bundle = prices.add_prices(goldens[2], tmp_path / "priced")
    prompts = [_ids(seed, 20 + seed) for seed in range(6)]
    with opened(bundle) as engine:
        wanted = [_alone(engine, ids, 24) for ids in prompts]
    policies = Policies(loss=0.05)
    with opened(bundle, 8, policies) as engine, Loop(engine) as loop:
        generations = [
            loop.submit(_asked(ids, 24, loss=0.0 if number % 2 else None))
            for number, ids in enumerate(prompts)
        ]
        found = [_got(generation) for generation in generations]
        spent = [generation.nats for generation in generations]
        assert found[1::2] == wanted[1::2]
        assert spent[1::2] == [0, 0, 0] and all(nats > 0 for nats in spent[::2])
        with pytest.raises(EngineError, match="A loss of 7.0 nats"):
            loop.submit(_asked(prompts[0], 4, loss=7.0))


def test_what_came_of_shortcuts_is_shared_with_nobody(goldens):
    bundle, ids = goldens[5], _ids(7, 60)
    with opened(bundle, 6, Policies(loss=0.5)) as engine, Loop(engine) as loop:
        lossy = loop.submit(_asked(ids, 40))
        longer = np.concatenate([ids, _got(lossy)[:30], [3]])
        assert lossy.nats > 0
        exact = loop.submit(_asked(longer, 8, loss=0.0))
        found, shared, spent = _got(exact), exact.shared, exact.nats
    assert shared == len(ids) and spent == 0  # its prompt took none
    with opened(bundle) as engine:
        assert found == _alone(engine, longer, 8)


def test_a_loss_where_the_engine_has_none_is_refused(programmed):
    with opened(programmed) as engine, Loop(engine) as loop:
        with pytest.raises(EngineError, match="this engine spends none"):
            loop.submit(_asked(_ids(0, 5), 4, loss=0.01))
        loop.submit(_asked(_ids(0, 5), 4, loss=0.0))


def test_what_requests_begin_with_is_read_once(programmed):
    shared = _ids(0, 100)
    prompts = [np.concatenate([shared, _ids(seed, 10 + seed)]) for seed in range(1, 5)]
    with opened(programmed) as engine:
        wanted = [_alone(engine, ids, 6) for ids in prompts]
        engine.reset_stats()
        with Loop(engine) as loop:
            generations = [loop.submit(_asked(ids, 6)) for ids in prompts]
            assert [_got(generation) for generation in generations] == wanted
            assert [generation.shared for generation in generations] == [100] * 4
            layers = engine.manifest.layers
            tokens = 100 + sum(len(ids) - 100 + 6 - 1 for ids in prompts)
            assert engine.stats.slots == tokens * sum(layer.top_k for layer in layers)
            later = loop.submit(_asked(np.append(prompts[2], [*wanted[2][:4], 3]), 2))
            # Its recurrent state is known where others ended, and not in the middle of one.
            assert len(_got(later)) == 2 and later.shared == 100


def test_any_length_of_another_is_shared_where_state_can_be_shortened(goldens):
    with opened(goldens[-1]) as engine, Loop(engine) as loop:
        ids = _ids(4, 50)
        first = _got(loop.submit(_asked(ids, 9)))
        for shared, extra in ((54, first[:4]), (40, [])):
            more = np.concatenate([ids, extra])[:shared].astype(np.int64)
            more = np.append(more, [1, 2, 3])
            second = loop.submit(_asked(more, 4))
            found = _got(second)
            assert second.shared in (shared, shared + 1, shared + 2)
            assert found == _got(loop.submit(Request([*more.tolist()], 4, stop=NEVER)))
        engine.sequence.rewind(0)
    with opened(goldens[-1]) as engine:
        assert found == _alone(engine, more, 4)


def test_a_prompt_goes_on_from_one_that_still_generates(programmed):
    ids = _ids(3, 60)
    with opened(programmed) as engine:
        wanted = _alone(engine, np.append(ids, 4), 5)
        with Loop(engine) as loop:
            first = loop.submit(_asked(ids, 40))
            while not first.made:
                loop.step()
            second = loop.submit(_asked(np.append(ids, 4), 5))
            assert _got(second) == wanted and second.shared == 60
            assert not first.finish and len(_got(first)) == 40


def test_more_requests_than_there_is_room_for_wait(programmed):
    held = Requests(4, 300)
    with Engine.open(programmed, context=CONTEXT, requests=4, held=300) as engine:
        assert engine.plan.state < plan_memory(
            open_bundle(programmed), None, CONTEXT, requests=Requests(4)
        ).state and engine.plan.held == held.tokens(CONTEXT)
        with Loop(engine) as loop:
            large = [loop.submit(_asked(_ids(seed, 180), 20)) for seed in range(3)]
            small = loop.submit(_asked(_ids(9, 5), 5))
            loop.step()
            assert not large[0].waits and "room for its state" in large[1].waits
            assert loop.counts["waiting"] == 3  # in turn
            assert [len(_got(generation)) for generation in large] == [20] * 3
            assert len(_got(small)) == 5 and small.waits == ""


def test_one_too_many_is_refused_and_harms_nobody(programmed):
    with opened(programmed) as engine, Loop(engine, waiting=2) as loop:
        first = loop.submit(_asked(_ids(0, 9), 3))
        with pytest.raises(EngineError, match="more than the context of 256"):
            loop.submit(_asked(_ids(1, 250), 7))
        with pytest.raises(EngineError, match="prompt is empty"):
            loop.submit(_asked(_ids(1, 0), 7))
        with pytest.raises(EngineError, match="max_new_tokens is 0"):
            loop.submit(_asked(_ids(1, 5), 0))
        with pytest.raises(EngineError, match="logprobs is 65"):
            loop.submit(_asked(_ids(1, 5), 1, logprobs=65))
        loop.submit(_asked(_ids(1, 9), 3))
        with pytest.raises(EngineError, match="2 requests wait already"):
            loop.submit(_asked(_ids(2, 9), 3))
        assert len(_got(first)) == 3


def test_a_cancelled_request_frees_its_room_within_a_step(programmed):
    one = Engine.open(programmed, context=CONTEXT, requests=2, held=CONTEXT)
    with one as engine, Loop(engine) as loop:
        first, second = (loop.submit(_asked(_ids(seed, 60), 190)) for seed in range(2))
        for _ in range(3):
            loop.step()
        assert first.made and second.waits
        first.cancel()
        loop.step()
        assert first.finish == "cancelled" and not second.waits
        second.cancel()
        assert not loop.step() and loop.counts == dict.fromkeys(loop.counts, 0)
        assert len(_got(first)) == first.made


def test_a_short_prompt_does_not_wait_for_a_long_one_that_begins_alike(programmed):
    shared = _ids(0, 40)
    with opened(programmed) as engine, Loop(engine) as loop:
        long = loop.submit(_asked(np.concatenate([shared, _ids(1, 180)]), 4))
        loop.step()
        short = loop.submit(_asked(np.append(shared, 1), 4))
        loop.step()
        assert not short.waits
        assert len(_got(short)) == 4 and len(_got(long)) == 4


def test_who_is_read_with_a_cancelled_one_begins_again(programmed):
    wanted = None
    for cancel in (False, True):
        with opened(programmed) as engine, Loop(engine) as loop:
            # Beside one who generates, prompts are read for a token's time at once, not as a whole.
            beside = loop.submit(_asked(_ids(0, 10), 200))
            while beside.made < 40:
                loop.step()
            asked = [_asked(_ids(seed, 100 + seed), 5) for seed in (1, 2, 3)]
            one, *others = [loop.submit(request) for request in asked]
            loop.step()
            if cancel:
                assert one.sequence is not None and not one.made  # it began and is not done
                one.cancel()
                loop.step()
                assert one.finish == "cancelled"
            found = [_got(other) for other in others]
            assert wanted in (None, found)
            wanted = found


@pytest.mark.parametrize("fails", ["listens", "breaks in"])
def test_nothing_waits_for_ever_when_the_loop_breaks(programmed, fails):
    with opened(programmed) as engine:
        loop = Loop(engine)

        def listener(token) -> None:
            if token is not None:
                raise KeyboardInterrupt if fails == "breaks in" else ValueError("listens badly")

        bad = loop.submit(_asked(_ids(0, 9), 20), listener)
        good = loop.submit(_asked(_ids(1, 9), 3))
        if fails == "listens":  # only its own answer ends
            assert len(_got(good)) == 3 and bad.finish == "cancelled" and loop.alive
        else:
            with pytest.raises(KeyboardInterrupt):
                _got(good)
            assert not loop.alive and good.finish == "failed"
            with pytest.raises(EngineError, match="loop has ended"):
                list(good)
        loop.close()


@pytest.mark.parametrize("what", ["prompt", "max_new_tokens", "logprobs"])
def test_what_is_no_request_is_refused(programmed, what):
    good = {"prompt": [1, 2], "max_new_tokens": 2, "logprobs": 1}
    with opened(programmed) as engine, Loop(engine) as loop:
        for bad in (2.5, "3", [[1], [2]]):
            if not (what == "prompt" and isinstance(bad, str)):
                with pytest.raises(EngineError):
                    loop.submit(Request(**(good | {what: bad})))
        assert len(_got(loop.submit(Request(**good, stop=NEVER)))) == 2


def test_probabilities_are_those_of_the_logits(programmed):
    ids = _ids(5, 12)
    with opened(programmed) as engine, Loop(engine) as loop:
        asked = _asked(ids, 5, logprobs=4, sampling=Sampling(0.7, seed=3))
        tokens = list(loop.submit(asked))
        whole = np.concatenate([ids, [token.id for token in tokens]])
        for at, token in enumerate(tokens, len(ids) - 1):
            wanted = log_softmax(engine.logits(whole[: at + 1])[-1])
            assert token.logprob == pytest.approx(wanted[token.id], abs=1e-5)
            assert [i for i, _ in token.best] == np.argsort(-wanted, kind="stable")[:4].tolist()
            assert [p for _, p in token.best] == pytest.approx(np.sort(wanted)[::-1][:4], abs=1e-5)


def _until_it_fails(engine: Engine, ids: np.ndarray, count: int) -> tuple[list[int], bool]:
    """Tokens that it gets alone, and whether that ends with an error."""
    made: list[int] = []
    try:
        for token in engine.generate(ids, count, stop=NEVER):
            made.append(token.id)
    except EngineError:
        return made, True
    return made, False


def test_who_needs_what_cannot_be_read_fails_alone(golden, tmp_path):
    bundle = Path(shutil.copytree(golden, tmp_path / "cut"))
    prompts = [_ids(seed, 1) for seed in range(60)]
    with opened(bundle, 3, Policies(warm=False)) as engine:
        shard = bundle / engine.manifest.shard(1)
        os.truncate(shard, shard.stat().st_size - 1)  # the last expert is gone
        alone = [(ids, *_until_it_fails(engine, ids, 4)) for ids in prompts]
        well = [one for one in alone if not one[2]][:2]
        late = [one for one in alone if one[1] and one[2]][:2]  # together with others by then
        early = [one for one in alone if not one[1]][:2]
        assert len(well) == len(late) == len(early) == 2
        for some in (well + late, early + well, early + late):
            with Loop(engine) as loop:
                generations = [loop.submit(_asked(ids, 4)) for ids, *_ in some]
                while loop.step():
                    pass
                for generation, (_, made, fails) in zip(generations, some, strict=True):
                    assert generation.finish == ("failed" if fails else "length")
                    assert generation.made == len(made)
                    with pytest.raises(EngineError) if fails else contextlib.nullcontext():
                        assert _got(generation) == made
    with opened(golden) as engine:
        assert [_alone(engine, ids, 4) for ids, *_ in well] == [made for _, made, _ in well]


def test_a_thread_runs_it(programmed):
    prompts = [_ids(seed, 10 + seed) for seed in range(6)]
    with opened(programmed) as engine:
        wanted = [_alone(engine, ids, 8) for ids in prompts]
        loop, found = Loop(engine), {}
        loop.start()

        def ask(number: int) -> None:
            found[number] = _got(loop.submit(_asked(prompts[number], 8)))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[number] for number in range(6)] == wanted and loop.alive
        endless = loop.submit(_asked(prompts[0], 200))
        first = next(iter(endless))
        assert first.id == wanted[0][0]
        loop.close()
        assert not loop.alive and endless.finish == "cancelled"
        with pytest.raises(EngineError, match="loop has ended"):
            loop.submit(_asked(prompts[0], 1))


def test_an_engine_that_is_closed_ends_all(programmed):
    engine = opened(programmed)
    loop = Loop(engine)
    generation = loop.submit(_asked(_ids(0, 5), 50))
    next(iter(generation))
    engine.close()
    with pytest.raises(EngineError, match="This engine is closed"):
        list(generation)
    loop.close()


@pytest.mark.parametrize("many", [(0, None), (2000, None), (4, 255), (4, 1025)])
def test_what_cannot_be_held_is_refused(programmed, many):
    with pytest.raises(EngineError, match="requests"):
        Engine.open(programmed, context=CONTEXT, requests=many[0], held=many[1])


def test_a_budget_counts_all_requests(programmed):
    bundle = open_bundle(programmed)
    one, four = (plan_memory(bundle, None, CONTEXT, requests=Requests(n)) for n in (1, 4))
    assert four.state == 4 * one.state and four.workspace > one.workspace
    with pytest.raises(EngineError, match="4 requests that hold 1024 tokens together"):
        plan_memory(bundle, one.fixed, CONTEXT, requests=Requests(4))


def test_bench_of_many_requests(golden, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    args = ["bench", str(golden), "--text", str(text), "--context", "128", "--length", "40"]
    done = CliRunner().invoke(cli, [*args, "--requests", "3", "--tokens", "200", "--json"])
    assert done.exit_code == 0, done.output
    assert '"requests": 5' in done.output and '"at_once": 3' in done.output
    assert "requests: up to 3 at once, of 384 tokens together" in done.output
    refused = CliRunner().invoke(cli, [*args, "--requests", "3", "--choices", "2"])
    assert refused.exit_code == 2 and "--choices has no effect with --requests" in refused.output
    refused = CliRunner().invoke(cli, [*args, "--held", "200"])
    assert refused.exit_code == 2 and "--held has no effect" in refused.output
