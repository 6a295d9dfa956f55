"""Checkpoints in few bits beside the same weights in float32: written by the published layouts, and
decoded here in NumPy, so that nothing of transformers' reading takes part.

Every scheme is random codes and scales, not a model that was quantised: all codes occur.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4 = np.concatenate([FP4, -FP4])
Tensors = dict[str, torch.Tensor]


def mxfp4(checkpoint: Path, directory: Path) -> tuple[Path, Path]:
    """A gpt_oss checkpoint with its experts as OCP MX: 32 values of FP4, low nibble first, share a
    power of two; stored `[E, n_out, n_in / 32, 16]`, the transpose of the model's."""
    random = np.random.default_rng(1)

    def replaced(name: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        experts, n_in, n_out = w.shape
        nibbles = random.integers(0, 16, (experts, n_out, n_in // 32, 32), dtype=np.uint8)
        exponents = random.integers(120, 125, nibbles.shape[:-1], dtype=np.uint8)
        scale = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)[..., None]
        exact = (FP4[nibbles] * scale).reshape(experts, n_out, n_in).swapaxes(1, 2)
        stored = {
            f"{name}_blocks": torch.from_numpy(nibbles[..., 0::2] | nibbles[..., 1::2] << 4),
            f"{name}_scales": torch.from_numpy(exponents),
        }
        return stored, torch.from_numpy(exact.copy())

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    matrices = ("experts.gate_up_proj", "experts.down_proj")
    return _pair(checkpoint, directory, config, lambda name: name.endswith(matrices), replaced)


def block_fp8(
    checkpoint: Path, directory: Path, block: int = 16, power_of_two: bool = False
) -> tuple[Path, Path]:
    """DeepSeek-V3's: float8 e4m3 with a float32 factor for every `block` x `block` weights, the
    last block of a row or a column as short as it comes; with `power_of_two` the factors are ue8m0
    bytes."""
    random = np.random.default_rng(2)

    def replaced(name: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        grid = [-(-size // block) for size in w.shape]
        codes = (w / w.abs().max() * 300).to(torch.float8_e4m3fn)
        exponents = torch.from_numpy(random.integers(112, 118, grid, dtype=np.uint8))
        factors = torch.from_numpy(random.uniform(0.5, 1, grid).astype(np.float32) / 300)
        if power_of_two:
            factors = torch.exp2(exponents.float() - 127)
        wide = factors.repeat_interleave(block, 0).repeat_interleave(block, 1)
        exact = codes.float() * wide[: w.shape[0], : w.shape[1]]
        stored = exponents.view(torch.float8_e8m0fnu) if power_of_two else factors
        return {name: codes, f"{name}_scale_inv": stored}, exact

    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block],
              "activation_scheme": "dynamic"}  # fmt: skip
    if power_of_two:
        config["scale_fmt"] = "ue8m0"
    return _pair(checkpoint, directory, config, _linear, replaced)


def packed_int4(
    checkpoint: Path, directory: Path, group: int = 32, dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, Path]:
    """compressed-tensors' `pack-quantized`, packed by that library: symmetric int4 with a factor
    of `dtype` for each row and `group` columns, experts only, as Kimi-K2 has it. Products are
    rounded to `dtype`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, group_size=group, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    random = np.random.default_rng(3)

    def replaced(name: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = w.shape
        q = torch.from_numpy(random.integers(-8, 8, (rows, columns)).astype(np.float32))
        factors = torch.from_numpy(random.uniform(0.01, 0.03, (rows, columns // group))).to(dtype)
        exact = q.to(dtype) * factors.repeat_interleave(group, 1)
        module = {"weight": exact, "weight_scale": factors}
        packed = compressor.compress(module, scheme)
        stem = name.removesuffix("weight")
        return {f"{stem}{key}": value.contiguous() for key, value in packed.items()}, exact

    dense = r"re:.*(self_attn|lm_head|mlp\.gate$|embed).*"
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized",
              "quantization_status": "compressed", "ignore": [dense],
              "config_groups": {"group_0": scheme.model_dump(mode="json")}}  # fmt: skip
    return _pair(checkpoint, directory, config, lambda name: ".experts." in name, replaced)


def _linear(name: str) -> bool:
    """What DeepSeek-V3 keeps in float8: every matrix but embeddings, head and routers."""
    kept = ("embed", "lm_head", "mlp.gate.", "norm")
    return name.endswith("proj.weight") or (
        name.endswith("_proj_with_mqa.weight") and not any(part in name for part in kept)
    )


def _pair(
    checkpoint: Path,
    directory: Path,
    quantisation: dict,
    chosen: Callable[[str], bool],
    replaced: Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]],
) -> tuple[Path, Path]:
    """The checkpoint in few bits and the same in float32, in `directory`."""
    paths = directory / "few", directory / "exact"
    stored: Tensors = {}
    exact: Tensors = {}
    for name, w in load_file(checkpoint / "model.safetensors").items():
        if chosen(name):
            few, value = replaced(name, w)
            stored |= few
            exact[name] = value.float().contiguous()
        else:
            stored[name] = exact[name] = w
    assert len(stored) > len(exact), "nothing was replaced"
    for path, tensors in zip(paths, (stored, exact), strict=True):
        shutil.copytree(checkpoint, path)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((paths[0] / "config.json").read_text())
    (paths[0] / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantisation})
    )
    return paths
