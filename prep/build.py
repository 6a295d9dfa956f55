"""All of it: a checkpoint and calibration text become a bundle. `build` names the stages in order
and does nothing else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import licence
from smoe.artifacts.bundle import open_bundle
from smoe.artifacts.encodings import encoding_named
from smoe.artifacts.manifest import Experts, File, Manifest
from smoe.artifacts.tables import study_of
from smoe.artifacts.validate import file_at, sha256
from smoe.prep.backbone.alone import export_apart
from smoe.prep.backbone.positions import reach
from smoe.prep.backbone.quantise import check_precision
from smoe.prep.checkpoint.checkpoint import Checkpoint, open_checkpoint, versions
from smoe.prep.checkpoint.hub import origin
from smoe.prep.checkpoint.licence import copy_licence
from smoe.prep.checkpoint.text import LENGTH, Calibration, Origin, digest, rows_of
from smoe.prep.errors import PrepError
from smoe.prep.estimate import Sizes, Work, disk_bytes, memory_bytes, short_of_memory
from smoe.prep.learn import How, Text, learn
from smoe.prep.options import STORED, Recipe, quantiser_settings
from smoe.prep.pack.pack import chosen_encoding, losses, unpacked
from smoe.prep.prices.calibrate import Fit, add_fit
from smoe.prep.progress import Progress, peak_memory
from smoe.prep.state_kind import StateKind, choose, refuse_unknown_kind
from smoe.prep.statistics.profile import open_profile
from smoe.prep.sweep.forward import refuse_missing_device, within_memory
from smoe.prep.workdir import (
    FINISHED,
    MARKER,
    beside,
    refuse_existing,
    refuse_full_disk,
    write_whole,
)
from smoe.prep.written import write


@dataclass(frozen=True)
class Built:
    """A finished bundle, what its prices were measured to be worth, how its `state` was chosen, and
    what this run took: seconds by stage, and the most bytes that this process, or one that it
    started, held."""

    bundle: Path
    manifest: Manifest
    no_prices: str  # why the model has none; "" if it has, or none were asked for
    fit: list[Fit]
    state: StateKind
    seconds: dict[str, float]
    memory: int

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.manifest.files.values())

    def as_dict(self) -> dict:
        fit = [fit.as_dict() for fit in self.fit]
        return {
            "bundle": str(self.bundle),
            "bytes": self.nbytes,
            "price_fit": fit,
            "state": self.state.kind,
            "state_nats": self.state.nats,
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
            "memory": self.memory,
        }

    def lines(self) -> list[str]:
        lines = [f"{self.bundle}: {self.nbytes / 1e6:.1f} MB", f"state: {self.state.line}"]
        if self.fit:
            lines.append("prices, in nats per token on text they were not taken from:")
        return lines + [line for fit in self.fit for line in fit.lines()]


def build(
    model: str | Path,
    output: str | Path,
    calibration: Calibration | None,
    recipe: Recipe | None = None,
    profiled: str | Path | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build the bundle `output` from the checkpoint at `model`.

    `profiled` is a directory that `profile` wrote; without it the text is profiled now: that of
    `calibration`, and what the model writes itself, as much as the recipe says. Given a profile and
    a calibration, the profile must have been made from that text. A nested encoding is quantised on
    the text too. The bundle is written beside and renamed once it is whole; an existing `output`
    is never touched. After an interruption the same call goes on from the layers that are finished,
    and gives the same bytes.
    """
    recipe, progress, output = recipe or Recipe(), progress or Progress(), Path(output)
    profiled = None if profiled is None else Path(profiled)
    with progress.stage("rest"):
        built = _build(model, output, calibration, recipe, profiled, progress)
    return dataclasses.replace(built, seconds=progress.seconds, memory=peak_memory())


