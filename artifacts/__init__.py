"""The bundle: its bytes, its tables, its validation. What prep and the runtime share; standard
library and NumPy only.

`FORMAT.md` beside this file is the specification; `bundle.open_bundle` is the one door.
"""

from smoe.artifacts.bundle import Bundle, open_bundle
from smoe.artifacts.encodings import record_layout
from smoe.artifacts.errors import BundleError, SmoeError
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.manifest import Manifest

__all__ = [
    "Bundle",
    "BundleError",
    "Manifest",
    "RecordLayout",
    "SmoeError",
    "open_bundle",
    "record_layout",
]
