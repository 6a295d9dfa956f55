"""Builds that share exports: a small model's build is little else, and many tests build the
same."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import shutil
import tempfile
from pathlib import Path

from smoe.artifacts.manifest import Manifest
from smoe.prep import build as building
from smoe.prep.backbone.checked import export_checked
from smoe.prep.build import Built
from smoe.prep.checkpoint.checkpoint import Checkpoint, open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe
from smoe.prep.pack.pack import chosen_encoding, unpacked
from smoe.prep.progress import Progress
from smoe.prep.workdir import FINISHED, MARKER

QUIET = Progress(True)


class Exports:
    """Backbones by checkpoint and precision, in a `directory` that all processes of a run share."""

    def __init__(self, directory: Path):
        self._directory = directory

    def build(
        self, model: Path, output: Path, calibration: Calibration | None, recipe: Recipe
    ) -> Built:
        """`smoe.prep.build.build`, which goes on after the export where one is known."""
        self.begin(model, output, recipe)
        return building.build(model, output, calibration, recipe, progress=QUIET)

    def begin(self, model: Path, output: Path, recipe: Recipe) -> None:
        """Leave what a build of `output` by this `recipe` leaves when it is interrupted right after
        its export: nothing where the backbone's bits learn from the build's own text."""
        if recipe.backbone == "int4":
            return
        checkpoint = open_checkpoint(model, QUIET)
        known = self._known(checkpoint, model, recipe.backbone)
        partial = output.with_name(output.name + ".partial")
        shutil.copytree(known / "exported", partial)
        manifest = Manifest.parse((known / "export.json").read_text(), "export.json")
        encoding = chosen_encoding(checkpoint, recipe.encoding, QUIET)
        manifest = dataclasses.replace(manifest, experts=unpacked(checkpoint, encoding))
        (partial / FINISHED).mkdir()
        (partial / FINISHED / "export.json").write_text(manifest.to_json())
        (partial / MARKER).touch()

    def _known(self, checkpoint: Checkpoint, model: Path, precision: str) -> Path:
        """Where that export is, which is made once."""
        known = self._directory / f"{_digest(model)}-{precision}"
        self._directory.mkdir(exist_ok=True)
        with open(known.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not known.exists():
                fresh = Path(tempfile.mkdtemp(dir=self._directory))
                checkpoint.move_backbone("cpu")
                experts = unpacked(checkpoint, "f32")
                manifest = export_checked(checkpoint, fresh / "exported", experts, precision, QUIET)
                (fresh / "export.json").write_text(manifest.to_json())
                fresh.rename(known)
        return known


def _digest(directory: Path) -> str:
    """Of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
