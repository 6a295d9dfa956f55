"""The quantiser against plain rounding and an oracle, and packing with it."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from smoe.artifacts import Bundle, nested, open_bundle
from smoe.artifacts.bundle import layouts_of
from smoe.artifacts.encodings import decode_expert
from smoe.artifacts.shard import shard_start
from smoe.prep.build import build
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import expert_weights
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe, chosen_quantiser
from smoe.prep.pack.pack import pack
from smoe.prep.pack.quantise import quantise, second_moment
from smoe.prep.progress import Progress
from smoe.runtime import Engine
from smoe.runtime.cache.storage import Shards

QUIET = Progress(quiet=True)


def _problem(seed=0, experts=3, n_out=24, n_in=96, rank=20):
    """Weights, and second moments of inputs that are correlated, as hidden states are."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(experts, n_out, n_in, generator=random) * 0.02
    basis = torch.randn(experts, rank, n_in, generator=random)
    noise = torch.randn(experts, 400, n_in, generator=random)
    x = torch.randn(experts, 400, rank, generator=random) @ basis + 0.5 * noise
    return w, x.mT @ x / 400


def _lost(w, moment, encoding, codes, scale, level):
    split = encoding.split
    values = split.values(level).astype(np.float32)[codes >> (split.total - split.bits(level))]
    d = w - torch.from_numpy(values * np.repeat(scale, encoding.group, -1)[..., : w.shape[-1]])
    return float(((d @ moment) * d).sum() / ((w @ moment) * w).sum())


@pytest.mark.parametrize("name", ["nested:2+1+1:64", "nested:5+1+1+1:32", "nested:3+1:128"])
def test_every_level_loses_less_than_rounding_and_says_how_much(name):
    encoding = nested.parse(name)
    w, moment = _problem()
    found = quantise(w, moment, encoding.split, encoding.group)
    assert found.codes.max() < 1 << encoding.split.total
    scale_bits = found.scale.view(np.uint32)
    assert not (scale_bits & 0xFFFF).any()  # bfloat16
    rounded = [nested.round_matrix(encoding, "up", of) for of in w.numpy()]
    codes, scale = (np.stack([r[i] for r in rounded]) for i in (0, 1))
    for level in range(1, encoding.levels + 1):
        lost = _lost(w, moment, encoding, found.codes, found.scale, level)
        assert lost < 0.7 * _lost(w, moment, encoding, codes, scale, level), level
        assert abs(lost - found.error[level - 1]) < 1e-3 * lost


def test_a_tiny_problem_is_near_the_best_there_is():
    # 4 columns of 2 bits: all 256 codes of a row can be tried, at a fine range of scales.
    w, moment = _problem(experts=1, n_out=6, n_in=4, rank=2)
    encoding = nested.parse("nested:2:32")
    found = quantise(w, moment, encoding.split, 32)
    values = encoding.split.values(1).astype(np.float64)
    every = values[np.array(list(itertools.product(range(4), repeat=4)))]
    h = moment[0].double().numpy()
    best = 0.0
    for row in w[0].double().numpy():
        # the best scale of a code in closed form
        s = (every @ h @ row) / np.einsum("ci,ij,cj->c", every, h, every)
        d = row - s[:, None] * every
        best += np.einsum("ci,ij,cj->c", d, h, d).min()
    lost = _lost(w, moment, encoding, found.codes, found.scale, 1) * float(((w @ moment) * w).sum())
    assert best <= lost * 1.001 and lost <= 2 * best


def test_groups_of_zeros_and_constant_inputs_do_not_break_it():
    w, moment = _problem()
    w[0, :, :64] = 0
    w[1] = 0
    moment[2] = 0
    encoding = nested.parse("nested:2+1+1:64")
    found = quantise(w, moment, encoding.split, 64)
    assert np.isfinite(found.scale).all() and np.isfinite(found.error).all()
    assert not found.scale[1].any() and not found.scale[0, :, 0].any()


def test_second_moments_blend_what_few_tokens_say_with_the_layer():
    common, x = torch.eye(3), torch.tensor([[0.0, 0.0, 5.0]]).repeat(640, 1)
    unreached = second_moment(x[:0], torch.zeros(0), common)
    assert torch.allclose(unreached, torch.eye(3) / 3)  # E[x x^T] of the layer
    many = second_moment(x, torch.full((640,), 0.5), common)
    assert 20 < many[2, 2] < 25 and 0 < many[0, 0] < 0.1  # 640 of its own, 64 of the layer's


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_packed_records_hold_calibrated_codes(checkpoints, bundles, ids_file, tmp_path, family):
    checkpoint = open_checkpoint(checkpoints(family))
    rows = Calibration(str(ids_file)).rows(checkpoint)
    name = "nested:2+1+1/3+1+1:32"
    experts = pack(checkpoint, tmp_path, name, QUIET, "calibrated", rows)
    assert experts.encoding == name
    whole = open_bundle(bundles(family))
    manifest = dataclasses.replace(whole.manifest, experts=experts)
    layouts = layouts_of(manifest)
    starts = [
        shard_start(tmp_path / manifest.shard(layer), layouts[layer], experts.page, spec.experts)
        for layer, spec in enumerate(manifest.layers)
    ]
    shards = Shards(Bundle(tmp_path, manifest, layouts, tuple(starts), whole.tables))
    for layer, layout in enumerate(layouts):
        shape = manifest.expert_shape(layer)
        record = np.empty(layout.nbytes, np.uint8)
        with checkpoint.experts(layer) as module:
            for expert in range(manifest.layers[layer].experts):
                shards.read(layer, expert, record)
                wanted, last = expert_weights(module, expert), np.inf
                for level in (1, 2, 3):
                    decoded = decode_expert(shape, layout, name, record, level)
                    assert decoded.keys() == wanted.keys()
                    for bias in (n for n in wanted if n.endswith("_bias")):
                        assert np.array_equal(decoded[bias], wanted[bias])
                    off = sum(np.square(decoded[n] - wanted[n]).sum() for n in shape.matrices())
                    assert off < 0.6 * last
                    last = off
                assert last < 0.05 * sum(np.square(wanted[n]).sum() for n in shape.matrices())
    shards.close()


