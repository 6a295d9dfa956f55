"""A Hugging Face checkpoint on disk: opened, or refused with the reason.

The backbone is loaded in float32. Experts stay on disk: `Checkpoint.experts` reads one layer's, in
the dtype they are stored in, and lets them go.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from smoe.artifacts.errors import first_line
from smoe.prep.checkpoint.coded import (
    Coded,
    CodedExperts,
    all_finite,
    coded_apart,
    read_coded,
)
from smoe.prep.checkpoint.families import empty_model, refuse_without_seam
from smoe.prep.checkpoint.few_bits import (
    decoded_dtype,
    is_code,
    kept_encoding,
    method_of,
    quantiser_of,
)
from smoe.prep.checkpoint.hub import Remote
from smoe.prep.checkpoint.seam import ExpertsLayer, ExpertsModule, experts_modules, layers_used
from smoe.prep.checkpoint.tokenizer import end_ids, read_text_side
from smoe.prep.checkpoint.weights import Weights, open_weights
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress

PIECE = 256 << 10  # bytes read at a time

LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of malloc.h


# Per parameter of a layer's experts: the stored tensors that it is made from, with the patterns of
# `Weights.targets`.
Sources = dict[str, dict[str, str | None]]


@dataclass(frozen=True)
class Checkpoint:
    """`model` has its backbone in memory and its experts on the meta device; `layers` are those
    that text reaches, in the order in which they run."""

    path: Path
    model: transformers.PreTrainedModel
    weights: Weights
    layers: list[ExpertsLayer]
    end_ids: tuple[int, ...]  # token ids that end a generation
    sources: list[Sources]
    text_files: dict[str, bytes]  # what a bundle holds of tokenizer, templates and generation

    @property
    def config(self):
        return self.model.config.get_text_config()

    @property
    def expert_dtypes(self) -> list[torch.dtype]:
        """Those that the experts are stored in."""
        names = {name for layer in self.sources for tensors in layer.values() for name in tensors}
        return sorted({self.weights.stored[name].dtype for name in names}, key=str)

    @property
    def stored_in(self) -> str:
        """The scheme of few bits that the experts are stored in, or their dtypes; for people."""
        dtypes, quantiser = self.expert_dtypes, self.weights.quantiser
        if quantiser is not None and any(is_code(dtype) for dtype in dtypes):
            return method_of(quantiser)
        return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    @property
    def kept_encoding(self) -> str:
        """The encoding that keeps the experts as they are stored; where there is none, as for
        float32 and float8, bf16."""
        half = self.expert_dtypes == [torch.float16]
        all_coded = all(
            self.weights.coded(names)
            for layer in self.sources
            for parameter, names in layer.items()
            if self.model.get_parameter(parameter).ndim > 2  # a matrix for each expert
        )
        codes = kept_encoding(self.weights.quantiser) if all_coded else None
        return codes or ("f16" if half else "bf16")

    def fingerprint(self) -> str:
        """SHA-256 that tells one checkpoint from another: of the config, and of each weight file's
        name, size and bytes. Of a file above 256 MiB, 1024 pieces spread evenly, so that 60 GB take
        a second."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self.weights.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            pieces = 1024 if size > 256 << 20 else -(-size // PIECE)
            with open(file, "rb") as opened:
                for i in range(pieces):
                    opened.seek(i * size // pieces if size > 256 << 20 else i * PIECE)
                    digest.update(opened.read(PIECE))
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """What every result depends on: the checkpoint's fingerprint, its tokenizer and generation
        config, and the versions of what reads and writes."""
        digest = hashlib.sha256(b"".join(content for _, content in sorted(self.text_files.items())))
        text = digest.hexdigest()[:12]
        model = self.fingerprint()[:12]
        return {"model": model, "tokenizer and generation config": text} | versions()

    def move_backbone(self, device: str) -> None:
        """Move all that is in memory to `device`, as torch names it; experts go there when read."""
        for tensor in itertools.chain(self.model.parameters(), self.model.buffers()):
            if not tensor.is_meta and tensor.device != torch.device(device):
                tensor.data = tensor.data.to(device)

    @property
    def backbone_bytes(self) -> int:
        """Of all that is in memory."""
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)

    def forget_backbone(self) -> None:
        """Let all that is in memory go; what is known of the checkpoint stays."""
        gc.collect()  # passes of a sweep refer to themselves, and to weights
        torch.nn.Module.to(self.model, "meta")
        _trim()

    @contextlib.contextmanager
    def experts(
        self, layer: int, device: str = "cpu", apart: bool = False
    ) -> Iterator[ExpertsModule]:
        """The module of one layer's experts with its weights read to `device`, for the length of
        the block. `apart`: an expert's matrices are read when they are asked for, where that can
        be, which is for who wants each once.

        Weights that are not finite are a `PrepError` that names them.
        """
        name, module = self.layers[layer]
        coded = {}
        try:
            # One parameter at a time, the largest first: what is read and what is made from it
            # may exist at once.
            for parameter, names in sorted(
                self.sources[layer].items(), key=lambda item: self.weights.nbytes(item[1])
            )[::-1]:
                experts = self._coded(parameter, names, device, apart)
                if experts is not None:
                    coded[parameter.removeprefix(f"{name}.")] = experts
                elif not self._filled(parameter, names):
                    self.weights.load(self.model, names)
            _refuse_infinite(self.path, name, module)
            if device != "cpu":
                _move(module, device)
            yield cast(ExpertsModule, CodedExperts(module, coded)) if coded else module
        finally:
            _forget(module)

    def _filled(self, parameter: str, names: dict[str, str | None]) -> bool:
        """Whether a parameter could be read one expert at a time, and was: all that is read and all
        that is made from it need not exist at once then."""
        weight = self.model.get_parameter(parameter)
        found = None
        if weight.ndim > 2:
            found = coded_apart(self.weights, self.model, parameter, names, "cpu")
        if found is not None:
            whole = torch.empty(weight.shape, dtype=weight.dtype)
            for expert in range(len(whole)):
                whole[expert] = found[expert]
            _replace(self.model, parameter, whole)
        return found is not None

    def _coded(
        self, parameter: str, names: dict[str, str | None], device: str, apart: bool
    ) -> Coded | None:
        """A parameter that stays as it is stored; None where it does not."""
        where = (self.weights, self.model, parameter, names, device)
        matrices = self.model.get_parameter(parameter).ndim > 2
        found = coded_apart(*where) if apart and matrices else None
        return read_coded(*where) if found is None and self.weights.coded(names) else found


