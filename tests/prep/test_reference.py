"""The trained example model, f32: what `transformers` generates, the runtime generates, at any
budget."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import promise
from support.agreement import open_exact

from bench import cgroup, page_cache
from bench.budgets import budget_for_share
from smoe.runtime import Engine, EngineError
from smoe.runtime.machine import held_memory
from smoe.runtime.sizes import MIB, parse_size

REASON = cgroup.unavailable()
limited = pytest.mark.skipif(REASON is not None, reason=REASON or "")

PROMPTS = 20


@pytest.fixture(scope="module")
def prompts(root, reference_bundle):
    """20 held-out prompts of 24 to 214 tokens."""
    lines = (root / "examples" / "heldout.jsonl").read_text("utf-8").splitlines()
    with Engine.open(reference_bundle) as engine:
        texts = [json.loads(line)["text"] for line in lines[:PROMPTS]]
        return [engine.text.encode(text)[: 24 + 10 * i] for i, text in enumerate(texts)]


def test_64_greedy_tokens_are_those_of_transformers(reference_bundle, reference_model, prompts):
    with open_exact(reference_bundle) as engine:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            wanted = reference_model.generate(ids, max_new_tokens=64, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            assert [token.id for token in engine.generate(prompt, max_new_tokens=64)] == wanted


def test_logits_and_scores(reference_bundle, reference_model, prompts):
    with open_exact(reference_bundle) as engine:
        for prompt in prompts[::4]:
            with torch.no_grad():
                wanted = reference_model(torch.tensor([prompt])).logits[0].numpy()
            logits = engine.logits(prompt)
            scored = np.stack(list(engine.score(prompt)))
            assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()
            assert np.abs(scored - logits).max() < 1e-4 * np.abs(wanted).max()


def test_a_quarter_of_the_experts_gives_the_same_bits(reference_bundle, prompts):
    quarter = budget_for_share(reference_bundle, 0.25, 2048)
    with (
        Engine.open(reference_bundle) as whole,
        Engine.open(reference_bundle, beside=quarter) as small,
    ):
        assert small.plan.capacity == 48
        for prompt in prompts[-2:]:
            assert np.array_equal(small.logits(prompt), whole.logits(prompt))
            assert np.array_equal(
                np.stack(list(small.score(prompt))), np.stack(list(whole.score(prompt)))
            )
        assert small.stats.misses > 0 and whole.stats.misses == 0


def test_a_budget_below_the_minimum_is_refused_with_the_minimum(reference_bundle):
    with pytest.raises(EngineError, match=r"needs at least [0-9.]+MiB"):
        Engine.open(reference_bundle, memory="16MiB")


def test_a_closed_engine_gives_its_memory_back_though_somebody_still_names_it(reference_bundle):
    """Experts of 72 MiB, weights of 15, state of 12, each time."""
    engines = [Engine.open(reference_bundle, context=2048)]
    engines[0].close()
    before = held_memory()
    for _ in range(3):
        engines.append(Engine.open(reference_bundle, context=2048))
        assert held_memory() > before + 72 * MIB
        engines[-1].close()
        engines[-1].close()
    assert held_memory() < before + 24 * MIB
    with pytest.raises(EngineError, match="closed"):
        engines[-1].logits([1, 2])
    with pytest.raises(EngineError, match="closed"):
        next(engines[-1].generate([1, 2]))


def _smoe(*arguments):
    return [sys.executable, "-m", "smoe.runtime", *map(str, arguments)]


@limited
def test_a_stated_memory_is_kept_in_a_cgroup_of_just_that_with_the_context_full(reference_bundle):
    for context, prompt in ((512, 500), (512, 8), (1536, 1500)):
        info = _smoe("info", reference_bundle, "--context", context, "--json")
        said = json.loads(subprocess.run(info, capture_output=True, check=True).stdout)
        told = promise.kept(reference_bundle, said["memory_minimum"], context, prompt)
        few, more, every = (run["experts"] for run in told)
        assert 4 <= few < 40 < more + 20 < every == 192
        assert len({run["logits"] for run in told}) == 1


@limited
def test_what_smoe_run_says_is_the_least_is_enough_in_a_cgroup_of_that(reference_bundle):
    arguments = (reference_bundle, "def main(", "--context", 300, "--max-new-tokens", 200)
    done = subprocess.run(_smoe("run", *arguments, "--memory", "50MiB"), capture_output=True)
    least = done.stderr.decode().split("needs at least ")[1].split(" ")[0]
    page_cache.drop(page_cache.files_under(reference_bundle))
    with cgroup.Group("least", parse_size(least)) as group:
        done = group.run(_smoe("run", *arguments, "--memory", least), timeout=60)
    assert (done.code, done.killed) == (0, False), done.err
    assert f"of {least} stated: process " in done.err


@limited
def test_without_a_budget_as_many_experts_stay_as_the_cgroup_leaves_room_for(reference_bundle):
    arguments = (reference_bundle, "1 2 3", "--ids", "--context", 300, "--max-new-tokens", 64)
    held, said = [], set()
    for limit in (100 * MIB, 120 * MIB, 400 * MIB):
        page_cache.drop(page_cache.files_under(reference_bundle))
        with cgroup.Group("default", limit) as group:
            done = group.run(_smoe("run", *arguments, "--json"), timeout=60)
        assert (done.code, done.killed) == (0, False), done.err
        told = json.loads(done.out)
        held.append(told["memory"]["resident_experts"])
        said.add(tuple(told["ids"]))
        assert told["memory"]["total"] <= limit - limit // 10 and "that this container" in done.err
    assert 4 <= held[0] < held[1] < held[2] == 192 and len(said) == 1
