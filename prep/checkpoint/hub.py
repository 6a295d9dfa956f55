"""Checkpoints by name, ORG/NAME[@REVISION]: what a build needs of a repository, in the cache that
other programs use as well, and what can be known of a checkpoint before its weights are fetched.

Code in a repository is not even fetched.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer

from smoe.artifacts.errors import first_line
from smoe.prep.checkpoint.licence import CARD, is_licence
from smoe.prep.checkpoint.weights import (
    INDEX,
    Header,
    Weights,
    open_weights,
    weight_files,
    weights_of,
)
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress
from smoe.runtime.hub import Name, again, asking, download, first_file, refuse_full_disk, size_of

CONFIG = "config.json"
SMALL = (".json", ".jinja", ".model", ".tiktoken", ".txt")  # configs, tokenizers and templates
TEMPLATES = "additional_chat_templates/"
SHA256 = re.compile(r"[0-9a-f]{64}")
AT_ONCE = 8  # headers that are asked for


@dataclass(frozen=True)
class Remote:
    """A checkpoint in a repository. `path` is its folder in the cache, where config.json is and
    what was fetched before; `files` are the sizes of all that the repository has in its own folder,
    or None where the hub cannot be reached."""

    name: Name
    path: Path
    files: dict[str, int] | None

    @classmethod
    def of(cls, model: str | Path) -> Remote | None:
        """The checkpoint that `model` names; None if it is a path. A `PrepError` if there is none,
        or it cannot be seen."""
        name = Name.of(model)
        if name is None:
            return None
        with asking(name, PrepError, "prep") as hub:
            config, answers = first_file(hub, name, CONFIG)
            path = config.parent
            return cls(name, path, _listed(hub, name, path.name) if answers else None)

    def headers(self, quantiser: HfQuantizer | None) -> Weights:
        """The tensors of the checkpoint, which `quantiser` decodes, from the headers of its files,
        of which no more is fetched."""
        if self.files is None:
            self._refuse_without_weights()
            return open_weights(self.path, quantiser)
        with asking(self.name, PrepError, "prep") as hub:
            names = self._weights(hub)
            if all((self.path / name).is_file() for name in names):
                return open_weights(self.path, quantiser)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                headers = list(pool.map(lambda name: self._header(hub, name), names))
        return weights_of(self.path, dict(zip(names, headers, strict=True)), quantiser)

    def fetch(self, progress: Progress) -> Path:
        """The directory of the checkpoint, once all that a build needs of it is there."""
        if self.files is None:
            progress.say(f"{self.name}: the hub does not answer; what is in the cache is used")
            return self.path
        with asking(self.name, PrepError, "prep") as hub:
            weights = self._weights(hub)
            beside = [name for name in self.files if _is_small(name)]
            missing = [name for name in [*beside, *weights] if not (self.path / name).is_file()]
            if missing:
                needed = sum(self.files[name] for name in missing)
                refuse_full_disk(self.name, self.path, needed, PrepError)
                progress.say(
                    f"{self.name}: {len(missing)} files, {size_of(needed)}, to {self.path}"
                )
            for name in missing:
                if name in weights:
                    self._fetch_weights(hub, name)
                self._cached(hub, name)
        return self.path

    def _refuse_without_weights(self) -> None:
        """A `PrepError` if the hub does not answer, and the cache has the config only, or weights
        in part."""
        there = [file.name for file in self.path.iterdir()]
        try:
            whole = set(weight_files(self.path, there)) <= set(there)
        except PrepError:
            whole = False
        if not whole:
            raise PrepError(
                f"{self.name} is not whole in {self.path}, and the hub does not answer; run this "
                "again with a network."
            )

    def _weights(self, hub: Any) -> list[str]:
        """The names of the weight files; the repository has them all."""
        assert self.files is not None
        if INDEX in self.files:
            self._cached(hub, INDEX)
        names = weight_files(self.path, self.files)
        gone = [name for name in names if name not in self.files]
        if gone:
            raise PrepError(
                f"{self.name}: {len(gone)} of {len(names)} weight files are not in the repository, "
                f"{gone[0]} first; ask its owner for them, or take another revision."
            )
        return names

    def _cached(self, hub: Any, name: str) -> None:
        """See to it that a file is in the hub's cache."""
        again(lambda: hub.hf_hub_download(self.name.repository, name, revision=self.path.name))

    def _header(self, hub: Any, name: str) -> Header:
        ask = hub.HfApi().parse_safetensors_file_metadata
        try:
            parsed = again(lambda: ask(self.name.repository, name, revision=self.path.name))
            header = {n: (str(t.dtype), tuple(t.shape)) for n, t in parsed.tensors.items()}
        except (TypeError, AttributeError) as error:  # other JSON than a header has
            raise ValueError(f"{name} has no header of safetensors ({error}).") from error
        sizes = (size for _, shape in header.values() for size in shape)
        if not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
            raise ValueError(f"{name} has a tensor of a size that none has.")
        return header

    def _fetch_weights(self, hub: Any, name: str) -> None:
        """Put a file where the cache has those of its content, so that it is only linked after."""
        url = hub.hf_hub_url(self.name.repository, name, revision=self.path.name)
        found = again(lambda: hub.get_hf_file_metadata(url))
        blob = self.path.parents[1] / "blobs" / str(found.etag)
        if found.size and SHA256.fullmatch(blob.name) and not blob.exists():
            download(hub, self.name, self.path.name, name, blob, found.size, blob.name)


def _listed(hub: Any, name: Name, commit: str) -> dict[str, int]:
    """The files in a repository's own folder, and its chat templates, and their sizes."""
    ask = hub.HfApi().model_info
    try:
        found = again(lambda: ask(name.repository, revision=commit, files_metadata=True))
        files = {s.rfilename: s.size or 0 for s in found.siblings or ()}
    except (TypeError, AttributeError, KeyError) as error:  # other JSON than a hub's
        raise ValueError(f"its list of files is none ({first_line(error)}).") from error
    if not all(isinstance(n, str) and type(size) is int for n, size in files.items()):
        raise ValueError("its list of files has names or sizes that are none.")
    return {n: size for n, size in files.items() if "/" not in n or n.startswith(TEMPLATES)}


def _is_small(name: str) -> bool:
    return name.endswith(SMALL) or name == CARD or is_licence(name)


def origin(path: Path) -> str:
    """What a bundle says of where its checkpoint is from: a folder of the hub's cache is named as
    its repository and commit, any other by itself."""
    parts = path.resolve().parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return f"{parts[-3].removeprefix('models--').replace('--', '/')}@{parts[-1]}"
    return parts[-1] if parts else ""
