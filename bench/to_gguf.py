"""A qwen3_moe or olmoe checkpoint as a GGUF file for llama.cpp.

Experts and the rest have a type each, so that a file can be made that is as precise as a bundle is:
f32 beside a bundle's float backbone, q8_0 beside int8. Routers and norms are float32 always, as in
llama.cpp's own converter. One tensor is in memory at a time. Needs `pip install gguf`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

TYPES = {"f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
EXPERTS = ("gate", "up", "down")
FAMILIES = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe"}  # as llama.cpp calls them


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: how it is read, float32, and what it becomes."""

    name: str
    shape: tuple[int, ...]
    type: Type
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return (
            int(np.prod(gguf.quant_shape_to_byte_shape(self.shape, self.type)))
            if self.quantised
            else (int(np.prod(self.shape)) * (2 if self.type == Type.F16 else 4))
        )

    @property
    def quantised(self) -> bool:
        return self.type not in (Type.F32, Type.F16)


class Checkpoint:
    """Tensors of a checkpoint by name, float32."""

    def __init__(self, path: Path):
        self._files = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self._files |= {
                    name: (file, tuple(opened.get_slice(name).get_shape()))
                    for name in opened.keys()  # noqa: SIM118  it is no mapping
                }

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name][1]

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._files[name][0], "pt") as opened:
            return opened.get_tensor(name).float().numpy()


def to_gguf(source: Path, out: Path, experts: str = "q4_0", backbone: str = "q8_0") -> int:
    """Write `out`; returns its bytes. A `ValueError` for another family."""
    config = json.loads((source / "config.json").read_text("utf-8"))
    if config["model_type"] not in FAMILIES:
        known = " and ".join(FAMILIES)
        raise ValueError(f"{source} is a {config['model_type']}; {known} are known here.")
    writer = gguf.GGUFWriter(out, FAMILIES[config["model_type"]])
    _settings(writer, config)
    _vocabulary(writer, _tokenizer(source, config), config)
    tensors = _tensors(Checkpoint(source), config, TYPES[experts], TYPES[backbone])
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, t.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(gguf.quantize(t.read(), t.type))
    writer.close()
    return out.stat().st_size


def _settings(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    width = config["intermediate_size"]
    writer.add_feed_forward_length(width)
    writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", width))
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _tokenizer(source: Path, config: dict) -> dict:
    """tokenizer.json; of a checkpoint without one, as many tokens as it has."""
    file = source / "tokenizer.json"
    if file.exists():
        return json.loads(file.read_text("utf-8"))
    names = {f"<{number}>": number for number in range(config["vocab_size"])}
    return {"model": {"vocab": names, "merges": ["< 0"]}, "added_tokens": []}


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: dict, config: dict) -> None:
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


def _tensors(source: Checkpoint, config: dict, experts: Type, backbone: Type) -> list[Tensor]:
    def plain(name: str, tensor: str) -> Tensor:
        kept = (
            backbone
            if len(source.shape(tensor)) == 2 and not name.endswith("ffn_gate_inp")
            else Type.F32
        )
        return Tensor(f"{name}.weight", source.shape(tensor), kept, lambda: source.read(tensor))

    def stacked(layer: int, part: str) -> Tensor:
        names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(count)]
        shape = (count, *source.shape(names[0]))
        return Tensor(
            f"blk.{layer}.ffn_{part}_exps.weight",
            shape,
            experts,
            lambda: np.stack(list(map(source.read, names))),
        )

    count = config.get("num_experts") or config["num_local_experts"]
    out = [
        plain(name, f"{old}.weight") for name, old in OUTSIDE.items() if f"{old}.weight" in source
    ]
    for layer in range(config["num_hidden_layers"]):
        out += [
            plain(f"blk.{layer}.{name}", f"model.layers.{layer}.{old}.weight")
            for name, old in IN_LAYER.items()
        ]
        out += [stacked(layer, part) for part in EXPERTS]
    return out
