"""A checkpoint as a GGUF file for llama.cpp, of the families of `gguf_families`.

Experts and the rest have a type each, so that a file can be made that is as precise as a bundle is:
f32 beside a bundle's float backbone, q8_0 beside int8. One tensor is in memory at a time. Needs
`pip install gguf`.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from bench.gguf_families import FAMILIES, TYPES, Checkpoint, Config, Tensors, Types


def to_gguf(source: Path, out: Path, experts: str = "q4_0", backbone: str = "q8_0") -> int:
    """Write `out`; returns its bytes. A `ValueError` for another family."""
    config = json.loads((source / "config.json").read_text("utf-8"))
    if config["model_type"] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{source} is a {config['model_type']}; {known} are known here.")
    family = FAMILIES[config["model_type"]]
    tensors = Tensors(Checkpoint(source), Types(TYPES[experts], TYPES[backbone]))
    family.tensors(tensors, config)
    beside = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(beside, family.arch)
    _settings(writer, config | family.heads(config))
    family.settings(writer, config)
    _vocabulary(writer, _tokenizer(source, config), config)
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, t.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(t.data())
    writer.close()
    return beside.rename(out).stat().st_size


def _settings(writer: gguf.GGUFWriter, config: Config) -> None:
    """Those that every family has."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    width = config["intermediate_size"]
    writer.add_feed_forward_length(width)
    writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", width))
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    counts = (config.get(name) for name in names)
    writer.add_expert_count(next(filter(None, counts)))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head)
    writer.add_value_length(config.get("value_length", head))
    _positions(writer, config)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _positions(writer: gguf.GGUFWriter, config: Config) -> None:
    parameters = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(parameters.get("rope_theta") or config["rope_theta"])
    scaling = config.get("rope_scaling") or parameters
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def _tokenizer(source: Path, config: Config) -> Config:
    """tokenizer.json; of a checkpoint without one, as many tokens as it has."""
    file = source / "tokenizer.json"
    if file.exists():
        return dict(json.loads(file.read_text("utf-8")))
    names = {f"<{number}>": number for number in range(config["vocab_size"])}
    return {"model": {"vocab": names, "merges": ["< 0"]}, "added_tokens": []}


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: Config, config: Config) -> None:
    """A byte-level BPE. Benches give ids, so nothing depends on how llama.cpp would split text
    before it."""
    ids = tokenizer["model"]["vocab"] | {
        token["content"]: token["id"] for token in tokenizer["added_tokens"]
    }
    tokens = sorted(ids, key=ids.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges(
        [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    )
    writer.add_bos_token_id(config.get("bos_token_id") or 0)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
