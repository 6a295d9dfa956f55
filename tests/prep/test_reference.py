"""The trained example model, f32: what `transformers` generates, the runtime generates, at any
budget."""

import json

import numpy as np
import pytest
import torch

from bench.budgets import budget_for_share
from smoe.runtime import Engine, EngineError

PROMPTS = 20


@pytest.fixture(scope="module")
def prompts(root, reference_bundle):
    """20 held-out prompts of 24 to 214 tokens."""
    lines = (root / "examples" / "heldout.jsonl").read_text("utf-8").splitlines()
    with Engine.open(reference_bundle) as engine:
        texts = [json.loads(line)["text"] for line in lines[:PROMPTS]]
        return [engine.text.encode(text)[: 24 + 10 * i] for i, text in enumerate(texts)]


def test_64_greedy_tokens_are_those_of_transformers(reference_bundle, reference_model, prompts):
    with Engine.open(reference_bundle) as engine:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            wanted = reference_model.generate(ids, max_new_tokens=64, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            assert [token.id for token in engine.generate(prompt, max_new_tokens=64)] == wanted


def test_logits_and_scores(reference_bundle, reference_model, prompts):
    with Engine.open(reference_bundle) as engine:
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
