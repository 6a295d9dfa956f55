"""Checkpoints that exist in few bits only: read as their schemes say, expert by expert."""

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import few_bits
from support.agreement import agreement
from support.pico import make_model
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig

from smoe.artifacts import open_bundle, record_layout
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.encodings import decode_expert
from smoe.artifacts.nested import Split
from smoe.artifacts.shard import shard_start
from smoe.prep.build import build
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import expert_weights
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.pack.kept import kept_codes
from smoe.prep.progress import Progress
from smoe.runtime import Engine

UE8M0 = functools.partial(few_bits.block_fp8, power_of_two=True)
# Families' own sizes: whole groups of 32 where a scheme has them; elsewhere the last block of most
# matrices is short (36 or 40 rows and columns in blocks of 16).
SCHEMES = {
    "gpt_oss in mxfp4": ("gpt_oss", few_bits.mxfp4, {"intermediate_size": 96}),
    "deepseek_v3 in block fp8": ("deepseek_v3", few_bits.block_fp8, {}),
    "deepseek_v3 in block fp8, ue8m0": ("deepseek_v3", UE8M0, {}),
    "qwen3_moe in block fp8": ("qwen3_moe", few_bits.block_fp8, {}),
    "qwen3_moe in int4": ("qwen3_moe", few_bits.packed_int4, {"moe_intermediate_size": 96}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """scheme -> the checkpoint in few bits, and the same weights in float32; what is not in few
    bits is bfloat16 in both, as it is published."""
    made = {}

    def get(scheme):
        if scheme not in made:
            family, stored, changes = SCHEMES[scheme]
            directory = tmp_path_factory.mktemp("few")
            make_model(family, **changes).bfloat16().save_pretrained(directory / "plain")
            made[scheme] = stored(directory / "plain", directory)
        return made[scheme]

    return get


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tokens_are_those_of_the_dequantised_model(exports, pairs, ids_file, tmp_path, scheme):
    few, exact = pairs(scheme)
    exports.build(few, tmp_path / "b", Calibration(str(ids_file)), Recipe("f32"))
    found = agreement(tmp_path / "b", exact)
    assert found.same and found.tokens >= 24, found
    assert found.error < 1e-4 * found.scale


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_decoded_to_the_bit(pairs, scheme):
    few, exact = (open_checkpoint(path) for path in pairs(scheme))
    for name, weight in few.model.state_dict().items():
        assert weight.is_meta or torch.equal(weight, exact.model.state_dict()[name]), name
    for layer in range(len(few.layers)):
        with few.experts(layer) as coded, exact.experts(layer) as plain:
            for expert in (5, 0, 3):
                weights = expert_weights(coded, expert)
                for name, wanted in expert_weights(plain, expert).items():
                    assert np.array_equal(weights[name], wanted), name


@pytest.mark.parametrize("scheme", ["gpt_oss in mxfp4", "qwen3_moe in int4"])
def test_what_is_called_exact_here_is_what_transformers_loads(pairs, scheme):
    few, exact = pairs(scheme)
    asked = AutoQuantizationConfig.from_dict(
        json.loads((few / "config.json").read_text())["quantization_config"]
    )
    asked.dequantize = True
    loaded = AutoModelForCausalLM.from_pretrained(
        few, dtype=torch.float32, quantization_config=asked
    ).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name].float(), w) for name, w in wanted.items())


KEPT = {
    "gpt_oss in mxfp4": "nested:2+1+1:32:fp4",
    "qwen3_moe in int4": "nested:2+1+1:32:int4",
}


@pytest.fixture(scope="module")
def kept(exports, pairs, tmp_path_factory, ids_file):
    """scheme -> its bundle as `build` makes it where nothing else is asked for."""
    made = {}

    def get(scheme):
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("kept") / "b.smoe"
            text = Calibration(str(ids_file))
            exports.build(pairs(scheme)[0], made[scheme], text, Recipe())
        return made[scheme]

    return get


def _records(path, bundle, layer, layout):
    page, count = bundle.manifest.experts.page, bundle.manifest.layers[layer].experts
    shard = path / bundle.manifest.shard(layer)
    start = shard_start(shard, layout, page, count)
    return np.fromfile(shard, np.uint8, offset=start).reshape(count, -1)


@pytest.mark.parametrize("scheme", KEPT)
def test_stored_codes_are_kept_to_the_bit(pairs, kept, scheme):
    bundle, exact = open_bundle(kept(scheme)), open_checkpoint(pairs(scheme)[1])
    experts = bundle.manifest.experts
    assert experts.encoding == KEPT[scheme]
    for layer in range(len(bundle.manifest.layers)):
        shape = bundle.manifest.expert_shape(layer)
        layout = record_layout(shape, experts.encoding, experts.page)
        with exact.experts(layer) as module:
            for expert, record in enumerate(_records(kept(scheme), bundle, layer, layout)):
                decoded = decode_expert(shape, layout, experts.encoding, record)
                for name, wanted in expert_weights(module, expert).items():
                    found = decoded[name]
                    if scheme == "qwen3_moe in int4":  # transformers' products are rounded
                        found = from_bf16(to_bf16(found))
                    assert np.array_equal(found, wanted), name


