"""Pico models of every family on transformers' experts interface: every dimension different, so
that a swapped axis fails.

The tables below are test data: which settings make a family small and show all its kinds of layers.
smoe itself knows no family.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING

from smoe.prep.checkpoint.families import text_class

# Whatever a config has of these is set.
BASE = {
    "vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24, "intermediate_size": 72, "moe_intermediate_size": 40, "num_experts_per_tok": 3,
    "num_experts": 6,
    "num_local_experts": 6, "n_routed_experts": 6, "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15, "moe_num_experts": 6,
    "moe_topk": 3, "moe_k": 3,
    "top_k_experts": 3, "sliding_window": 16, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "shared_intermediate_size": 56,
    "shared_expert_intermediate_size": 56,
    "shared_experts_intermediate_size": 56, "q_lora_rank": 20, "kv_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "index_head_dim": 12,
    "index_n_heads": 2,
    "linear_num_heads": 3, "linear_head_dim": 10, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_d_state": 18, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "ssm_state_size": 18,
    "mamba_chunk_size": 8, "chunk_size": 8, "n_groups": 1, "vocab_size_per_layer_input": 211,
    "hidden_size_per_layer_input": 12, "moe_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 56,
}  # fmt: skip
TOWER = {  # the parts of multimodal models that see or hear
    "hidden_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2, "num_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "image_size": 28,
    "patch_size": 14,
    "embed_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "d_model": 32,
    "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "vocab_size": 32,
    "fullatt_block_indexes": [0], "output_channels": 16, "downsample_channels": [32, 32],
    "global_attn_indexes": [0],
    "mlp_dim": 48, "output_dim": 64, "downsample_hidden_size": 16,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
LINEAR_INDEXED = ["linear_attention", "indexed_attention"]
ALL_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
FAMILIES: dict[str, dict] = {
    "afmoe": {"global_attn_every_n_layers": 2, "num_hidden_layers": 3},
    "axk1": LATENT,
    "axk2": LATENT | DENSE_FIRST,
    "bailing_hybrid": LATENT | LINEAR,
    "beam": SLIDING | ALL_SPARSE,
    "cohere2_moe": {"sliding_window_pattern": 2} | ALL_SPARSE,
    "deepseek_ocr2": DENSE_FIRST,
    "deepseek_v2": LATENT | {"num_hidden_layers": 3},
    "deepseek_v3": LATENT | {"num_hidden_layers": 3},
    "deepseek_v32": LATENT,
    "dots3_note_text": LATENT,
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [40, 36],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "exaone_moe": SLIDING,
    "flint": {"mlp_only_layers": [0]} | SLIDING,
    "gemma4_text": {"enable_moe_block": True} | SLIDING,
    "glm4_moe_lite": LATENT,
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
            "partial_rotary_factor": 1.0
        }
    },
    "glm5_next": LATENT
    | ALL_SPARSE
    | {"qk_rope_head_dim": 0, "head_dim": 0, "layer_types": LINEAR_INDEXED},
    "glm_moe_dsa": LATENT,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hy_v4": LATENT,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": LATENT | LINEAR | {"first_k_dense_replace": 0},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_hidden_layers": 3,
    },
    "mellum": SLIDING,
    "minimax": LINEAR,
    "mistral4": LATENT,
    "mistral_large4": LATENT,
    "olmoe": {"head_dim": 16, "norm_topk_prob": False},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": {
        "layer_types": LINEAR_INDEXED, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 28,
        "indexer_budget": 64, "indexer_compress_ratio": 4, "hc_lowrank": 10,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
OUTSIDE = {"qwen3_omni_moe_thinker": {"vision_start_token_id": 7}}  # of the text decoder
TOWERS: dict[str, dict[str, dict]] = {
    "mistral_large4": {
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "head_dim": 16,
        }
    },
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 4,
            "hidden_sizes": [16, 16, 16, 16],
            "depths": [1, 1, 1, 1],
        }
    },
}


def model_files() -> list[str]:
    """The families whose modelling code offers the experts interface, as this transformers has
    them."""
    root = Path(transformers.__file__).parent / "models"
    return sorted(
        {
            f.parent.name
            for f in root.glob("*/modeling_*.py")
            if "@use_experts_implementation" in f.read_text()
        }
    )


def config_name(family: str) -> str:
    """The config with which a family is made: that of its text decoder, where this can be loaded
    alone."""
    names = [f"{family}_text", f"{family}_thinker", family, f"{family}_mm_model"]
    return next(
        (name for name in names if name in CONFIG_MAPPING and text_class(CONFIG_MAPPING[name])),
        family,
    )


def make_config(name: str, base: dict = BASE, **changes):
    cls = CONFIG_MAPPING[name]
    chosen = FAMILIES.get(name, {}) | changes
    if "text_config" not in cls.sub_configs:
        return cls(**(_known(cls, base) | chosen))
    parts = {
        part: _tower(sub) | TOWERS.get(name, {}).get(part, {})
        for part, sub in cls.sub_configs.items()
    }
    text = _known(cls.sub_configs["text_config"], base) | chosen
    return cls(**(parts | OUTSIDE.get(name, {}) | {"text_config": text}))


def make_model(name: str, seed: int = 5, base: dict = BASE, **changes):
    """A pico model with random weights: biases too, which are zero as made and would hide one that
    is lost."""
    torch.manual_seed(seed)
    config = make_config(name, base, **changes)
    model = text_class(type(config))._from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "bias" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    for buffer_name, buffer in model.named_buffers():
        if "correction_bias" in buffer_name:
            buffer.copy_(torch.linspace(-0.3, 0.3, buffer.numel()))
    return model


def _known(cls, settings: dict) -> dict:
    if not dataclasses.is_dataclass(cls):
        return settings
    known = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    return {name: value for name, value in settings.items() if name in known}


def _tower(sub) -> dict:
    if not dataclasses.is_dataclass(sub):
        return {}
    nested = {part: _tower(inner) for part, inner in getattr(sub, "sub_configs", {}).items()}
    return _known(sub, TOWER) | nested
