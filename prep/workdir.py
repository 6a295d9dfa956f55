"""What an interrupted run leaves, so that the next one goes on: a directory beside the output,
finished layers in it.

Everything is written under another name and renamed when it is whole, so that whatever carries its
final name can be trusted after a kill at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts import safetensors_file
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress
from smoe.runtime.system import aligned

# In a directory that is being written: it is ours, held by the process that writes, and says with
# which settings.
MARKER = "smoe-prep.lock"
FINISHED = "finished"  # a folder for what later stages or runs need, and the output does not
BLOCK = 4 << 20  # bytes written at once


@contextlib.contextmanager
def beside(output: Path, settings: dict[str, str], progress: Progress) -> Iterator[Path]:
    """A directory to write into that becomes `output` when the block ends well.

    If it does not, what is finished stays for the next run with the same `settings`; with others
    that is a `PrepError` which names both. `output` itself is never overwritten.
    """
    partial = _partial(output)
    with open(partial / MARKER, "a+", encoding="utf-8") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepError(
                f"Another smoe-prep is writing {output}; wait for it, or give another -o."
            ) from error
        _same_settings(marker, partial, settings)
        for left in partial.rglob("*.part"):
            left.unlink()
        try:
            yield partial
        except BaseException:
            if any(path.is_file() and path.name != MARKER for path in partial.rglob("*")):
                progress.say(
                    f"What is finished is kept in {partial}; the same command goes on from there."
                )
            else:
                shutil.rmtree(partial)
            raise
        shutil.rmtree(partial / FINISHED, ignore_errors=True)
        partial.rename(output)
        (output / MARKER).unlink(missing_ok=True)


def refuse_existing(output: Path) -> None:
    """A `PrepError` if `output` cannot become a new directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (output / MARKER).unlink()  # a run was killed when all was done but this
    if output.exists() or output.is_symlink():
        raise PrepError(f"{output} exists; smoe does not overwrite. Remove it, or give another -o.")
    if not output.parent.is_dir():
        raise PrepError(f"{output.parent} is not a directory; make it first, or give another -o.")


def _partial(output: Path) -> Path:
    refuse_existing(output)
    partial = output.with_name(output.name + ".partial")
    if partial.exists() and not (partial / MARKER).is_file() and any(partial.iterdir()):
        raise PrepError(f"{partial} is in the way and not smoe's; move it, or give another -o.")
    partial.mkdir(exist_ok=True)
    return partial


def _same_settings(marker, partial: Path, settings: dict[str, str]) -> None:
    """Write the settings down, or compare them with those that the directory was begun with."""
    marker.seek(0)
    try:
        begun = json.loads(marker.read() or "null")
    except ValueError:
        begun = None  # killed while they were written: nothing else is there yet
    if begun is None:
        marker.truncate(0)
        marker.write(json.dumps(settings, indent=1))
        marker.flush()
        os.fsync(marker.fileno())
        return
    for name in sorted({*begun, *settings}):
        if begun.get(name) != settings.get(name):
            raise PrepError(
                f"{partial} was begun with {name} {begun.get(name)}, now it is "
                f"{settings.get(name)}; run it with the "
                "same settings to go on, or remove that directory to start again."
            )


def refuse_full_disk(partial: Path, needed: int) -> None:
    """A `PrepError` if what is still to be written of `needed` bytes does not fit on the disk of
    `partial`."""
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial).free
    if needed - there > free:
        raise PrepError(
            f"{partial.parent} has {free / 1e6:.0f} MB free, about {(needed - there) / 1e6:.0f} "
            "MB are needed; make "
            "room, or give another -o."
        )


class FinishedLayers:
    """Layers that a sweep is done with, in `directory`: what its observers leave of each, and the
    experts' outputs, which later layers need."""

    def __init__(self, directory: Path):
        self.directory = directory / FINISHED / "sweep"  # files without a name may lie there too
        self.directory.mkdir(parents=True, exist_ok=True)
        self._writer = ThreadPoolExecutor(1)  # waits for the disk while the next layer is computed
        self._written: dict[int, Future] = {}  # by layer

    def __enter__(self) -> FinishedLayers:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()  # what is being written gets finished, whatever failed after it

    def known(self, layer: int) -> dict[str, np.ndarray] | None:
        """What `keep` was given of a layer, or None if it is not finished."""
        self._settle(layer)
        file = self.directory / f"{layer:02d}.known"
        if not file.exists():
            return None
        return {name: array.copy() for name, array in safetensors_file.load(file).items()}

    def outputs(
        self, layer: int, shapes: Sequence[torch.Size], device: str
    ) -> Iterator[torch.Tensor]:
        """What `keep_outputs` was given of a layer, float32, in pieces of these shapes."""
        with open(self.directory / f"{layer:02d}.outputs", "rb") as file:
            for shape in shapes:
                yield self._output(file, shape).to(device)

    def _output(self, file, shape: torch.Size) -> torch.Tensor:
        output = np.empty(shape, np.float32)
        if file.readinto(output.reshape(-1).view(np.uint8).data) != output.nbytes:
            partial = self.directory.parent.parent
            raise PrepError(f"{file.name} is too short; remove {partial} and start again.")
        return torch.from_numpy(output)

    def keep_outputs(self, layer: int, outputs: Iterable[torch.Tensor]) -> None:
        """Write the experts' outputs of a layer, before `keep`."""
        with _Direct(self.directory / f"{layer:02d}.outputs") as opened:
            for output in outputs:
                opened.write(output.cpu().float().contiguous().numpy().reshape(-1).view(np.uint8))

    def keep(self, layer: int, known: dict[str, np.ndarray]) -> None:
        """Keep a layer. That it is finished is on the disk after all else, and soon."""
        file = self.directory / f"{layer:02d}.outputs"
        self._settle(layer - 1)
        self._written[layer] = self._writer.submit(self._finish, layer, file, known)

    def _finish(self, layer: int, outputs: Path, known: dict[str, np.ndarray]) -> None:
        with open(outputs, "rb") as opened:
            os.fsync(opened.fileno())
        safetensors_file.save(self.directory / f"{layer:02d}.known", known)

    def _settle(self, layer: int) -> None:
        """Wait until `layer` is written; what went wrong there is said now."""
        if layer in self._written:
            self._written.pop(layer).result()

    def clear(self) -> None:
        """The sweep's results are written; its layers are needed no more."""
        for layer in list(self._written):
            self._settle(layer)
        shutil.rmtree(self.directory, ignore_errors=True)


class _Direct:
    """A file that is written past the page cache where that can be: emptying it takes the
    processors from the model."""

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError:
            self._file = os.open(path, flags, 0o666)
        self._block = aligned(1, BLOCK)[0]
        self._filled = 0

    def __enter__(self) -> _Direct:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                fcntl.fcntl(self._file, fcntl.F_SETFL, 0)  # the rest is no whole number of sectors
                self._flush()
        finally:
            os.close(self._file)

    def write(self, data: np.ndarray) -> None:
        """Append uint8 `[n]`."""
        while len(data):
            room = min(BLOCK - self._filled, len(data))
            self._block[self._filled : self._filled + room] = data[:room]
            self._filled, data = self._filled + room, data[room:]
            if self._filled == BLOCK:
                self._flush()

    def _flush(self) -> None:
        left = self._block[: self._filled]
        while len(left):
            left = left[os.write(self._file, left) :]
        self._filled = 0


def settle(file: Path) -> None:
    """Onto the disk, before a manifest says that it is there."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
