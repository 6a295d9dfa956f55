"""The tables and the trace that a profile makes and a scheduler looks up: names, shapes, dtypes,
units, formulas.

`TABLES`, `BITS` and `TRACE` are the definition; FORMAT.md prints the same list, and a test holds
one against the other. Each MoE layer has its own, under `NN.name`, because layers may differ in
their number of experts E.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import safetensors_file
from smoe.artifacts.errors import BundleError
from smoe.artifacts.manifest import STUDY


@dataclass(frozen=True)
class Table:
    """`shape` is in letters: E experts of this layer, P experts of the previous MoE layer, H
    hidden, R ranks, J levels, T tokens."""

    shape: str
    dtype: str
    unit: str
    formula: str
    optional: bool = False
    study: bool = False  # read by people and `plan`, and by nothing on a device


# How a layer's choice is guessed from so many MoE layers before: the rows and columns of
# `predict_recall`.
PREDICTORS = ("previous", "transition", "router", "linear")
DISTANCES = (1, 2, 3)

TABLES: dict[str, Table] = {
    "counts": Table("E", "I64", "tokens", "how often e was routed to"),
    "gate_mass": Table("E", "F64", "weight", "sum of e's mixing weights"),
    "saliency": Table(
        "E",
        "F64",
        "norm",
        "mean over tokens routed to e of mixing weight x |y_e| (REAP)",
        study=True,
    ),
    "output_norm": Table("E", "F64", "norm", "mean over tokens routed to e of |y_e|", study=True),
    "coactivation": Table("E,E", "I64", "tokens", "tokens routed to both; the diagonal is counts"),
    "transition": Table(
        "P,E", "I64", "tokens", "tokens routed to p in the previous MoE layer and e in this one"
    ),
    "score_similarity": Table(
        "E,E",
        "F32",
        "1",
        "Pearson correlation over tokens of the selection scores",
        True,
        study=True,
    ),
    "output_similarity": Table(
        "E,E", "F32", "1", "mean cosine(y_e, y_s) over sampled tokens routed to e (row)", study=True
    ),
    "output_error": Table(
        "E,E", "F32", "1", "sum |y_s - y_e|^2 / sum |y_e|^2 over sampled tokens routed to e (row)"
    ),
    "sampled": Table("E", "I64", "tokens", "sampled tokens routed to e", study=True),
    "standin_ids": Table(
        "E,R",
        "I16",
        "expert",
        "other experts, smallest output_error first; -1 beyond the last",
        study=True,
    ),
    "standin_error": Table("E,R", "F32", "1", "their output_error", study=True),
    "price_sampled": Table(
        "E", "I64", "tokens", "tokens routed to e that the prices are from", True, study=True
    ),
    "price_cross": Table(
        "E,E", "F32", "nats/weight^2", "E[(g . y_e)(g . y_s)] over tokens routed to e (row)", True
    ),
    "price_standin": Table(
        "E,E", "F32", "nats/weight^2", "E[(g . y_s)^2] over tokens routed to e (row)", True
    ),
    "price_level": Table(
        "E,J", "F32", "nats/weight^2", "E[(g . (y_e at level j - y_e at level J))^2]", True
    ),
    "price_packed": Table(
        "E",
        "F32",
        "nats/weight^2",
        "E[(g . (y_e at level J - y_e of the checkpoint))^2]",
        True,
        study=True,
    ),
    "price_fit": Table(
        "3,2", "F32", "1, nats^(1/2)", "rows skip, stand-in, level: of p and of sqrt(p)", True
    ),
    "predict_recall": Table(
        "4,3", "F32", "1", "rows previous, transition, router, linear; columns distances", True
    ),
    "predict_bias": Table(
        "3,E", "F32", "score", "of the linear predictor, a row for each distance", True
    ),
    "predict_1": Table(
        "H,E",
        "F16",
        "score",
        "of the linear predictor, from the hidden state one MoE layer before",
        True,
    ),
    "predict_2": Table("H,E", "F16", "score", "two MoE layers before", True),
    "predict_3": Table("H,E", "F16", "score", "three MoE layers before", True),
}

# The routers of levels, in a file of their own: a bundle is given them when it is there already.
BITS_FILE = "bits.safetensors"
BITS: dict[str, Table] = {
    "bits_weight": Table(
        "E,J,H", "F16", "logit", "of e's router of levels, from what the layer's experts receive"
    ),
    "bits_bias": Table("E,J", "F32", "logit", "of the same"),
    "bits_mixing": Table(
        "1", "F32", "logit/bit", "what the logarithm of a slot's mixing weight adds for each bit"
    ),
    "bits_curve": Table(
        "33,2",
        "F32",
        "logit/bit, bits",
        "prices of a bit, rising, and the mean bits of all layers' slots at each, falling",
    ),
}

TRACE: dict[str, Table] = {
    "ids": Table(
        "T,K", "I16", "expert", "experts routed to, in the router's order; E is no expert"
    ),
    "weights": Table("T,K", "F32", "weight", "their mixing weights"),
    "scores": Table("T,E", "F16", "score", "selection scores of all experts", True),
}

# Once per trace, not per layer: the token ids, and 1 where a sequence starts.
TRACE_TOKENS = {"tokens": "I32", "starts": "U8"}


def nbytes(tables: Mapping[str, Table], sizes: Mapping[str, int]) -> int:
    """Bytes of all `tables` of one layer, the optional ones too; `sizes` are those of the letters
    of `Table.shape`."""
    total = 0
    for table in tables.values():
        shape = [sizes[s] if s in sizes else int(s) for s in table.shape.split(",")]
        total += math.prod(shape) * safetensors_file.DTYPES[table.dtype].itemsize
    return total


def key(layer: int, name: str) -> str:
    """What the table `name` of MoE layer `layer` is called in its file."""
    return f"{layer:02d}.{name}"


def study_of(path: Path) -> Path:
    """Where the tables lie that the tables at `path` can do without."""
    return path.parent / STUDY / path.name


def save_tables(path: Path, layers: list[dict[str, np.ndarray]], metadata: dict[str, str]) -> None:
    """Write one dict of tables per MoE layer, names as in `TABLES`: at `path` what a device reads,
    at `study_of(path)` the others. Where `path` has all of them, as before version 4, it keeps
    them."""
    files = {path: TABLES} if _has_study(path) else _files(path)
    for file, names in files.items():
        file.parent.mkdir(exist_ok=True)
        arrays = {
            key(i, name): array
            for i, tables in enumerate(layers)
            for name, array in tables.items()
            if name in names
        }
        safetensors_file.save(file, arrays, metadata)


def save_bits(path: Path, layers: list[dict[str, np.ndarray]], metadata: dict[str, str]) -> None:
    """Write the routers of levels, one dict per MoE layer, names as in `BITS`, at `path`."""
    arrays = {key(i, name): layer[name] for i, layer in enumerate(layers) for name in BITS}
    safetensors_file.save(path, arrays, metadata)


def _files(path: Path) -> dict[Path, Collection[str]]:
    """Which tables lie where; the device's last, which a reader looks for first."""
    return {study_of(path): names_in(True), path: names_in(False)}


