"""Models and bundles by name, ORG/NAME[@REVISION]: through `huggingface_hub`, which is imported
only when a name is given, since a device that copies its bundle needs none of it.

Files of gigabytes are fetched here and not by `hf_hub_download`, which begins a file anew in every
process (2.4): what an interrupted call left is gone on with.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from smoe.artifacts.errors import BundleError, SmoeError, first_line
from smoe.artifacts.licence import Licence
from smoe.artifacts.manifest import File, Manifest
from smoe.artifacts.validate import MAX_MANIFEST, listing_problems, read_manifest, sha256
from smoe.runtime.errors import EngineError

T = TypeVar("T")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)
MANIFEST = "manifest.json"
PIPED: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
PATIENCE = 60.0  # seconds without a byte, after which a download is given up
PAUSE = 0.5  # seconds after a break
BUSY = (408, 429, 500, 502, 503, 504)  # answers of a hub that may be asked again
PARTIAL = 206
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


@dataclass(frozen=True)
class Name:
    """A repository of a hub, and a branch, tag or commit of it."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repository + ("" if self.revision == "main" else f"@{self.revision}")

    @classmethod
    def of(cls, given: str | Path) -> Name | None:
        """What a command was given, if it is a name: a path that exists never is."""
        repository, _, revision = str(given).partition("@")
        if os.path.lexists(given) or not REPOSITORY.fullmatch(repository):
            return None
        if len(repository) > 96 or "--" in repository or ".." in repository:
            return None
        if revision and (not REVISION.fullmatch(revision) or ".." in revision):
            return None
        return cls(repository, revision or "main")


@contextlib.contextmanager
def asking(name: Name, refusal: type[SmoeError], extra: str) -> Iterator[Any]:
    """`huggingface_hub`, for the length of the block; what goes wrong there, or that it is not
    installed with the `extra`, is a `refusal` in one sentence."""
    try:
        import huggingface_hub
        import huggingface_hub.errors as errors
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "huggingface_hub":
            raise
        raise refusal(
            f"{name} is no path on this disk; to fetch a model of that name:  pip install "
            f"'smoe[{extra}]'"
        ) from error
    if not hasattr(errors, "RemoteEntryNotFoundError"):  # before version 1
        raise refusal(
            f"{name} is no path on this disk, and huggingface_hub {huggingface_hub.__version__} is "
            f"too old to fetch a model of that name with:  pip install --upgrade 'smoe[{extra}]'"
        )
    try:
        yield huggingface_hub
    except (
        errors.HTTPError,
        errors.SafetensorsParsingError,
        OSError,
        ValueError,
        RuntimeError,  # of what hf_xet does for small files
    ) as error:
        raise refusal(_sentence(name, error, huggingface_hub.constants)) from error


def _sentence(name: Name, error: Exception, constants: Any) -> str:
    """What a failure of `huggingface_hub` means for somebody who gave a name."""
    import huggingface_hub.errors as errors

    hub, repository = constants.ENDPOINT, name.repository
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated: accept its terms at {hub}/{repository}, then log in with `hf "
            "auth login`, and run this again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository} is neither a path on this disk nor a model that {hub} shows you; check "
            "the spelling, or log in with `hf auth login` if it is private."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {name.revision!r}; {hub}/{repository} lists them."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        file = error.response.url.path.rpartition("/")[2]
        return f"{name} at {hub} has no {file}."
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        why = error if error.__cause__ is None else error.__cause__
        return (
            f"{name} is no path on this disk, not whole in {constants.HF_HUB_CACHE}, and {hub} "
            f"does not answer ({first_line(why, 200)}); run this again with a network."
        )
    if getattr(error, "errno", None) == errno.ENOSPC:
        return (
            f"The disk of {constants.HF_HOME} is full; make room, or let HF_HOME name a larger "
            "one, and run this again: it goes on where it stopped."
        )
    if getattr(error, "errno", None) in UNWRITABLE:
        return (
            f"{constants.HF_HOME} cannot be written to ({first_line(error)}); let HF_HOME name a "
            "folder that can."
        )
    if not isinstance(error, OSError | errors.HTTPError | RuntimeError):
        return f"{name} at {hub} cannot be used: {first_line(error)}"
    return (
        f"{name} could not be fetched from {hub}: {first_line(error)} Run this again; it goes on "
        "where it stopped."
    )


