"""Checkpoints whose weights are stored in few bits: which schemes can be read, and what decodes
them.

What a code stands for is `transformers`' business: its own load operations run. Two are completed
here: block fp8 with short blocks, and mxfp4, which would take most of a build's time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, Mxfp4Dequantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

from smoe.artifacts.errors import first_line
from smoe.prep.errors import PrepError
from smoe.prep.pack.compiled import native
from smoe.runtime.machine import processors

# Schemes whose load operations give the weights back on any processor.
READ = ("mxfp4", "fp8", "mxfp8", "compressed-tensors")
# Of compressed-tensors, which is many: packed integers, and float8.
FORMATS = ("pack-quantized", "float-quantized", "naive-quantized", "dense")
DECODED_TO = (torch.float32, torch.bfloat16)  # in native code
SHUFFLED = ("group", "dynamic", True)  # of actorder; "weight" leaves columns where they are
WAY_OUT = (
    "smoe reads mxfp4, block fp8 and compressed-tensors int4 and fp8; give the original "
    "checkpoint, in bf16 or f16"
)


def quantiser_of(config: transformers.PreTrainedConfig, path: Path) -> HfQuantizer | None:
    """What decodes the weights of a checkpoint with this config, None where they are plain numbers.

    A scheme that cannot be read is a `PrepError` that names it and the way out.
    """
    parts = (config, config.get_text_config())
    stored = next((q for p in parts if (q := getattr(p, "quantization_config", None))), None)
    if stored is None:
        return None
    fields: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(fields.get("quant_method", "")).rpartition(".")[2].lower() or "an unnamed scheme"
    if method not in READ:
        raise PrepError(f"{path} is stored in {method}; {WAY_OUT}.")
    _refuse_formats(path, fields)
    try:
        parsed = AutoQuantizationConfig.from_dict(dict(fields))
        parsed.dequantize = True
        quantiser = _QUANTISERS.get(method, AUTO_QUANTIZER_MAPPING[method])(parsed)
        if method == "compressed-tensors":
            quantiser.validate_environment()
    except ImportError as error:
        raise PrepError(f"{path} is stored in {method}: {first_line(error)}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PrepError(
            f"{path}/config.json: quantization_config is not one of {method} that transformers "
            f"{transformers.__version__} reads: {_reason(error)}"
        ) from error
    return quantiser


def _reason(error: Exception) -> str:
    """What an exception says, in one line; of pydantic's, which begin with a count, the first."""
    found = error.errors() if hasattr(error, "errors") else ()
    return str(found[0]["msg"]) if found else first_line(error)


def _refuse_formats(path: Path, fields: Mapping[str, Any]) -> None:
    """A `PrepError` for what compressed-tensors stores and `transformers` does not decode."""
    groups = fields.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        known = group if isinstance(group, dict) else {}
        kept = known.get("format") or fields.get("format")
        weights = known.get("weights") or {}
        if kept not in FORMATS:
            raise PrepError(f"{path} is stored in compressed-tensors' {kept}; {WAY_OUT}.")
        if not isinstance(weights, dict):
            continue
        if weights.get("symmetric") is False:
            raise PrepError(
                f"{path} is stored in compressed-tensors' {kept} with zero points; {WAY_OUT}."
            )
        if weights.get("actorder") in SHUFFLED:
            raise PrepError(
                f"{path} is stored in compressed-tensors' {kept} with groups of columns that are "
                f"no neighbours (actorder); {WAY_OUT}."
            )