@pytest.mark.parametrize("scheme", KEPT)
def test_more_bits_of_kept_codes_are_nearer_to_the_model(pairs, kept, scheme):
    model = AutoModelForCausalLM.from_pretrained(pairs(scheme)[1], dtype=torch.float32)
    ids = np.random.default_rng(4).integers(3, 211, 120)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1).numpy()
    divergence = []
    for level in (1, 2, 3):
        with Engine.open(kept(scheme), level=level) as engine:
            found = torch.from_numpy(engine.logits(ids)).log_softmax(-1).numpy()
        divergence.append(float((np.exp(wanted) * (wanted - found)).sum(-1).mean()))
    assert divergence[0] > 2 * divergence[1] > 20 * divergence[2] > 0, divergence


def test_kept_codes_can_still_be_rounded(pairs, tmp_path, smoe_prep):
    few, _ = pairs("gpt_oss in mxfp4")
    options = ("--encoding", "nested:2+1+1:64", "--quantiser", "nearest")
    assert smoe_prep("pack", few, "-o", tmp_path / "rounded", *options).returncode == 0
    said = smoe_prep("pack", few, "-o", tmp_path / "x", *options[:2], "--quantiser", "kept")
    assert said.returncode == 1 and "has other values than those" in said.stderr


def test_what_experts_are_stored_in_is_said_by_its_name(pairs, checkpoints):
    schemes = {"gpt_oss in mxfp4": "mxfp4", "deepseek_v3 in block fp8": "fp8"}
    schemes |= {"qwen3_moe in int4": "compressed-tensors"}
    for scheme, name in schemes.items():
        assert open_checkpoint(pairs(scheme)[0]).stored_in == name
    assert open_checkpoint(checkpoints("mixtral")).stored_in == "float32"


def test_weights_that_are_no_codes_are_not_kept(checkpoints, tmp_path, smoe_prep):
    options = ("--encoding", "nested:2+1+1:32:int4")
    said = smoe_prep("pack", checkpoints("mixtral"), "-o", tmp_path / "x", *options)
    assert said.returncode == 1
    assert "expert 0: down is not made of codes of nested:2+1+1:32:int4" in said.stderr


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", ["fp4", "int4"])
def test_codes_are_found_again_whatever_a_group_holds(table, factors):
    # Groups of one value, of small values only, of zeros of both signs; a short last group.
    split, random = Split((2, 1, 1), table), np.random.default_rng(6)
    values = split.values(3).astype(np.float32)
    codes = random.integers(0, 16, (64, 3, 32))
    codes[:16] = random.integers(0, 16, (16, 1, 1))
    codes[16:40] = random.integers(6, 10, (24, 3, 32))
    scale = random.uniform(2**-9, 2**-8, (64, 3)).astype(np.float32)
    scale = from_bf16(to_bf16(2 ** np.floor(np.log2(scale)) if table == "fp4" else scale))
    w = torch.from_numpy((values[codes] * scale[..., None]).reshape(64, 96)[:, :90].copy())
    w = w.to(factors).float().numpy()
    found, factor = kept_codes(split, 32, w)
    products = values[found] * np.repeat(factor, 32, 1)[:, :90]
    assert np.array_equal(torch.from_numpy(products).to(factors).float().numpy(), w)


def test_a_zero_of_fp4_keeps_its_sign_which_fewer_bits_show():
    w = np.array([[0.0, -0.0, 6.0] + [1.0] * 29], np.float32)
    codes, _ = kept_codes(Split((2, 1, 1), "fp4"), 32, w)
    assert codes[0, :3].tolist() == [8, 7, 15]


def test_float16_is_kept(tmp_path, ids_file):
    model = make_model("qwen3_moe").half()
    model.save_pretrained(tmp_path / "m")
    build(tmp_path / "m", tmp_path / "b", Calibration(str(ids_file)), progress=Progress(True))
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.experts.encoding == "f16"
    shape = bundle.manifest.expert_shape(1)
    layout = record_layout(shape, "f16", bundle.manifest.experts.page)
    down = model.model.layers[1].mlp.experts.down_proj
    for expert, record in enumerate(_records(tmp_path / "b", bundle, 1, layout)):
        decoded = decode_expert(shape, layout, "f16", record)
        assert np.array_equal(decoded["down"], down[expert].float().detach().numpy())


def _with_scheme(checkpoint, directory, fields):
    directory.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = fields
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "warp"}, "warp"),
        ({"bits": 4}, "an unnamed scheme"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
            },
            "compressed-tensors' nvfp4-pack-quantized",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"symmetric": False}}},
            },
            "compressed-tensors' pack-quantized with zero points",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"actorder": "group"}}},
            },
            "compressed-tensors' pack-quantized with groups of columns that are no neighbours",
        ),
    ],
)
def test_a_scheme_that_cannot_be_read_is_named_with_the_way_out(
    checkpoints, tmp_path, smoe_prep, fields, named
):
    checkpoint = _with_scheme(checkpoints("mixtral"), tmp_path / "m", fields)
    with pytest.raises(PrepError, match=f"is stored in {named}.*give the original checkpoint"):
        open_checkpoint(checkpoint)
    said = smoe_prep("inspect", checkpoint)
    assert said.returncode == 1 and "give the original checkpoint" in said.stdout + said.stderr


