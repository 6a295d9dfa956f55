"""The weights of a checkpoint on disk: which tensors there are, and a few of them at a time into a
model.

`transformers`' own conversion turns what is stored (a tensor per expert or one for all, old names
or new) into what the model has. Here it runs on parts: once on the headers alone, on the meta
device, where nothing is read and everything that is missing or has another shape shows; then for
real, on the backbone's tensors or on those of one layer's experts.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo
from transformers.quantizers.base import HfQuantizer

from smoe.artifacts.errors import BundleError, first_line
from smoe.artifacts.safetensors_file import read_raw_header
from smoe.prep.checkpoint.few_bits import is_code, packed_as_decoded
from smoe.prep.errors import PrepError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype as written and shape, by name


@dataclass(frozen=True)
class Stored:
    """One tensor on disk."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes


class Target(NamedTuple):
    """What a stored tensor is for: the model's (first) parameter that is made from it, and the
    pattern of the conversion that takes it, None where it is the parameter itself."""

    name: str
    pattern: str | None


@dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint by name, known from the headers; `quantiser` decodes those that
    are stored in few bits."""

    path: Path
    stored: dict[str, Stored]
    quantiser: HfQuantizer | None = None

    @property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.stored.values()})

    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self.stored[name].nbytes for name in names)

    def check(self, model: transformers.PreTrainedModel) -> LoadStateDictInfo:
        """Convert the headers into `model`, which must be on the meta device and stays there.

        What is of another shape or cannot be converted is a `PrepError`. What is missing is in the
        result: only when the model is completed is it known whether it matters (tied weights do
        not).
        """
        empty = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in self.stored.items()
        }
        try:
            info, _ = self._convert(model, empty, "meta")
        except AttributeError as error:  # what a scheme leaves as it is has no place in the model
            raise PrepError(
                f"{self.path}: its weights are stored in another way than quantization_config in "
                f"config.json says ({first_line(error)}); give the original checkpoint, in bf16 or "
                "f16."
            ) from error
        wrong = sorted(str(entry[0]) for entry in info.mismatched_keys) + sorted(
            info.conversion_errors
        )
        if wrong and self.quantiser is not None and info.conversion_errors:
            name, said = next(iter(info.conversion_errors.items()))
            raise PrepError(
                f"{self.path}: {name} cannot be decoded: {_reason(said)}. Its weights are missing "
                "in part, or stored in a way that transformers "
                f"{transformers.__version__} does not read; give the original checkpoint, in bf16 "
                "or f16."
            )
        if wrong:
            raise PrepError(
                f"{self.path}: {len(wrong)} weights are missing in part or have another shape "
                "than config.json says, "
                f"{wrong[0]} first; download the checkpoint again."
            )
        self._refuse_misread(model)
        return info

    def _refuse_misread(self, model: transformers.PreTrainedModel) -> None:
        """A `PrepError` for packed integers of other bits than they would be decoded by."""
        if self.quantiser is None:
            return
        packed: dict[str, list[str]] = {}
        targets = self.targets(model)
        for name, target in targets.items():
            if name.endswith(".weight_packed"):
                packed.setdefault(target.name, []).append(name)
        for parameter, names in packed.items():
            shapes = [self.stored[name].shape for name in names]
            experts = "*." in (targets[names[0]].pattern or "")
            count = model.get_parameter(parameter).numel()
            if not packed_as_decoded(self.quantiser, experts, shapes, count):
                raise PrepError(
                    f"{self.path}: {parameter} is packed in other bits than transformers "
                    f"{transformers.__version__} decodes, which takes one group of "
                    "quantization_config for all experts and one for all else; give the original "
                    "checkpoint, in bf16 or f16."
                )

    def targets(self, model: transformers.PreTrainedModel) -> dict[str, Target]:
        """What every stored tensor is for."""
        renamings, converters = self.mapping(model)
        state = model.state_dict()
        targets = {}
        for name in self.stored:
            target, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, state
            )
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
            targets[name] = Target(target, pattern)
        return targets

    def coded(self, names: Iterable[str]) -> bool:
        """Whether any of these tensors holds codes of a scheme of few bits."""
        return self.quantiser is not None and any(is_code(self.stored[n].dtype) for n in names)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor as it is stored, or `[1, ..]` of it. A file that cannot be read, or became
        shorter, is a `PrepError`."""
        stored = self.stored[name]
        shape = stored.shape if row is None else (1, *stored.shape[1:])
        tensor = torch.empty(shape, dtype=stored.dtype)
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            begin = _begins(stored.file, stored.file.stat().st_mtime_ns)[name]
            with open(stored.file, "rb", buffering=0) as file:
                file.seek(begin + (row or 0) * tensor.nbytes)
                while left and (count := file.readinto(left)):
                    left = left[count:]
        except (OSError, BundleError, ValueError, KeyError) as error:  # changed since it was opened
            raise PrepError(
                f"{stored.file} is not whole any more ({first_line(error)}); download it again, "
                "and leave it alone until smoe-prep is done."
            ) from error
        if left:
            raise PrepError(
                f"{stored.file} became shorter while it was read; leave it alone until smoe-prep "
                "is done."
            )
        return tensor

    def load(self, model: transformers.PreTrainedModel, names: Iterable[str]) -> None:
        """Read the tensors `names` and put what they make into `model`, in the dtype its parameters
        have there.

        A file that cannot be read is a `PrepError`.
        """
        requested = set(names)
        with contextlib.ExitStack() as opened:
            slices = {}
            for file in sorted({self.stored[name].file for name in requested}):
                handle = opened.enter_context(_opened(file))
                slices.update(
                    {
                        name: handle.get_slice(name)
                        for name in requested
                        if self.stored[name].file == file
                    }
                )
            try:
                info, _ = self._convert(model, slices, "cpu")
            except (SafetensorError, OSError) as error:
                raise PrepError(
                    f"{self.path} became unreadable: {error}; download it again."
                ) from error
        if info.mismatched_keys or info.conversion_errors:
            raise PrepError(
                f"{self.path} changed while it was read; leave it alone until smoe-prep is done."
            )

    @staticmethod
    def complete(model: transformers.PreTrainedModel, info: LoadStateDictInfo) -> None:
        """Once everything of `model` but its experts is loaded: tie weights, fill what no
        checkpoint holds. Afterwards `info.missing_keys` names what is really missing."""
        with quiet():
            model._finalize_model_loading(
                model, LoadStateDictConfig(device_map={"": "cpu"}, dtype=torch.float32), info
            )
        model.eval()

    def mapping(
        self, model: transformers.PreTrainedModel
    ) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        """How `transformers` turns what is stored into what the model has."""
        mapping = get_model_conversion_mapping(model, hf_quantizer=self.quantiser)
        return (
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
        )

    def _convert(self, model: transformers.PreTrainedModel, tensors: dict, device: str):
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=torch.float32,
            hf_quantizer=self.quantiser,
            weight_mapping=get_model_conversion_mapping(  # type: ignore[arg-type]
                model, hf_quantizer=self.quantiser
            ),
        )
        wanted = {n: w.dtype for n, w in model.named_parameters(remove_duplicate=False)}
        with quiet():
            converted = convert_and_load_state_dict_in_model(model, tensors, config)
        # In a checkpoint of few bits, what is stored plainly comes in the dtype it is stored in.
        for name, weight in model.named_parameters(remove_duplicate=False):
            if weight.dtype != wanted[name]:
                weight.data = weight.data.to(wanted[name])
        return converted


