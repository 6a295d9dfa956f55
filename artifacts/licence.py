"""Under which licence a model may be used: the texts that came with its checkpoint, in the folder
`licence/`, and what its model card says.

They are described in the manifest's provenance and not among its files, so that readers from before
there were any still open the bundle. A bundle runs without them; `smoe verify` misses them.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from smoe.artifacts.errors import BundleError
from smoe.artifacts.manifest import File, Manifest

FOLDER = "licence"
CARD, FILES = "licence", "licence_files"  # keys of the provenance
NAME = re.compile(rf"{FOLDER}/(?!\.)[\w.-]{{1,100}}")
SHOWN = 300  # characters of what the card says


@dataclass(frozen=True)
class Licence:
    """`card`: what the model card says, in one line, "" if nothing. `files`: the texts, by their
    name in the bundle."""

    card: str
    files: dict[str, File]

    @classmethod
    def of(cls, manifest: Manifest) -> Licence:
        """That of a bundle; a listing that names anything but files of `licence/` is a
        `BundleError`."""
        card = " ".join(manifest.provenance.get(CARD, "").split())[:SHOWN]
        return cls(card=card, files=_listed(manifest.provenance.get(FILES, "{}")))

    def provenance(self) -> dict[str, str]:
        """What a manifest's provenance says of it."""
        files = {name: asdict(file) for name, file in self.files.items()}
        said = {CARD: self.card} if self.card else {}
        return said | ({FILES: json.dumps(files, sort_keys=True)} if files else {})

    def as_dict(self, bundle: Path) -> dict[str, str]:
        """What people are told of it."""
        names = [
            name if (bundle / name).is_file() else f"{name} (missing)"
            for name in sorted(self.files)
        ]
        return {
            "licence": self.card or "not stated",
            "licence_files": ", ".join(names) or "none",
        }


def _listed(text: str) -> dict[str, File]:
    try:
        listed = json.loads(text)
        files = {
            name: File(size=file["size"], sha256=file["sha256"]) for name, file in listed.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BundleError(_wrong(f"cannot be read ({error!r})"[:200])) from error
    for name, file in files.items():
        if not NAME.fullmatch(name) or type(file.size) is not int or type(file.sha256) is not str:
            raise BundleError(_wrong(f"names {name[:80]!r}, which is no file of {FOLDER}/"))
    return files


def _wrong(what: str) -> str:
    return f"manifest.json: provenance: {FILES} {what}; build the bundle again."
