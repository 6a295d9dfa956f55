"""The export of a large backbone in a process of its own, since the exporter holds the weights
twice and leaves 0.2 to 0.3 GB behind; ours lets its own go before."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from smoe.artifacts import SmoeError
from smoe.artifacts.errors import printable
from smoe.artifacts.manifest import ExpertActivation, Experts, Manifest
from smoe.prep.backbone.checked import export_checked
from smoe.prep.checkpoint.checkpoint import Checkpoint, open_checkpoint
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress

LARGE = 256 << 20  # bytes of a backbone in memory: less is exported here, which takes seconds less
REFUSED = 3  # the exit status that says that the reason is on stdout
# Python looks for modules in the directory where it is started too, which may be a checkpoint, and
# whose code is not to run.
COMMAND = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from smoe.prep.backbone.alone import main; sys.exit(main())"
)
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def export_apart(
    checkpoint: Checkpoint,
    directory: Path,
    experts: Experts,
    precision: str,
    progress: Progress,
    large: int = LARGE,
) -> Manifest:
    """`export_checked`, of a backbone of `large` bytes and more in another process; `checkpoint` is
    then without its backbone. It ends when this one does."""
    if checkpoint.backbone_bytes < large:
        checkpoint.move_backbone("cpu")
        return export_checked(checkpoint, directory, experts, precision, progress)
    checkpoint.forget_backbone()
    request = {
        "path": str(checkpoint.path),
        "directory": str(directory),
        "experts": dataclasses.asdict(experts),
        "precision": precision,
        "quiet": progress.quiet,
        "parent": os.getpid(),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode == REFUSED:
        raise PrepError(done.stdout)
    if done.returncode:
        killed = "; it may have been too large for the memory" if done.returncode < 0 else ""
        raise PrepError(
            f"{checkpoint.path}: the process that exports the backbone ended with "
            f"{done.returncode}{killed}. The same command goes on from there."
        )
    return Manifest.parse(done.stdout, "the export's answer")


def main() -> int:
    """In the process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts the build interrupts our parent
    request = json.load(sys.stdin)
    _end_with(request["parent"])
    experts = request["experts"]
    experts["gate"] = ExpertActivation(**experts["gate"])
    progress = Progress(quiet=request["quiet"])
    try:
        checkpoint = open_checkpoint(request["path"], progress)
        manifest = export_checked(
            checkpoint, Path(request["directory"]), Experts(**experts), request["precision"],
            progress,
        )  # fmt: skip
    except (SmoeError, OSError) as error:
        print(printable(str(error)), end="")
        return REFUSED
    print(manifest.to_json())
    return 0


def _end_with(parent: int) -> None:
    """A run that is killed leaves nobody who writes into its directory. Linux alone can do it."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("The process that asked for this export is gone.")
