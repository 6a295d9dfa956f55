"""Drafts: guesses change no token, whoever makes them, and how many are made follows what they
bring."""

import itertools

import numpy as np
import pytest
from click.testing import CliRunner
from support import prices, requests
from support.requests import CONTEXT, opened

from smoe.runtime import Engine, EngineError, Policies, StopWhen
from smoe.runtime.cli import cli
from smoe.runtime.draft import named
from smoe.runtime.draft.decoder import Decoder, Going
from smoe.runtime.draft.ngrams import NGrams
from smoe.runtime.draft.pays import Odds, StepTimes, guesses_that_pay
from smoe.runtime.sampling import Sampler, Sampling
from smoe.runtime.serve import Loop, Request
from smoe.runtime.stats import Stats
from smoe.runtime.step import Step

DRAFTS = [("ngram", None), ("ngram:16", 4), ("resident", 4), ("resident:9", 7)]
NEVER = StopWhen(ids=())


@pytest.fixture(autouse=True)
def guess(monkeypatch):
    """A model that was not trained is never sure: it guesses all the same."""
    monkeypatch.setattr(named, "SURE", 0.0)


def _repeating(seed: int, count: int) -> np.ndarray:
    return np.tile(np.random.default_rng(seed).integers(0, 37, 7), count)[:count]


def _generated(engine: Engine, ids: np.ndarray, how: Sampling, **more) -> tuple[list, str]:
    """Tokens with their probabilities to the bit, and why they ended."""
    with Loop(engine) as loop:
        generation = loop.submit(Request(ids, 60, how, logprobs=3, **({"stop": NEVER} | more)))
        return list(generation), generation.finish


@pytest.mark.parametrize(("draft", "experts"), DRAFTS)
def test_no_token_changes_nor_a_bit_of_its_probability(programmed, draft, experts):
    hows = [Sampling(), Sampling(0.7, seed=5), Sampling(2.0, top_k=9, top_p=0.9, seed=6)]
    cases = list(itertools.product([_repeating(seed, 50) for seed in range(3)], hows))
    with opened(programmed, experts) as engine:
        wanted = [_generated(engine, *case) for case in cases]
    with opened(programmed, experts, Policies(draft=draft)) as engine:
        assert [_generated(engine, *case) for case in cases] == wanted
        stats = engine.stats
        assert stats.guesses_checked > 0 and (
            draft.startswith("resident") or 0 < stats.guesses_right < stats.guesses_checked
        )


@pytest.mark.parametrize(("draft", "experts"), DRAFTS)
def test_a_request_among_others_gets_what_it_gets_alone(programmed, draft, experts):
    policies = Policies(draft=draft)
    done, wrong = requests.many(programmed, 4, seed=2, experts=experts, policies=policies)
    assert done["requests"] == 4 * requests.PROMPTS and not wrong


@pytest.mark.parametrize("draft", ["ngram:16", "resident:9"])
def test_a_text_ends_where_it_ends_without_a_draft(programmed, draft):
    ids, found = _repeating(1, 50), {}
    for name in ("none", draft):
        with opened(programmed, 6, Policies(draft=name)) as engine:
            texts = [token.id for token in engine.generate(ids, 60, stop=NEVER)]
            stops = [StopWhen(ids=(one,)) for one in dict.fromkeys(texts)]
            ends = [list(engine.generate(ids, 60, stop=stop)) for stop in stops]
            # What an early end leaves behind is what another turn goes on from.
            turn = np.array([*ids, *texts[:20], 3, 1])
            found[name] = texts, ends, list(engine.generate(turn, 30, stop=NEVER, reuse=True))
            counts = [len(list(engine.generate(ids, count, stop=NEVER))) for count in (1, 2, 3, 20)]
            assert counts == [1, 2, 3, 20]
            held = np.array(engine.sequence.ids)
            assert np.array_equal(held, [*ids, *texts[:19]]) and engine.stats.new_tokens
    assert found["none"] == found[draft]