def _build(
    model: str | Path,
    output: Path,
    calibration: Calibration | None,
    recipe: Recipe,
    profiled: Path | None,
    progress: Progress,
) -> Built:
    """The stages."""
    refuse_existing(output)
    _refuse_options(recipe, calibration, profiled)
    checkpoint = open_checkpoint(model, progress)
    encoding = chosen_encoding(checkpoint, recipe.encoding, progress)
    recipe = recipe.resolved(encoding, calibration is not None, profiled is not None)
    _refuse_early(checkpoint, recipe, calibration, profiled)
    if not checkpoint.end_ids:
        progress.say(
            "warning: neither config, generation config nor tokenizer of this model names a token "
            "that ends a text: generation will run to its limit, unless --stop ends it."
        )
    given = _given(checkpoint, recipe, calibration, profiled, progress)
    origin = _origin(recipe, calibration if given else None)
    with beside(output, _settings(checkpoint, recipe, calibration, given, profiled), progress) as (
        partial
    ):
        tokens = sum(map(len, given))
        _refuse_small_machine(checkpoint, recipe, tokens, origin.own, partial, progress)
        experts = unpacked(checkpoint, recipe.encoding)
        with progress.stage("text"):
            text = _text(checkpoint, partial, experts, recipe, origin, given, progress)
        how = How(
            experts=experts,
            quantiser=recipe.quantiser,
            watch_backbone=recipe.backbone == "int4" and bool(text.rows),
            profiled=profiled,
            device=recipe.device,
        )
        no_prices = learn(checkpoint, partial, text, how, progress)
        if no_prices:
            progress.say(f"prices: none for this model, and so no --loss: {no_prices}")
        # Last, though it may refuse a family: the exporter leaves 0.2 GB in the process.
        with progress.stage("export"):
            draft = _backbone(checkpoint, partial, experts, recipe.backbone, progress)
        for name, content in checkpoint.text_files.items():
            (partial / name).write_bytes(content)
        terms = copy_licence(checkpoint.path, partial, progress)
        lost = losses(partial, len(checkpoint.layers))
        provenance = _provenance(checkpoint, recipe, text, lost) | terms.provenance()
        manifest = dataclasses.replace(draft, provenance=provenance, files=_files(partial))
        write_whole(partial / "manifest.json", manifest.to_json())
        fit: list[Fit] = []
        if text.drawn and not no_prices:  # now that the bundle can run
            with progress.stage("fit"):
                fit = add_fit(partial, text.ids(text.held_out), origin.seed, progress)
            manifest = _with_new_tables(partial, manifest)
        with progress.stage("state"):
            state = choose(partial, text.held_out_first, recipe.state, progress)
        manifest = _with_state(partial, manifest, state)
        open_bundle(partial)
    return Built(output, manifest, no_prices, fit, state, {}, 0)


def _given(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    profiled: Path | None,
    progress: Progress,
) -> list[np.ndarray]:
    """The rows of the calibration text, tokenised if anything needs them."""
    needed = profiled is None or recipe.prices or recipe.quantiser == "calibrated"
    needed = needed or recipe.backbone == "int4"
    if calibration is None or not needed:
        return []
    return calibration.rows(checkpoint, progress.say)


def _origin(recipe: Recipe, calibration: Calibration | None) -> Origin:
    """Of all text of a build."""
    origin = Origin("", recipe.seed, LENGTH) if calibration is None else calibration.origin
    if not recipe.self_tokens:
        return origin
    rounded = "nearest" if recipe.quantiser == "calibrated" else recipe.quantiser
    writer = ", ".join(filter(None, (recipe.encoding, rounded)))
    return dataclasses.replace(origin, own=recipe.self_tokens, writer=writer)


def _text(
    checkpoint: Checkpoint,
    partial: Path,
    experts: Experts,
    recipe: Recipe,
    origin: Origin,
    given: list[np.ndarray],
    progress: Progress,
) -> Text:
    """The text that was given, and what the model writes itself after it."""
    rows = given
    if origin.own:
        with within_memory(recipe.device):
            own = write(
                checkpoint, partial, origin, experts, recipe.quantiser, recipe.device, progress
            )
        rows = rows_of(np.concatenate([*given, own]), origin.length)
    return Text.split(origin, rows, recipe.prices or 0)


def _settings(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    given: list[np.ndarray],
    profiled: Path | None,
) -> dict[str, str]:
    """All that the bundle's bytes depend on: an interrupted build goes on only with the same."""
    settings = {
        "--encoding": encoding_named(recipe.encoding).name,
        "--backbone": recipe.backbone,
        "--prices": str(recipe.prices),
        "--self": str(recipe.self_tokens),
        "--seed": str(recipe.seed),
        "--device": recipe.device,
        "--state": recipe.state or "measured",
    }
    settings |= quantiser_settings(recipe.encoding, recipe.quantiser)
    if profiled is not None:
        tables = sha256(profiled / "tables.safetensors")[:12]
        settings["--profile"] = f"{profiled.name} ({tables})"
    if calibration is not None and given:
        settings |= calibration.settings(given)
    return settings | checkpoint.identity()


def _backbone(
    checkpoint: Checkpoint, partial: Path, experts: Experts, precision: str, progress: Progress
) -> Manifest:
    """`export_apart`, once."""
    file = partial / FINISHED / "export.json"
    if not file.exists():
        manifest = export_apart(checkpoint, partial, experts, precision, progress)
        file.parent.mkdir(exist_ok=True)
        write_whole(file, manifest.to_json())
    return Manifest.parse(file.read_text("utf-8"), str(file))