def test_packing_takes_no_accelerator_that_was_not_asked_for(
    checkpoints, ids_file, tmp_path, monkeypatch
):
    """Other arithmetic would give other codes, and an interrupted build would mix them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    rows = Calibration(str(ids_file)).rows(checkpoint)
    # There is no CUDA here: it would fail.
    pack(checkpoint, tmp_path, "nested:2+1:32", QUIET, "calibrated", rows)
    assert len(list((tmp_path / "experts").iterdir())) == 2


def test_packing_goes_on_after_the_last_finished_layer(
    checkpoints, ids_file, tmp_path, monkeypatch
):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    rows = Calibration(str(ids_file)).rows(checkpoint)
    pack(checkpoint, tmp_path / "whole", "nested:2+1:32", QUIET, "calibrated", rows)
    files = sorted(
        p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors")
    )
    (tmp_path / "half" / "experts").mkdir(parents=True)
    (tmp_path / "half" / files[0]).write_bytes((tmp_path / "whole" / files[0]).read_bytes())
    before = (tmp_path / "half" / files[0]).stat().st_mtime_ns
    pack(checkpoint, tmp_path / "half", "nested:2+1:32", QUIET, "calibrated", rows)
    assert (tmp_path / "half" / files[0]).stat().st_mtime_ns == before
    for file in files:
        assert (tmp_path / "half" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_nested_bundle_runs_and_says_what_each_level_lost(
    smoe_prep, checkpoints, ids_file, tmp_path
):
    source = checkpoints("deepseek_v3")
    done = smoe_prep(
        "build",
        source,
        "-o",
        tmp_path / "b",
        "--calibration",
        ids_file,
        "--encoding",
        "nested:5+1+1+1:32",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("output lost by level: gate+up") == len(
        open_bundle(tmp_path / "b").manifest.layers
    )
    rises = []
    for level in (1, 4):
        said = smoe_prep(
            "verify",
            tmp_path / "b",
            source,
            "--text",
            ids_file,
            "--tokens",
            200,
            "--level",
            level,
            "--json",
        )
        rises.append(json.loads(said.stdout)["kl_nats_per_token"])
    assert 0 < rises[1] < rises[0]
    refused = smoe_prep(
        "verify", tmp_path / "b", source, "--text", ids_file, "--tokens", 200, "--level", 5
    )
    assert (
        refused.returncode == 1
        and "Level 5 was asked for" in refused.stderr
        and "Traceback" not in refused.stderr
    )


@pytest.mark.parametrize("encoding, asked, said", [
    ("nested:2+1+1", None, "give --calibration FILE, or --quantiser nearest"),
    ("nested:2+1+1", "gptq", "no quantiser 'gptq'"),
    ("bf16", "nearest", "bf16 has one way only"),
])  # fmt: skip
def test_a_quantiser_that_cannot_be_is_refused(encoding, asked, said):
    with pytest.raises(PrepError, match=said):
        chosen_quantiser(encoding, asked, None)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_backbone_in_fewer_bits(checkpoints, bundles, ids_file, tmp_path, family, capfd):
    """Codes against NumPy, logits against the same bundle in float32, and routers untouched."""
    import onnx
    from onnx import numpy_helper

    prompt = json.loads(ids_file.read_text().splitlines()[0])["input_ids"]
    with Engine.open(bundles(family)) as engine:
        wanted = engine.logits(prompt)
    off = {}
    for precision, bits in (("int8", 8), ("int4", 4)):
        output = tmp_path / precision
        recipe = Recipe("f32", precision, prices=0)
        build(checkpoints(family), output, Calibration(str(ids_file)), recipe, progress=Progress())
        assert f"matrices in {precision}" in capfd.readouterr().err
        assert open_bundle(output, hashes=True).manifest.backbone.precision == precision
        with Engine.open(output) as engine:
            found = engine.logits(prompt)
        off[bits] = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        _check_codes(onnx, numpy_helper, bundles(family), output, bits)
    assert off[8] < 0.1 and off[8] < off[4] < 1


def _check_codes(onnx, numpy_helper, original, output, bits):
    """Every MatMulNBits holds the float matrix to half a step of its block's scale."""
    checked = 0
    for file in sorted((output / "backbone").glob("*.onnx")):
        models = [onnx.load(str(folder / "backbone" / file.name)) for folder in (original, output)]
        floats, packed = (
            {t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in models
        )
        products = {n.output[0]: n for n in models[0].graph.node}
        for node in models[1].graph.node:
            if node.op_type != "MatMulNBits":
                continue
            before = products[node.output[0]]
            w = floats[before.input[1]]
            turned = {a.name: a.i for a in before.attribute}.get("transB", 0)
            w = w if turned else w.T
            codes, scale = (packed[name] for name in node.input[1:3])
            if bits == 4:
                codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], 32)
            step = scale.reshape(codes.shape[:2])[..., None]
            values = ((codes.astype(np.float32) - (1 << (bits - 1))) * step).reshape(len(w), -1)[
                :, : w.shape[1]
            ]
            bound = np.repeat(np.abs(step), 32, 2).reshape(len(w), -1)[:, : w.shape[1]]
            assert np.all(
                np.abs(values - w) <= bound * 1.0001
            )  # a whole one at the end that has no code
            checked += 1
    assert checked >= 3