def again(call: Callable[[], T]) -> T:
    """What `call` gives. A connection that breaks meanwhile is made again, until nothing came for
    too long."""
    from huggingface_hub.errors import HTTPError

    started = time.monotonic()
    while True:
        try:
            return call()
        except HTTPError as error:
            if not _passing(error) or time.monotonic() - started > PATIENCE:
                raise
            time.sleep(PAUSE)


def _passing(error: Exception) -> bool:
    """Whether a failure may be gone in a second: a break, or an answer that the hub is busy."""
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code in BUSY


def first_file(hub: Any, name: Name, file: str) -> tuple[Path, bool]:
    """The file of a repository that says what it is, in the hub's own cache, and whether the hub
    answers. Where it does not, the file is the one that was fetched before, or an error at once:
    `huggingface_hub` asks again for half a minute, and the name may be a path with a slip."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    url = hub.hf_hub_url(name.repository, file, revision=name.revision)
    fetch = partial(hub.hf_hub_download, name.repository, file, revision=name.revision)
    try:
        size = hub.get_hf_file_metadata(url).size or 0
    except (HTTPError, OfflineModeIsEnabled) as error:
        if not _passing(error):
            raise
        try:
            return Path(fetch(local_files_only=True)), False
        except LocalEntryNotFoundError as none:
            raise none from error
    if size > MAX_MANIFEST:
        raise ValueError(f"{file} has {size} bytes, more than one has.")
    return Path(again(fetch)), True


def refuse_full_disk(name: Name, directory: Path, needed: int, refusal: type[SmoeError]) -> None:
    """A `refusal` if `needed` bytes do not fit on the disk of `directory`."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise refusal(
            f"{name} needs {size_of(needed)} more at {there}, where {size_of(free)} are "
            "free; make room, or let HF_HOME name a larger disk."
        )


def size_of(nbytes: int) -> str:
    """Of what is fetched, for people, in the units of hubs."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def download(
    hub: Any, name: Name, commit: str, file: str, target: Path, size: int, digest: str | None
) -> None:
    """Fetch one file of a repository to `target`, going on from what an earlier call left in
    `target`.part. Bytes with another SHA-256 than `digest`, where one is known, are a ValueError,
    and removed."""
    import fcntl  # only a Unix has it

    url = hub.hf_hub_url(name.repository, file, revision=commit)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with open(part, "ab") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another process is fetching {file}; wait for it.") from error
        if opened.tell() > size:
            opened.truncate(0)
        _persist(url, opened, size, file)
    if digest is not None and (found := sha256(part)) != digest:
        part.unlink()
        raise ValueError(  # not to be asked for again without a word
            f"{file} came with the SHA-256 {found[:12]}…, {digest[:12]}… was wanted; it is "
            "removed. If it comes so again, the repository is damaged: ask its owner."
        )
    os.replace(part, target)


def _persist(url: str, opened: BinaryIO, size: int, file: str) -> None:
    """Fetch the rest of `url` into `opened`. A connection that breaks is made again, as often as it
    takes while anything comes."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import tqdm

    came = time.monotonic()
    before = opened.seek(0, os.SEEK_END)
    with tqdm(  # type: ignore[no-untyped-call]
        desc=file, total=size, initial=before, unit="B", unit_scale=True, disable=None
    ) as bar:  # silent where stderr is no terminal
        while before < size:
            try:
                _rest(url, opened, size, bar)
                if opened.tell() <= before:
                    raise OSError(f"{file} ended after {opened.tell()} of {size} bytes.")
            except HTTPError as error:
                nothing = opened.tell() <= before and time.monotonic() - came > PATIENCE
                if nothing or not _passing(error):
                    raise
                time.sleep(PAUSE)
            if opened.tell() > before:
                came = time.monotonic()
            before = opened.tell()


def _rest(url: str, opened: BinaryIO, size: int, bar: Any) -> None:
    """Append to `opened` what one answer gives of the rest of `url`."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    asked = {"Range": f"bytes={opened.tell()}-", "Accept-Encoding": "identity"}
    headers = build_hf_headers() | asked
    with get_session().stream(
        "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != PARTIAL:  # the whole of it
            bar.update(-opened.tell())
            opened.truncate(0)
        for piece in answer.iter_bytes():
            opened.write(piece)
            bar.update(len(piece))
            if opened.tell() > size:
                opened.truncate(0)
                raise OSError(f"it is longer than {size} bytes.")


def located(bundle: Path) -> Path:
    """The directory of a bundle that is given by path or name. A name is fetched by a process of
    its own: what it takes in memory is not the model's."""
    name = Name.of(bundle)
    if name is None:
        return bundle
    command = [sys.executable, "-m", "smoe.runtime.hub", str(bundle)]
    done = subprocess.run(command, stdout=subprocess.PIPE, **PIPED)
    if done.returncode == 1:
        raise EngineError(done.stdout.strip())
    if done.returncode != 0:
        raise EngineError(f"Fetching {name} ended with status {done.returncode}.")
    return Path(done.stdout.strip())