def _refuse_options(recipe: Recipe, calibration: Calibration | None, profiled: Path | None) -> None:
    """An option that no model takes is a `PrepError` before the model is looked for."""
    given, made = calibration is not None, profiled is not None
    if calibration is not None:
        calibration.refuse_wrong()
    recipe.refuse_wrong_self(given, made)
    if recipe.encoding != STORED:
        recipe.resolved(recipe.encoding, given, made)
    recipe.price_tokens(recipe.has_text(given, made))
    check_precision(recipe.backbone)
    refuse_unknown_kind(recipe.state)
    refuse_missing_device(recipe.device)


def _refuse_early(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    profiled: Path | None,
) -> None:
    """Whatever the user may have got wrong is a `PrepError` now, not after hours of work."""
    unpacked(checkpoint, recipe.encoding)
    if profiled is not None:
        profile = open_profile(profiled, checkpoint)
        if calibration is not None:
            _refuse_other_text(profiled, profile["calibration"], calibration)


def _refuse_small_machine(
    checkpoint: Checkpoint,
    recipe: Recipe,
    given: int,
    own: int,
    partial: Path,
    progress: Progress,
) -> None:
    """A disk without room for a build with so many tokens, `given` and its `own`, is a `PrepError`,
    and little memory a warning: now, not after hours."""
    sizes = Sizes.of(checkpoint.model, checkpoint.weights.quantiser)
    work = Work.of(recipe, given, own)
    refuse_full_disk(partial, disk_bytes(sizes, work))
    if short := short_of_memory(memory_bytes(sizes, work)):
        progress.say(f"warning: {short}")


def _refuse_other_text(profiled: Path, made: dict, asked: Calibration) -> None:
    """A `PrepError` if the profile was `made` from another text, or with other settings, than
    `asked`."""
    settings = {"source": Path(asked.source).name, "seed": asked.seed}
    if asked.tokens is not None:
        settings["tokens"] = asked.tokens
    for name, value in settings.items():
        if made.get(name) != value:
            raise PrepError(
                f"{profiled} was made with {name} {made.get(name)!r}, asked for is {value!r}; "
                "leave out --profile to profile again, or the other options to use it as it is."
            )


def _files(partial: Path) -> dict[str, File]:
    """All that belongs to the bundle but the manifest, which an interrupted run may have written
    too."""
    names = [str(f.relative_to(partial)) for f in sorted(partial.rglob("*")) if f.is_file()]
    return {
        name: file_at(partial / name)
        for name in names
        if name not in (MARKER, "manifest.json")
        and not name.startswith((f"{FINISHED}/", f"{licence.FOLDER}/"))
    }


def _with_new_tables(partial: Path, manifest: Manifest) -> Manifest:
    """The manifest, written, after the tables alone have changed."""
    file = partial / "tables.safetensors"
    changed = {str(f.relative_to(partial)): file_at(f) for f in (file, study_of(file))}
    manifest = dataclasses.replace(manifest, files=manifest.files | changed)
    write_whole(partial / "manifest.json", manifest.to_json())
    return manifest


def _with_state(partial: Path, manifest: Manifest, state: StateKind) -> Manifest:
    """The manifest, written, that says what the program keeps keys and values in."""
    backbone = dataclasses.replace(manifest.backbone, state_kind=state.kind)
    provenance = manifest.provenance | {"state": state.line}
    manifest = dataclasses.replace(manifest, backbone=backbone, provenance=provenance)
    write_whole(partial / "manifest.json", manifest.to_json())
    return manifest


def _provenance(
    checkpoint: Checkpoint, recipe: Recipe, text: Text, lost: dict[str, list[float]]
) -> dict[str, str]:
    """Where a bundle comes from: checkpoint, text, how its codes and prices were made, what its
    codes `lost`, versions."""
    provenance = {
        "source": origin(checkpoint.path),
        "source_fingerprint": checkpoint.fingerprint(),
        "versions": json.dumps(versions(), sort_keys=True),
        "price_tokens": str(sum(len(part) for part in text.drawn)),
        "device": recipe.device,
    }
    if why := reach(checkpoint.config).why:
        provenance["context"] = why
    if recipe.backbone != "f32":
        calibrated = recipe.backbone == "int4" and bool(text.rows)
        provenance["backbone"] = f"{recipe.backbone}, {'calibrated' if calibrated else 'rounded'}"
    if recipe.quantiser is not None:
        provenance["quantiser"] = recipe.quantiser
    if lost:
        shares = {name: [float(f"{x:.3g}") for x in levels] for name, levels in lost.items()}
        provenance["output_lost_by_level"] = json.dumps(shares)
    if text.rows:
        provenance |= {
            "calibration": str(text.origin),
            "calibration_sha256": digest(text.rows),
            "calibration_tokens": str(text.tokens),
            "calibration_seed": str(text.origin.seed),
        }
    if text.origin.own:
        provenance["calibration_own_tokens"] = str(text.origin.own)
        provenance["calibration_written_with"] = text.origin.writer
    return provenance
