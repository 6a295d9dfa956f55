"""All of it: a checkpoint and calibration text become a bundle. `build` names the stages in order and does nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np

from smoe.artifacts.bundle import open_bundle
from smoe.artifacts.encodings import encoding_named
from smoe.artifacts.manifest import FORMAT, VERSION, Experts, File, Layer, Manifest, Model, Wires
from smoe.artifacts.validate import sha256
from smoe.prep.backbone import cut
from smoe.prep.backbone.check import check_backbone
from smoe.prep.backbone.export import Exported, export
from smoe.prep.backbone.onnx_graph import continues
from smoe.prep.backbone.quantise import check_precision, reduce
from smoe.prep.checkpoint.checkpoint import Checkpoint, open_checkpoint
from smoe.prep.checkpoint.seam import expert_geometry
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.inspect import disk_needed
from smoe.prep.options import Recipe, chosen_quantiser, quantiser_settings
from smoe.prep.pack.pack import pack, unpacked
from smoe.prep.prices import price
from smoe.prep.prices.calibrate import add_fit
from smoe.prep.progress import Progress
from smoe.prep.statistics.predict import add_predictors
from smoe.prep.statistics.profile import PROFILE_FILES, open_profile, profile
from smoe.prep.workdir import (
    FINISHED,
    MARKER,
    beside,
    refuse_existing,
    refuse_full_disk,
    write_whole,
)

HELD_OUT = 2048  # tokens on which predictors are compared


def build(
    model: str | Path,
    output: str | Path,
    calibration: Calibration | None,
    recipe: Recipe | None = None,
    profiled: str | Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Build the bundle `output` from the checkpoint at `model`.

    `profiled` is a directory that `profile` wrote; without it the `calibration` text is profiled here. Given both, the
    profile must have been made from that text. A nested encoding is quantised on the text too. The bundle is written
    beside and renamed once it is whole; an existing `output` is never touched. After an interruption the same call goes on from the layers that are finished, and gives
    the same bytes.
    """
    recipe, progress, output = recipe or Recipe(), progress or Progress(), Path(output)
    refuse_existing(output)
    checkpoint = open_checkpoint(model)
    _refuse_early(checkpoint, recipe, calibration, profiled)
    calibrated = chosen_quantiser(recipe.encoding, recipe.quantiser, calibration) == "calibrated"
    priced = recipe.price_tokens(calibration)
    needed = profiled is None or calibrated or priced
    rows = calibration.rows(checkpoint) if calibration is not None and needed else []
    with beside(
        output, _settings(checkpoint, recipe, calibration, rows, profiled), progress
    ) as partial:
        refuse_full_disk(
            partial, disk_needed(checkpoint.model, recipe.encoding, sum(len(row) for row in rows))
        )
        _statistics(checkpoint, partial, calibration, rows, profiled, progress)
        experts = pack(checkpoint, partial, recipe.encoding, progress, rows if calibrated else None)
        fitted_on = (
            _prices(checkpoint, partial, experts, rows, priced, calibration, progress)
            if priced
            else []
        )
        # Last, though it may refuse a family: the exporter leaves 0.2 GB behind, which would be there in all stages.
        draft = _backbone(checkpoint, partial, experts, recipe.backbone, progress)
        for file in checkpoint.text_files():
            shutil.copyfile(file, partial / file.name)
        manifest = _listed(partial, draft)
        if fitted_on:  # now that the bundle can run
            add_fit(partial, fitted_on, calibration.seed if calibration else 0, progress)
            manifest = _listed(partial, draft)
        open_bundle(partial)
    progress.say(
        f"build: {output} is ready, {sum(f.size for f in manifest.files.values()) / 1e6:.1f} MB"
    )
    return manifest


def _listed(partial: Path, draft: Manifest) -> Manifest:
    """The manifest, with all files as they are now, written."""
    manifest = dataclasses.replace(draft, files=_files(partial))
    write_whole(partial / "manifest.json", manifest.to_json())
    return manifest


