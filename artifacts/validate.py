"""The checks of the door: a bundle is untrusted, and everything in it is looked at here, once,
before it is used.

Each check says what is wrong as a sentence (file, field, found, wanted, what to do);
`bundle.open_bundle` runs them all and raises them together. Sizes are checked always; bytes
(SHA-256, scales) only when asked, since that reads them all.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from smoe.artifacts import program_checks, safetensors_file, tables
from smoe.artifacts.encodings import encoding_named, float_fields
from smoe.artifacts.errors import BundleError
from smoe.artifacts.layout import RecordLayout
from smoe.artifacts.licence import Licence
from smoe.artifacts.manifest import ACTIVATIONS, KINDS, STATE_KINDS, File, Manifest
from smoe.artifacts.program import PROGRAM, PROGRAM_WEIGHTS, Program
from smoe.artifacts.shard import shard_start

MAX_MANIFEST = MAX_PROGRAM = 64 << 20
MAX_STATE = 1 << 40  # bytes of one sequence at its longest, in the widest dtype
NORMALISERS = ("none", "sum", "softmax")
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
PROGRAMS = {PROGRAM, PROGRAM_WEIGHTS}
STUDY_FILES = ("trace.safetensors", "profile.json", "report.html")


def read_manifest(path: Path) -> Manifest:
    """manifest.json of the bundle at `path`, its fields checked but no other file looked at."""
    file = path / "manifest.json"
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}; a bundle is the directory that `smoe-prep build` wrote.")
    if not file.is_file():
        checkpoint = (path / "config.json").is_file()
        raise BundleError(
            f"{path} has no manifest.json; it is not a smoe bundle, "
            + (
                "but looks like a checkpoint, which `smoe-prep build` makes a bundle of."
                if checkpoint
                else "or its build did not finish."
            )
        )
    if file.stat().st_size > MAX_MANIFEST:
        raise BundleError(
            f"{file} has {file.stat().st_size} bytes, more than {MAX_MANIFEST}; it is damaged."
        )
    return Manifest.parse(_text(file), str(file))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{file} is not UTF-8; copy the bundle again.") from error


def manifest_problems(manifest: Manifest) -> Iterator[str]:
    """Everything in the manifest that contradicts itself or the format, as sentences."""
    yield from _geometry(manifest)
    yield from _wiring(manifest)
    yield from _states(manifest)


def _geometry(m: Manifest) -> Iterator[str]:
    def bad(what: str, value: object, expected: str) -> str:
        return f"manifest.json: {what} is {value!r}, {expected} was wanted; build the bundle again."

    if not m.layers or len(m.layers) > 4096:
        yield bad("the number of layers", len(m.layers), "1 to 4096")
    if not 1 <= m.model.vocabulary < 2**31 or not 1 <= m.model.context < 2**31:
        yield bad("vocabulary, context", (m.model.vocabulary, m.model.context), "1 to 2^31")
    if m.experts.page < 512 or m.experts.page > 1 << 24 or m.experts.page & (m.experts.page - 1):
        yield bad("experts.page", m.experts.page, "a power of two from 512 to 16 MiB")
    if not 1 <= m.backbone.heads <= 65536:
        yield bad("backbone.heads", m.backbone.heads, "1 to 65536")
    if m.backbone.state_kind not in ("", *STATE_KINDS):
        yield bad("backbone.state_kind", m.backbone.state_kind, f"one of {STATE_KINDS} or nothing")
    gate = m.experts.gate
    named = gate.kind in ("gated", "plain", "bounded")
    if gate.kind not in KINDS or (named and gate.activation not in ACTIVATIONS):
        yield bad(
            "experts.gate",
            (gate.kind, gate.activation),
            f"one of {KINDS} with one of {ACTIVATIONS}",
        )
    elif gate.kind not in ("gated", "plain"):
        numbers = [gate.limit, *([gate.alpha] if gate.kind != "bounded" else [])]
        if not all(
            1e-6 < number < 1e6 for number in numbers
        ):  # far inside float32, in which they are used
            yield bad(
                "experts.gate limit, alpha", (gate.limit, gate.alpha), "numbers from 1e-6 to 1e6"
            )
    try:
        if encoding_named(m.experts.encoding).name != m.experts.encoding:
            yield bad(
                "experts.encoding", m.experts.encoding, encoding_named(m.experts.encoding).name
            )
    except BundleError as error:
        yield f"manifest.json: {error}"
    for i, layer in enumerate(m.layers):
        if not 1 <= layer.experts <= 32767:  # ids are int16
            yield bad(f"layers[{i}].experts", layer.experts, "1 to 32767")
        if not 1 <= layer.top_k <= layer.experts:
            yield bad(f"layers[{i}].top_k", layer.top_k, f"1 to {layer.experts}")
        if not (1 <= layer.hidden < 2**24 and 1 <= layer.width < 2**24):
            yield bad(f"layers[{i}] hidden, width", (layer.hidden, layer.width), "1 to 2^24")
        if layer.routing and layer.routing.normaliser not in NORMALISERS:
            yield bad(
                f"layers[{i}].routing.normaliser", layer.routing.normaliser, f"one of {NORMALISERS}"
            )


def _wiring(m: Manifest) -> Iterator[str]:
    """Every input of a segment must have a source before it, so that running never looks for what
    is not there."""
    known = {"input_ids", "past_length", "logits_to_keep"} | {
        state.input for state in m.backbone.state
    }
    weights = {w.name for w in m.backbone.initializers}
    wanted = m.backbone.prelude + len(m.layers) + 1
    if len(m.backbone.segments) != wanted:
        yield (
            f"manifest.json: {len(m.backbone.segments)} segments for {len(m.layers)} layers, "
            f"{wanted} were wanted; build the bundle again."
        )
        return
    for i, segment in enumerate(m.backbone.segments):
        lost = [name for name in segment.inputs if name not in known]
        if lost:
            yield (
                f"manifest.json: segment {i} takes {lost[0]!r}, which nothing before gives; build "
                "the bundle again."
            )
        if not weights.issuperset(segment.weights):
            yield (
                f"manifest.json: segment {i} names weights that are not listed; build the bundle "
                "again."
            )
        known |= set(segment.outputs)
        layer = i - m.backbone.prelude
        if 0 <= layer < len(m.layers):
            wires = m.layers[layer].wires
            needed = [wires.hidden, wires.ids, wires.weights]
            if m.layers[layer].routing:
                needed += [wires.scores, wires.raw]
            absent = [name for name in needed if name not in known]
            if absent:
                yield (
                    f"manifest.json: layer {layer} takes {absent[0]!r}, which no segment gives; "
                    "build the bundle again."
                )
            known.add(wires.output)
    if "logits" not in m.backbone.segments[-1].outputs:
        yield "manifest.json: the last segment does not give 'logits'; build the bundle again."


def _states(m: Manifest) -> Iterator[str]:
    """The state of a sequence: of segments that there are, in sizes that a machine can have."""
    total = 0
    for state in m.backbone.state:
        total += math.prod((*state.shape, m.model.context if state.growing >= 0 else 1, 8))
        if state.dtype not in safetensors_file.DTYPES:
            yield (
                f"manifest.json: state {state.input!r} has dtype {state.dtype!r}; build the bundle "
                "again."
            )
        if not 0 <= state.segment < len(m.backbone.segments):
            yield (
                f"manifest.json: state {state.input!r} belongs to segment {state.segment}, which "
                "does not exist."
            )
        elif state.output not in m.backbone.segments[state.segment].outputs or state.growing >= len(
            state.shape
        ):
            yield (
                f"manifest.json: state {state.input!r} has no such output or axis; build the "
                "bundle again."
            )
        if any(size < 0 or size >= 2**31 for size in state.shape) or len(state.shape) > 8:
            yield (
                f"manifest.json: state {state.input!r} has shape {state.shape}; build the bundle "
                "again."
            )
    if total > MAX_STATE:
        yield (
            f"manifest.json: the state of one sequence may take {total} bytes, more than "
            f"{MAX_STATE}; do not trust it."
        )


def listing_problems(m: Manifest) -> Iterator[str]:
    """What the manifest lists and no bundle has, or has outside itself, and what it fails to
    list."""
    required, optional = _parts(m)
    if PROGRAMS & m.files.keys():  # both or none
        required |= PROGRAMS
    for name in sorted(required - set(m.files)):
        yield f"manifest.json: files does not list {name}; build the bundle again."
    for name in m.files:
        pure = PurePosixPath(name)
        if (
            pure.is_absolute()
            or ".." in pure.parts
            or "\0" in name
            or not re.fullmatch(r"[\w./-]{1,200}", name)
        ):
            yield (
                f"manifest.json: files names {name[:80]!r}, a path outside the bundle; do not "
                "trust this bundle."
            )
        elif name not in required | optional:
            yield (
                f"manifest.json: files lists {name}, which no part of a bundle is; build the "
                "bundle again."
            )


def _parts(m: Manifest) -> tuple[set[str], set[str]]:
    """The files that the bundle must have, and those that it may have."""
    required = _graphs(m) | {m.shard(i) for i in range(len(m.layers))}
    optional = {"tables.safetensors", f"{m.study}tables.safetensors", *TEXT_FILES, *PROGRAMS}
    optional |= {tables.BITS_FILE, *(m.study + name for name in STUDY_FILES)}
    return required, optional


def _graphs(m: Manifest) -> set[str]:
    """The segments and their weights."""
    return {segment.file for segment in m.backbone.segments} | {m.backbone.weights}


def has_graphs(path: Path, m: Manifest) -> bool:
    """Whether any of the backbone's graphs or their weights is there. A device that runs the whole
    program needs none."""
    return any(os.path.lexists(path / name) for name in _graphs(m))


def file_problems(path: Path, m: Manifest, hashes: bool = False) -> Iterator[str]:
    """Every file that is missing, of another size, or outside the bundle; with `hashes` of another
    SHA-256."""
    wrong = list(listing_problems(m))
    if wrong:  # names that are not to be touched
        yield from wrong
        return
    stayed = _graphs(m) if PROGRAM in m.files and not has_graphs(path, m) else set()
    for name, file in m.files.items():
        travels = name not in stayed and not (m.study and name.startswith(m.study))
        if not travels and not os.path.lexists(path / name):
            continue
        yield from _file_problems(path, name, file, hashes)
    for name, file in Licence.of(m).files.items():
        if hashes or os.path.lexists(path / name):  # a bundle runs without
            yield from _file_problems(path, name, file, hashes)


def _file_problems(path: Path, name: str, file: File, hashes: bool) -> Iterator[str]:
    if not (path / name).is_file() or (path / name).resolve() != path.resolve() / name:
        yield f"{name} is missing or not a plain file of the bundle; copy the bundle again."
    elif (size := (path / name).stat().st_size) != file.size:
        yield f"{name} has {size} bytes, the manifest wants {file.size}; copy the bundle again."
    elif hashes and (digest := sha256(path / name)) != file.sha256:
        yield (
            f"{name} has SHA-256 {digest[:12]}…, the manifest {file.sha256[:12]}…; copy the "
            "bundle again."
        )


def shard_start_checked(
    path: Path, m: Manifest, layer: int, layout: RecordLayout, scales: bool = False
) -> int:
    """Where record 0 of a shard begins; with `scales` every record's floats are read and must be
    finite."""
    start = shard_start(path / m.shard(layer), layout, m.experts.page, m.layers[layer].experts)
    if not scales:
        return start
    with open(path / m.shard(layer), "rb") as file:
        for expert in range(m.layers[layer].experts):
            for field in float_fields(layout):
                file.seek(start + expert * layout.nbytes + field.offset)
                if not all_finite(file.read(field.nbytes), field.dtype):
                    raise BundleError(
                        f"{m.shard(layer)}: {field.name} of expert {expert} holds values that are "
                        "not finite; copy the "
                        "bundle again, or build it again."
                    )
    return start


def all_finite(data: bytes | np.ndarray, dtype: str) -> bool:
    """Whether no exponent of F32 or BF16 values is all ones, as those of infinities and NaNs
    are."""
    if dtype == "BF16":
        return bool((np.frombuffer(data, np.uint16) & 0x7F80).max(initial=0) < 0x7F80)
    return bool((np.frombuffer(data, np.uint32) & 0x7F800000).max(initial=0) < 0x7F800000)


def check_weights(m: Manifest) -> None:
    """The backbone's weights lie inside their file and fill it; a `BundleError` if not."""
    size, end = m.files[m.backbone.weights].size, 0
    for w in m.backbone.initializers:
        dtype = safetensors_file.DTYPES.get(w.dtype)
        nbytes = dtype.itemsize if dtype else 0
        for extent in w.shape:
            nbytes *= extent
        end = max(end, w.offset + nbytes)
        outside = w.offset < 0 or w.offset + nbytes > size or w.offset % 64
        if dtype is None or min(w.shape, default=1) < 1 or nbytes != w.nbytes or outside:
            raise BundleError(
                f"manifest.json: weight {w.name!r} is {w.dtype} {list(w.shape)} at {w.offset}, "
                "outside "
                f"{m.backbone.weights} of {size} bytes or not of that size; build the bundle again."
            )
    if end != size:  # the runtime reads the file whole
        raise BundleError(
            f"{m.backbone.weights} has {size} bytes, its last weight ends at {end}; build it again."
        )


