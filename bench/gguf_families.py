"""What llama.cpp wants of each family: its name, settings beyond those that all have, and tensors.

Names are those of the `gguf` package's constants, keys and shapes those that llama.cpp's loader
asks for. Experts and the rest have a type each; routers, norms and what is no matrix are float32
always, as in llama.cpp's own converter. Experts in mxfp4 keep their codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

Config = dict[str, Any]
Change = Callable[[np.ndarray], np.ndarray]

TYPES = {"f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
EXPERTS = ("gate", "up", "down")
ATTENTION = {f"attn_{m}": f"self_attn.{m}_proj" for m in "qkv"} | {
    "attn_output": "self_attn.o_proj"
}
LITE = (26, 27)  # layers of a deepseek2 model whose queries llama.cpp takes in one matrix
LANES = 32  # numbers of a block: every row is a multiple of it


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: how it is read, float32 or uint8 in the bytes of its type already."""

    name: str
    shape: tuple[int, ...]
    type: Type
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        if self.type in (Type.F32, Type.F16):
            return int(np.prod(self.shape)) * (2 if self.type == Type.F16 else 4)
        return int(np.prod(gguf.quant_shape_to_byte_shape(self.shape, self.type)))

    def data(self) -> np.ndarray:
        """Its bytes, as an array of any type."""
        array = self.read()
        return array if array.dtype == np.uint8 else gguf.quantize(array, self.type)


class Checkpoint:
    """Tensors of a checkpoint by name: float32, or uint8 where it has such."""

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
            tensor = opened.get_tensor(name)
        return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


@dataclass(frozen=True)
class Types:
    """Of the experts, and of the other matrices."""

    experts: Type
    backbone: Type


