"""A Hugging Face checkpoint on disk: opened, or refused with the reason.

`Checkpoint.model` is the whole model in float32 for now; everything that reads experts goes through `experts.py`, one
layer at a time, so that loading them lazily changes this file alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from smoe.prep.errors import PrepError
from smoe.prep.experts import experts_modules

# Copied into the bundle as they are, where the checkpoint has them.
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

PIECE = 256 << 10  # bytes read at a time


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    model: transformers.PreTrainedModel

    @property
    def config(self):
        return self.model.config.get_text_config()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end a generation, from generation_config.json or the config."""
        ids = self.model.generation_config.eos_token_id
        ids = self.config.eos_token_id if ids is None else ids
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)

    def text_files(self) -> list[Path]:
        return [self.path / name for name in TEXT_FILES if (self.path / name).is_file()]

    def fingerprint(self) -> str:
        """SHA-256 that tells one checkpoint from another: of the config, and of each weight file's name, size and bytes.
        Of a file above 256 MiB, 1024 pieces spread evenly, so that 60 GB take a second."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(self.path.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            pieces = 1024 if size > 256 << 20 else -(-size // PIECE)
            with open(file, "rb") as opened:
                for i in range(pieces):
                    opened.seek(i * size // pieces if size > 256 << 20 else i * PIECE)
                    digest.update(opened.read(PIECE))
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Load the checkpoint directory at `path` in float32; a `PrepError` says why it cannot be prepared."""
    path = Path(path)
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is not a directory"
        raise PrepError(
            f"{path} {what}; give the directory of a Hugging Face checkpoint, as `hf download MODEL --local-dir DIR` "
            "or `save_pretrained` leaves it."
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, RecursionError, StrictDataclassError) as error:
        raise PrepError(
            f"{path}/config.json is not one that transformers {transformers.__version__} reads: {_first_line(error)}"
        ) from error
    if not list(path.glob("*.safetensors")):
        raise PrepError(
            f"{path} has no .safetensors files; download the weights, or convert them with save_pretrained."
        )
    if not (path / "tokenizer.json").is_file() and list(path.glob("tokenizer*.model")):
        raise PrepError(
            f"{path} has a tokenizer that only Python code reads (no tokenizer.json); convert it with "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    model = _load(path, config)
    _refuse_without_seam(path, model)
    model.config.get_text_config().output_router_logits = False
    return Checkpoint(path, model)


def _load(path: Path, config) -> transformers.PreTrainedModel:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what is missing is said below, as an error
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise PrepError(f"{path} cannot be loaded by transformers: {_first_line(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
        transformers.utils.logging.enable_progress_bar()
    missing = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    if missing:
        raise PrepError(
            f"{path}: {len(missing)} weights are missing or have another shape, {missing[0]} first; "
            "download the checkpoint again."
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise PrepError(f"{path}: {name} holds values that are not finite; the checkpoint is damaged.")
    return model.eval()


def _refuse_without_seam(path: Path, model: transformers.PreTrainedModel) -> None:
    found = experts_modules(model)
    family = model.config.model_type
    if not found:
        raise PrepError(
            f"{path} is a {family} model without experts on transformers' experts interface: either it is dense, or "
            "its family does not offer the interface. smoe prepares mixture-of-experts models that do."
        )
    if any(module.has_post_expert_norm for _, module in found):
        raise PrepError(f"{path}: {family} normalises each expert's output, which this version does not run yet.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
