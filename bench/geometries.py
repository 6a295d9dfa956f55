"""Published models by their sizes, in as few layers as one likes, for `random_models`.

Configs are those of docs/models where there are any. Of DeepSeek-V2-Lite and Qwen3.5-35B-A3B they
are written out here: what the model cards and papers say, and for the rest the defaults of
`transformers`' config classes, whose examples they are (`DeepseekV2Config`,
`Qwen3_5MoeTextConfig`; the text decoder alone of the latter). Tensors have the names and shapes in
which these models are published.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bench.harness import ROOT
from bench.random_models import Mxfp4Shape, Shape

Shapes = dict[str, tuple[int, ...]]


def published(folder: str) -> dict[str, Any]:
    """The config.json of a folder of docs/models."""
    path = ROOT / "docs" / "models" / folder / "config.json"
    return dict(json.loads(path.read_text("utf-8")))


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
        counts = {"num_hidden_layers": self.layers, "dtype": "bfloat16"}
        return published("olmoe-1b-7b") | counts

    def layer_tensors(self, layer: int) -> Shapes:
        stem = f"model.layers.{layer}.self_attn"
        square, whole = (self.hidden, self.hidden), (self.hidden,)
        attention: Shapes = {f"{stem}.{matrix}_proj.weight": square for matrix in "qkvo"}
        norms: Shapes = {f"{stem}.{matrix}_norm.weight": whole for matrix in "qk"}
        return super().layer_tensors(layer) | attention | norms


@dataclass(frozen=True)
class GptOss20bShape(Mxfp4Shape):
    """Sizes of gpt-oss-20b, as docs/models says them: every other layer has a window of 128."""

    layers: int = 24
    experts: int = 32
    top_k: int = 4
    hidden: int = 2880
    width: int = 2880
    vocabulary: int = 201088
    heads: int = 64
    kv_heads: int = 8

    encoding = ()  # its own codes are kept
    embedding_std = 1.0
    worded = True

    def config(self) -> dict[str, object]:
        config = published("gpt-oss-20b")
        kinds = config["layer_types"][: self.layers]
        return config | {"num_hidden_layers": self.layers, "layer_types": kinds}


@dataclass(frozen=True)
class DeepseekV2LiteShape(Shape):
    """Sizes of DeepSeek-V2-Lite; the first layer is dense."""

    layers: int = 27
    experts: int = 64
    top_k: int = 6
    hidden: int = 2048
    width: int = 1408
    vocabulary: int = 102400
    context: int = 163840
    heads: int = 16
    kv_heads: int = 16

    dense = 10944  # width of the first layer
    latent, rotary, plain, value = 512, 64, 128, 128  # widths: shared; of a head

    embedding_std = 1.0
    worded = True

    @property
    def expert_bytes(self) -> int:
        return super().expert_bytes // self.layers * (self.layers - 1)

    def config(self) -> dict[str, object]:
        config = super().config()
        del config["num_experts"], config["decoder_sparse_step"], config["mlp_only_layers"]
        return config | {
            "model_type": "deepseek_v2",
            "architectures": ["DeepseekV2ForCausalLM"],
            "intermediate_size": self.dense,
            "n_routed_experts": self.experts,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": self.latent,
            "q_lora_rank": None,
            "qk_nope_head_dim": self.plain,
            "qk_rope_head_dim": self.rotary,
            "head_dim": self.rotary,
            "v_head_dim": self.value,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707,
            },
        }  # fmt: skip

    def layer_tensors(self, layer: int) -> Shapes:
        name, hidden, heads = f"model.layers.{layer}", self.hidden, self.heads
        attention = f"{name}.self_attn"
        shapes: Shapes = {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{attention}.q_proj.weight": (heads * (self.plain + self.rotary), hidden),
            f"{attention}.kv_a_proj_with_mqa.weight": (self.latent + self.rotary, hidden),
            f"{attention}.kv_a_layernorm.weight": (self.latent,),
            f"{attention}.kv_b_proj.weight": (heads * (self.plain + self.value), self.latent),
            f"{attention}.o_proj.weight": (hidden, heads * self.value),
        }
        if layer == 0:
            return shapes | feed_forward(f"{name}.mlp", hidden, self.dense)
        shapes[f"{name}.mlp.gate.weight"] = (self.experts, hidden)
        for expert in range(self.experts):
            shapes |= feed_forward(f"{name}.mlp.experts.{expert}", hidden, self.width)
        return shapes | feed_forward(f"{name}.mlp.shared_experts", hidden, 2 * self.width)


@dataclass(frozen=True)
class Qwen35Shape(Shape):
    """Sizes of the text decoder of Qwen3.5-35B-A3B: three layers of linear attention, then one of
    full attention."""

    layers: int = 40
    experts: int = 256
    top_k: int = 8
    hidden: int = 2048
    width: int = 512
    vocabulary: int = 248320
    context: int = 262144
    heads: int = 16
    kv_heads: int = 2

    head = 256
    kernel = 4  # of the convolution of linear layers
    linear_heads, linear_values, linear_head = 16, 32, 128  # heads of keys, of values; their width

    embedding_std = 1.0
    worded = True

    def config(self) -> dict[str, object]:
        config = super().config()
        del config["decoder_sparse_step"], config["mlp_only_layers"], config["norm_topk_prob"]
        return config | {
            "model_type": "qwen3_5_moe_text",
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "head_dim": self.head,
            "shared_expert_intermediate_size": self.width,
            "linear_conv_kernel_dim": self.kernel,
            "linear_key_head_dim": self.linear_head,
            "linear_value_head_dim": self.linear_head,
            "linear_num_key_heads": self.linear_heads,
            "linear_num_value_heads": self.linear_values,
            "layer_types": [
                "linear_attention" if self.linear(layer) else "full_attention"
                for layer in range(self.layers)
            ],
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10], "mrope_interleaved": True,
            },
        }  # fmt: skip

    @staticmethod
    def linear(layer: int) -> bool:
        """Whether its attention is linear."""
        return (layer + 1) % 4 != 0

    def layer_tensors(self, layer: int) -> Shapes:
        name, hidden, width = f"model.layers.{layer}", self.hidden, self.width
        attention = self._linear(name) if self.linear(layer) else self._full(name)
        return attention | {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.mlp.gate.weight": (self.experts, hidden),
            f"{name}.mlp.experts.gate_up_proj": (self.experts, 2 * width, hidden),
            f"{name}.mlp.experts.down_proj": (self.experts, hidden, width),
            f"{name}.mlp.shared_expert_gate.weight": (1, hidden),
            **feed_forward(f"{name}.mlp.shared_expert", hidden, width),
        }

    def _full(self, name: str) -> Shapes:
        stem, queries, keys = f"{name}.self_attn", self.heads * self.head, self.kv_heads * self.head
        return {
            f"{stem}.q_proj.weight": (2 * queries, self.hidden),  # and its gate
            f"{stem}.k_proj.weight": (keys, self.hidden),
            f"{stem}.v_proj.weight": (keys, self.hidden),
            f"{stem}.o_proj.weight": (self.hidden, queries),
            f"{stem}.q_norm.weight": (self.head,),
            f"{stem}.k_norm.weight": (self.head,),
        }

    def _linear(self, name: str) -> Shapes:
        stem, values = f"{name}.linear_attn", self.linear_values * self.linear_head
        mixed = 2 * self.linear_heads * self.linear_head + values
        return {
            f"{stem}.in_proj_qkv.weight": (mixed, self.hidden),
            f"{stem}.in_proj_z.weight": (values, self.hidden),
            f"{stem}.in_proj_b.weight": (self.linear_values, self.hidden),
            f"{stem}.in_proj_a.weight": (self.linear_values, self.hidden),
            f"{stem}.conv1d.weight": (mixed, 1, self.kernel),
            f"{stem}.dt_bias": (self.linear_values,),
            f"{stem}.A_log": (self.linear_values,),
            f"{stem}.norm.weight": (self.linear_head,),
            f"{stem}.out_proj.weight": (self.hidden, values),
        }


def feed_forward(name: str, hidden: int, width: int) -> Shapes:
    """Gate, up and down."""
    return {
        f"{name}.gate_proj.weight": (width, hidden),
        f"{name}.up_proj.weight": (width, hidden),
        f"{name}.down_proj.weight": (hidden, width),
    }


GEOMETRIES: dict[str, type[Shape]] = {
    "olmoe": OlmoeShape,
    "gpt-oss-20b": GptOss20bShape,
    "deepseek-v2-lite": DeepseekV2LiteShape,
    "qwen3.5-35b-a3b": Qwen35Shape,
}