class _ShortBlocks(Fp8Dequantize):
    """Block fp8 whose last blocks of a row or a column are short, as DeepSeek-V3's kv_a_proj has
    them (576 rows, blocks of 128): `transformers` takes whole blocks only, and where the sizes
    happen to divide it takes blocks of another size."""

    def _dequantize_one(self, quantized, scales, output_dtype=None):
        block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        rows, columns = quantized.shape[-2:]
        grid = tuple(scales.shape[-2:])
        if not block or grid != (-(-rows // block[0]), -(-columns // block[1])):
            return super()._dequantize_one(quantized, scales, output_dtype)
        known = quantized.dtype == torch.float8_e4m3fn and output_dtype in DECODED_TO
        if native is not None and quantized.device.type == "cpu" and known:
            return block_fp8_decoded(quantized, scales, block, output_dtype)
        padding = (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows)
        whole = torch.nn.functional.pad(quantized.view(torch.uint8), padding)
        decoded = super()._dequantize_one(whole.view(quantized.dtype), scales, output_dtype)
        return decoded[..., :rows, :columns]


def block_fp8_decoded(
    quantized: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    threads: int | None = None,
) -> torch.Tensor:
    """Float8 e4m3 `[.., rows, columns]` times a factor for every `block` of rows and columns, or
    the power of two that a byte stands for: what `transformers` makes of them in `dtype`, one of
    `DECODED_TO`. In native code, on `threads` (None: as many as this process may use)."""
    powers = scales.dtype == torch.uint8
    factors = (scales.float() - 127).exp2() if powers else scales.float()
    rows, columns = quantized.shape[-2:]
    codes = quantized.contiguous().view(torch.uint8).reshape(-1, rows, columns)
    factors = factors.reshape(-1, *factors.shape[-2:]).expand(len(codes), -1, -1).contiguous()
    out = torch.empty(codes.shape, dtype=dtype)
    filled = out.view(torch.uint16) if dtype == torch.bfloat16 else out
    arrays = (codes.numpy(), factors.numpy())
    native.dequantise_fp8(*arrays, *block, filled.numpy(), threads or processors().count)
    return out.reshape(quantized.shape)


def mxfp4_decoded(
    blocks: torch.Tensor, scales: torch.Tensor, threads: int | None = None
) -> torch.Tensor:
    """Blocks uint8 `[.., 16]` of two codes of FP4 each, times powers of two, uint8 `[..]`: bfloat16
    `[.., 32]`. In native code, on `threads` (None: as many as this process may use)."""
    w = torch.empty(*blocks.shape[:-1], 32, dtype=torch.bfloat16)
    stored = (blocks.reshape(-1, 16).numpy(), scales.reshape(-1).numpy())
    filled = w.view(torch.uint16).reshape(-1, 32).numpy()
    native.dequantise_mxfp4(*stored, filled, threads or processors().count)
    return w


class _BlockFp8(FineGrainedFP8HfQuantizer):
    def get_load_operations(self):
        return {"dequantize": _ShortBlocks}


class _TwoCodesAtOnce(Mxfp4Dequantize):
    """What `transformers`' operation gives, from a table of bytes: in a sixth of the time and a
    third of the memory (docs/log.md, 2026-11-26)."""

    def convert(  # type: ignore[override]  # takes what its own parent takes
        self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs
    ):
        parts = {
            name.rpartition("_")[2]: value[0] if isinstance(value, list) else value
            for name, value in input_dict.items()
        }
        # [E, n_out, groups, 16] and [E, n_out, groups]
        blocks, scales = parts["blocks"], parts["scales"]
        if blocks.shape[:-1] != scales.shape:  # else they would be spread over the blocks
            raise ValueError(
                f"blocks of shape {tuple(blocks.shape)} with scales of {tuple(scales.shape)}"
            )
        if native is not None and blocks.device.type == "cpu":
            w = mxfp4_decoded(blocks, scales)
            return {full_layer_name: w.flatten(2).transpose(1, 2)}
        byte = torch.arange(256, device=blocks.device)
        values = torch.tensor(FP4_VALUES, dtype=torch.bfloat16, device=blocks.device)
        pairs = torch.stack([values[byte & 15], values[byte >> 4]], -1).view(torch.int32)[:, 0]
        factors = torch.exp2(byte.float() - 127).bfloat16()
        w = pairs.index_select(0, blocks.reshape(-1).int()).view(torch.bfloat16)
        w = w.reshape(*blocks.shape[:-1], 32).mul_(factors[scales.int()][..., None])
        return {full_layer_name: w.flatten(2).transpose(1, 2)}


class _Mxfp4(Mxfp4HfQuantizer):
    def get_load_operations(self):
        return {"dequantize": _TwoCodesAtOnce}


_QUANTISERS: dict[str, type[HfQuantizer]] = {
    "fp8": _BlockFp8,
    "mxfp8": _BlockFp8,
    "mxfp4": _Mxfp4,
}


def kept_encoding(quantiser: HfQuantizer | None) -> str | None:
    """The nested encoding that holds the checkpoint's own codes of 4 bits, None where it has none,
    or groups that no encoding has."""
    if quantiser is None:
        return None
    if method_of(quantiser) == "mxfp4":
        return "nested:2+1+1:32:fp4"
    schemes = [w for w in _schemes(quantiser) if w.type == "int" and w.num_bits == 4]
    widths = {128 if w.strategy == "channel" else w.group_size for w in schemes}
    groups = {next((g for g in (128, 64, 32) if width and width % g == 0), 0) for width in widths}
    if not groups or 0 in groups:
        return None
    return f"nested:2+1+1:{min(groups)}:int4"


def _schemes(quantiser: HfQuantizer) -> list[Any]:
    """How compressed-tensors stores weights, group by group of modules."""
    parsed = getattr(quantiser.quantization_config, "quantization_config", None)
    groups = getattr(parsed, "config_groups", None) or {}
    return [scheme.weights for scheme in groups.values() if scheme.weights]


def method_of(quantiser: HfQuantizer) -> str:
    """The name of a scheme, as config.json writes it."""
    method = quantiser.quantization_config.quant_method
    return str(getattr(method, "value", method)).lower()


def packed_as_decoded(
    quantiser: HfQuantizer, experts: bool, packed: Iterable[tuple[int, ...]], weights: int
) -> bool:
    """Whether `packed` tensors of int32, of these shapes, hold so many `weights` in the bits that
    they are decoded by: `transformers` takes one scheme for all experts and one for all else,
    whatever a config's groups of modules say."""
    config = quantiser.compressor.quantization_config  # type: ignore[attr-defined]
    scheme = (get_experts_scheme if experts else get_dense_scheme)(config)
    bits = scheme.weights.num_bits
    rows = [(math.prod(shape[:-1]), shape[-1]) for shape in packed]
    most = sum(count * (words * 32 // bits) for count, words in rows)
    least = sum(count * ((words - 1) * 32 // bits) for count, words in rows)
    return least < weights <= most


def bytes_per_weight(quantiser: HfQuantizer) -> float:
    """About how many bytes of the checkpoint an expert's weight takes."""
    schemes = _schemes(quantiser)
    if schemes:
        return max(w.num_bits / 8 + 2 / max(32, w.group_size or 0) for w in schemes)
    return 0.5 + 1 / 32 if method_of(quantiser) == "mxfp4" else 1.0


def is_code(dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype holds codes, or what belongs to them, and no plain numbers."""
    return not dtype.is_floating_point or dtype.itemsize < 2


def decoded_dtype(stored: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that one parameter is decoded to, where its tensors are stored so: that of plain
    numbers; bfloat16 for codes times powers of two, which is exact; float32 for float8 times other
    factors; that of the factors for packed integers, as `transformers` has it."""
    dtypes = set(stored)
    plain = {dtype for dtype in dtypes if not is_code(dtype)}
    if torch.int32 in dtypes or plain == dtypes:
        return plain.pop() if len(plain) == 1 else torch.float32
    return torch.float32 if plain else torch.bfloat16
