"""An opened bundle: what the door returns. Past it nothing is parsed, laid out or checked again.

Opening reads the manifest, the header of every shard, that of the tables and the program, each
once, and no weight. What a record's scales hold is looked at when the record is read, not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from smoe.artifacts import validate
from smoe.artifacts.encodings import record_layout
from smoe.artifacts.errors import BundleError
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.manifest import Manifest
from smoe.artifacts.program import Program
from smoe.artifacts.tables import Tables

T = TypeVar("T")
SHOWN = 10  # sentences of one refusal


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed every check.

    `layouts[l]` is the layout of the records of MoE layer l, `starts[l]` the byte of its shard
    where record 0 begins. `tables` reads what a policy asks for, and is empty where the bundle has
    none. `program` is the table of its backbone's operations, where it has one; `graphs` whether
    the backbone's ONNX graphs travelled along, without which the program knows every segment.
    """

    path: Path
    manifest: Manifest
    layouts: tuple[RecordLayout, ...]
    starts: tuple[int, ...]
    tables: Tables
    program: Program | None = None
    graphs: bool = True

    @property
    def levels(self) -> int:
        """Planes of a record, at most."""
        return len(self.layouts[0].levels)

    def shard(self, layer: int) -> Path:
        """The file of a layer's records."""
        return self.path / self.manifest.shard(layer)

    def study(self, name: str) -> Path | None:
        """A file that only people and `plan` read, like "trace.safetensors"; None where it did not
        travel along."""
        return validate.study_file(self.path, self.manifest, name)


def open_bundle(path: str | Path, hashes: bool = False) -> Bundle:
    """The bundle at `path`, if it passes every check; otherwise a `BundleError` that lists what is
    wrong. With `hashes` every byte is read: the SHA-256 of each file, and the scales of each
    record."""
    path = Path(path)
    manifest = validate.read_manifest(path)
    wrong = [*validate.manifest_problems(manifest), *validate.file_problems(path, manifest, hashes)]
    _refuse(wrong)  # what follows would repeat the same faults in other words

    def checked(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except BundleError as error:
            wrong.append(str(error))
            return None

    layouts = layouts_of(manifest)
    start = partial(validate.shard_start_checked, path, manifest, scales=hashes)
    starts = [checked(partial(start, n, layout)) for n, layout in enumerate(layouts)]
    checked(lambda: validate.check_weights(manifest))
    checked(lambda: validate.check_trace(path, manifest))
    tables = checked(lambda: validate.open_tables(path, manifest))
    program = checked(lambda: validate.open_program(path, manifest))
    _refuse(wrong)
    assert tables is not None
    whole = tuple(start for start in starts if start is not None)
    graphs = validate.has_graphs(path, manifest)
    return Bundle(path, manifest, layouts, whole, tables, program, graphs)


def layouts_of(manifest: Manifest) -> tuple[RecordLayout, ...]:
    """The record layout of every layer, each distinct geometry laid out once."""
    experts = manifest.experts
    shapes = [manifest.expert_shape(layer) for layer in range(len(manifest.layers))]
    made = {shape: record_layout(shape, experts.encoding, experts.page) for shape in set(shapes)}
    return tuple(made[shape] for shape in shapes)


def _refuse(wrong: list[str]) -> None:
    if wrong:
        more = f"\n(and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        raise BundleError("\n".join(wrong[:SHOWN]) + more)
