"""The steps of a build one by one, each into a directory of its own: what the commands `profile`,
`pack` and `export` do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts.manifest import Experts, Manifest
from smoe.prep.backbone.checked import export_checked
from smoe.prep.backbone.quantise import check_precision
from smoe.prep.checkpoint.checkpoint import Checkpoint, open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import chosen_quantiser, quantiser_settings
from smoe.prep.pack.pack import chosen_encoding, pack, unpacked
from smoe.prep.progress import Progress
from smoe.prep.statistics.profile import Profile, profile
from smoe.prep.sweep.forward import refuse_missing_device
from smoe.prep.workdir import beside, refuse_existing, write_whole


@dataclass(frozen=True)
class Packed:
    """Shards in `output`, with experts.json beside them."""

    output: Path
    experts: Experts

    def as_dict(self) -> dict:
        return dataclasses.asdict(self.experts)

    def lines(self) -> list[str]:
        return [f"{self.output}: experts in {self.experts.encoding}"]


@dataclass(frozen=True)
class Backbone:
    """Segments in `output`, with backbone.json beside them."""

    output: Path
    manifest: Manifest

    def as_dict(self) -> dict:
        fields = dataclasses.asdict(self.manifest)
        return {name: fields[name] for name in ("backbone", "layers")}

    def lines(self) -> list[str]:
        return [f"{self.output}: {len(self.manifest.backbone.segments)} segments"]


def profile_to(
    model: Path, output: Path, calibration: Calibration, progress: Progress, device: str = "cpu"
) -> Profile:
    """Write the profile of the checkpoint at `model` into a new directory `output`."""
    checkpoint = _opened(model, output, progress, device)
    settings = {"--device": device}
    with _writing(checkpoint, output, settings, calibration, progress) as (rows, partial):
        return profile(checkpoint, partial, calibration, progress, rows, device)


def pack_to(
    model: Path,
    output: Path,
    calibration: Calibration | None,
    encoding: str,
    quantiser: str | None,
    progress: Progress,
    device: str = "cpu",
) -> Packed:
    """Write the experts of the checkpoint at `model` as shards into a new directory `output`. A
    `calibration` that the encoding does not use is a `PrepError`."""
    checkpoint = _opened(model, output, progress, device)
    encoding = chosen_encoding(checkpoint, encoding, progress)
    chosen = chosen_quantiser(encoding, quantiser, calibration is not None)
    if calibration is not None and chosen != "calibrated":
        raise PrepError("--calibration is for nested encodings with --quantiser calibrated.")
    settings = {"--encoding": encoding, "--device": device}
    settings |= quantiser_settings(encoding, quantiser)
    with _writing(checkpoint, output, settings, calibration, progress) as (rows, partial):
        experts = pack(checkpoint, partial, encoding, progress, chosen, rows, device)
        packed = Packed(output=output, experts=experts)
        write_whole(partial / "experts.json", json.dumps(packed.as_dict(), indent=1) + "\n")
    return packed


def export_to(model: Path, output: Path, precision: str, progress: Progress) -> Backbone:
    """Write the backbone of the checkpoint at `model` as ONNX segments into a new directory
    `output`."""
    check_precision(precision)
    checkpoint = _opened(model, output, progress)
    with _writing(checkpoint, output, {"--backbone": precision}, None, progress) as (_, partial):
        experts = unpacked(checkpoint, "f32")
        manifest = export_checked(checkpoint, partial, experts, precision, progress)
        backbone = Backbone(output=output, manifest=manifest)
        write_whole(partial / "backbone.json", json.dumps(backbone.as_dict(), indent=1) + "\n")
    return backbone


def _opened(model: Path, output: Path, progress: Progress, device: str = "cpu") -> Checkpoint:
    """The checkpoint at `model`, once it is known that `output` can be written."""
    refuse_existing(output)
    refuse_missing_device(device)
    return open_checkpoint(model, progress)


@contextlib.contextmanager
def _writing(
    checkpoint: Checkpoint,
    output: Path,
    settings: dict[str, str],
    calibration: Calibration | None,
    progress: Progress,
) -> Iterator[tuple[list[np.ndarray], Path]]:
    """The text's rows, and the directory that becomes `output`."""
    rows = calibration.rows(checkpoint, progress.say) if calibration else []
    if calibration:
        settings = settings | calibration.settings(rows)
    with beside(output, settings | checkpoint.identity(), progress) as partial:
        yield rows, partial
