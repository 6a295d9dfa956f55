"""Positions at every length that a bundle allows: each way to stretch them, against transformers,
on both sides of the length that the model was made for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import pico
from support.agreement import open_exact

from smoe.artifacts import open_bundle
from smoe.prep.backbone.positions import Reach, reach
from smoe.runtime import Engine
from smoe.runtime.errors import EngineError

ORIGINAL, PAIRS = 300, 8  # of a rotary table
SHORT, LONG = np.linspace(1, 1.5, PAIRS).tolist(), np.linspace(2, 6, PAIRS).tolist()
STATED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ROPES = {
    "longrope": {"short_factor": SHORT, "long_factor": LONG} | STATED,
    "dynamic": {"factor": 4.0},
    "yarn": STATED,
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | STATED,
    "linear": {"factor": 4.0},
}
# family, rope, max_position_embeddings; the context of the bundle, and what is said of it
CASES = {
    "longrope": ("qwen3_moe", "longrope", 1200, 300, "longrope takes other factors beyond 300"),
    "phimoe": ("phimoe", "longrope", 1200, 300, "longrope takes other factors beyond 300"),
    "dynamic": ("gpt_oss", "dynamic", 300, 300, "dynamic rope takes other frequencies beyond"),
    "yarn": ("qwen3_moe", "yarn", 300, 1200, "yarn stretches 300 tokens by 4; max_position"),
}


@pytest.mark.parametrize("rope, longest, tokens, why", [
    ("yarn", 300, 1200, "yarn stretches 300 tokens by 4; max_position_embeddings says 300"),
    ("yarn", 1200, 1200, ""),
    ("yarn", 4000, 4000, ""),
    ("llama3", 300, 1200, "llama3 stretches 300 tokens by 4; max_position_embeddings says 300"),
    ("linear", 1200, 1200, ""),
    ("longrope", 1200, 300, "longrope takes other factors beyond 300 of 1200 tokens"),
    ("longrope", 300, 300, ""),
    ("dynamic", 300, 300, "dynamic rope takes other frequencies beyond 300 tokens"),
])  # fmt: skip
def test_how_far_positions_reach(rope, longest, tokens, why):
    parameters = {"rope_type": rope, "rope_theta": 1e4} | ROPES[rope]
    changes = {"rope_parameters": parameters, "max_position_embeddings": longest}
    assert reach(pico.make_config("qwen3_moe", **changes)) == Reach(tokens, why)


def test_the_kind_of_layer_that_reaches_least_ends_the_context():
    kinds = {
        "full_attention": {"rope_type": "yarn", "rope_theta": 1e4} | STATED,
        "sliding_attention": {"rope_type": "longrope", "rope_theta": 1e4} | ROPES["longrope"],
    }
    config = pico.make_config("mellum", rope_parameters=kinds, max_position_embeddings=1200)
    assert reach(config).tokens == ORIGINAL
    same = kinds["sliding_attention"] | {"long_factor": SHORT}
    config.rope_parameters = kinds | {"sliding_attention": same}
    assert reach(config) == Reach(1200)


@pytest.fixture(scope="module", params=CASES)
def built(request, tmp_path_factory, smoe_prep):
    """A pico model with one way to stretch positions, its bundle, and what the build said."""
    family, rope, longest, context, said = CASES[request.param]
    parameters = {"rope_type": rope, "rope_theta": 1e4} | ROPES[rope]
    if family == "phimoe":
        parameters |= {"short_mscale": 1.1, "long_mscale": 1.3}
    changes = {"rope_parameters": parameters, "max_position_embeddings": longest}
    if family == "phimoe":
        changes |= {"head_dim": 2 * PAIRS}
    model = pico.make_model(family, **changes)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "model")
    ids = folder / "ids.jsonl"
    rows = np.random.default_rng(0).integers(0, 211, (12, 40)).tolist()
    ids.write_text("".join(f'{{"input_ids": {row}}}\n' for row in rows))
    bundle = folder / "model.smoe"
    options = ("--encoding", "f32", "--calibration", ids, "--prices", "0")
    done = smoe_prep("build", folder / "model", "-o", bundle, *options)
    assert done.returncode == 0, done.stderr
    return bundle, model, context, said, done.stderr


def test_the_context_is_what_positions_reach_and_the_reason_is_said(built):
    bundle, _, context, said, stderr = built
    manifest = open_bundle(bundle).manifest
    assert manifest.model.context == context
    assert said in manifest.provenance.get("context", "")
    assert ("longest context" in stderr) == bool(said) and said in stderr
    with pytest.raises(EngineError, match=str(context)), Engine.open(bundle) as engine:
        engine.logits(np.zeros(context + 1, np.int64))


def test_logits_are_those_of_the_model_at_every_length(built):
    """The prompt at once, in parts of 100 tokens, and token by token across the border."""
    bundle, model, context, _, _ = built
    longest = min(600, context)
    ids = np.random.default_rng(1).integers(0, 211, longest)
    with torch.no_grad(), open_exact(bundle, context=longest) as engine:
        for length in range(100, longest + 1, 100):
            wanted = model(torch.from_numpy(ids[:length])[None]).logits[0].numpy()
            assert np.abs(engine.logits(ids[:length]) - wanted).max() < 1e-4 * np.abs(wanted).max()
        start = min(ORIGINAL, longest) - 12
        tokens = [t.id for t in engine.generate(ids[:start].tolist(), min(24, longest - start))]
        cached = model(torch.from_numpy(ids[:start])[None], use_cache=True)
        greedy = []
        for _ in tokens:
            greedy.append(int(cached.logits[0, -1].argmax()))
            cached = model(
                torch.tensor([[greedy[-1]]]), past_key_values=cached.past_key_values, use_cache=True
            )
        ends = [i for i, token in enumerate(greedy) if token == model.config.eos_token_id]
        assert tokens == greedy[: ends[0] + 1 if ends else None] and len(tokens) > 3


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "warp"},
        {"rope_type": "yarn", "factor": "4"},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": -5},
    ],
)
def test_a_way_to_stretch_positions_that_is_not_known_is_one_sentence(
    checkpoints, tmp_path, smoe_prep, rope
):
    config = json.loads((checkpoints("qwen3_moe") / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0} | rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = smoe_prep("inspect", tmp_path)
    assert said.returncode == 1 and "config.json" in said.stderr and "\n" not in said.stderr.strip()


def test_no_factor_stretches_positions_beyond_what_a_bundle_can_say():
    rope = {"rope_type": "yarn", "factor": float("inf"), "original_max_position_embeddings": 64}
    config = pico.make_config("qwen3_moe", rope_parameters={"rope_theta": 10000.0} | rope)
    assert reach(config).tokens == 2**31 - 1