def test_a_guess_that_is_left_alone_is_forgotten(programmed):
    """Who leaves a generation early goes on with another text as with a new engine."""
    ids = _repeating(3, 40)
    with opened(programmed, policies=Policies(draft="ngram:16")) as engine:
        for token, _ in zip(engine.generate(ids, 60, stop=NEVER), range(9), strict=False):
            assert token.id >= 0
        other = [*ids[:30], 4, 4]
        found = [token.id for token in engine.generate(other, 20, stop=NEVER, reuse=True)]
        assert found == [token.id for token in engine.generate(other, 20, stop=NEVER)]


def test_ngrams_are_the_last_copy_of_the_longest_end():
    random = np.random.default_rng(0)
    for _ in range(300):
        ids = random.integers(0, 4, random.integers(1, 60)).tolist()
        longest = int(random.integers(2, 6))
        ngrams, cut = NGrams(longest, 2), int(random.integers(0, len(ids) + 1))
        ngrams.push(ids[:cut])
        ngrams.push(ids[cut:])
        wanted, length = list[int](), 0
        for n, end in itertools.product(range(longest, 1, -1), range(len(ids) - 1, 1, -1)):
            if n <= end and ids[end - n : end] == ids[len(ids) - n :]:
                wanted, length = ids[end : end + 5], n
                break
        assert ngrams.find() == length and ngrams.next(5) == wanted


def test_as_many_guesses_as_make_most_tokens_a_second():
    def known(step: float, token: float) -> StepTimes:
        times = StepTimes()
        for tokens in (1, 3, 9, 2, 5):
            times.seen(tokens, step + token * tokens)
        assert np.allclose(times.line(), (step, token))
        return times

    cheap, dear = known(1.0, 0.01), known(0.0, 1.0)
    assert guesses_that_pay(cheap, 0, 0.99, 16) == 16
    assert guesses_that_pay(cheap, 0, 0.0, 16) == 0
    assert guesses_that_pay(dear, 0, 0.9, 16) == 0
    assert guesses_that_pay(cheap, 0, 0.9, 16, each=1.0) == 0  # who guesses takes as long
    assert guesses_that_pay(StepTimes(), 0, 0.5, 5) == 5  # to find out
    middling = known(1.0, 0.1)
    few, many = (guesses_that_pay(middling, 0, right, 16) for right in (0.5, 0.9))
    assert 0 < few < many
    assert guesses_that_pay(middling, 30, 0.5, 16) < few  # of many, one gains little


def test_a_step_of_unlike_tokens_is_a_line_that_forgets():
    times, random = StepTimes(), np.random.default_rng(1)
    for _ in range(500):
        tokens = int(random.integers(1, 9))
        times.seen(tokens, 5.0 + tokens * random.uniform(0.9, 1.1))
    for _ in range(500):
        tokens = int(random.integers(1, 9))
        times.seen(tokens, 1.0 + 0.1 * tokens * random.uniform(0.9, 1.1))
    assert np.allclose(times.line(), (1.0, 0.1), rtol=0.1)


def test_odds_follow_the_guesses_and_go_back_to_even():
    odds = Odds(0.5)
    odds.seen(50, False)
    assert odds.right > 0.95
    odds.seen(0, True)
    assert 0.8 < odds.right < 0.95
    for _ in range(60):
        odds.seen(0, True)
    assert odds.right < 0.01
    for _ in range(1000):
        odds.rest()
    assert 0.49 < odds.right <= 0.5


def test_a_forked_sampler_draws_the_same_and_changes_nothing():
    random = np.random.default_rng(3)
    for how in (Sampling(), Sampling(0.8, seed=1), Sampling(1.5, top_k=5, top_p=0.8, seed=2)):
        sampler, alone = Sampler(how), Sampler(how)
        for _ in range(20):
            rows = random.normal(size=(4, 60)).astype(np.float32)
            fork = sampler.fork()
            guessed = [fork.draw(row) for row in rows]
            assert [sampler.draw(row) for row in rows] == guessed
            assert [alone.draw(row) for row in rows] == guessed


