"""The example model padded to a realistic size: the same function and the same routing, heavy
weights.

A checkpoint that a test can carry has experts of kilobytes, and moving those shows nothing. This
one adds channels to the hidden state and to the experts' inner activations that carry exactly zero,
so that logits and routing stay what they were while every expert becomes megabytes:

* whatever writes into an added channel gives zero: rows of o_proj and down_proj, columns of the
  embedding (which is untied from the head for it), and rows of up_proj, since silu(gate) * 0 is 0;
* whatever only multiplies such a zero is noise of the scale of its tensor, so that neither storage
  nor a quantiser gets a free ride: the added columns of q, k, v, gate, up, down, router and head,
  the added rows of gate, and of up and down what lies beyond the real columns;
* norm weights times sqrt(old/new) and epsilon times old/new undo what the zeros do to the mean
  square. These weights are stored in float32, since the root need not be a bfloat16. (The per-head
  norms of q and k share that epsilon and not the zeros: epsilon being 1e-6 of their mean square or
  less, that is below float32's rounding.)

Noise and zeros never share a group of 128 columns: a code without a zero (nested planes) would
otherwise turn the zeros into something. An all-zero group has scale 0 and stays zero, there and in
Q4_0. What must be zero is printed. It cannot be avoided: a norm sees every channel, so an added one
cannot carry anything, however little its readers made of it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open

from bench.harness import EXAMPLES
from smoe.artifacts import safetensors_file
from smoe.artifacts.bfloat16 import to_bf16
from smoe.artifacts.safetensors_file import TensorSpec

EXAMPLE = EXAMPLES / "reference"
GROUP = 128  # columns that may share a scale: the widest of the nested encodings, times Q4_0's 32


@dataclass(frozen=True)
class Rule:
    """What the rows and columns of a matrix are ("hidden", "width", or "" for what keeps its size),
    and whether what its added rows give must be zero. The embedding writes with its columns: it is
    taken transposed."""

    rows: str
    columns: str
    silent: bool = False
    transposed: bool = False


RULES = {
    r"model\.embed_tokens": Rule("hidden", "", silent=True, transposed=True),
    r"lm_head": Rule("", "hidden"),
    r".*\.self_attn\.[qkv]_proj": Rule("", "hidden"),
    r".*\.self_attn\.o_proj": Rule("hidden", "", silent=True),
    r".*\.mlp\.gate": Rule("", "hidden"),
    r".*\.mlp\.experts\.\d+\.gate_proj": Rule("width", "hidden"),
    r".*\.mlp\.experts\.\d+\.up_proj": Rule("width", "hidden", silent=True),
    r".*\.mlp\.experts\.\d+\.down_proj": Rule("hidden", "width", silent=True),
}
NORM, HEAD_NORM = r"(.*_layernorm|model\.norm)", r".*\.[qk]_norm"


@dataclass
class Share:
    """Of one kind of tensor: weights stored, of which `real` came from the source and `zero` had to
    be zero."""

    weights: int = 0
    real: int = 0
    zero: int = 0
    bytes: int = 0


@dataclass
class Inflation:
    """Old and new sizes, the generator's seed, and what was stored by kind of tensor."""

    old: dict[str, int]
    new: dict[str, int]
    seed: int
    shares: dict[str, Share] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        out = [f"{'kind':14} {'MB':>9} {'real':>8} {'noise':>8} {'must be zero':>13}"]
        total = Share(
            *map(
                sum,
                zip(*(dataclasses.astuple(share) for share in self.shares.values()), strict=True),
            )
        )
        for name, share in [*self.shares.items(), ("all", total)]:
            noise = share.weights - share.real - share.zero
            parts = [f"{part / share.weights:.2%}" for part in (share.real, noise, share.zero)]
            out.append(
                f"{name:14} {share.bytes / 1e6:9.1f} {parts[0]:>8} {parts[1]:>8} {parts[2]:>13}"
            )
        return out


