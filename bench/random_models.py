"""Checkpoints of random weights at the sizes of any model, and text of random ids.

What they compute is of no use; what they take in time and memory is what the model takes that has
these sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.harness import ROOT
from smoe.artifacts import safetensors_file
from smoe.artifacts.safetensors_file import TensorSpec

FIRST_ID = 3  # of a random text: what lies before are special tokens
HEAD_SIZE = 64
NORM = 0x3F80  # 1 in bfloat16


@dataclass(frozen=True)
class Shape:
    """Sizes of a qwen3_moe model."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    vocabulary: int = 2048
    context: int = 4096
    heads: int = 8
    kv_heads: int = 2

    @property
    def expert_bytes(self) -> int:
        """Of all experts, in bfloat16."""
        return self.layers * self.experts * 3 * self.hidden * self.width * 2

    def config(self) -> dict[str, object]:
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_SIZE,
            "intermediate_size": 4 * self.hidden,
            "moe_intermediate_size": self.width,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "max_position_embeddings": self.context,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def parts(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Tensors and their shapes: of every layer, and of what lies outside."""
        for layer in range(self.layers):
            yield self._layer(f"model.layers.{layer}")
        yield {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    def _layer(self, name: str) -> dict[str, tuple[int, ...]]:
        hidden, width = self.hidden, self.width
        queries, keys = self.heads * HEAD_SIZE, self.kv_heads * HEAD_SIZE
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (queries, hidden),
            f"{name}.self_attn.k_proj.weight": (keys, hidden),
            f"{name}.self_attn.v_proj.weight": (keys, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, queries),
            f"{name}.self_attn.q_norm.weight": (HEAD_SIZE,),
            f"{name}.self_attn.k_norm.weight": (HEAD_SIZE,),
            f"{name}.mlp.gate.weight": (self.experts, hidden),
        }
        for expert in range(self.experts):
            stem = f"{name}.mlp.experts.{expert}"
            shapes[f"{stem}.gate_proj.weight"] = (width, hidden)
            shapes[f"{stem}.up_proj.weight"] = (width, hidden)
            shapes[f"{stem}.down_proj.weight"] = (hidden, width)
        return shapes


class Mxfp4Shape(Shape):
    """Sizes of a gpt_oss model, whose experts are stored in mxfp4."""

    @property
    def expert_bytes(self) -> int:
        return super().expert_bytes // 4 * 17 // 16

    def config(self) -> dict[str, object]:
        return super().config() | {
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "intermediate_size": self.width,
            "num_local_experts": self.experts,
            "layer_types": ["sliding_attention", "full_attention"] * (self.layers // 2),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "quantization_config": {"quant_method": "mxfp4"},
        }

    def _layer(self, name: str) -> dict[str, tuple[int, ...]]:
        hidden, width, count = self.hidden, self.width, self.experts
        queries, keys = self.heads * HEAD_SIZE, self.kv_heads * HEAD_SIZE
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.sinks": (self.heads,),
            f"{name}.mlp.router.weight": (count, hidden),
            f"{name}.mlp.router.bias": (count,),
        }
        for matrix, n_out, n_in in (
            ("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)
        ):  # fmt: skip
            shapes[f"{name}.self_attn.{matrix}_proj.weight"] = (n_out, n_in)
            shapes[f"{name}.self_attn.{matrix}_proj.bias"] = (n_out,)
        for matrix, n_out, n_in in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
            stem = f"{name}.mlp.experts.{matrix}_proj"
            shapes[f"{stem}_blocks"] = (count, n_out, n_in // 32, 16)
            shapes[f"{stem}_scales"] = (count, n_out, n_in // 32)
            shapes[f"{stem}_bias"] = (count, n_out)
        return shapes


@dataclass(frozen=True)
class OlmoeShape(Shape):
    """Sizes of OLMoE-1B-7B, as docs/models says them, in so many layers."""

    layers: int = 16
    experts: int = 64
    top_k: int = 8
    hidden: int = 2048
    width: int = 1024
    vocabulary: int = 50304
    heads: int = 16
    kv_heads: int = 16

    def config(self) -> dict[str, object]:
        published = ROOT / "docs" / "models" / "olmoe-1b-7b" / "config.json"
        config = json.loads(published.read_text("utf-8"))
        return config | {"num_hidden_layers": self.layers, "dtype": "bfloat16"}

    def _layer(self, name: str) -> dict[str, tuple[int, ...]]:
        square, whole = (self.hidden, self.hidden), (self.hidden,)
        attention = {f"{name}.self_attn.{matrix}_proj.weight": square for matrix in "qkvo"}
        norms = {f"{name}.self_attn.{matrix}_norm.weight": whole for matrix in "qk"}
        return super()._layer(name) | attention | norms


GEOMETRIES = {"olmoe": OlmoeShape}


def random_checkpoint(path: Path, shape: Shape) -> Path:
    """A checkpoint of random weights in one file per layer, as published: bfloat16, one tensor per
    expert matrix, or what the shape says."""
    if path.exists():
        return path
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(shape.config()))
    random, index = np.random.default_rng(0), dict[str, str]()
    for number, shapes in enumerate(shape.parts(), 1):
        file = f"model-{number:05d}-of-{shape.layers + 1:05d}.safetensors"
        tensors = [
            TensorSpec(name, "U8" if name.endswith(("_blocks", "_scales")) else "BF16", size)
            for name, size in shapes.items()
        ]
        weights = (_random(random, tensor) for tensor in tensors)
        safetensors_file.write(path / file, tensors, weights, {"format": "pt"})
        index.update(dict.fromkeys(shapes, file))
    about = {"metadata": {}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(about))
    return path


def _random(random: np.random.Generator, tensor: TensorSpec) -> np.ndarray:
    shape = tensor.shape
    if tensor.name.endswith("_scales"):
        return np.full(shape, 120, np.uint8)  # 2^-7
    if tensor.dtype == "U8":
        return random.integers(0, 256, shape, np.uint8)
    if len(shape) == 1:
        return np.full(shape, NORM, np.uint16)
    values = random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def random_text(path: Path, tokens: int, vocabulary: int, row: int = 256) -> Path:
    """Rows of random ids as calibration text."""
    random = np.random.default_rng(1)
    ids = random.integers(FIRST_ID, vocabulary, (max(1, tokens // row), row)).tolist()
    path.write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in ids))
    return path
