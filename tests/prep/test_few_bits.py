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

from smoe.prep.build import build
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import expert_weights
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress

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
    """scheme -> the checkpoint in few bits, and the same weights in float32."""
    made = {}

    def get(scheme):
        if scheme not in made:
            family, stored, changes = SCHEMES[scheme]
            directory = tmp_path_factory.mktemp("few")
            make_model(family, **changes).save_pretrained(directory / "plain")
            made[scheme] = stored(directory / "plain", directory)
        return made[scheme]

    return get


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tokens_are_those_of_the_dequantised_model(pairs, ids_file, tmp_path, scheme):
    few, exact = pairs(scheme)
    build(few, tmp_path / "b", Calibration(str(ids_file)), Recipe("f32"), progress=Progress(True))
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


def test_a_scale_that_is_not_finite_is_found_where_it_is_read(pairs, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.down_proj_scales"][4, 0, 0] = 255

    checkpoint = open_checkpoint(_changed(pairs("gpt_oss in mxfp4"), tmp_path / "m", change))
    said = r"layers\.1\.mlp\.experts\.down_proj of expert 4 holds values that are not finite"
    with checkpoint.experts(1) as module, pytest.raises(PrepError, match=said):
        expert_weights(module, 4)


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
