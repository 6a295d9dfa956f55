"""Whether a pico model says in long contexts what transformers says: across the borders of windows,
and where positions are stretched.

A case is a family, or a family and a way to stretch positions ("gpt_oss, yarn"). smoe itself knows
no family.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smoe.artifacts import open_bundle
from smoe.runtime import EngineError

from . import pico
from .agreement import open_exact

LENGTHS = (600, 2000, 5000)
LONGEST = 8192
TAIL = 12  # tokens that are decoded one by one, after a prompt
CLOSE = 1e-4  # of the largest logit
# Recurrent layers add up in another order than transformers' chunks, and gather the difference.
GATHERED = 1e-3

ROPES = ("yarn", "llama3", "linear", "longrope", "dynamic")
STRETCHED = (
    *(f"qwen3_moe, {rope}" for rope in ROPES), "phimoe, longrope", "gpt_oss, yarn",
    "gpt_oss, dynamic", "deepseek_v2, yarn", "deepseek_v3, yarn", "glm4_moe_lite, yarn",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """At one length: the largest difference of any logit from transformers', of the prompt at once
    (`prompt`), of tokens decoded after it (`decoded`), and of the last logits of the prompt read in
    two parts from those at once (`parts`); over the largest logit, `scale`."""

    length: int
    prompt: float
    decoded: float
    parts: float
    scale: float

    @property
    def error(self) -> float:
        return max(self.prompt, self.decoded)


@dataclass(frozen=True)
class Compared:
    """One case: the `context` of its bundle, what ran it, and what was found at each length up to
    that. `beyond` is what is said of a longer one, "" where the bundle took all of them."""

    case: str
    context: int
    ran: str
    recurrent: bool
    found: list[Found]
    beyond: str

    @property
    def good(self) -> bool:
        """Whether all of it is close, and of a program alone the parts the same to the bit."""
        limit = GATHERED if self.recurrent else CLOSE
        close = all(max(f.error, f.parts) < limit for f in self.found)
        same = "ONNX Runtime" in self.ran or all(f.parts == 0 for f in self.found)
        return bool(self.found) and close and same

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"good": self.good}


def cases() -> list[str]:
    """Every family, and some with stretched positions."""
    return [*pico.model_files(), *STRETCHED]


def make(case: str, window: int, original: int):
    """The model of a case, with layers that look back `window` tokens where the family has such,
    and made for `original` tokens where its positions are stretched."""
    family, _, rope = case.partition(", ")
    name = pico.config_name(family)
    base = pico.BASE | {"sliding_window": window, "max_position_embeddings": LONGEST}
    return pico.make_model(name, base=base, **_stretched(family, rope, original))


def _stretched(family: str, rope: str, original: int) -> dict[str, Any]:
    if not rope:
        return {}
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 1e4, "factor": 8.0}
    if rope == "dynamic":
        return {"rope_parameters": parameters, "max_position_embeddings": original}
    if rope == "linear":
        return {"rope_parameters": parameters}
    parameters["original_max_position_embeddings"] = original
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope != "longrope":
        return {"rope_parameters": parameters}
    pairs = 8
    parameters["short_factor"] = np.linspace(1, 1.5, pairs).tolist()
    parameters["long_factor"] = np.linspace(2, 6, pairs).tolist()
    if family != "phimoe":
        return {"rope_parameters": parameters}
    parameters |= {"short_mscale": 1.1, "long_mscale": 1.3}
    return {"rope_parameters": parameters, "head_dim": 2 * pairs}


def build(model, folder: Path) -> Path:
    """The bundle of a model, in float32."""
    from smoe.prep.build import build as build_bundle
    from smoe.prep.checkpoint.text import Calibration
    from smoe.prep.options import Recipe
    from smoe.prep.progress import Progress

    model.save_pretrained(folder / "model")
    text, bundle = folder / "ids.jsonl", folder / "model.smoe"
    ids = np.random.default_rng(0).integers(3, 211, (8, 40)).tolist()
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    recipe = Recipe("f32", prices=0)
    build_bundle(folder / "model", bundle, Calibration(str(text)), recipe, progress=Progress(True))
    return bundle


@torch.no_grad()
def compare(
    case: str, folder: Path, lengths: tuple[int, ...] = LENGTHS, window: int = 700,
    original: int = 1000,
) -> Compared:  # fmt: skip
    """Make the model of a case in `folder`, build it, and compare."""
    model = make(case, window, original)
    bundle = build(model, folder)
    manifest = open_bundle(bundle).manifest
    context, vocabulary = manifest.model.context, model.config.get_text_config().vocab_size
    ids = np.random.default_rng(2).integers(3, vocabulary, max(lengths))
    within = dict.fromkeys(min(length, context) for length in lengths)
    with open_exact(bundle, context=max(within)) as engine:
        found = [_found(model, engine, ids[:length]) for length in within]
        lines = [line for line in engine.mode_lines() if line.startswith("backbone: ")]
        beyond = ""
        if max(within) < max(lengths):
            try:
                engine.logits(ids[: max(within) + 1])
            except EngineError as error:
                beyond = str(error)
    fixed = any(state.growing < 0 for state in manifest.backbone.state)
    recurrent = fixed and manifest.backbone.one_at_a_time
    return Compared(case, context, "; ".join(lines), recurrent, found, beyond)


def _found(model, engine, ids: np.ndarray) -> Found:
    wanted = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    scale = float(np.abs(wanted).max())
    prompt = engine.logits(ids)
    stream = engine.score(ids, prompt=len(ids) - TAIL)
    decoded = np.stack(list(stream))
    last = _in_parts(engine, ids)
    return Found(
        length=len(ids),
        prompt=_largest(prompt - wanted) / scale,
        decoded=_largest(decoded - wanted[-TAIL - 1 :]) / scale,
        parts=_largest(last - prompt[-1]) / scale,
        scale=scale,
    )


def _in_parts(engine, ids: np.ndarray) -> np.ndarray:
    """Logits at the last token of a prompt that is read in two parts."""
    sequence, cut = engine.new_sequence(), len(ids) // 2 + 1
    engine.prefill(sequence, ids[:cut]).finish()
    return engine.prefill(sequence, ids[cut:]).finish()[-1]


def _largest(difference: np.ndarray) -> float:
    """NaN where there is one."""
    return float(np.abs(difference).max())