def inflate(
    source: Path, out: Path, hidden: int = 2048, width: int = 1536, seed: int = 0
) -> Inflation:
    """Write the checkpoint `out`: what `source` computes, with `hidden` channels and experts
    `width` wide.

    A `ValueError` says why that cannot be done.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    old = {"": 0, "hidden": config["hidden_size"], "width": config.get("moe_intermediate_size", 0)}
    plan = Inflation(old, {"": 0, "hidden": hidden, "width": width}, seed)
    _check(config, plan, out)
    out.mkdir(parents=True)
    _write_weights(source, out, plan, tied=config.get("tie_word_embeddings", False))
    larger = {"hidden_size": hidden, "moe_intermediate_size": width, "tie_word_embeddings": False,
              "head_dim": config.get("head_dim") or old["hidden"] // config["num_attention_heads"],
              "rms_norm_eps": config["rms_norm_eps"] * old["hidden"] / hidden}  # fmt: skip
    (out / "config.json").write_text(json.dumps(config | larger, indent=2), "utf-8")
    for file in (
        *source.glob("*token*"),
        *source.glob("generation_config.json"),
        *source.glob("*.jinja"),
    ):
        shutil.copy(file, out)
    return plan


def _check(config: dict, plan: Inflation, out: Path) -> None:
    if config.get("model_type") != "qwen3_moe" or config.get("mlp_only_layers"):
        raise ValueError(
            f"The model is a {config.get('model_type')}; only qwen3_moe without dense layers is "
            "known here."
        )
    for name in ("hidden", "width"):
        if plan.new[name] < plan.old[name]:
            raise ValueError(
                f"{name} {plan.new[name]} is less than the model's {plan.old[name]}; it can only "
                "grow."
            )
    if out.exists():
        raise ValueError(f"{out} exists; name another directory or remove it.")


def _write_weights(source: Path, out: Path, plan: Inflation, tied: bool) -> None:
    """One shard for each layer, and one for what lies outside; an index."""
    parts: dict[str, list[tuple[str, str, Path]]] = {}  # layer -> (new name, old name, file)
    for file in sorted(source.glob("*.safetensors")):
        for name in safetensors_file.read_header(file).entries:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            part = parts.setdefault(f"{int(layer[1]):05d}" if layer else "outside", [])
            part.append((name, name, file))
            if tied and name == "model.embed_tokens.weight":
                part.append(("lm_head.weight", name, file))
    index: dict[str, str] = {}
    for i, part in enumerate(sorted(parts)):
        shard = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        index |= dict.fromkeys((new for new, _, _ in parts[part]), shard)
        planned = [_planned(new, _shape(file, name), plan) for new, name, file in parts[part]]
        grown = (_grown(new, _load(file, name), plan) for new, name, file in parts[part])
        safetensors_file.write(out / shard, planned, grown, {"format": "pt"})
    about = {
        "metadata": {"total_size": sum(s.bytes for s in plan.shares.values())},
        "weight_map": index,
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(about), "utf-8")


def _shape(file: Path, name: str) -> tuple[int, ...]:
    return tuple(safetensors_file.read_header(file).entries[name].shape)


def _load(file: Path, name: str) -> np.ndarray:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name).float().numpy()


def _rule(name: str) -> Rule | None:
    """The rule of a matrix; None for a norm."""
    if not name.endswith(".weight") or re.fullmatch(
        rf"{NORM}|{HEAD_NORM}", name.removesuffix(".weight")
    ):
        return None
    for pattern, rule in RULES.items():
        if re.fullmatch(pattern, name.removesuffix(".weight")):
            return rule
    raise ValueError(f"The model has a tensor {name}, of which nothing is known here.")


def _planned(name: str, shape: tuple[int, ...], plan: Inflation) -> TensorSpec:
    rule = _rule(name)
    if rule is None:
        grows = bool(re.fullmatch(NORM, name.removesuffix(".weight")))
        return TensorSpec(name, "F32", (plan.new["hidden"],) if grows else shape)
    axes = (rule.columns, rule.rows) if rule.transposed else (rule.rows, rule.columns)
    return TensorSpec(
        name, "BF16", tuple(plan.new[axis] or size for axis, size in zip(axes, shape, strict=True))
    )


def _grown(name: str, w: np.ndarray, plan: Inflation) -> np.ndarray:
    """The tensor to store, and its part in the report."""
    rule, random = _rule(name), np.random.default_rng([plan.seed, zlib.crc32(name.encode())])
    share = plan.shares.setdefault(re.sub(r".*\d\.|model\.|\.weight", "", name), Share())
    zero = 0
    if rule is None:
        stored = _norm(w, plan, random) if re.fullmatch(NORM, name.removesuffix(".weight")) else w
    else:
        large, zero = _matrix(w.T if rule.transposed else w, rule, plan, random)
        stored = to_bf16(large.T if rule.transposed else large)
    share.weights += stored.size
    share.real += w.size
    share.zero += zero
    share.bytes += stored.nbytes
    return stored


def _norm(w: np.ndarray, plan: Inflation, random: np.random.Generator) -> np.ndarray:
    added = w.mean() + w.std() * random.standard_normal(plan.new["hidden"] - len(w), np.float32)
    return np.concatenate([w, added]) * np.float32((len(w) / plan.new["hidden"]) ** 0.5)


def _matrix(
    w: np.ndarray, rule: Rule, plan: Inflation, random: np.random.Generator
) -> tuple[np.ndarray, int]:
    """`w` with rows and columns added, and how many weights had to be zero."""
    rows, columns = w.shape
    shape = plan.new[rule.rows] or rows, plan.new[rule.columns] or columns
    large = random.standard_normal(shape, np.float32) * w.std()
    large[:rows, :columns] = w
    if not rule.silent:
        return large, 0
    mixed = min(shape[1], -(-columns // GROUP) * GROUP)  # columns of the groups that have real ones
    large[rows:, :mixed] = 0
    return large, (shape[0] - rows) * mixed