@pytest.mark.parametrize("fields", [[], "fp8", 4, True])
def test_a_quantization_config_that_is_no_object_is_one_sentence(checkpoints, tmp_path, fields):
    with pytest.raises(PrepError, match="config.json is not one that transformers"):
        open_checkpoint(_with_scheme(checkpoints("mixtral"), tmp_path / "m", fields))


def test_gguf_is_not_read_and_that_is_said(tmp_path, smoe_prep):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for model in (tmp_path, tmp_path / "model.gguf"):
        said = smoe_prep("inspect", model)
        assert said.returncode == 1
        assert "GGUF" in said.stderr and "safetensors" in said.stderr


def _changed(pair, directory, change):
    """The checkpoint in few bits with other tensors."""
    tensors = load_file(pair[0] / "model.safetensors")
    change(tensors)
    directory.mkdir()
    (directory / "config.json").write_text((pair[0] / "config.json").read_text())
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def _group(targets, **weights):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | weights
    return {"targets": targets, "weights": weights, "format": "pack-quantized"}


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}


@pytest.mark.parametrize(
    "groups, said",
    [
        ({"a": _group(["Linear"], num_bits=8)}, "is packed in other bits than transformers"),
        (
            # By their names transformers takes the first of these for all experts.
            {"a": _group([r"re:.*attn.*"], **FLOAT8), "b": _group([r"re:.*mlp.*"])},
            "stored in another way than quantization_config",
        ),
    ],
)
def test_experts_in_another_scheme_than_they_are_decoded_by_are_not_misread(
    pairs, tmp_path, groups, said
):
    few = _changed(pairs("qwen3_moe in int4"), tmp_path / "m", lambda tensors: None)
    config = json.loads((few / "config.json").read_text())
    config["quantization_config"]["config_groups"] = groups
    (few / "config.json").write_text(json.dumps(config))
    with pytest.raises(PrepError, match=said) as refused:
        open_checkpoint(few)
    assert "again" not in str(refused.value)


def test_codes_are_kept_only_where_all_experts_have_them(pairs, tmp_path):
    few, exact = pairs("gpt_oss in mxfp4")
    plain = load_file(exact / "model.safetensors")

    def change(tensors):
        name = "model.layers.1.mlp.experts.down_proj"
        del tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        tensors[name] = plain[name].bfloat16()

    assert open_checkpoint(few).kept_encoding == "nested:2+1+1:32:fp4"
    assert open_checkpoint(_changed((few, exact), tmp_path / "m", change)).kept_encoding == "bf16"


def test_a_scale_that_is_not_finite_is_found_where_it_is_read(pairs, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.down_proj_scales"][4, 0, 0] = 255

    checkpoint = open_checkpoint(_changed(pairs("gpt_oss in mxfp4"), tmp_path / "m", change))
    said = r"layers\.1\.mlp\.experts\.down_proj of expert 4 holds values that are not finite"
    with checkpoint.experts(1) as module, pytest.raises(PrepError, match=said):
        expert_weights(module, 4)


def test_scales_for_some_blocks_only_are_not_taken_for_all(pairs, tmp_path):
    def change(tensors):
        name = "model.layers.1.mlp.experts.down_proj_scales"
        tensors[name] = tensors[name][..., :1].clone()

    with pytest.raises(PrepError, match="down_proj cannot be decoded: .*blocks of shape"):
        open_checkpoint(_changed(pairs("gpt_oss in mxfp4"), tmp_path / "m", change))


@pytest.mark.parametrize(
    "scheme, lost",
    [
        ("gpt_oss in mxfp4", "model.layers.1.mlp.experts.down_proj_scales"),
        ("gpt_oss in mxfp4", "model.layers.1.mlp.experts.down_proj_blocks"),
        ("qwen3_moe in int4", "model.layers.1.mlp.experts.3.up_proj.weight_scale"),
        ("qwen3_moe in int4", "model.layers.1.mlp.experts.3.up_proj.weight_packed"),
        ("deepseek_v3 in block fp8", "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"),
        ("deepseek_v3 in block fp8", "model.layers.2.self_attn.o_proj.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_one_sentence(pairs, tmp_path, lost, scheme):
    checkpoint = _changed(pairs(scheme), tmp_path / "m", lambda tensors: tensors.pop(lost))
    with pytest.raises(PrepError, match=r"layers\.[12]\.") as said:
        opened = open_checkpoint(checkpoint)
        with opened.experts(len(opened.layers) - 1):
            pass
    assert "\n" not in str(said.value)