def _has_study(path: Path) -> bool:
    """Whether the tables at `path` are those of a device and of a study in one."""
    if not path.is_file():
        return False
    entries = safetensors_file.read_header(path).entries
    return any(key(0, name) in entries for name in names_in(True))


class Tables:
    """The tables of a bundle, of which only what is asked for is read."""

    def __init__(
        self,
        files: Mapping[Path, Collection[str]],
        experts: Sequence[int],
        levels: int | None = None,
        hidden: Sequence[int] | None = None,
    ):
        """Those of `files`, each with the names of the tables that are looked for there, for layers
        of so many `experts`. A missing table, a wrong shape or dtype is a `BundleError`; `levels`
        of the encoding and `hidden` sizes are checked where they are given."""
        self._experts = list(experts)
        self._files = {
            file: (safetensors_file.read_header(file), names) for file, names in files.items()
        }
        for file, (header, names) in self._files.items():
            _check_header(file, header, names, self._experts, levels, hidden)

    def layers(self, *names: str) -> list[dict[str, np.ndarray]]:
        """The tables of these names (none given: all of `TABLES`) of every layer, where it has
        them."""
        names = names or tuple(TABLES)
        loaded: dict[str, np.ndarray] = {}
        for file, (header, there) in self._files.items():
            keys = {
                key(layer, name)
                for name in set(names).intersection(there)
                for layer in range(len(self._experts))
            }
            loaded |= safetensors_file.load_some(file, keys, header)
        return [
            {name: loaded[key(layer, name)] for name in names if key(layer, name) in loaded}
            for layer in range(len(self._experts))
        ]

    def column(self, name: str) -> list[np.ndarray]:
        """One table of every layer that has it, in order."""
        return [tables[name] for tables in self.layers(name) if name in tables]


