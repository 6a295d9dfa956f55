"""A profile of a pico model against an independent count: forward hooks on a run of `transformers` itself."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from smoe.prep.calibration import Calibration
from smoe.prep.checkpoint import open_checkpoint
from smoe.prep.profile import profile
from smoe.prep.progress import Progress


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "gpt_oss"])
def profiled(request, checkpoints, ids_file, tmp_path_factory):
    """(tables, trace, about, calls): `calls[l]` is what the experts of layer l were called with in a plain run."""
    out = tmp_path_factory.mktemp("profile")
    checkpoint = open_checkpoint(checkpoints(request.param))
    calibration = Calibration(str(ids_file), tokens=300, length=47)
    about = profile(checkpoint, out, calibration, Progress(True))
    modules = [m for _, m in checkpoint.model.named_modules() if hasattr(m, "is_concatenated")]
    calls = [[] for _ in modules]
    for layer, module in enumerate(modules):
        module.register_forward_hook(lambda m, args, out, layer=layer: calls[layer].append(args))
    with torch.no_grad():
        for row in calibration.rows(checkpoint):
            checkpoint.model(torch.from_numpy(row)[None])
    joined = [tuple(torch.cat([a[i].reshape(-1, a[i].shape[-1]) for a in c]) for i in range(3)) for c in calls]
    return load_file(out / "tables.safetensors"), load_file(out / "trace.safetensors"), about, joined, modules


def test_counts_gate_mass_coactivation_and_transitions(profiled):
    tables, _, about, calls, _ = profiled
    assert about["calibration"]["tokens"] == 300 == len(calls[0][1])
    before = None
    for layer, (_, ids, weights) in enumerate(calls):
        chosen = [set(row) for row in ids.tolist()]
        for e in range(6):
            assert tables[f"{layer:02d}.counts"][e] == sum(e in c for c in chosen)
            assert np.isclose(tables[f"{layer:02d}.gate_mass"][e], float(weights[ids == e].double().sum()), rtol=1e-5)
            for s in range(6):
                assert tables[f"{layer:02d}.coactivation"][e, s] == sum(e in c and s in c for c in chosen)
                if before:
                    both = sum(e in b and s in c for b, c in zip(before, chosen, strict=True))
                    assert tables[f"{layer:02d}.transition"][e, s] == both
        before = chosen


def _one(module, expert, x):
    """The output of one expert, from the module's own forward with a weight of 1."""
    ids = torch.full((len(x), 1), expert)
    return module(x, ids, torch.ones(len(x), 1))


def test_saliency_similarity_and_error(profiled):
    tables, _, about, calls, modules = profiled
    assert about["calibration"]["sampled_tokens"] == 300, "all tokens are sampled here"
    for layer, (x, ids, weights) in enumerate(calls):
        with torch.no_grad():
            y = torch.stack([_one(modules[layer], e, x) for e in range(6)], 1).double()
        for e in range(6):
            routed = (ids == e).any(-1)
            w = (weights * (ids == e)).sum(-1)[routed].double()
            ye = y[routed, e]
            assert np.isclose(tables[f"{layer:02d}.saliency"][e], float((w * ye.norm(dim=-1)).mean()), rtol=1e-4)
            for s in range(6):
                ys = y[routed, s]
                cosine = torch.nn.functional.cosine_similarity(ye, ys, dim=-1).mean()
                assert np.isclose(tables[f"{layer:02d}.output_similarity"][e, s], float(cosine), atol=1e-4)
                error = ((ys - ye) ** 2).sum() / (ye**2).sum()
                assert np.isclose(tables[f"{layer:02d}.output_error"][e, s], float(error), rtol=1e-3, atol=1e-6)


def test_the_trace_is_what_happened_and_its_scores_explain_it(profiled):
    _, trace, _, calls, _ = profiled
    assert trace["starts"].sum() == 7 and len(trace["tokens"]) == 300
    for layer, (_, ids, weights) in enumerate(calls):
        assert np.array_equal(np.sort(trace[f"{layer:02d}.ids"]), np.sort(ids.numpy()))
        assert np.allclose(trace[f"{layer:02d}.weights"].sum(-1), weights.sum(-1).numpy(), atol=1e-5)
        scores = trace[f"{layer:02d}.scores"].astype(np.float32)
        chosen = np.take_along_axis(scores, trace[f"{layer:02d}.ids"].astype(int), -1).min(-1)
        rest = scores.copy()
        np.put_along_axis(rest, trace[f"{layer:02d}.ids"].astype(int), -np.inf, -1)
        assert (chosen >= rest.max(-1)).all()  # half precision may tie


def test_profiling_leaves_the_model_as_it_was(checkpoints, ids_file, tmp_path):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = checkpoint.model(ids).logits
        profile(checkpoint, tmp_path, Calibration(str(ids_file), tokens=128), Progress(True))
        assert torch.equal(checkpoint.model(ids).logits, before)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(checkpoints, ids_file, tmp_path):
    made = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        out.mkdir()
        text = Calibration(str(ids_file), tokens=200, seed=seed)
        profile(open_checkpoint(checkpoints("mixtral")), out, text, Progress(True))
        made.append((out / "tables.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_unreached_experts_are_listed_and_get_usable_statistics(make, tmp_path):
    model = make("mixtral")
    for block in model.model.layers:
        with torch.no_grad():  # expert 4's logit is always far below the others
            block.mlp.gate.weight[4] = 0
            block.mlp.gate.weight[[0, 1, 2, 3, 5]] = block.mlp.gate.weight[[0, 1, 2, 3, 5]].abs() * 0 + 1
        block.post_attention_layernorm.weight.data.fill_(1.0)
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    with torch.no_grad():  # hidden states whose sum is positive: logits of all but 4 are equal and above 0
        checkpoint.model.model.embed_tokens.weight.abs_()
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"input_ids": list(range(200))}) + "\n")
    about = profile(checkpoint, tmp_path, Calibration(str(text)), Progress(True))
    tables = load_file(tmp_path / "tables.safetensors")
    assert 4 in about["layers"][0]["unreached"] and tables["00.counts"][4] == 0
    assert tables["00.saliency"][4] > 0 and np.isfinite(tables["00.standin_error"][4]).all()
    assert np.isclose(tables["00.output_similarity"][4, 4], 1)
