"""Pico models of several families, end to end: the cut gives up scores that explain the routing,
ONNX and safetensors readers accept every file, and the runtime says what `transformers` says."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open
from support.agreement import agreement, open_exact
from transformers import AutoModelForCausalLM

from smoe.artifacts import open_bundle
from smoe.runtime import Engine

# One of each way to lay out weights and to route; all of ALL_FAMILIES have to give transformers'
# tokens.
FAMILIES = ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss"]
ALL_FAMILIES = [
    *FAMILIES,
    "qwen2_moe",
    "deepseek_v2",
    "phimoe",
    "granitemoe",
    "glm4_moe",
    "ernie4_5_moe",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_scores_and_raw_weights_explain_ids_and_mixing_weights(bundles, family, make):
    """Run the segments in plain ONNX Runtime, with the family's own experts in between, and redo
    the router's choice here from the scores and raw weights alone."""
    path, model = bundles(family), make(family)
    manifest = open_bundle(path).manifest
    ids = np.random.default_rng(1).integers(0, 211, (1, 37))
    values = {
        "input_ids": ids,
        "past_length": np.zeros(1, np.int64),
        "logits_to_keep": np.array([36]),
    }
    for s in manifest.backbone.state:
        shape = [
            64 if a == s.growing and s.in_place else 0 if a == s.growing else n
            for a, n in enumerate(s.shape)
        ]
        values[s.input] = np.zeros(shape, np.int64 if s.dtype == "I64" else np.float32)
    modules = [m for _, m in model.named_modules() if hasattr(m, "is_concatenated")]
    assert len(modules) == len(manifest.layers)
    for i, segment in enumerate(manifest.backbone.segments, -manifest.backbone.prelude):
        session = ort.InferenceSession(str(path / segment.file), providers=["CPUExecutionProvider"])
        outputs = session.run(
            list(segment.outputs), {name: values[name] for name in segment.inputs}
        )
        values.update(zip(segment.outputs, outputs, strict=True))
        if i not in range(len(manifest.layers)):
            continue
        layer = manifest.layers[i]
        chosen, weights = (
            values[layer.wires.ids].reshape(37, 3),
            values[layer.wires.weights].reshape(37, 3),
        )
        scores, raw = (values[n].reshape(37, 6) for n in (layer.wires.scores, layer.wires.raw))
        assert np.array_equal(np.argsort(-scores, -1, kind="stable")[:, :3], chosen)
        w = np.take_along_axis(raw, chosen, -1)
        w = {"none": w, "sum": w / w.sum(-1, keepdims=True), "softmax": _softmax(w)}[
            layer.routing.normaliser
        ]
        assert np.allclose(w * layer.routing.scale, weights, rtol=1e-5, atol=1e-6)
        hidden = values[layer.wires.hidden]
        with torch.no_grad():
            out = modules[i](
                torch.from_numpy(hidden).reshape(37, -1),
                torch.from_numpy(chosen),
                torch.from_numpy(weights),
            )
        values[layer.wires.output] = out.numpy().reshape(hidden.shape)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits[0, -1].numpy()
    assert np.abs(values["logits"][0, -1] - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_rules_are_the_families_own(bundles):
    rules = {f: open_bundle(bundles(f)).manifest.layers[0].routing for f in FAMILIES}
    assert {f: r.normaliser for f, r in rules.items()} == {
        "mixtral": "sum",
        "olmoe": "none",
        "qwen3_moe": "sum",
        "deepseek_v3": "sum",
        "gpt_oss": "softmax",
    }
    assert {f: round(r.scale, 6) for f, r in rules.items() if r.scale != 1} == {"deepseek_v3": 1.7}


def test_every_file_opens_in_its_official_reader(bundles, family, make):
    path, model = bundles(family), make(family)
    manifest = open_bundle(path, hashes=True).manifest
    for segment in manifest.backbone.segments:
        onnx.checker.check_model(str(path / segment.file))
        raw = (path / segment.file).read_bytes()
        assert (
            b"site-packages" not in raw and b"modeling_" not in raw
        )  # traces of the author's machine
    down = [m.down_proj for _, m in model.named_modules() if hasattr(m, "is_concatenated")]
    transposed = [
        m.is_transposed for _, m in model.named_modules() if hasattr(m, "is_concatenated")
    ]
    for i in range(len(manifest.layers)):
        with safe_open(path / manifest.shard(i), "pt") as shard:
            for expert in range(6):
                wanted = down[i][expert].T if transposed[i] else down[i][expert]
                assert torch.equal(shard.get_tensor(f"expert.{expert:04d}.down"), wanted)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_the_tokens_are_those_of_transformers(bundles, checkpoints, name):
    """Greedy, up to the first place where the two best logits are closer than 10 x the logit "
    "error."""
    found = agreement(bundles(name), checkpoints(name))
    assert found.same and found.tokens >= 24, found
    assert found.error < 1e-4 * found.scale


def test_prefill_says_what_transformers_says_and_greedy_repeats(bundles, checkpoints, family):
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family), dtype=torch.float32).eval()
    prompt = np.random.default_rng(2).integers(3, 211, 140)  # longer than a chunk
    with torch.no_grad():
        wanted = model(torch.from_numpy(prompt)[None]).logits[0].numpy()
    with open_exact(bundles(family)) as engine:
        logits = engine.logits(prompt)
        tokens = [t.id for t in engine.generate(prompt, max_new_tokens=20)]
        assert tokens == [t.id for t in engine.generate(prompt, max_new_tokens=20)]
    assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_model_without_a_tokenizer_works_with_ids(bundles):
    with Engine.open(bundles("mixtral")) as engine:
        assert len(list(engine.generate([5, 6, 7], max_new_tokens=3))) == 3