def test_what_cannot_be_is_a_sentence(programmed, golden, goldens):
    def refusal(bundle, **how) -> str:
        policies, more = Policies(**how.pop("policies")), how
        with pytest.raises(EngineError) as refused:
            Engine.open(bundle, context=CONTEXT, policies=policies, **more).close()
        return str(refused.value)

    assert "There is no draft 'shadows'" in refusal(programmed, policies={"draft": "shadows"})
    assert "from 1 to 16" in refusal(programmed, policies={"draft": "ngram:17"})
    assert "a whole one" in refusal(programmed, policies={"draft": "ngram:2.5"})
    assert "none is missing" in refusal(programmed, policies={"draft": "resident"})
    assert "program runs whole" in refusal(golden, policies={"draft": "ngram"})
    lossy = {"draft": "ngram", "substitution": lambda routed, available: None}
    assert "exclude each other" in refusal(programmed, policies=lossy)


def test_drafts_are_in_the_mode_lines_and_in_the_plan(programmed):
    with opened(programmed) as engine:
        assert not any("draft" in line for line in engine.mode_lines())
        before = engine.plan.total - engine.plan.process
    with opened(programmed, policies=Policies(draft="ngram")) as engine:
        assert "draft: ngram, as many guesses as pay (no token changes)" in engine.mode_lines()
        more = engine.plan.total - engine.plan.process - before
        assert more == 32 * 4 * engine.manifest.model.vocabulary
        list(engine.generate(_repeating(0, 40), 40, stop=NEVER))
        assert "guesses right" in engine.stats.line()


def test_a_guess_that_cannot_be_computed_is_left_out(programmed):
    ids, broke = _repeating(2, 40), list[int]()

    def breaks(step: Step) -> list[np.ndarray]:
        if step.tokens > 1:
            broke.append(step.tokens)
            raise EngineError("A record cannot be read.")
        return engine.step(step)

    with opened(programmed, policies=Policies(draft="ngram")) as engine:
        wanted = [token.id for token in engine.generate(ids, 12, stop=NEVER)]
        sequence, stats = engine.new_sequence(), Stats()
        made = engine.continuation(Sampling(), NEVER, 12)
        found = [made.take(engine.prefill(sequence, ids).finish()[-1])]
        decoder = Decoder(breaks, stats, most=8)
        while not made.finish:
            (came,) = decoder.advance([Going(sequence, made, found[-1].id, made.take)])
            found += came
        assert [token.id for token in found] == wanted
        assert broke and not stats.guesses_checked


def test_a_step_that_fails_costs_nobody_anything(goldens, tmp_path):
    bundle = prices.add_prices(goldens[2], tmp_path / "priced")

    def breaks(step: Step) -> list[np.ndarray]:
        engine.step(step)
        raise EngineError("A record cannot be read.")

    with opened(bundle, 8, Policies(loss=0.05)) as engine:
        sequence = engine.new_sequence()
        engine.prefill(sequence, _repeating(0, 20)).finish()
        made = engine.continuation(Sampling(), NEVER, 30)
        last = 3
        for _ in range(8):  # so that it has spent something
            ((token,),) = engine.advance([Going(sequence, made, last, made.take)])
            last = token.id
        before = vars(sequence.ledger).copy()
        assert before["spent"] > 0
        with pytest.raises(EngineError, match="cannot be read"):
            Decoder(breaks, Stats()).advance([Going(sequence, made, last, made.take)])
        assert vars(sequence.ledger) == before


def test_a_bench_of_a_given_text_has_no_use_for_a_draft(goldens, tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 9)
    asked = ["bench", str(goldens[-1]), "--text", str(tmp_path / "text.txt"), "--draft", "ngram"]
    refused = CliRunner().invoke(cli, asked)
    assert refused.exit_code == 2 and "--draft has no effect with" in refused.output
    drawn = CliRunner().invoke(cli, [*asked, "--requests", "2", "--length", "40"])
    assert drawn.exit_code == 0, drawn.output
