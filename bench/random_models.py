"""Checkpoints of random weights at the sizes of any model, and text of random ids.

What they compute is of no use; what they take in time and memory is what the model takes that has
these sizes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from bench.harness import EXAMPLES
from smoe.artifacts import safetensors_file
from smoe.artifacts.safetensors_file import TensorSpec

ROUNDED = ("--encoding", "nested:2+1+1:128", "--quantiser", "nearest")
FIRST_ID = 3  # of a random text: what lies before are special tokens
HEAD_SIZE = 64
NORM = 0x3F80  # 1 in bfloat16
INDEX = "model.safetensors.index.json"  # is written last
PIECE = 1 << 24  # numbers that are drawn at once


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

    encoding: ClassVar[tuple[str, ...]] = ROUNDED  # how smoe-prep build is told to pack it
    # Of an embedding's numbers; None as of any matrix, which leaves a token little to say beside
    # what attention adds, so that most are sent to the same experts.
    embedding_std: ClassVar[float | None] = None
    worded: ClassVar[bool] = False  # whether the checkpoint has a tokenizer

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
            yield self.layer_tensors(layer)
        yield {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Tensors of one layer and their shapes."""
        name, hidden, width = f"model.layers.{layer}", self.hidden, self.width
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

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        name, hidden, width, count = (
            f"model.layers.{layer}", self.hidden, self.width, self.experts
        )  # fmt: skip
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


def random_checkpoint(path: Path, shape: Shape) -> Path:
    """A checkpoint of random weights in one file per layer, as published: bfloat16, one tensor per
    expert matrix, or what the shape says."""
    if (path / INDEX).exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape.config()))
    if shape.worded:
        _tokenizer(path, shape.vocabulary)
    random, index = np.random.default_rng(0), dict[str, str]()
    for number, shapes in enumerate(shape.parts(), 1):
        file = f"model-{number:05d}-of-{shape.layers + 1:05d}.safetensors"
        tensors = [
            TensorSpec(name, "U8" if name.endswith(("_blocks", "_scales")) else "BF16", size)
            for name, size in shapes.items()
        ]
        weights = (_random(random, tensor, shape.embedding_std) for tensor in tensors)
        safetensors_file.write(path / file, tensors, weights, {"format": "pt"})
        index.update(dict.fromkeys(shapes, file))
    about = {"metadata": {}, "weight_map": index}
    (path / INDEX).write_text(json.dumps(about))
    return path


def _random(
    random: np.random.Generator, tensor: TensorSpec, embedding_std: float | None
) -> np.ndarray:
    shape = tensor.shape
    if tensor.name.endswith("_scales"):
        return np.full(shape, 120, np.uint8)  # 2^-7
    if tensor.dtype == "U8":
        return random.integers(0, 256, shape, np.uint8)
    if tensor.name.endswith("A_log"):  # decays from slow to fast, as such layers begin
        return _bfloat16(np.log(np.linspace(0.01, 16, shape[0], dtype=np.float32)))
    if len(shape) == 1:
        return np.full(shape, NORM, np.uint16)
    std = shape[-1] ** -0.5
    if tensor.name.endswith("embed_tokens.weight") and embedding_std:
        std = embedding_std
    out = np.empty(shape, np.uint16)
    for rows in np.array_split(out.reshape(-1, shape[-1]), -(-out.size // PIECE)):
        rows[...] = _bfloat16(random.standard_normal(rows.shape, np.float32) * np.float32(std))
    return out


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, uint16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _tokenizer(path: Path, vocabulary: int) -> None:
    """The example's tokenizer, with words up to the size of the vocabulary that no text has."""
    example = json.loads((EXAMPLES / "reference" / "tokenizer.json").read_text("utf-8"))
    words = example["model"]["vocab"]
    words |= {f"<{number}>": number for number in range(len(words), vocabulary)}
    (path / "tokenizer.json").write_text(json.dumps(example), "utf-8")
    shutil.copyfile(
        EXAMPLES / "reference" / "tokenizer_config.json", path / "tokenizer_config.json"
    )


def random_text(path: Path, tokens: int, vocabulary: int, row: int = 256) -> Path:
    """Rows of random ids as calibration text."""
    random = np.random.default_rng(1)
    ids = random.integers(FIRST_ID, vocabulary, (max(1, tokens // row), row)).tolist()
    path.write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in ids))
    return path


def worded_ids(count: int, vocabulary: int, seed: int = 2) -> list[int]:
    """So many ids, as frequent as the words of a text are: the n-th most frequent one 1 / n times
    as often as the first (Zipf's law), over the vocabulary."""
    random = np.random.default_rng(seed)
    ranks = np.cumsum(1 / np.arange(1, vocabulary - FIRST_ID + 1))
    drawn = np.searchsorted(ranks, random.random(count) * ranks[-1])
    return (FIRST_ID + random.permutation(len(ranks))[drawn]).tolist()
