"""Latent attention as a program: all heads attend to what is remembered, and the logits are those
of transformers in float32, however a sequence is cut."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import torch
from support import pico
from support.backbones import compiled, logits_of, operations

from smoe.artifacts.program import ABSENT
from smoe.prep.backbone.checked import export_checked
from smoe.prep.backbone.quantise import Known as Sizes
from smoe.prep.backbone.quantise import reduce
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import experts_run_by
from smoe.prep.pack.pack import unpacked
from smoe.prep.progress import Progress
from smoe.runtime.execution import Execution, divide

FAMILIES = ["deepseek_v2", "deepseek_v3"]  # others: python -m bench families
VOCABULARY, HIDDEN, TOKENS = 211, 64, 600
LATENTS, ROTATED, OWN, VALUES, HEADS = 64, 8, 16, 12, 4  # sizes of the models below
CLOSE = 1e-5  # of the largest logit, beside transformers in float32
DEARER = 1.5  # times what ONNX Runtime in int8 loses: a matrix is rounded twice


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """family -> its checkpoint, the directory of its backbone in f32, and the manifest."""
    made = {}

    def get(family: str):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            sizes = {"max_position_embeddings": 1024, "kv_lora_rank": LATENTS}
            pico.make_model(family, **sizes).save_pretrained(path / "model")
            checkpoint = open_checkpoint(path / "model")
            experts = unpacked(checkpoint, "f32")
            manifest = export_checked(checkpoint, path, experts, "f32", Progress(True))
            made[family] = checkpoint, path, manifest
        return made[family]

    return get


def _stand_in(hidden, weights):
    """For experts, which any hidden state can go through."""
    return hidden * (weights * weights).sum(-1)[:, None]


@torch.no_grad()
def _transformers(checkpoint, ids):
    def run(layer, module, hidden, ids, weights):
        return _stand_in(hidden.reshape(len(weights), -1), weights).reshape(hidden.shape)

    with experts_run_by(checkpoint.model, checkpoint.layers, run):
        logits = checkpoint.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits
    return logits[0].numpy()


def _logits(path, manifest, parts, program=None):
    """Of every token of the `parts` of a sequence; by ONNX Runtime where there is no program."""
    division = program and divide(manifest, program, Execution(state="f32"))

    def stand_in(routed, layer):
        return _stand_in(routed.hidden.reshape(len(routed.weights), -1), routed.weights)

    return logits_of(path, manifest, parts, division, stand_in=stand_in)


def _tokens():
    """Of a sequence, and the same in chunks of random lengths, some of them of one token."""
    random = np.random.default_rng(4)
    cuts = random.choice(np.arange(1, TOKENS - 1), 8, replace=False)
    ids = random.integers(0, VOCABULARY, TOKENS)
    return ids, np.split(ids, sorted({*cuts, *(cuts[:3] + 1)}))


def _off(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def _nats(found, wanted):
    """Mean KL divergence of what `found` predicts from what is `wanted`."""
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(exported, family):
    checkpoint, path, manifest = exported(family)
    program = compiled(path, manifest)
    assert [part.reason for part in program.parts if part.ops is None] == []
    ids, parts = _tokens()
    found = _logits(path, manifest, parts, program)
    assert _off(found, _transformers(checkpoint, ids)) <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_in_few_bits_it_costs_little_more_than_in_onnx_runtime(exported, tmp_path, family):
    checkpoint, path, manifest = exported(family)
    shutil.copytree(path / "backbone", tmp_path / "backbone")
    known = Sizes(VOCABULARY, HIDDEN)
    backbone, _ = reduce(tmp_path, manifest.backbone, manifest.layers, "int8", known)
    manifest = dataclasses.replace(manifest, backbone=backbone)
    program = compiled(tmp_path, manifest)
    assert [part.reason for part in program.parts if part.ops is None] == []
    weights = {op.weight for op in operations(program, "head_product")}
    forms = {c.name: c.form for c in program.constants}
    assert {forms[name] for name in weights} == {"int8"}
    ids, parts = _tokens()
    true = _transformers(checkpoint, ids)
    found, others = _logits(tmp_path, manifest, parts, program), _logits(tmp_path, manifest, parts)
    assert _nats(found, true) <= DEARER * _nats(others, true) < 0.05


def test_only_latents_and_the_shared_part_are_remembered(exported):
    _, path, manifest = exported("deepseek_v3")
    program = compiled(path, manifest)
    layers = len(program.states)
    for state in program.states:
        assert (state.heads, state.key_width, state.value_width) == (1, LATENTS + ROTATED, LATENTS)
        assert state.latent
    for op in operations(program, "attention"):
        assert op.inputs[0].shape == (HEADS, LATENTS + ROTATED) and op.inputs[2] == ABSENT
    wanted = [((HEADS, OWN), (HEADS, LATENTS)), ((HEADS, LATENTS), (HEADS, VALUES))]
    products = operations(program, "head_product")
    assert [(op.inputs[0].shape, op.outputs[0].shape) for op in products] == wanted * layers
    wide = {b.name for b in program.buffers if b.numbers == HEADS * (OWN + VALUES)}
    assert not wide  # keys and values of all heads are never made


def test_values_that_are_no_products_are_left_to_onnx_runtime(exported, tmp_path):
    """A sine of what is remembered."""
    _, path, manifest = exported("deepseek_v3")
    shutil.copytree(path / "backbone", tmp_path / "backbone")
    state = manifest.backbone.state[-2]
    file = tmp_path / manifest.backbone.segments[state.segment].file
    model = onnx.load(str(file), load_external_data=False)
    nodes = list(model.graph.node)
    readers = [node for node in nodes if state.output in node.input]
    for node in readers:
        node.input[list(node.input).index(state.output)] = "bent"
    sine = onnx.helper.make_node("Sin", [state.output], ["bent"])
    model.graph.node.insert(nodes.index(readers[0]), sine)
    file.write_bytes(model.SerializeToString())
    program = compiled(tmp_path, manifest)
    assert "attends to something else than two states" in program.parts[state.segment].reason
