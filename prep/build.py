"""All of it: a checkpoint and calibration text become a bundle. `build` names the stages in order and does nothing else."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts.encodings import encoding_named
from smoe.artifacts.manifest import FORMAT, VERSION, Experts, File, Layer, Manifest, Model, Wires
from smoe.artifacts.validate import open_bundle, sha256
from smoe.prep import cut, routing
from smoe.prep.calibration import Calibration
from smoe.prep.checkpoint import Checkpoint, open_checkpoint
from smoe.prep.errors import PrepError
from smoe.prep.experts import expert_geometry, experts_modules
from smoe.prep.export import Exported, check_precision, export
from smoe.prep.pack import common_gate, pack
from smoe.prep.profile import PROFILE_FILES, open_profile, profile
from smoe.prep.progress import Progress
from smoe.runtime.backbone import Backbone as Running
from smoe.runtime.backbone import Sequence, ort_value

MARKER = "smoe-prep.lock"  # in a directory that is being written: it is ours, and held by the process that writes


@dataclass(frozen=True)
class Recipe:
    """How a bundle is built; the defaults are those of the command line."""

    encoding: str = "bf16"
    backbone: str = "f32"


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
    profile must have been made from that text. The bundle is written beside and renamed once it is whole; an existing
    `output` is never touched.
    """
    recipe, progress, output = recipe or Recipe(), progress or Progress(), Path(output)
    with beside(output) as partial:
        checkpoint = open_checkpoint(model)
        _refuse_early(checkpoint, recipe, calibration, profiled)
        _statistics(checkpoint, partial, calibration, profiled, progress)
        experts = pack(checkpoint, partial, recipe.encoding, progress)
        progress.say("export: tracing the backbone")
        exported = export(checkpoint, partial, recipe.backbone)
        for file in checkpoint.text_files():
            shutil.copyfile(file, partial / file.name)
        manifest = _manifest(checkpoint, partial, experts, exported)
        (partial / "manifest.json").write_text(manifest.to_json(), "utf-8")
        open_bundle(partial)
    progress.say(f"build: {output} is ready, {sum(f.size for f in manifest.files.values()) / 1e6:.1f} MB")
    return manifest


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A directory to write into that becomes `output` when the block ends well, and is gone when it fails.

    What a killed run left there is removed; `output` itself is never overwritten (a `PrepError`).
    """
    if output.exists() or output.is_symlink():
        raise PrepError(f"{output} exists; smoe does not overwrite. Remove it, or give another -o.")
    if not output.parent.is_dir():
        raise PrepError(f"{output.parent} is not a directory; make it first, or give another -o.")
    partial = output.with_name(output.name + ".partial")
    if partial.exists() and not (partial / MARKER).is_file():
        raise PrepError(f"{partial} is in the way and not smoe's; move it, or give another -o.")
    partial.mkdir(exist_ok=True)
    with open(partial / MARKER, "w") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepError(f"Another smoe-prep is writing {output}; wait for it, or give another -o.") from error
        try:
            for left in partial.iterdir():
                if left.name != MARKER:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / MARKER).unlink()
        partial.rename(output)


def _statistics(
    checkpoint: Checkpoint,
    partial: Path,
    calibration: Calibration | None,
    profiled: str | Path | None,
    progress: Progress,
) -> None:
    if profiled is not None:
        for name in PROFILE_FILES:
            shutil.copyfile(Path(profiled) / name, partial / name)
    elif calibration is not None:
        profile(checkpoint, partial, calibration, progress)


def _refuse_early(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | None, profiled: str | Path | None
) -> None:
    """Whatever the user may have got wrong is a `PrepError` now, not after hours of profiling."""
    encoding_named(recipe.encoding)
    check_precision(recipe.backbone)
    common_gate(checkpoint)
    if profiled is not None:
        about = open_profile(Path(profiled), checkpoint)
        if calibration is not None:
            _refuse_other_text(Path(profiled), about["calibration"], calibration)
    elif calibration is not None:
        calibration.rows(checkpoint)
    else:
        raise PrepError("There is no calibration text; give --calibration FILE, or --profile PROFILE.")


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


def _manifest(checkpoint: Checkpoint, partial: Path, experts: Experts, exported: Exported) -> Manifest:
    config = checkpoint.config
    layers = [
        _layer(name, module, node)
        for (name, module), node in zip(experts_modules(checkpoint.model), exported.nodes, strict=True)
    ]
    model = Model(
        checkpoint.model.config.model_type,
        type(checkpoint.model).__name__,
        int(config.vocab_size),
        int(getattr(config, "max_position_embeddings", None) or 2048),
        checkpoint.end_ids,
    )
    draft = Manifest(FORMAT, VERSION, model, tuple(layers), experts, exported.backbone, _provenance(checkpoint), {})
    checked = _check_routing(draft, exported.nodes, partial)
    files = {
        str(file.relative_to(partial)): File(file.stat().st_size, sha256(file))
        for file in sorted(partial.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    return dataclasses.replace(checked, files=files)


def _layer(name: str, module, node: cut.ExpertsNode) -> Layer:
    count, hidden, width = expert_geometry(module)
    scores, raw = (node.found.scores, node.found.raw) if node.found else ("", "")
    rule = node.found.rule if node.found else None
    refusal = "" if node.found else f"no known pattern leads from {name}'s router scores to its choice"
    wires = Wires(node.hidden, node.ids, node.weights, node.output, scores, raw)
    return Layer(name, count, 1, hidden, width, wires, rule, refusal)  # top_k follows from running it


def _check_routing(manifest: Manifest, nodes: list[cut.ExpertsNode], partial: Path) -> Manifest:
    """Run the segments on random tokens and replay every layer's routing rule; drop those that do not reproduce it.

    The experts' outputs are noise here: any hidden state exercises a router. top_k is read off the ids.
    """
    backbone = Running(partial, manifest)
    random = np.random.default_rng(0)
    ids = random.integers(0, manifest.model.vocabulary, 64)
    sequence = Sequence(manifest.backbone.state, 64)
    values = backbone.begin(sequence, ids, np.array([63]))
    layers = []
    for index, layer in enumerate(manifest.layers):
        backbone.run(index, values, sequence)
        wires = layer.wires
        chosen = values[wires.ids].numpy().reshape(64, -1)
        layer = dataclasses.replace(layer, top_k=chosen.shape[1])
        found = nodes[index].found
        if found:
            scores, raw = (values[n].numpy().reshape(64, -1) for n in (found.scores, found.raw))
            why = routing.check(found, scores, raw, chosen, values[wires.weights].numpy().reshape(64, -1))
            if why:
                layer = dataclasses.replace(layer, routing=None, routing_refusal=f"{layer.name}: {why}")
        layers.append(layer)
        hidden = values[wires.hidden].numpy()
        values[wires.output] = ort_value(random.standard_normal(hidden.shape, np.float32) * hidden.std())
    return dataclasses.replace(manifest, layers=tuple(layers))


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("smoe", "torch", "transformers", "onnxruntime")}
    return {
        "source": checkpoint.path.resolve().name,
        "source_fingerprint": checkpoint.fingerprint(),
        "versions": json.dumps(versions, sort_keys=True),
    }
