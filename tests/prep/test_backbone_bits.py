"""The backbone in fewer bits: codes against NumPy and plain rounding, what is stored once, what
calibration did not reach, and builds that are interrupted."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support import pico

from smoe.artifacts import open_bundle, safetensors_file
from smoe.prep.backbone import compensate, watch
from smoe.prep.backbone.compensate import compensated, inverse_factor, nearest
from smoe.prep.build import build
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress
from smoe.runtime import Engine

QUIET = Progress(quiet=True)
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "Gather")


def _activations(tokens, columns, seed):
    """Correlated, as hidden states are."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(12, columns, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(tokens, columns, generator=random)
    return torch.randn(tokens, 12, generator=random) @ basis + 0.5 * noise


@pytest.mark.parametrize("bits, block, columns", [(4, 64, 128), (4, 32, 72), (8, 32, 96)])
def test_calibrated_codes_lose_less_than_rounding_on_other_text(bits, block, columns):
    w = torch.randn(40, columns, generator=torch.Generator().manual_seed(1)) * 0.02
    w[3], w[4, :block] = 0, 0
    seen, other = (_activations(2000, columns, seed) for seed in (1, 2))
    found = compensated(w, inverse_factor(seen.T @ seen), bits, block)
    blocks = -(-columns // block)
    assert found.codes.shape == (40, blocks, block) and found.scale.shape == (40, blocks)
    assert found.codes.max() < 1 << bits and np.isfinite(found.scale).all()
    assert not found.values(columns)[3].any() and not found.values(columns)[4, :block].any()

    def lost(coded):
        return float((other @ (w - torch.from_numpy(coded.values(columns))).T).square().sum())

    assert lost(found) < 0.75 * lost(nearest(w.numpy(), bits, block))


def test_rounding_takes_the_nearest_value():
    rows = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    coded = nearest(rows, 4, 32)
    step = np.repeat(np.abs(coded.scale), 32, -1)[:, :40]
    clipped = np.repeat((coded.codes == 15).reshape(5, -1)[:, :40], 1)  # one has no code: 8
    off = np.abs(coded.values(40) - rows)
    assert np.all(off <= 0.5001 * step + (0.5 * step) * clipped.reshape(off.shape))


def test_many_rows_are_rounded_as_each_is_alone(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(11, 40)).astype(np.float32)
    whole = nearest(rows, 8, 32)
    monkeypatch.setattr(compensate, "ROWS", 4)
    some = nearest(rows, 8, 32)
    assert np.array_equal(whole.codes, some.codes) and np.array_equal(whole.scale, some.scale)


def _stored(folder):
    """Graphs of a bundle, with constants by name."""
    for file in sorted((folder / "backbone").glob("*.onnx")):
        graph = onnx.load(str(file)).graph
        yield graph, {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def _values(node, constants):
    """Of a MatMulNBits or GatherBlockQuantized: the whole matrix, by the operators' own text."""
    attributes = {a.name: a.i for a in node.attribute}
    lookup = node.op_type == "GatherBlockQuantized"
    codes, scale = (constants[node.input[i]] for i in ((0, 2) if lookup else (1, 2)))
    bits, block = attributes["bits"], attributes["block_size"]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1)
    codes = codes.reshape(-1, block).astype(np.float32) - (1 << (bits - 1))
    rows = len(constants[node.input[0]]) if lookup else attributes["N"]
    columns = scale.shape[1] * block if lookup else attributes["K"]
    return (codes * scale.reshape(-1, 1)).reshape(rows, -1)[:, :columns], bits


def _matrices(original, reduced):
    """(float matrix as rows, matrix of fewer bits, bits of its rows) of every product and lookup
    that was rewritten; what was split into runs of rows is one again."""
    for (before, floats), (after, packed) in zip(_stored(original), _stored(reduced), strict=True):
        producers = {name: node for node in after.node for name in node.output}
        for node in before.node:
            now = producers.get(node.output[0])
            if node.op_type not in PRODUCTS or now is None or now.op_type in PRODUCTS:
                continue
            while now.op_type == "Add" and node.op_type == "Gemm":
                now = producers[now.input[0]]
            parts = [producers.get(n) for n in now.input] if now.op_type == "Concat" else [now]
            if not all(p and p.op_type in ("MatMulNBits", "GatherBlockQuantized") for p in parts):
                continue
            place = 0 if node.op_type == "Gather" else 1
            turned = {a.name: a.i for a in node.attribute}.get("transB", place == 0)
            w = floats[node.input[place]]
            values = [_values(part, packed) for part in parts]
            bits = np.concatenate([np.full(len(v), b) for v, b in values])
            yield w if turned else w.T, np.concatenate([v for v, _ in values]), bits


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_a_backbone_in_fewer_bits(checkpoints, bundles, ids_file, tmp_path, family, capfd):
    """Matrices against NumPy, logits against the same bundle in float32."""
    prompt = json.loads(ids_file.read_text().splitlines()[0])["input_ids"]
    with Engine.open(bundles(family)) as engine:
        wanted = engine.logits(prompt)
    off = {}
    for precision in ("int8", "int4"):
        output = tmp_path / precision
        recipe = Recipe("f32", precision, prices=0)
        built = build(
            checkpoints(family), output, Calibration(str(ids_file)), recipe, progress=Progress()
        )
        said = capfd.readouterr().err
        assert f"matrices in {precision}" in said
        assert ("in 4 bits, calibrated" in said) == (precision == "int4")
        how = "int4, calibrated" if precision == "int4" else "int8, rounded"
        assert built.manifest.provenance["backbone"] == how
        assert open_bundle(output, hashes=True).manifest.backbone.precision == precision
        with Engine.open(output) as engine:
            found = engine.logits(prompt)
        off[precision] = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        matrices = list(_matrices(bundles(family), output))
        assert len(matrices) >= 5
        for w, values, bits in matrices:
            lost = np.linalg.norm(values - w, axis=1) / (np.linalg.norm(w, axis=1) + 1e-9)
            assert lost[bits == 8].max(initial=0) < 0.01 and lost[bits == 4].max(initial=0) < 0.2
            vocabulary = len(w) == built.manifest.model.vocabulary
            assert precision == "int4" or (bits == 8).all()
            assert not vocabulary or (bits == 8).all()
        kinds = {b for _, _, bits in matrices for b in bits.tolist()}
        assert kinds == ({4, 8} if precision == "int4" else {8})
    assert off["int8"] < 0.1 and off["int8"] < off["int4"] < 1


def test_what_narrows_the_hidden_state_has_8_bits_within_a_joined_product(ids_file, tmp_path):
    """Queries `[64, 64]` in 4 bits, keys and values, `[16, 64]` each, in 8."""
    model = pico.make_model("qwen3_moe", num_key_value_heads=1)
    model.save_pretrained(tmp_path / "model")
    text = Calibration(str(ids_file))
    for name in ("f32", "int4"):
        recipe = Recipe("f32", name, prices=0)
        build(tmp_path / "model", tmp_path / name, text, recipe, progress=QUIET)
    joined = [b for _, _, b in _matrices(tmp_path / "f32", tmp_path / "int4") if len({*b}) == 2]
    assert [b.tolist() for b in joined] == [[4] * 64 + [8] * 32] * 2


def test_a_tied_embedding_is_stored_once(ids_file, tmp_path):
    text, sizes = Calibration(str(ids_file)), {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        model = pico.make_model("qwen3_moe", tie_word_embeddings=tied)
        model.save_pretrained(folder / "model")
        built = build(folder / "model", folder / "b", text, Recipe("f32", "int8"), progress=QUIET)
        sizes[tied] = built.manifest.files["backbone/weights.data"].size
        places = [w.offset for w in built.manifest.backbone.initializers if w.shape[0] == 211]
        assert (len({*places}) < len(places)) == tied
        with Engine.open(folder / "b") as engine:
            assert np.isfinite(engine.logits([3, 4, 5])).all()
    assert 0 <= sizes[False] - sizes[True] - 211 * (64 + 2 * 4) < 256  # codes, scales; alignment


def test_without_text_or_where_it_did_not_reach_codes_are_rounded(
    checkpoints, ids_file, tmp_path, smoe_prep, monkeypatch
):
    model, text = checkpoints("deepseek_v3"), ("--calibration", ids_file)
    assert smoe_prep("profile", model, "-o", tmp_path / "p", *text).returncode == 0
    common = ("build", model, "--encoding", "f32", "--backbone", "int4", "--profile")
    done = smoe_prep(*common, tmp_path / "p", "-o", tmp_path / "rounded")
    assert done.returncode == 0, done.stderr
    assert "in 4 bits, rounded" in done.stderr and "calibrated" not in done.stderr
    provenance = open_bundle(tmp_path / "rounded").manifest.provenance
    assert provenance["backbone"] == "int4, rounded"
    monkeypatch.setattr(watch, "WIDEST", 64)  # what a dense layer has inside has 72 columns
    done = smoe_prep(*common, tmp_path / "p", "-o", tmp_path / "b", *text, "--prices", 0)
    assert done.returncode == 0, done.stderr
    assert "in 4 bits, calibrated" in done.stderr and "in 4 bits, rounded" in done.stderr


@pytest.mark.parametrize("family, where", [("olmoe", "visit"), ("deepseek_v3", "finish")])
def test_an_interrupted_build_has_the_same_codes(
    checkpoints, ids_file, tmp_path, monkeypatch, family, where
):
    """In the middle, and once all layers are done: then shared experts, which run after the others,
    are watched without what predictors make of them beside the text."""
    model, text, recipe = checkpoints(family), Calibration(str(ids_file)), Recipe("f32", "int4")
    build(model, tmp_path / "whole", text, recipe, progress=QUIET)
    usual = getattr(watch.BackboneCodes, where)

    def fails(self, *at):
        if all(each.layer == 1 for each in at):
            raise PrepError("stop")
        return usual(self, *at)

    with monkeypatch.context() as patched, pytest.raises(PrepError, match="stop"):
        patched.setattr(watch.BackboneCodes, where, fails)
        build(model, tmp_path / "half", text, recipe, progress=QUIET)
    written, save = [], safetensors_file.save

    def noted(path, *given):
        if path.parent.name == watch.FOLDER.name:
            written.append(path.name)
        save(path, *given)

    monkeypatch.setattr(watch.safetensors_file, "save", noted)
    build(model, tmp_path / "half", text, recipe, progress=QUIET)
    assert written == ["01.safetensors", "02.safetensors"][where == "finish" :]
    for file in sorted((tmp_path / "whole" / "backbone").iterdir()):
        assert (tmp_path / "half" / "backbone" / file.name).read_bytes() == file.read_bytes()
