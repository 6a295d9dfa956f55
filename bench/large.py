"""A checkpoint whose experts are larger than memory may be: how much of it a build holds, and how long it takes.

    python bench/large.py [--gigabytes 4] [--tokens 4096] [--keep DIR]

Writes a checkpoint with random bfloat16 weights, one tensor per expert as the family's published checkpoints have them,
builds it, and prints the peak of anonymous and mapped memory (VmHWM: all resident pages) of the build and its figures
beside what `smoe-prep inspect` said before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from smoe.artifacts import safetensors_file
from smoe.artifacts.safetensors_file import TensorSpec

LAYERS, EXPERTS, HIDDEN, WIDTH, VOCABULARY = 16, 64, 1024, 0, 2048
HEADS, KV_HEADS, HEAD = 8, 2, 64


def write(path: Path, gigabytes: float) -> int:
    """Write the checkpoint; returns the bytes of its experts."""
    width = math.ceil(gigabytes * 1e9 / (LAYERS * EXPERTS * 3 * HIDDEN * 2) / 16) * 16
    path.mkdir()
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "intermediate_size": 4 * HIDDEN,
        "moe_intermediate_size": width, "num_experts": EXPERTS, "num_experts_per_tok": 4, "norm_topk_prob": True,
        "max_position_embeddings": 4096, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
        "dtype": "bfloat16", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    index: dict[str, str] = {}
    for layer in [*range(LAYERS), None]:
        shapes = _outside() if layer is None else _layer(layer, width)
        name = f"model-{(layer or 0) + 1 if layer is not None else LAYERS + 1:05d}-of-{LAYERS + 1:05d}.safetensors"
        tensors = [TensorSpec(tensor, "BF16", shape) for tensor, shape in shapes.items()]
        safetensors_file.write(
            path / name, tensors, (_random(random, t) for t in tensors), {"format": "pt"}
        )
        index.update(dict.fromkeys(shapes, name))
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return LAYERS * EXPERTS * 3 * HIDDEN * width * 2


def _layer(layer: int, width: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}.input_layernorm.weight": (HIDDEN,), f"{at}.post_attention_layernorm.weight": (HIDDEN,),
        f"{at}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN), f"{at}.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{at}.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN), f"{at}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        f"{at}.self_attn.q_norm.weight": (HEAD,), f"{at}.self_attn.k_norm.weight": (HEAD,),
        f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN),
    }  # fmt: skip
    for expert in range(EXPERTS):
        for name, shape in (
            ("gate", (width, HIDDEN)),
            ("up", (width, HIDDEN)),
            ("down", (HIDDEN, width)),
        ):
            shapes[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] = shape
    return shapes


def _outside() -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }


def _random(random: np.random.Generator, tensor: TensorSpec) -> np.ndarray:
    if len(tensor.shape) == 1:
        return np.full(tensor.shape, 0x3F80, np.uint16)  # norms are 1
    values = random.standard_normal(tensor.shape, np.float32) * np.float32(tensor.shape[-1] ** -0.5)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def run(command: list[str]) -> tuple[int, float]:
    """Run a command; its peak of resident memory in bytes, and its seconds."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return usage.ru_maxrss * 1024, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--encoding", default="bf16")
    parser.add_argument("--keep", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "model").exists():
            print(f"experts: {write(folder / 'model', chosen.gigabytes) / 1e9:.2f} GB in bfloat16")
        text = folder / "ids.jsonl"
        ids = np.random.default_rng(1).integers(3, VOCABULARY, (chosen.tokens // 256, 256)).tolist()
        text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        prep = [sys.executable, "-m", "smoe.prep"]
        about = [
            str(folder / "model"),
            "--tokens",
            str(chosen.tokens),
            "--encoding",
            chosen.encoding,
        ]
        said = json.loads(subprocess.check_output([*prep, "inspect", *about, "--json"]))
        output = folder / "model.smoe"
        peak, seconds = run([*prep, "build", *about, "--calibration", str(text), "-o", str(output)])
        size = sum(file.stat().st_size for file in output.rglob("*"))
        print(f"{'':8} {'said before':>12} {'measured':>12}")
        for name, before, after in (
            ("memory", said["memory"] / 1e9, peak / 1e9),
            ("bundle", said["bundle"] / 1e9, size / 1e9),
            ("seconds", said["seconds"], seconds),
        ):
            print(f"{name:8} {before:12.2f} {after:12.2f}")


if __name__ == "__main__":
    main()
