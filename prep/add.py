"""What a newer smoe-prep gives to a bundle that an older one built, without packing it again. The
manifest is replaced last and at once, so that whatever interrupts, the bundle is what it was."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import Manifest, open_bundle, validate
from smoe.artifacts.errors import as_sentence
from smoe.artifacts.manifest import STUDY_SINCE, VERSION
from smoe.artifacts.program import PROGRAM, PROGRAM_WEIGHTS, Part
from smoe.prep.backbone.check import PARTS, program_differs
from smoe.prep.errors import PrepError
from smoe.prep.program import compile
from smoe.prep.progress import Progress
from smoe.prep.workdir import settle, write_whole


@dataclass(frozen=True)
class Added:
    """A program that a bundle was given: its parts, and the bytes of its files."""

    bundle: Path
    parts: tuple[Part, ...]
    nbytes: int

    def as_dict(self) -> dict:
        reasons = {n: part.reason for n, part in enumerate(self.parts) if part.ops is None}
        return {
            "bundle": str(self.bundle),
            "bytes": self.nbytes,
            "segments": len(self.parts),
            "in_onnx_runtime": reasons,
        }

    def lines(self) -> list[str]:
        known = sum(part.ops is not None for part in self.parts)
        lines = [
            f"{self.bundle}: {known} of {len(self.parts)} segments in the program, "
            f"{self.nbytes / 1e6:.1f} MB"
        ]
        return lines + [
            f"segment {n} stays with ONNX Runtime: {part.reason}"
            for n, part in enumerate(self.parts)
            if part.ops is None
        ]


def add_program(bundle: str | Path, progress: Progress | None = None) -> Added:
    """Compile the segments of the bundle at `bundle` into a program, and list it in the manifest.

    What it computes is compared with ONNX Runtime. A bundle that does not open is a `BundleError`;
    one that has a program already, whose graphs cannot be read, or whose program does something
    else, a `PrepError`.
    """
    bundle, progress = Path(bundle), progress or Progress()
    opened = open_bundle(bundle)
    if opened.program is not None:
        raise PrepError(f"{bundle} has a program already; there is nothing to add.")
    manifest = opened.manifest
    _refuse_full_disk(bundle, manifest.files[manifest.backbone.weights].size)
    with progress.stage("program"), _unlisted(bundle):
        with as_sentence(
            lambda said: PrepError(f"The segments of {bundle} cannot be read: {said}")
        ):
            compile(bundle, manifest.backbone, manifest.layers, manifest.model.context)
        for name in (PROGRAM, PROGRAM_WEIGHTS):
            settle(bundle / name)
        manifest = _with_program(bundle, manifest)
        program = validate.open_program(bundle, manifest)
        assert program is not None
        count = min(sum(PARTS), manifest.model.context)
        ids = np.random.default_rng(0).integers(0, manifest.model.vocabulary, count)
        if why := program_differs(bundle, manifest, program, ids):
            raise PrepError(
                f"The program of {bundle} does not do what its segments do: {why}. It is not "
                "added; the bundle runs as it did."
            )
    write_whole(bundle / "manifest.json", manifest.to_json())
    nbytes = sum(manifest.files[name].size for name in (PROGRAM, PROGRAM_WEIGHTS))
    return Added(bundle, program.parts, nbytes)


def _refuse_full_disk(bundle: Path, needed: int) -> None:
    free = shutil.disk_usage(bundle).free
    if free < needed:
        raise PrepError(
            f"{bundle} has {free / 1e6:.0f} MB free on its disk, a program needs about "
            f"{needed / 1e6:.0f} MB; make room."
        )


@contextlib.contextmanager
def _unlisted(bundle: Path) -> Iterator[None]:
    """While files are written that the manifest does not list yet. What an interrupted run left, or
    a link that leads elsewhere, is removed first; and what this one wrote, if it fails."""
    files = [bundle / PROGRAM, bundle / PROGRAM_WEIGHTS]
    folder = bundle / "backbone"
    if folder.resolve() != bundle.resolve() / "backbone":
        raise PrepError(f"{folder} is a link that leads elsewhere; copy the bundle again.")
    folder.mkdir(exist_ok=True)
    for file in files:
        file.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise


def _with_program(bundle: Path, manifest: Manifest) -> Manifest:
    """The manifest that lists the program. What version 4 changed no program brings along: bundles
    from before keep their version."""
    files = {name: validate.file_at(bundle / name) for name in (PROGRAM, PROGRAM_WEIGHTS)}
    version = VERSION if manifest.version >= STUDY_SINCE else manifest.version
    return dataclasses.replace(manifest, version=version, files=manifest.files | files)
