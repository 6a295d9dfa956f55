"""A bundle's experts inside transformers' own model, and the harness's likelihoods, against
`transformers` itself."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from smoe.artifacts import BundleError
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.integrations.transformers import attach, load
from smoe.prep.options import Recipe

IDS = torch.from_numpy(np.random.default_rng(0).integers(3, 211, (2, 17)))


@pytest.fixture(scope="module")
def planes(exports, checkpoints, ids_file, tmp_path_factory):
    """A bundle in planes."""
    out = tmp_path_factory.mktemp("planes") / "planes.smoe"
    recipe = Recipe("nested:2+1+1:32", quantiser="nearest", prices=0, self_tokens=0)
    exports.build(checkpoints("qwen3_moe"), out, Calibration(str(ids_file)), recipe)
    return out


def _own(checkpoints, family="qwen3_moe"):
    return AutoModelForCausalLM.from_pretrained(checkpoints(family), dtype="float32").eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_with_a_bundles_experts_says_what_its_own_say(checkpoints, bundles, family):
    own = _own(checkpoints, family)
    model = load(checkpoints(family), bundles(family))
    assert any(p.is_meta for p in model.parameters()), "its own experts are not read"
    wanted, found = own(IDS).logits, model(IDS).logits
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    options = {"max_new_tokens": 12, "do_sample": False}
    assert model.generate(IDS, **options).tolist() == own.generate(IDS, **options).tolist()


@torch.no_grad()
def test_levels_and_memory_are_those_asked_for_and_the_models_own_come_back(checkpoints, planes):
    model = _own(checkpoints)
    own, wanted, found = model.get_experts_implementation(), model(IDS).logits, {}
    for level in (1, 2, 3):
        for memory in (None, "1B"):
            with attach(model, planes, memory, level):
                found[level, memory] = model(IDS).logits
        assert torch.equal(found[level, None], found[level, "1B"]), "memory decides no bit"
    far = [float((found[level, "1B"] - wanted).norm()) for level in (1, 2, 3)]
    assert far[0] > far[1] > far[2] > 0
    with attach(model, planes):
        assert torch.equal(model(IDS).logits, found[3, "1B"])
        model.set_experts_implementation(own)
        assert torch.equal(model(IDS).logits, wanted)
        model.set_experts_implementation("smoe")
        assert torch.equal(model(IDS).logits, found[3, "1B"])
    assert torch.equal(model(IDS).logits, wanted)


def test_what_does_not_fit_together_is_a_sentence(checkpoints, bundles, planes):
    with pytest.raises(PrepError, match="was not built from"):
        load(checkpoints("mixtral"), planes)
    with pytest.raises(PrepError, match="this model 2 MoE layers, the first of .* experts"):
        attach(_own(checkpoints, "mixtral"), planes)
    with pytest.raises(BundleError, match="Level 4 was asked for"):
        attach(_own(checkpoints), planes, level=4)
    model = _own(checkpoints)
    model.set_experts_implementation("smoe")
    with pytest.raises(PrepError, match="no bundle is attached to it"):
        model(IDS)


# -- lm-evaluation-harness ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(reference_bundle):
    pytest.importorskip("lm_eval", reason="a harness to test with")
    from smoe.prep.integrations.lm_eval import SmoeModel

    model = SmoeModel(str(reference_bundle), memory="2GiB", context=256)
    yield model
    model.engine.close()


def _instances(kind, *each):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(each)]


TEXTS = [
    ("def main(", "):\n    return 0"), ("import", " numpy as np"), ("import", " os"),
    ("", "class A:"),
]  # fmt: skip


@torch.no_grad()
def test_likelihoods_are_those_of_transformers(harness, reference_model):
    found = harness.loglikelihood(_instances("loglikelihood", *TEXTS), disable_tqdm=True)
    for (context, continuation), (nats, greedy) in zip(TEXTS, found, strict=True):
        head = harness.tok_encode(context) if context else [harness.prefix_token_id]
        ids = head + harness.tok_encode(context + continuation)[len(head) * bool(context) :]
        scores = reference_model(torch.tensor([ids])).logits[0].log_softmax(-1)[len(head) - 1 : -1]
        tokens = torch.tensor(ids[len(head) :])
        wanted = float(scores.gather(1, tokens[:, None]).sum())
        assert nats == pytest.approx(wanted, abs=1e-3)
        assert greedy == bool((scores.argmax(1) == tokens).all())


@torch.no_grad()
def test_whole_texts_longer_than_the_context_go_in_windows(harness, reference_model):
    text = "def f(x):\n    return x + 1\n" * 40
    ids = [harness.prefix_token_id, *harness.tok_encode(text, add_special_tokens=False)]
    assert len(ids) > 257
    (found,) = harness.loglikelihood_rolling(
        _instances("loglikelihood_rolling", (text,)), disable_tqdm=True
    )
    wanted, done = 0.0, 0
    for end in (256, len(ids) - 1):  # the last window is as long as the others
        window = torch.tensor([ids[end - 256 : end + 1]])
        scores = reference_model(window[:, :-1]).logits[0].log_softmax(-1)
        wanted += float(scores.gather(1, window[0, 1:, None])[done - end :].sum())
        done = end
    assert found == pytest.approx(wanted, abs=2e-2)


def test_a_text_is_begun_once_and_what_is_too_long_is_a_sentence(harness, monkeypatch):
    begin = harness.engine.text.decode([harness.prefix_token_id], special=True)
    alone = harness.tok_encode("def f", add_special_tokens=False)
    monkeypatch.setattr(type(harness), "begin", begin)
    assert harness.tok_encode(f"{begin}def f") == [harness.prefix_token_id, *alone]
    long = _instances("loglikelihood", ("def", " f" * 300))
    with pytest.raises(PrepError, match="1 to 256 are possible"):
        harness.loglikelihood(long, disable_tqdm=True)


def test_answers_end_where_a_task_says(harness):
    asked = {"until": ["\n"], "max_gen_toks": 20}
    (found,) = harness.generate_until(
        _instances("generate_until", ("def main(", asked)), disable_tqdm=True
    )
    said = "".join(token.text for token in harness.engine.generate("def main(", 20))
    assert found == said.split("\n")[0]
