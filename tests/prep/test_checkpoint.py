"""Opening a checkpoint: what is refused and why, and that experts read one layer at a time are
those of transformers."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import expert_geometry, expert_weights
from smoe.prep.errors import PrepError


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """damage(change) -> a copy of the mixtral checkpoint whose tensors `change` was given to "
    "edit."""

    def damage(change):
        source = checkpoints("mixtral")
        weights = load_file(source / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        return tmp_path

    return damage


EXPERT = "model.layers.1.block_sparse_moe.experts.4.w3.weight"


def _nan(weights):
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan


def _missing(weights):
    del weights["model.norm.weight"]


def _cut(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


def _one_expert_missing(weights):
    del weights[EXPERT]


def _all_experts_of_a_layer_missing(weights):
    for name in [
        name for name in weights if name.startswith("model.layers.1.block_sparse_moe.experts")
    ]:
        del weights[name]


def _one_expert_cut(weights):
    weights[EXPERT] = weights[EXPERT][:-1].clone()


@pytest.mark.parametrize(
    "change, said",
    [
        (_nan, "q_proj.weight holds values that are not finite"),
        (_missing, "1 weights are missing, model.norm.weight first; download the checkpoint again"),
        (_cut, "another shape than config.json says, model.norm.weight first"),
        (
            _one_expert_missing,
            "1 weights are missing in part or have another sh.*layers.1.mlp.experts.gate_up_proj",
        ),
        (
            _all_experts_of_a_layer_missing,
            "2 weights are missing, model.layers.1.mlp.experts.down_proj first",
        ),
        (
            _one_expert_cut,
            "1 weights are missing in part or have another sh.*layers.1.mlp.experts.gate_up_proj",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(damaged, change, said):
    with pytest.raises(PrepError, match=said):
        open_checkpoint(damaged(change))


def test_an_expert_that_is_not_finite_is_refused_by_name_when_its_layer_is_read(damaged):
    def change(weights):
        weights[EXPERT][3, 5] = torch.inf

    checkpoint = open_checkpoint(damaged(change))
    with checkpoint.experts(0):
        pass
    said = "layers.1.mlp.experts.gate_up_proj of expert 4 holds values that are not finite"
    with pytest.raises(PrepError, match=said), checkpoint.experts(1):
        pass


def test_of_experts_read_one_by_one_only_the_damaged_one_is_refused(damaged):
    def change(weights):
        weights[EXPERT][3, 5] = torch.nan

    checkpoint = open_checkpoint(damaged(change))
    with checkpoint.experts(1, apart=True) as module:
        expert_weights(module, 3)
        with pytest.raises(PrepError, match="gate_up_proj of expert 4 holds values that are not"):
            expert_weights(module, 4)


@pytest.fixture
def sharded(make, tmp_path):
    """A checkpoint of several files with an index."""
    make("mixtral").save_pretrained(tmp_path / "m", max_shard_size="300kB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    return tmp_path / "m"


def _experts(path) -> list[torch.Tensor]:
    checkpoint = open_checkpoint(path)
    found = []
    for layer in range(len(checkpoint.layers)):
        with checkpoint.experts(layer) as module:
            found += [weight.detach().clone() for weight in module.parameters()]
    return found


def test_shards_hold_the_same_as_one_file(sharded, checkpoints):
    ours, theirs = _experts(sharded), _experts(checkpoints("mixtral"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


FAMILIES = [
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "ernie4_5_moe",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_transformers_reads(checkpoints, family):
    """Backbone, buffers, and every layer's experts, which are gone again afterwards."""
    checkpoint = open_checkpoint(checkpoints(family))
    wanted = AutoModelForCausalLM.from_pretrained(checkpoints(family), dtype=torch.float32)
    weights, buffers = wanted.state_dict(), dict(wanted.named_buffers())
    for name, weight in checkpoint.model.state_dict().items():
        assert weight.is_meta == (".experts." in name and "shared" not in name)
        assert weight.is_meta or torch.equal(weight, weights[name]), name
    for name, buffer in checkpoint.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for layer, (name, _) in enumerate(checkpoint.layers):
        with checkpoint.experts(layer) as module:
            for part, weight in module.named_parameters():
                assert torch.equal(weight, weights[f"{name}.{part}"])
        assert all(weight.is_meta for weight in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_read_one_by_one_are_the_same(checkpoints, family):
    checkpoint = open_checkpoint(checkpoints(family))
    for layer in range(len(checkpoint.layers)):
        found = []
        for apart in (False, True):
            with checkpoint.experts(layer, apart=apart) as module:
                count = expert_geometry(module)[0]
                found.append([expert_weights(module, expert) for expert in range(count)])
        for whole, alone in zip(*found, strict=True):
            assert whole.keys() == alone.keys()
            assert all(np.array_equal(whole[name], alone[name]) for name in whole)


def test_half_precision_stays_half_in_memory(make, tmp_path):
    make("qwen3_moe").bfloat16().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert all(
        w.dtype == torch.float32 for n, w in checkpoint.model.named_parameters() if not w.is_meta
    )
    with checkpoint.experts(1) as module:
        assert all(weight.dtype == torch.bfloat16 for weight in module.parameters())


def _lose_a_shard(path):
    sorted(path.glob("*.safetensors"))[1].unlink()


def _stop_half_way(path):
    shard = sorted(path.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)


def _index(change):
    def edit(path):
        index = json.loads((path / "model.safetensors.index.json").read_text())
        change(index["weight_map"])
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    "change, said",
    [
        (
            _lose_a_shard,
            "1 of . weight files are not there, model-00002.*the download is not complete",
        ),
        (_stop_half_way, "model-00002.*is not whole"),
        (
            _index(lambda m: m.update(ghost=next(iter(m.values())))),
            "ghost is in the index but in no file",
        ),
        (
            _index(lambda m: m.update({"model.norm.weight": "../../etc/x.safetensors"})),
            "files elsewhere",
        ),
        (_index(lambda m: m.clear()), "names no weight files"),
        (
            lambda p: (p / "model.safetensors.index.json").write_text("{"),
            "is not an index of weights",
        ),
    ],
)
def test_an_incomplete_download_is_refused(sharded, change, said):
    change(sharded)
    with pytest.raises(PrepError, match=said):
        open_checkpoint(sharded)


def test_a_half_written_single_file_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints("mixtral"), tmp_path / "m")
    os.truncate(
        tmp_path / "m" / "model.safetensors",
        (tmp_path / "m" / "model.safetensors").stat().st_size // 2,
    )
    with pytest.raises(PrepError, match="is not whole .* Download it again"):
        open_checkpoint(tmp_path / "m")


def test_a_damaged_generation_config_is_refused_before_anything_is_read(checkpoints, tmp_path):
    shutil.copytree(checkpoints("mixtral"), tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text("{")
    with pytest.raises(PrepError, match="generation_config.json is damaged"):
        open_checkpoint(tmp_path / "m")


def test_a_file_that_shrinks_later_is_a_sentence(checkpoints, tmp_path):
    shutil.copytree(checkpoints("mixtral"), tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    os.truncate(tmp_path / "m" / "model.safetensors", 1000)
    with pytest.raises(PrepError, match="is not whole"), checkpoint.experts(0):
        pass


def test_a_dense_model_is_refused_by_name(tmp_path):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=99,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(PrepError, match="is a llama model without experts"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config, said",
    [
        (None, "has no config.json"),
        ("{", "config.json is not one that transformers"),
        ('{"model_type": "warp"}', "config.json is not one that"),
        ('{"model_type": "mixtral", "num_hidden_layers": 2147483648}', "says 2147483648 layers"),
        ('{"model_type": "mixtral"}', "has no .safetensors files"),
        ('{"model_type": "mixtral", "hidden_size": "abc"}', "config.json is"),
        ('{"model_type": "mixtral", "num_local_experts": 0}', "a mixtral model without experts"),
        ('{"model_type": "mixtral", "pad_token_id": 99999}', "makes no MixtralForCausalLM of its"),
        (
            '{"model_type": "openai_privacy_filter"}',
            "no model that generates text for the family openai_privacy_filter",
        ),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path, config, said):
    with pytest.raises(PrepError, match="is not a directory"):
        open_checkpoint(tmp_path / "m")
    (tmp_path / "m").mkdir()
    if config is not None:
        (tmp_path / "m" / "config.json").write_text(config)
    with pytest.raises(PrepError, match=said):
        open_checkpoint(tmp_path / "m")


def test_a_fingerprint_sees_the_last_byte(checkpoints, tmp_path):
    shutil.copytree(checkpoints("mixtral"), tmp_path / "m")
    before = open_checkpoint(tmp_path / "m").fingerprint()
    data = bytearray((tmp_path / "m" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m" / "model.safetensors").write_bytes(data)
    assert open_checkpoint(tmp_path / "m").fingerprint() != before
