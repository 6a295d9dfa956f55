"""Drafts where state cannot be shortened at will: windows, and recurrent layers."""

import numpy as np
import pytest
from support import pico

from smoe.artifacts import open_bundle
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe
from smoe.runtime import Engine, Policies, StopWhen
from smoe.runtime.budget import memory_for
from smoe.runtime.draft import named
from smoe.runtime.draft.named import draft_bytes


@pytest.fixture(autouse=True)
def guess(monkeypatch):
    """A model that was not trained is never sure: it guesses all the same."""
    monkeypatch.setattr(named, "SURE", 0.0)


@pytest.mark.parametrize("family", ["gpt_oss", "lfm2_moe", "jamba"])
def test_no_token_changes(family, exports, tmp_path, ids_file):
    pico.make_model(family, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    recipe, text = Recipe("f32", prices=0), Calibration(str(ids_file))
    bundle = tmp_path / "bundle"
    exports.build(tmp_path / "model", bundle, text, recipe)
    random = np.random.default_rng(1)
    prompts = [np.tile(random.integers(0, 211, 9), 8), random.integers(0, 211, 40)]
    hows = [{}, {"temperature": 0.3, "seed": 2}]
    found, there = {}, open_bundle(bundle)
    experts = sum(layer.experts for layer in there.manifest.layers) - 1
    for draft in ("none", "ngram", "resident:6"):
        policies = Policies(draft=draft)
        beside = memory_for(there, experts, 512, tables=draft_bytes(policies, there))
        with Engine.open(bundle, context=512, beside=beside, policies=policies) as engine:
            found[draft] = [
                [token.id for token in engine.generate(ids, 90, stop=StopWhen(ids=()), **how)]
                for ids in prompts
                for how in hows
            ]
            stats = engine.stats
            assert draft == "none" or stats.guesses_checked
            assert draft != "ngram" or stats.guesses_right < stats.guesses_checked
    assert found["ngram"] == found["resident:6"] == found["none"]