def fetch_bundle(name: Name, say: Callable[[str], None]) -> Path:
    """Fetch what is missing of the bundle `name`: what its manifest lists, but for what only people
    and `plan` read, each file checked by its SHA-256.

    It lies in a folder named by the manifest's SHA-256, so that a new card in the repository costs
    nothing, and another bundle never mixes with it; its own manifest is written last.
    """
    with asking(name, EngineError, "hub") as hub:
        fetched, answers = _manifest(hub, name)
        commit, text = fetched.parent.name, fetched.read_bytes()
        manifest = _read(name, fetched)
        _refuse(name, list(listing_problems(manifest)))
        digest = hashlib.sha256(text).hexdigest()[:16]
        folder = name.repository.replace("/", "--")
        target = Path(hub.constants.HF_HOME) / "smoe" / folder / digest
        checked = (target / MANIFEST).is_file()
        missing = {
            file: wanted
            for file, wanted in _travelling(manifest).items()
            if not _there(target / file, wanted, checked)
        }
        if missing and not answers:
            raise EngineError(
                f"{name} is not whole in {target}, and {hub.constants.ENDPOINT} does not answer; "
                "run this again with a network."
            )
        if missing:
            needed = sum(max(wanted.size, 0) for wanted in missing.values())
            refuse_full_disk(name, target, needed, EngineError)
            say(f"{name}: {len(missing)} files, {size_of(needed)}, to {target}")
        for file, wanted in missing.items():
            download(hub, name, commit, file, target / file, wanted.size, wanted.sha256)
        if not checked:
            (target / f"{MANIFEST}.part").write_bytes(text)
            os.replace(target / f"{MANIFEST}.part", target / MANIFEST)
    return target


def _manifest(hub: Any, name: Name) -> tuple[Path, bool]:
    """manifest.json of a bundle, in the hub's own cache, and whether the hub answers."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return first_file(hub, name, MANIFEST)
    except RemoteEntryNotFoundError as error:
        raise EngineError(
            f"{name} has no {MANIFEST}, so it is no bundle of smoe. Is it a checkpoint?  smoe-prep "
            f"build {name} -o {name.repository.rpartition('/')[2]}.smoe --calibration SOURCE"
        ) from error


def _read(name: Name, fetched: Path) -> Manifest:
    """The manifest in a file of the hub's cache, which nobody can copy again."""
    try:
        return read_manifest(fetched.parent)
    except BundleError as error:
        why = str(error).replace(f"{fetched}", MANIFEST).partition("; copy")[0].rstrip(".")
        raise EngineError(
            f"{name} is no bundle that this smoe reads: {why}. Ask its owner, or take another "
            "revision."
        ) from error


def _refuse(name: Name, wrong: list[str]) -> None:
    if wrong:
        raise EngineError(f"{name} is not fetched: {wrong[0]}")


def _travelling(manifest: Manifest) -> dict[str, File]:
    study = manifest.study
    files = manifest.files | Licence.of(manifest).files
    return {file: files[file] for file in files if not study or not file.startswith(study)}


def _there(path: Path, wanted: File, checked: bool) -> bool:
    """Whether a file was fetched before: by its size once all were `checked`, else by its bytes."""
    whole = path.is_file() and path.stat().st_size == wanted.size
    return whole and (checked or sha256(path) == wanted.sha256)


def main() -> None:
    """Fetch the bundle that is named, and print where it is; or why not, with status 1."""
    name = Name.of(sys.argv[1])
    assert name is not None and isinstance(sys.stdout, TextIOWrapper)
    sys.stdout.reconfigure(**PIPED)  # what `located` reads
    try:
        print(fetch_bundle(name, lambda line: print(line, file=sys.stderr, flush=True)))
    except SmoeError as error:
        print(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # the other process says so


if __name__ == "__main__":
    main()
