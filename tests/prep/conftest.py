"""Pico models made on the spot, every dimension different so that a swapped axis fails. Needs torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="prep needs its extra; the lean environment does not run these tests")

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

BASE = {
    "vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 24, "intermediate_size": 72, "moe_intermediate_size": 40, "num_experts_per_tok": 3, "num_experts": 6,
    "num_local_experts": 6, "n_routed_experts": 6, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
FAMILIES = {
    "mixtral": {},
    "olmoe": {"head_dim": 16},
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 28, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 12, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
        "routed_scaling_factor": 1.7, "head_dim": 8, "num_hidden_layers": 3,
    },
    "gpt_oss": {"sliding_window": 16},
}  # fmt: skip


def make_model(family: str, seed: int = 5, **changes):
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**BASE, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:  # zero as made, which would hide a bias that is lost
            torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(torch.linspace(-0.3, 0.3, buffer.numel()))
    return model


def save_checkpoint(model, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def write_ids(path: Path, rows: int = 12, length: int = 40, vocabulary: int = 211, seed: int = 0) -> Path:
    """Calibration of random token ids, one .jsonl record a row."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (rows, length)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return path


@pytest.fixture(scope="session")
def make():
    return make_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """family -> directory of its pico checkpoint, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_checkpoint(make_model(family), tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def ids_file(tmp_path_factory) -> Path:
    return write_ids(tmp_path_factory.mktemp("text") / "ids.jsonl")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory, checkpoints, ids_file):
    """family -> its pico bundle in f32, built once."""
    from smoe.prep.build import Recipe, build
    from smoe.prep.calibration import Calibration
    from smoe.prep.progress import Progress

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("bundles") / f"{family}.smoe"
            build(
                checkpoints(family), made[family], Calibration(str(ids_file)), Recipe("f32"), progress=Progress(True)
            )
        return made[family]

    return get


@pytest.fixture(scope="session")
def reference_model(root):
    return AutoModelForCausalLM.from_pretrained(root / "examples" / "reference", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference_bundle(root, tmp_path_factory) -> Path:
    """The example model in f32."""
    from smoe.prep.build import Recipe, build
    from smoe.prep.calibration import Calibration
    from smoe.prep.progress import Progress

    out = tmp_path_factory.mktemp("reference") / "reference.smoe"
    text = Calibration(str(root / "examples" / "calibration.jsonl"), tokens=2048)
    build(root / "examples" / "reference", out, text, Recipe("f32"), progress=Progress(True))
    return out