def open_program(path: Path, m: Manifest) -> Program | None:
    """The program of the bundle's backbone, its table checked in full; None where there is none.
    A `BundleError` that lists what is wrong."""
    if PROGRAM not in m.files:
        return None
    if m.files[PROGRAM].size > MAX_PROGRAM:
        raise BundleError(
            f"{PROGRAM} has {m.files[PROGRAM].size} bytes, more than {MAX_PROGRAM}; it is damaged."
        )
    program = Program.parse(_text(path / PROGRAM), PROGRAM)
    wrong = list(program_checks.problems(program, m, m.files[PROGRAM_WEIGHTS].size))
    unknown = [number for number, part in enumerate(program.parts) if part.ops is None]
    if unknown and not has_graphs(path, m):
        wrong.append(
            f"{m.backbone.weights} and the graphs beside it are missing, and {PROGRAM} does not "
            f"know segment {unknown[0]}; copy the bundle again."
        )
    if wrong:
        raise BundleError("\n".join(wrong))
    return program


def open_tables(path: Path, m: Manifest) -> tables.Tables:
    """The bundle's tables, their headers checked; none where the manifest does not list them."""
    experts, hidden = [layer.experts for layer in m.layers], [layer.hidden for layer in m.layers]
    levels = encoding_named(m.experts.encoding).levels
    files: dict[Path, Collection[str]] = {}
    if "tables.safetensors" in m.files:
        files[path / "tables.safetensors"] = tables.names_in(False) if m.study else tables.TABLES
    study = study_file(path, m, "tables.safetensors") if m.study else None
    if study:
        files[study] = tables.names_in(True)
    if tables.BITS_FILE in m.files:
        files[path / tables.BITS_FILE] = tables.BITS
    return tables.Tables(files, experts, levels, hidden)


def study_file(path: Path, m: Manifest, name: str) -> Path | None:
    """A file of the bundle's study, if the manifest lists it and it is there."""
    listed = m.study + name in m.files and os.path.lexists(path / m.study / name)
    return path / m.study / name if listed else None


def check_trace(path: Path, m: Manifest) -> None:
    """The header of the bundle's trace, if it has one."""
    trace = study_file(path, m, "trace.safetensors")
    if trace:
        tables.check_trace(trace, [(layer.experts, layer.top_k) for layer in m.layers])


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def file_at(path: Path) -> File:
    """What a manifest says of the file at `path`."""
    return File(size=path.stat().st_size, sha256=sha256(path))
