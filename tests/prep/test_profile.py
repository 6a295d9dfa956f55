"""A profile of a pico model against an independent count: forward hooks on a run of `transformers`
itself."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.progress import Progress
from smoe.prep.statistics.profile import profile


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "gpt_oss"])
def profiled(request, checkpoints, ids_file, tmp_path_factory):
    """(tables, trace, about, calls): `calls[l]` is what the experts of layer l were called with in
    a plain run."""
    out = tmp_path_factory.mktemp("profile")
    checkpoint = open_checkpoint(checkpoints(request.param))
    calibration = Calibration(str(ids_file), tokens=300, length=47)
    about = profile(checkpoint, out, calibration, Progress(True))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    modules = [m for _, m in model.named_modules() if hasattr(m, "is_concatenated")]
    calls = [[] for _ in modules]
    for layer, module in enumerate(modules):
        module.register_forward_hook(lambda m, args, out, layer=layer: calls[layer].append(args))
    with torch.no_grad():
        for row in calibration.rows(checkpoint):
            model(torch.from_numpy(row)[None])
    joined = [
        tuple(torch.cat([a[i].reshape(-1, a[i].shape[-1]) for a in c]) for i in range(3))
        for c in calls
    ]
    return (
        load_file(out / "tables.safetensors") | load_file(out / "study" / "tables.safetensors"),
        load_file(out / "study" / "trace.safetensors"),
        about,
        joined,
        modules,
    )


def test_counts_gate_mass_coactivation_and_transitions(profiled):
    tables, _, about, calls, _ = profiled
    assert about.calibration["tokens"] == 300 == len(calls[0][1])
    before = None
    for layer, (_, ids, weights) in enumerate(calls):
        chosen = [set(row) for row in ids.tolist()]
        for e in range(6):
            assert tables[f"{layer:02d}.counts"][e] == sum(e in c for c in chosen)
            assert np.isclose(
                tables[f"{layer:02d}.gate_mass"][e],
                float(weights[ids == e].double().sum()),
                rtol=1e-5,
            )
            for s in range(6):
                assert tables[f"{layer:02d}.coactivation"][e, s] == sum(
                    e in c and s in c for c in chosen
                )
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
    assert about.calibration["sampled_tokens"] == 300, "all tokens are sampled here"
    for layer, (x, ids, weights) in enumerate(calls):
        with torch.no_grad():
            y = torch.stack([_one(modules[layer], e, x) for e in range(6)], 1).double()
        for e in range(6):
            routed = (ids == e).any(-1)
            w = (weights * (ids == e)).sum(-1)[routed].double()
            ye = y[routed, e]
            assert np.isclose(
                tables[f"{layer:02d}.saliency"][e], float((w * ye.norm(dim=-1)).mean()), rtol=1e-4
            )
            for s in range(6):
                ys = y[routed, s]
                cosine = torch.nn.functional.cosine_similarity(ye, ys, dim=-1).mean()
                assert np.isclose(
                    tables[f"{layer:02d}.output_similarity"][e, s], float(cosine), atol=1e-4
                )
                error = ((ys - ye) ** 2).sum() / (ye**2).sum()
                assert np.isclose(
                    tables[f"{layer:02d}.output_error"][e, s], float(error), rtol=1e-3, atol=1e-6
                )


def test_the_trace_is_what_happened_and_its_scores_explain_it(profiled):
    _, trace, _, calls, _ = profiled
    assert trace["starts"].sum() == 7 and len(trace["tokens"]) == 300
    for layer, (_, ids, weights) in enumerate(calls):
        assert np.array_equal(np.sort(trace[f"{layer:02d}.ids"]), np.sort(ids.numpy()))
        assert np.allclose(
            trace[f"{layer:02d}.weights"].sum(-1), weights.sum(-1).numpy(), atol=1e-5
        )
        scores = trace[f"{layer:02d}.scores"].astype(np.float32)
        chosen = np.take_along_axis(scores, trace[f"{layer:02d}.ids"].astype(int), -1).min(-1)
        rest = scores.copy()
        np.put_along_axis(rest, trace[f"{layer:02d}.ids"].astype(int), -np.inf, -1)
        assert (chosen >= rest.max(-1)).all()  # half precision may tie


def test_profiling_lets_the_experts_go(checkpoints, ids_file, tmp_path):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    profile(checkpoint, tmp_path, Calibration(str(ids_file), tokens=128), Progress(True))
    assert all(weight.is_meta for _, module in checkpoint.layers for weight in module.parameters())
    assert not any(
        weight.is_meta
        for name, weight in checkpoint.model.named_parameters()
        if "experts" not in name
    )


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
        torch.nn.init.zeros_(
            block.mlp.gate.weight
        )  # all scores tie, and a tie is always broken the same way
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    text = tmp_path / "t.jsonl"
    text.write_text(
        json.dumps({"input_ids": list(range(1, 201))}) + "\n"
    )  # id 0 pads: its state is zero
    about = profile(checkpoint, tmp_path, Calibration(str(text)), Progress(True))
    tables = load_file(tmp_path / "tables.safetensors") | load_file(
        tmp_path / "study" / "tables.safetensors"
    )
    unreached = about.layers[0]["unreached"]
    assert len(unreached) == 3 and unreached == np.flatnonzero(tables["00.counts"] == 0).tolist()
    for e in unreached:
        assert tables["00.saliency"][e] > 0 and np.isfinite(tables["00.standin_error"][e]).all()
        assert (
            np.isclose(tables["00.output_similarity"][e, e], 1)
            and e not in tables["00.standin_ids"][e]
        )