def _prices(
    checkpoint: Checkpoint,
    partial: Path,
    experts: Experts,
    rows: list[np.ndarray],
    tokens: int,
    calibration: Calibration | None,
    progress: Progress,
) -> list[np.ndarray]:
    """Add the tables of prices and predictors; the rows on which prices are to be fitted, none if there are no prices."""
    assert calibration is not None
    drawn, others = price.sampled(rows, tokens, calibration.seed)
    why = price.add_prices(
        checkpoint, partial, drawn, calibration.seed, price.Packed(experts, partial), progress
    )
    add_predictors(
        checkpoint, partial, list(drawn), _some(others or list(drawn), HELD_OUT), progress
    )
    if why:
        progress.say(f"price: none for this model, and so no --loss: {why}")
        return []
    return others or list(drawn)


def _some(rows: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The first rows, until they have so many tokens."""
    return rows[: 1 + int(np.searchsorted(np.cumsum([len(row) for row in rows]), tokens))]


def _settings(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    rows: list[np.ndarray],
    profiled: str | Path | None,
) -> dict[str, str]:
    """All that the bundle's bytes depend on: an interrupted build goes on only with the same."""
    about = {"--encoding": encoding_named(recipe.encoding).name, "--backbone": recipe.backbone}
    about |= quantiser_settings(recipe.encoding, recipe.quantiser) | {
        "--prices": str(recipe.price_tokens(calibration))
    }
    if profiled is not None:
        about["--profile"] = (
            f"{Path(profiled).name} ({sha256(Path(profiled) / 'tables.safetensors')[:12]})"
        )
    if calibration is not None and rows:
        about |= calibration.settings(rows)
    return about | made_by(checkpoint)


def _statistics(
    checkpoint: Checkpoint,
    partial: Path,
    calibration: Calibration | None,
    rows: list[np.ndarray],
    profiled: str | Path | None,
    progress: Progress,
) -> None:
    if profiled is not None:
        (partial / "study").mkdir(exist_ok=True)
        for name in PROFILE_FILES:
            shutil.copyfile(Path(profiled) / name, partial / name)
    elif calibration is not None:
        profile(checkpoint, partial, calibration, progress, rows)


def _backbone(
    checkpoint: Checkpoint, partial: Path, experts: Experts, precision: str, progress: Progress
) -> Manifest:
    """`export_checked`, once."""
    file = partial / FINISHED / "export.json"
    if not file.exists():
        manifest = export_checked(checkpoint, partial, experts, precision, progress)
        file.parent.mkdir(exist_ok=True)
        write_whole(file, manifest.to_json())
    return Manifest.parse(file.read_text("utf-8"), str(file))


def export_checked(
    checkpoint: Checkpoint, directory: Path, experts: Experts, precision: str, progress: Progress
) -> Manifest:
    """The manifest, but for its files, of a backbone that is exported into `directory` and does what the model does, and
    is then brought to `precision`; a `PrepError` if there is none.

    A graph for any number of tokens is tried first; where the model or the graph does not go on from its state with
    several, one for single tokens.
    """
    why = ""
    for one_at_a_time in (False, True) if continues(checkpoint) else (True,):
        progress.say(
            "export: tracing the backbone" + (" for one token at a time" if one_at_a_time else "")
        )
        try:
            exported = export(checkpoint, directory, one_at_a_time)
        except PrepError as error:
            why = why or str(error)
            continue
        draft = _draft(checkpoint, experts, exported)
        manifest, wrong = check_backbone(checkpoint, directory, draft, exported.nodes)
        if not wrong and precision == "f32":
            return manifest
        if not wrong:
            backbone, line = reduce(directory, manifest.backbone, manifest.layers, precision)
            progress.say(f"export: {line}")
            return dataclasses.replace(manifest, backbone=backbone)
        why = why or wrong
    raise PrepError(
        f"{checkpoint.path}: the backbone of this {checkpoint.model.config.model_type} cannot be exported: {why}"
    )


def _refuse_early(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    profiled: str | Path | None,
) -> None:
    """Whatever the user may have got wrong is a `PrepError` now, not after hours of profiling."""
    chosen_quantiser(recipe.encoding, recipe.quantiser, calibration)
    recipe.price_tokens(calibration)
    check_precision(recipe.backbone)
    unpacked(checkpoint, recipe.encoding)
    if profiled is not None:
        about = open_profile(Path(profiled), checkpoint)
        if calibration is not None:
            _refuse_other_text(Path(profiled), about["calibration"], calibration)
    elif calibration is None:
        raise PrepError(
            "There is no calibration text; give --calibration FILE, or --profile PROFILE."
        )


def _refuse_other_text(profiled: Path, made: dict, asked: Calibration) -> None:
    """A `PrepError` if the profile was `made` from another text, or with other settings, than `asked`."""
    wanted = {"source": Path(asked.source).name, "seed": asked.seed}
    if asked.tokens is not None:
        wanted["tokens"] = asked.tokens
    for name, value in wanted.items():
        if made.get(name) != value:
            raise PrepError(
                f"{profiled} was made with {name} {made.get(name)!r}, asked for is {value!r}; leave out --profile to "
                "profile again, or the other options to use it as it is."
            )


def _draft(checkpoint: Checkpoint, experts: Experts, exported: Exported) -> Manifest:
    """The manifest, but for its files and what only running the segments shows."""
    config = checkpoint.config
    layers = [
        _layer(name, module, node)
        for (name, module), node in zip(checkpoint.layers, exported.nodes, strict=True)
    ]
    model = Model(
        checkpoint.model.config.model_type,
        type(checkpoint.model).__name__,
        int(config.vocab_size),
        int(getattr(config, "max_position_embeddings", None) or 2048),
        checkpoint.end_ids,
    )
    return Manifest(
        FORMAT,
        VERSION,
        model,
        tuple(layers),
        experts,
        exported.backbone,
        _provenance(checkpoint),
        {},
    )


def _files(partial: Path) -> dict[str, File]:
    """All that belongs to the bundle but the manifest, which an interrupted run may have written too."""
    names = [
        str(file.relative_to(partial)) for file in sorted(partial.rglob("*")) if file.is_file()
    ]
    ours = [
        name
        for name in names
        if name not in (MARKER, "manifest.json") and not name.startswith(f"{FINISHED}/")
    ]
    return {name: File((partial / name).stat().st_size, sha256(partial / name)) for name in ours}


def _layer(name: str, module, node: cut.ExpertsNode) -> Layer:
    count, hidden, width = expert_geometry(module)
    scores, raw = (node.found.scores, node.found.raw) if node.found else ("", "")
    rule = node.found.rule if node.found else None
    refusal = (
        "" if node.found else f"no known pattern leads from {name}'s router scores to its choice"
    )
    wires = Wires(node.hidden, node.ids, node.weights, node.output, scores, raw)
    return Layer(
        name, count, 1, hidden, width, wires, rule, refusal
    )  # top_k follows from running it


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        "source": checkpoint.path.resolve().name,
        "source_fingerprint": checkpoint.fingerprint(),
        "versions": json.dumps(_versions(), sort_keys=True),
    }


def made_by(checkpoint: Checkpoint) -> dict[str, str]:
    """What every result depends on: the checkpoint's fingerprint, its tokenizer and generation config, and the versions
    of what reads and writes."""
    text = hashlib.sha256(
        b"".join(file.read_bytes() for file in checkpoint.text_files())
    ).hexdigest()[:12]
    return {
        "model": checkpoint.fingerprint()[:12],
        "tokenizer and generation config": text,
    } | _versions()


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name)
        for name in ("smoe", "torch", "transformers", "onnxruntime")
    }