def open_weights(path: Path, quantiser: HfQuantizer | None = None) -> Weights:
    """The tensors of the checkpoint directory `path`, which `quantiser` decodes; a `PrepError` for
    one that is not there or not whole."""
    names = weight_files(path, [file.name for file in path.iterdir()])
    gone = [name for name in names if not (path / name).is_file()]
    if gone:
        raise PrepError(
            f"{path}: {len(gone)} of {len(names)} weight files are not there, {gone[0]} first; "
            "the download is not "
            "complete. Run it again, it goes on where it stopped."
        )
    return weights_of(path, {name: _header(path / name) for name in names}, quantiser)


def weight_files(path: Path, there: Collection[str]) -> list[str]:
    """The names of the files that hold the weights, of a checkpoint at `path` whose files are named
    `there`; a `PrepError` if there are none."""
    if INDEX in there:
        return sorted(set(_index(path / INDEX).values()))
    names = [SINGLE] if SINGLE in there else [n for n in there if n.endswith(".safetensors")]
    if not names:
        raise PrepError(
            f"{path} has no .safetensors files; download the weights, or convert them with "
            "save_pretrained."
        )
    return sorted(names)


def weights_of(
    path: Path, headers: dict[str, Header], quantiser: HfQuantizer | None = None
) -> Weights:
    """The tensors that the headers of the weight files of `path` name; a `PrepError` for one that
    is of an unknown type, or in the index only."""
    stored: dict[str, Stored] = {}
    for file, header in headers.items():
        for name, (written, shape) in header.items():
            dtype = DTYPES.get(written)
            if dtype is None:
                raise PrepError(
                    f"{path / file}: {name} is stored as {written}, which smoe does not read."
                )
            stored[name] = Stored(path / file, dtype, shape)
    lost = sorted(set(_index(path / INDEX)) - set(stored)) if (path / INDEX).is_file() else []
    if lost:
        raise PrepError(
            f"{path}: {lost[0]} is in the index but in no file; download the checkpoint again."
        )
    return Weights(path, stored, quantiser)


def _index(file: Path) -> dict[str, str]:
    try:
        listed = json.loads(file.read_text("utf-8"))["weight_map"]
        plain = all(
            isinstance(n, str) and n == Path(n).name and n.endswith(".safetensors")
            for n in listed.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PrepError(
            f"{file} is not an index of weights ({error!r}); download it again."
        ) from error
    if not listed or not plain:
        raise PrepError(f"{file} names no weight files, or files elsewhere; download it again.")
    return listed


def _header(file: Path) -> Header:
    with _opened(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {n: (str(s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()}


@functools.lru_cache(maxsize=64)
def _begins(file: Path, changed: int) -> dict[str, int]:
    """Where the tensors of a file, which was last `changed` then, begin in it."""
    raw, _ = read_raw_header(file)
    entries = json.loads(raw).items()
    return {name: 8 + len(raw) + e["data_offsets"][0] for name, e in entries if "dtype" in e}


def _reason(error: str) -> str:
    """What was raised, of a conversion's report: a traceback, the word, and what it was about."""
    return error.rpartition("\nError")[0].rstrip().rpartition("\n")[2] or error


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PrepError(
            f"{file} is not whole ({error}); the download stopped half-way or the file is "
            "damaged. Download it again."
        ) from error
    with handle:
        yield handle


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What transformers would warn about while loading is said by us, as an error."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        transformers.utils.logging.enable_progress_bar()