def versions() -> dict[str, str]:
    """The versions of the packages that read and write."""
    packages = ("smoe", "torch", "transformers", "onnxruntime")
    return {name: importlib.metadata.version(name) for name in packages}


def open_checkpoint(path: str | Path, progress: Progress | None = None) -> Checkpoint:
    """Open the checkpoint at `path`, a directory or the name ORG/NAME[@REVISION] of a repository; a
    `PrepError` says why it cannot be prepared.

    Everything that can be known from config and headers is checked before a weight is fetched or
    read.
    """
    remote = Remote.of(path)
    path = Path(path) if remote is None else _fetched(remote, progress or Progress(quiet=True))
    config = read_config(path)
    quantiser = quantiser_of(config, path)
    model = empty_model(config, path)
    refuse_without_seam(model, path)
    weights = open_weights(path, quantiser)
    text_files, end_of_text = read_text_side(path)
    ends = end_ids(path, config, end_of_text)
    _load_backbone(path, model, weights)
    model.requires_grad_(False)  # only values are ever differentiated
    layers = layers_used(model)
    sources = _sources(weights, model, layers)
    for (name, module), layer_sources in zip(layers, sources, strict=True):
        for parameter, tensors in layer_sources.items():
            # Half the memory of float32, where that is what is stored.
            dtype = decoded_dtype(weights.stored[source].dtype for source in tensors)
            empty = torch.empty_like(model.get_parameter(parameter), dtype=dtype)
            _replace(module, parameter.removeprefix(f"{name}."), empty)
    return Checkpoint(path, model, weights, layers, ends, sources, text_files)


def _fetched(remote: Remote, progress: Progress) -> Path:
    """The directory of a checkpoint that is fetched if its config and headers say that it can be
    used."""
    config = read_config(remote.path)
    quantiser = quantiser_of(config, remote.path)
    model = empty_model(config, remote.path)
    refuse_without_seam(model, remote.path)
    remote.headers(quantiser).check(model)
    return remote.fetch(progress)


