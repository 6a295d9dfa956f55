"""Models that benches run: the example, the example padded to real sizes, and random ones of any
shape.

Building takes minutes and is never timed, so whatever is there already is used as it is.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.harness import EXAMPLES, Rows, Run, Table, bench, note, option
from bench.page_cache import size
from smoe.artifacts import open_bundle, safetensors_file, validate
from smoe.artifacts.manifest import File
from smoe.artifacts.safetensors_file import TensorSpec
from smoe.artifacts.tables import save_tables

EXAMPLE, CALIBRATION = EXAMPLES / "reference", EXAMPLES / "calibration.jsonl"
PADDED = ("--encoding", "nested:2+1+1:128", "--quantiser", "nearest", "--backbone", "int8")
FIRST_ID = 3  # of a random text: what lies before are special tokens
HEAD_SIZE = 64
NORM = 0x3F80  # 1 in bfloat16

# -- the example, and the example padded -----------------------------------------------


@bench(option("--directory", type=Path, required=True, help="where models are, or are made"))
def models(run: Run) -> Rows:
    """Build the bundles that other benches take: the example, and the padded one."""
    paths = {"example.smoe": example(run.directory), "padded.smoe": padded(run.directory)}
    lines = [[name, size(path) / 1e6] for name, path in paths.items()]
    yield Table("models", {"bundle": "{}", "MB": "{:.1f}"}, lines)


def example(directory: Path) -> Path:
    """The example model in nested planes, calibrated, with prices."""
    bundle = directory / "example.smoe"
    return build(EXAMPLE, bundle, CALIBRATION, "--encoding", "nested:2+1+1")


def padded(directory: Path) -> Path:
    """The example model with hidden 2048 and experts of 4.9 MB in 4 bits, and what calibration says
    of the example.

    `inflate` keeps the function, so that statistics, prices and predictors of the example hold for
    it too; 65,536 tokens through the padded model would take hours and say the same. See `graft`.
    """
    bundle = directory / "padded.smoe"
    if bundle.exists():
        return bundle
    plain = build(
        padded_checkpoint(directory), directory / "padded-plain.smoe", CALIBRATION,
        "--tokens", "256", "--prices", "0", *PADDED,
    )  # fmt: skip
    small = build(EXAMPLE, directory / "example-128.smoe", CALIBRATION, *PADDED[:4])
    graft(plain, small)
    return plain.rename(bundle)


def padded_checkpoint(directory: Path) -> Path:
    from bench.inflate import inflate

    checkpoint = directory / "padded"
    if not checkpoint.exists():
        note(f"padding the example model into {checkpoint}", *inflate(EXAMPLE, checkpoint).lines())
    return checkpoint


def graft(bundle: Path, small: Path) -> None:
    """Give the padded `bundle` the tables and the trace of `small`, the example model in the same
    encoding.

    Both compute the same function with the same codes: an added channel carries zero wherever
    something reads it. So routing, outputs and gradients are those of the example, and a linear
    predictor is the example's with rows of zero for the added channels. Not the same are the
    backbones' bits: the example's statistics are of float32.
    """
    manifest, source = open_bundle(bundle).manifest, open_bundle(small)
    layers = source.tables.layers()
    for tables, layer in zip(layers, manifest.layers, strict=True):
        for name in ("predict_1", "predict_2", "predict_3"):
            if name in tables:
                added = layer.hidden - len(tables[name])
                tables[name] = np.pad(tables[name], ((0, added), (0, 0)))
    header = safetensors_file.read_header(small / "tables.safetensors")
    save_tables(bundle / "tables.safetensors", layers, header.metadata)
    if trace := source.study("trace.safetensors"):
        shutil.copyfile(trace, bundle / manifest.study / trace.name)
    changed = dataclasses.replace(manifest, files=manifest.files | _listed(bundle))
    (bundle / "manifest.json").write_text(changed.to_json(), "utf-8")
    open_bundle(bundle)


def _listed(bundle: Path) -> dict[str, File]:
    """Tables and traces as they are now, for the manifest."""
    paths = [*bundle.rglob("tables.safetensors"), *bundle.rglob("trace.safetensors")]
    return {
        str(path.relative_to(bundle)): File(size=path.stat().st_size, sha256=validate.sha256(path))
        for path in paths
    }


def build(model: Path, bundle: Path, text: Path, *options: str) -> Path:
    """`smoe-prep build`, where the bundle is not there yet."""
    if not bundle.exists():
        command = [sys.executable, "-m", "smoe.prep", "build", str(model), "-o", str(bundle)]
        command += ["--calibration", str(text), *options]
        note("building: " + " ".join(command[3:]))
        bundle.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, stdout=sys.stderr)
    return bundle


# -- random models ---------------------------------------------------------------------


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


def random_bundle(bundle: Path, shape: Shape, tokens: int, *options: str) -> Path:
    """A bundle of a random model; the checkpoint is not kept."""
    if bundle.exists():
        return bundle
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as scratch:
        model = random_checkpoint(Path(scratch) / "model", shape)
        text = random_text(Path(scratch) / "ids.jsonl", tokens, shape.vocabulary)
        return build(model, bundle, text, "--tokens", str(tokens), *options)
