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
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import expert_inner, expert_weights, felt_in_output
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe, chosen_quantiser
from smoe.prep.pack.calibrated import in_groups_that_fit
from smoe.prep.pack.pack import pack
from smoe.prep.pack.quantise import DAMPING, made_up_for, quantise, second_moment, shares
from smoe.prep.progress import Progress
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


def _decoded(encoding, codes, scale, level):
    split = encoding.split
    values = split.values(level).astype(np.float32)[codes >> (split.total - split.bits(level))]
    wide = np.repeat(scale, encoding.group, -1)[..., : codes.shape[-1]]
    return torch.from_numpy(values * wide)


def _lost(w, moment, encoding, codes, scale, level):
    d = w - _decoded(encoding, codes, scale, level)
    return float(((d @ moment) * d).sum() / ((w @ moment) * w).sum())


@pytest.mark.parametrize("name", ["nested:2+1+1:64", "nested:5+1+1+1:32", "nested:3+1:128"])
def test_every_level_loses_less_than_rounding_and_says_how_much(name):
    encoding = nested.parse(name)
    w, moment = _problem()
    found = quantise(w[None], moment[None], encoding.split, encoding.group)
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
    found = quantise(w[None], moment[None], encoding.split, 32)
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


def test_groups_are_halved_until_they_fit():
    tried = []

    def work(group):
        tried.append(len(group))
        if len(group) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return list(group)

    assert list(in_groups_that_fit(range(3, 14), 8, work)) == list(range(3, 14))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]

    def never(group):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(PrepError, match="even one expert .CUDA out of memory. Tried to allocate"):
        list(in_groups_that_fit(range(3), 2, never))


def test_groups_of_zeros_and_constant_inputs_do_not_break_it():
    w, moment = _problem()
    w[0, :, :64] = 0
    w[1] = 0
    moment[2] = 0
    encoding = nested.parse("nested:2+1+1:64")
    found = quantise(w[None], moment[None], encoding.split, 64)
    assert np.isfinite(found.scale).all() and np.isfinite(found.error).all()
    assert not found.scale[1].any() and not found.scale[0, :, 0].any()


def test_second_moments_blend_what_few_tokens_say_with_the_layer():
    common, x = torch.eye(3), torch.tensor([[0.0, 0.0, 5.0]]).repeat(640, 1)
    unreached = second_moment(common, shares(torch.zeros(0), 3))
    assert torch.allclose(unreached, torch.eye(3) / 3)  # E[x x^T] of the layer
    many = second_moment(torch.cat([x, common]), shares(torch.full((640,), 0.5), 3))
    assert 20 < many[2, 2] < 25 and 0 < many[0, 0] < 0.1  # 640 of its own, 64 of the layer's


def test_levels_with_inputs_of_their_own_are_made_up_for():
    """The weights that do with damaged inputs what the right ones do, against NumPy's least
    squares; and codes for them give an output nearer to the right one's than codes without."""
    encoding = nested.parse("nested:2+1+1:64")
    w, _ = _problem(experts=1, n_out=16, n_in=64)
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 64, generator=random)
    noise = 0.7 * torch.randn(64, 64, generator=random) / 8
    damaged = [x + x @ noise * 0.5**level for level in range(3)]
    moments = torch.stack([d.T @ d / 2000 for d in damaged])
    targets = made_up_for(w, moments, torch.stack([x.T @ d / 2000 for d in damaged]))
    # drawn towards the weights as they are, as strongly as unseen inputs count elsewhere
    d, held = (
        damaged[0].numpy() / 2000**0.5,
        np.eye(64) * (DAMPING * moments[0].diagonal().mean()).sqrt().item(),
    )
    right = np.concatenate([x.numpy() / 2000**0.5, held]) @ w[0].numpy().T
    exact = np.linalg.lstsq(np.concatenate([d, held]), right, rcond=None)[0].T
    assert np.allclose(targets[0].numpy(), exact, atol=1e-4)
    off = []
    for target in (targets[:, None], w[None]):
        found = quantise(target, moments[:, None], encoding.split, 64)
        off.append([])
        for level, d in enumerate(damaged, 1):
            values = _decoded(encoding, found.codes, found.scale, level)[0]
            off[-1].append(float((d @ values.T - x @ w[0].T).square().mean()))
    assert off[0][0] < 0.6 * off[1][0] and off[0][1] < 0.8 * off[1][1] and off[0][2] < off[1][2]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_what_is_felt_in_the_output_is_its_slope(checkpoints, family):
    with open_checkpoint(checkpoints(family)).experts(0) as module:
        w = {name: torch.from_numpy(each) for name, each in expert_weights(module, 1).items()}
        first = torch.stack([w[name] for name in ("gate", "up") if name in w])
        x = torch.randn(1, first.shape[2], generator=torch.Generator().manual_seed(5))
        felt = felt_in_output(module, 1, x, w["down"])
        assert len(felt) == len(first)
        for k, each in enumerate(felt):
            moved = first.clone()  # so that every row's product is .001 more
            moved[k] += 1e-3 * x / x.square().sum()
            change = expert_inner(module, 1, x, moved) - expert_inner(module, 1, x, first)
            wanted = (change / 1e-3 * w["down"]).norm()
            assert abs(each - wanted) < 0.02 * wanted and wanted > 0


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


def test_packing_says_where_the_text_was_narrow(checkpoints, ids_file, tmp_path, capfd):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    rows = Calibration(str(ids_file)).rows(checkpoint)
    pack(checkpoint, tmp_path / "a", "nested:2+1:32", Progress(), "calibrated", rows)
    assert "hardly reached" not in capfd.readouterr().err
    pack(checkpoint, tmp_path / "b", "nested:2+1:32", Progress(), "calibrated", [rows[0][:40]])
    said = capfd.readouterr().err
    assert said.count("; 6 of 6 experts hardly reached") == 2, said


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
    exports, smoe_prep, checkpoints, ids_file, tmp_path
):
    source, encoding = checkpoints("deepseek_v3"), "nested:5+1+1+1:32"
    exports.begin(source, tmp_path / "b", Recipe(encoding))
    options = ("--calibration", ids_file, "--encoding", encoding, "--self", "0")
    done = smoe_prep("build", source, "-o", tmp_path / "b", *options)
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