def read_config(path: Path) -> transformers.PreTrainedConfig:
    """config.json of a checkpoint; a `PrepError` if it is none."""
    alone = path.is_dir() and any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    if path.suffix == ".gguf" or alone:
        raise PrepError(
            f"{path} is GGUF, which smoe does not read; give the directory of the checkpoint that "
            "it was made from, with config.json and .safetensors files."
        )
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is not a directory"
        raise PrepError(
            f"{path} {what}; give the directory of a Hugging Face checkpoint, as `save_pretrained` "
            "leaves it, or the name ORG/NAME of a model to fetch."
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (
        ValueError,
        KeyError,
        OSError,
        TypeError,
        ArithmeticError,
        AttributeError,
        RecursionError,
        StrictDataclassError,
    ) as error:
        if "custom code" in str(error):
            raise PrepError(
                f"{path} is a model of Python code of its own (auto_map in config.json), and smoe "
                "runs no code out of a checkpoint; it prepares the families that transformers "
                f"{transformers.__version__} has, of which this model_type is none."
            ) from error
        raise PrepError(
            f"{path}/config.json is not one that transformers {transformers.__version__} reads: "
            f"{first_line(error)}"
        ) from error
    return config


def _load_backbone(path: Path, model: transformers.PreTrainedModel, weights: Weights) -> None:
    """Fill `model`, but not its experts: whatever is missing or not finite is a `PrepError`."""
    experts = tuple(f"{name}." for name, _ in experts_modules(model))
    info = weights.check(model)
    tied = model.all_tied_weights_keys.keys()
    _refuse_missing(
        path, {name for name in info.missing_keys if name.startswith(experts) and name not in tied}
    )
    if any(name.startswith(experts) for name in tied):
        raise PrepError(
            f"{path}: {min(tied)} is shared with another module; smoe cannot take such experts "
            "apart."
        )
    weights.load(
        model,
        [
            source
            for source, target in weights.targets(model).items()
            if not target.name.startswith(experts)
        ],
    )
    weights.complete(model, info)  # ties weights, and fills buffers that no checkpoint holds
    _refuse_missing(path, info.missing_keys)
    for name, weight in model.named_parameters():
        if not weight.is_meta and not all_finite(weight):
            raise PrepError(
                f"{path}: {name} holds values that are not finite; the checkpoint is damaged."
            )


def _refuse_missing(path: Path, names: set[str]) -> None:
    if names:
        raise PrepError(
            f"{path}: {len(names)} weights are missing, {min(names)} first; download the "
            "checkpoint again."
        )


def _sources(
    weights: Weights, model: transformers.PreTrainedModel, layers: list[ExpertsLayer]
) -> list[Sources]:
    """Of every layer in `layers`."""
    places = {name: place for place, (name, _) in enumerate(layers)}
    sources: list[Sources] = [{} for _ in layers]
    for source, target in weights.targets(model).items():
        parent = target.name
        while parent and parent not in places:
            parent = parent.rpartition(".")[0]
        if parent:
            sources[places[parent]].setdefault(target.name, {})[source] = target.pattern
    return sources


def _replace(module: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    """A parameter by another tensor."""
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, torch.nn.Parameter(weight, requires_grad=False))


def _refuse_infinite(path: Path, layer: str, module: torch.nn.Module) -> None:
    for name, weight in module.named_parameters():
        if weight.is_meta:  # stays in its codes, and is checked when it is decoded
            continue
        for expert, part in enumerate(weight):
            if not all_finite(part):
                raise PrepError(
                    f"{path}: {layer}.{name} of expert {expert} holds values that are not finite; "
                    "the checkpoint is "
                    "damaged. Download it again."
                )


def _move(module: torch.nn.Module, device: str) -> None:
    """What was read to `device`; codes are decoded there, one expert at a time."""
    for name, weight in list(module.named_parameters()):
        if not weight.is_meta:
            _replace(module, name, weight.to(device))


def _forget(module: torch.nn.Module) -> None:
    """Back to the meta device, which frees the memory; and glibc is told to give it back: pieces of
    a layer that it keeps for later were 0.4 GB of 1.5 (docs/log.md, 2026-11-22)."""
    for name, weight in list(module.named_parameters()):
        _replace(module, name, torch.empty_like(weight, device="meta"))
    _trim()


def _trim() -> None:
    trim = getattr(LIBC, "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def one_small_heap() -> None:
    """Tell glibc that blocks of 1 MiB and more go back as soon as they are freed, and that threads
    share a heap: pieces that every pass of a sweep keeps for itself were 0.26 GB of 1.19
    (docs/log.md, 2026-11-26)."""
    mallopt = getattr(LIBC, "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
        mallopt(M_ARENA_MAX, 1)