class Tensors(list[Tensor]):
    """The tensors of one file, as they are added."""

    def __init__(self, source: Checkpoint, types: Types):
        super().__init__()
        self.source, self._types = source, types

    def matrix(
        self, name: str, old: str, shape: tuple[int, ...] = (), change: Change | None = None
    ) -> None:
        """A matrix of the backbone, or several; `change` gives it another `shape`."""
        self._add(name, old, self._types.backbone, shape, change)

    def exact(
        self, name: str, old: str, shape: tuple[int, ...] = (), change: Change | None = None
    ) -> None:
        """In float32."""
        self._add(name, old, Type.F32, shape, change)

    def _add(
        self, name: str, old: str, kind: Type, shape: tuple[int, ...], change: Change | None
    ) -> None:
        def read() -> np.ndarray:
            array = self.source.read(old)
            changed = array if change is None else change(array)
            return changed.reshape(shape or changed.shape)

        self.append(Tensor(name, shape or self.source.shape(old), kind, read))

    def experts(self, name: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        self.append(Tensor(name, shape, self._types.experts, read))

    def stacked(self, name: str, stem: str, count: int, part: str) -> None:
        """One matrix of all experts, which the checkpoint has one by one."""
        names = [f"{stem}.{expert}.{part}_proj.weight" for expert in range(count)]
        shape = (count, *self.source.shape(names[0]))
        self.experts(name, shape, lambda: np.stack(list(map(self.source.read, names))))

    def outside(self, norm: Change | None = None) -> None:
        """What lies outside the layers."""
        for name, old in OUTSIDE.items():
            if f"{old}.weight" in self.source:
                add = self.exact if name == "output_norm" else self.matrix
                change = norm if name == "output_norm" else None
                add(f"{name}.weight", f"{old}.weight", change=change)


# -- qwen3_moe and olmoe ---------------------------------------------------------------


def _plain(out: Tensors, config: Config) -> None:
    out.outside()
    count = config.get("num_experts") or config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        new, old = f"blk.{layer}", f"model.layers.{layer}"
        for name, stem in ATTENTION.items():
            out.matrix(f"{new}.{name}.weight", f"{old}.{stem}.weight")
        for matrix in "qk":
            out.exact(f"{new}.attn_{matrix}_norm.weight", f"{old}.self_attn.{matrix}_norm.weight")
        _norms(out, new, old, "ffn_norm")
        out.exact(f"{new}.ffn_gate_inp.weight", f"{old}.mlp.gate.weight")
        for part in EXPERTS:
            out.stacked(f"{new}.ffn_{part}_exps.weight", f"{old}.mlp.experts", count, part)


def _norms(out: Tensors, new: str, old: str, second: str, change: Change | None = None) -> None:
    """Before attention, and before the experts, which has several names."""
    out.exact(f"{new}.attn_norm.weight", f"{old}.input_layernorm.weight", change=change)
    out.exact(f"{new}.{second}.weight", f"{old}.post_attention_layernorm.weight", change=change)


# -- gpt_oss ---------------------------------------------------------------------------


def _gpt_oss_settings(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_dimension_count(config["head_dim"])


def _gpt_oss(out: Tensors, config: Config) -> None:
    out.outside()
    for layer in range(config["num_hidden_layers"]):
        new, old = f"blk.{layer}", f"model.layers.{layer}"
        for name, stem in ATTENTION.items():
            out.matrix(f"{new}.{name}.weight", f"{old}.{stem}.weight")
            out.exact(f"{new}.{name}.bias", f"{old}.{stem}.bias")
        out.exact(f"{new}.attn_sinks.weight", f"{old}.self_attn.sinks")
        _norms(out, new, old, "post_attention_norm")
        for kind in ("weight", "bias"):
            out.exact(f"{new}.ffn_gate_inp.{kind}", f"{old}.mlp.router.{kind}")
        for part, stored, start, step in (
            ("gate", "gate_up", 0, 2), ("up", "gate_up", 1, 2), ("down", "down", 0, 1)
        ):  # fmt: skip
            _coded(out, f"{new}.ffn_{part}_exps", f"{old}.mlp.experts.{stored}_proj", start, step)


def _coded(out: Tensors, name: str, stem: str, start: int, step: int) -> None:
    """Every `step`-th row of the experts' codes, and of their biases."""
    count, rows, groups, _ = out.source.shape(f"{stem}_blocks")

    def read() -> np.ndarray:
        blocks, scales = (out.source.read(f"{stem}_{kind}") for kind in ("blocks", "scales"))
        return mxfp4_bytes(blocks[:, start::step], scales[:, start::step])

    out.append(Tensor(f"{name}.weight", (count, rows // step, LANES * groups), Type.MXFP4, read))
    rows_of = (count, rows // step)
    out.exact(f"{name}.bias", f"{stem}_bias", rows_of, lambda bias: bias[:, start::step].copy())


def mxfp4_bytes(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes as checkpoints have them, uint8 `[..., groups, 16]` with neighbours in a byte, and
    their scales uint8 `[..., groups]`, as llama.cpp has them: uint8 `[..., groups * 17]`, the scale
    and then a number of the first half of the group beside one of the second."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], LANES)
    halves = codes[..., : LANES // 2] | codes[..., LANES // 2 :] << 4
    whole = np.concatenate([scales[..., None], halves], -1)
    return whole.reshape(*whole.shape[:-2], -1)


# -- deepseek_v2 -----------------------------------------------------------------------


def _deepseek_heads(config: Config) -> Config:
    """One head of keys, a latent and what is rotated, whose values are the latent."""
    latent = config["kv_lora_rank"]
    key = latent + config["qk_rope_head_dim"]
    return {"num_key_value_heads": 1, "head_dim": key, "value_length": latent}


def _deepseek_settings(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if (rank := query_rank(config)) is not None:
        writer.add_q_lora_rank(rank)
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_rope_scaling_yarn_log_mul(0.1 * config["rope_scaling"]["mscale_all_dim"])


def query_rank(config: Config) -> int | None:
    """llama.cpp tells the models whose queries are one matrix by their number of layers. With any
    other it takes them as a product of two, which here get the rank with as many weights."""
    if config["num_hidden_layers"] in LITE:
        return None
    head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rows, columns = config["num_attention_heads"] * head, config["hidden_size"]
    return int(rows * columns / (rows + columns)) // LANES * LANES


def _deepseek(out: Tensors, config: Config) -> None:
    out.outside()
    for layer in range(config["num_hidden_layers"]):
        new, old = f"blk.{layer}", f"model.layers.{layer}"
        _norms(out, new, old, "ffn_norm")
        _latent_attention(out, config, new, f"{old}.self_attn")
        if layer < config["first_k_dense_replace"]:
            for part in EXPERTS:
                out.matrix(f"{new}.ffn_{part}.weight", f"{old}.mlp.{part}_proj.weight")
            continue
        out.exact(f"{new}.ffn_gate_inp.weight", f"{old}.mlp.gate.weight")
        for part in EXPERTS:
            stem, count = f"{old}.mlp.experts", config["n_routed_experts"]
            out.stacked(f"{new}.ffn_{part}_exps.weight", stem, count, part)
            shared = f"{old}.mlp.shared_experts.{part}_proj.weight"
            out.matrix(f"{new}.ffn_{part}_shexp.weight", shared)


def _latent_attention(out: Tensors, config: Config, new: str, old: str) -> None:
    heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    rank, queries = query_rank(config), f"{old}.q_proj.weight"
    if rank is None:
        out.matrix(f"{new}.attn_q.weight", queries)
    else:
        rows, columns = out.source.shape(queries)
        out.matrix(f"{new}.attn_q_a.weight", queries, (rank, columns), lambda w: w[:rank])
        out.append(
            Tensor(f"{new}.attn_q_a_norm.weight", (rank,), Type.F32,
                   lambda: np.ones(rank, np.float32))
        )  # fmt: skip
        out.matrix(f"{new}.attn_q_b.weight", queries, (rows, rank), lambda w: w[:, :rank].copy())
    out.matrix(f"{new}.attn_kv_a_mqa.weight", f"{old}.kv_a_proj_with_mqa.weight")
    out.exact(f"{new}.attn_kv_a_norm.weight", f"{old}.kv_a_layernorm.weight")

    def part(start: int, stop: int, turned: bool) -> Change:
        def change(w: np.ndarray) -> np.ndarray:
            rows = w.reshape(heads, plain + value, latent)[:, start:stop]
            return np.ascontiguousarray(rows.swapaxes(1, 2) if turned else rows)

        return change

    both = f"{old}.kv_b_proj.weight"
    out.matrix(f"{new}.attn_k_b.weight", both, (heads, latent, plain), part(0, plain, True))
    values = part(plain, plain + value, False)
    out.matrix(f"{new}.attn_v_b.weight", both, (heads, value, latent), values)
    out.matrix(f"{new}.attn_output.weight", f"{old}.o_proj.weight")


# -- qwen3_5_moe -----------------------------------------------------------------------


def _qwen35_settings(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = config["rope_parameters"]
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_full_attention_interval(config["layer_types"].index("full_attention") + 1)
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    heads, width = config["linear_num_value_heads"], config["linear_value_head_dim"]
    writer.add_ssm_inner_size(heads * width)
    writer.add_ssm_state_size(width)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_group_count(config["linear_num_key_heads"])


def _qwen35(out: Tensors, config: Config) -> None:
    def from_one(weight: np.ndarray) -> np.ndarray:
        return weight + 1  # these norms multiply by 1 + w

    out.outside(from_one)
    width = config["moe_intermediate_size"]
    for layer, kind in enumerate(config["layer_types"]):
        new, old = f"blk.{layer}", f"model.layers.{layer}"
        _norms(out, new, old, "post_attention_norm", from_one)
        if kind == "linear_attention":
            _linear_attention(out, new, f"{old}.linear_attn")
        else:
            for name, stem in ATTENTION.items():
                out.matrix(f"{new}.{name}.weight", f"{old}.{stem}.weight")
            for matrix in "qk":
                norm = f"{old}.self_attn.{matrix}_norm.weight"
                out.exact(f"{new}.attn_{matrix}_norm.weight", norm, change=from_one)
        out.exact(f"{new}.ffn_gate_inp.weight", f"{old}.mlp.gate.weight")
        _fused_experts(out, f"{new}.ffn", f"{old}.mlp.experts", width)
        shared = f"{old}.mlp.shared_expert"
        for part in EXPERTS:
            out.matrix(f"{new}.ffn_{part}_shexp.weight", f"{shared}.{part}_proj.weight")
        gate = (config["hidden_size"],)
        out.exact(f"{new}.ffn_gate_inp_shexp.weight", f"{shared}_gate.weight", gate)


def _linear_attention(out: Tensors, new: str, old: str) -> None:
    for name, stem in (
        ("attn_qkv", "in_proj_qkv"), ("attn_gate", "in_proj_z"), ("ssm_beta", "in_proj_b"),
        ("ssm_alpha", "in_proj_a"), ("ssm_out", "out_proj"),
    ):  # fmt: skip
        out.matrix(f"{new}.{name}.weight", f"{old}.{stem}.weight")
    channels, _, kernel = out.source.shape(f"{old}.conv1d.weight")
    out.exact(f"{new}.ssm_conv1d.weight", f"{old}.conv1d.weight", (channels, kernel))
    out.exact(f"{new}.ssm_dt.bias", f"{old}.dt_bias")
    out.exact(f"{new}.ssm_a", f"{old}.A_log", change=lambda log: -np.exp(log))
    out.exact(f"{new}.ssm_norm.weight", f"{old}.norm.weight")


def _fused_experts(out: Tensors, new: str, old: str, width: int) -> None:
    """Gate and up, which the checkpoint has one below the other, and down."""
    count, _, hidden = out.source.shape(f"{old}.gate_up_proj")

    def half(start: int) -> Callable[[], np.ndarray]:
        return lambda: out.source.read(f"{old}.gate_up_proj")[:, start : start + width].copy()

    out.experts(f"{new}_gate_exps.weight", (count, width, hidden), half(0))
    out.experts(f"{new}_up_exps.weight", (count, width, hidden), half(width))
    down = (count, hidden, width)
    out.experts(f"{new}_down_exps.weight", down, lambda: out.source.read(f"{old}.down_proj"))


@dataclass(frozen=True)
class Family:
    """`arch` as llama.cpp calls it; `tensors` adds all of them; `settings` are written beyond the
    usual ones; `heads` is what of the config is another for llama.cpp."""

    arch: str
    tensors: Callable[[Tensors, Config], None]
    settings: Callable[[gguf.GGUFWriter, Config], None] = lambda writer, config: None
    heads: Callable[[Config], Config] = lambda config: {}


FAMILIES = {
    "qwen3_moe": Family("qwen3moe", _plain),
    "olmoe": Family("olmoe", _plain),
    "gpt_oss": Family("gpt-oss", _gpt_oss, _gpt_oss_settings),
    "deepseek_v2": Family("deepseek2", _deepseek, _deepseek_settings, _deepseek_heads),
    "qwen3_5_moe_text": Family("qwen35moe", _qwen35, _qwen35_settings),
}