def names_in(study: bool) -> list[str]:
    """The tables that lie in the study's file, or in the device's."""
    return [name for name, table in TABLES.items() if table.study == study]


def load_tables(
    path: Path, experts: list[int], names: Collection[str] = tuple(TABLES)
) -> list[dict[str, np.ndarray]]:
    """Those tables of `names` that layers of so many `experts` have, checked; no others are read.
    They are at `path`, and where there is a study beside it, there; without one, all of them may be
    at `path`, as version 3 has them."""
    files: dict[Path, Collection[str]] = {path: TABLES}
    if not _has_study(path):
        files = {file: names for file, names in _files(path).items() if file.is_file()}
    return Tables(files, experts).layers(*names)


def _check_header(
    path: Path,
    header: safetensors_file.Header,
    names: Collection[str],
    experts: Sequence[int],
    levels: int | None,
    hidden: Sequence[int] | None,
) -> None:
    known = {} if levels is None else {"J": levels}
    for layer, count in enumerate(experts):
        known_names = TABLES | BITS
        tables = {n: known_names[n] for n in names if n != "transition" or layer > 0}
        sizes = known | ({} if hidden is None else {"H": hidden[layer]})
        _check(path, header, layer, tables, {"E": count, "P": experts[layer - 1]} | sizes)


def check_trace(path: Path, layers: list[tuple[int, int]]) -> None:
    """The same for a trace of layers of (experts, top_k)."""
    header = safetensors_file.read_header(path)
    for name, dtype in TRACE_TOKENS.items():
        entry = header.entries.get(name)
        if entry is None or entry.dtype != dtype or len(entry.shape) != 1:
            raise BundleError(
                f"{path}: {dtype} {name!r} with one axis was wanted; profile and build again."
            )
    tokens = header.entries["tokens"].shape[0]
    for layer, (experts, k) in enumerate(layers):
        _check(path, header, layer, TRACE, {"T": tokens, "E": experts, "K": k})


def _check(
    path: Path,
    header: safetensors_file.Header,
    layer: int,
    tables: dict[str, Table],
    sizes: dict[str, int],
) -> None:
    for name, table in tables.items():
        entry = header.entries.get(key(layer, name))
        if entry is None and table.optional:
            continue
        if (
            entry is None
            or entry.dtype != table.dtype
            or not _fits(entry.shape, table.shape, sizes)
        ):
            actual = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise BundleError(
                f"{path}: table {key(layer, name)} is {actual}, {table.dtype} [{table.shape}] with "
                f"{sizes} was wanted; "
                "profile and build again."
            )


def _fits(shape: tuple[int, ...], letters: str, sizes: dict[str, int]) -> bool:
    dimensions = letters.split(",")
    return len(shape) == len(dimensions) and all(
        size == (int(letter) if letter.isdigit() else sizes.get(letter, size))
        for size, letter in zip(shape, dimensions, strict=True)
    )
