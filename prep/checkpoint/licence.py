"""The licence of a checkpoint, which travels with every bundle of it: the texts that lie beside its
weights, and what its model card says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from smoe.artifacts.errors import first_line
from smoe.artifacts.licence import FOLDER, Licence
from smoe.artifacts.validate import file_at
from smoe.prep.progress import Progress

TEXTS = (
    "LICENSE", "LICENCE", "MODEL_LICENSE", "COPYING", "NOTICE", "THIRD_PARTY", "TERMS",
    "USE_POLICY", "USAGE_POLICY",
)  # fmt: skip
CARD = "README.md"


def copy_licence(checkpoint: Path, bundle: Path, progress: Progress) -> Licence:
    """Copy the licence texts of `checkpoint` into `bundle`; what they are, and what the card
    says."""
    files = {}
    for file in sorted(checkpoint.iterdir()):
        if is_licence(file.name) and file.is_file():
            name = f"{FOLDER}/{re.sub(r'[^A-Za-z0-9_.-]', '_', file.name)[:100]}"
            while name in files:
                name = f"{name[:-1]}_"
            (bundle / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(file, bundle / name)
            files[name] = file_at(bundle / name)
    return Licence(card=_of_card(checkpoint / CARD, progress), files=files)


def is_licence(name: str) -> bool:
    """Whether a file of this name says under which terms others may be used."""
    return name.upper().startswith(TEXTS)


def _of_card(card: Path, progress: Progress) -> str:
    """What the front matter of a model card says of the licence, in one line; "" if nothing."""
    try:
        said = metadata_load(card) if card.is_file() else None
    except (yaml.YAMLError, ValueError) as error:
        progress.say(f"licence: {card} has no front matter that can be read: {first_line(error)}")
        return ""
    said = said or {}
    names = said.get("license") or ""
    if isinstance(names, list):
        names = ", ".join(map(str, names))
    name, link = said.get("license_name"), said.get("license_link")
    words = [str(names), f"({name})" if name else "", str(link) if link else ""]
    return " ".join(" ".join(words).split())
