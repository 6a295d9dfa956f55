"""The bundle: its bytes, its tables, its validation. What prep and the runtime share; standard library and NumPy only.

`FORMAT.md` beside this file is the specification; `validate` is the one door through which a bundle is opened.
"""

from smoe.artifacts.encodings import record_layout
from smoe.artifacts.errors import BundleError, SmoeError
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.manifest import Manifest
from smoe.artifacts.validate import open_bundle, problems

__all__ = [
    "BundleError",
    "Manifest",
    "RecordLayout",
    "SmoeError",
    "open_bundle",
    "problems",
    "record_layout",
]
