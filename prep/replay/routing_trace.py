"""Routing traces: which experts every step of a run was sent to, layer by layer, in the order of
execution.

Three sources: a bundle (its calibration text, with scores), BigMoeOnEdge's `.route.csv` (record
sizes, a prompt and what followed it), and `.jsonl` of one token per line, `{"tok": 1, "layers":
[[6, 8, …], …]}`. A trace is as untrusted as any file from elsewhere: what is wrong with it is a
`PrepError` that names the line, the value and the limit."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smoe.artifacts import safetensors_file
from smoe.artifacts.bundle import Bundle, open_bundle
from smoe.artifacts.encodings import checked_level, encoding_named
from smoe.artifacts.manifest import Routing
from smoe.artifacts.tables import key
from smoe.prep.errors import PrepError
from smoe.runtime.sizes import show_size

MOST_LAYERS, MOST_EXPERTS = (
    4096,
    65536,
)  # beyond any model there is: a number above these is a damaged file


@dataclass(frozen=True)
class TraceStep:
    """One layer's part of a step: `ids` int64 `[T, k]` of its T tokens (the number of experts is no
    expert), mixing `weights` `[T, k]` and selection `scores` `[T, experts]` where they are known.
    Steps of a prompt are not `decode`."""

    layer: int
    ids: np.ndarray
    decode: bool = True
    weights: np.ndarray | None = None
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class Trace:
    """`experts` and `records` (bytes; 1 each where they are not known) are per layer. `share`
    float64 `[all experts]` is what part of its layer's slots each got in calibration, `tables`
    those that substitutions use, by name, `rules` how routers choose."""

    name: str
    experts: list[int]
    records: list[int]
    steps: list[TraceStep] = field(repr=False)
    share: np.ndarray | None = field(default=None, repr=False)
    rules: list[Routing | None] = field(default_factory=list, repr=False)
    tables: dict[str, list[np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def sized(self) -> bool:
        """Whether `records` are bytes; otherwise each counts as one."""
        return max(self.records) > 1

    def show(self, amount: int) -> str:
        """A budget for people."""
        return show_size(amount) if self.sized else f"{amount} records"

    @property
    def total(self) -> int:
        """Of all experts, in bytes or records."""
        return sum(n * size for n, size in zip(self.experts, self.records, strict=True))

    @property
    def token_cycle(self) -> int:
        """What one token's experts take in all layers, in bytes or records: below it plain LRU
        never hits."""
        k = {step.layer: step.ids.shape[1] for step in self.steps}
        return sum(k.get(layer, 0) * size for layer, size in enumerate(self.records))

    @property
    def scored(self) -> bool:
        return all(step.scores is not None for step in self.steps)


def read_trace(path: Path, level: int | None = None, prompt: int = 0) -> Trace:
    """The trace at `path`: a bundle, or a file whose name ends with .route.csv or .jsonl. Of a
    bundle, records are as long as at `level`, and the first `prompt` tokens of every sequence are
    one prefill."""
    if path.is_dir():
        return bundle_trace(path, level, prompt)
    if level is not None or prompt:
        raise PrepError(
            f"{path} is not a bundle: its records and prompts are what they are; leave out level "
            f"and prompt."
        )
    readers = {".route.csv": route_csv, ".jsonl": token_lines}
    reader = next(
        (reader for ending, reader in readers.items() if path.name.endswith(ending)), None
    )
    if reader is None:
        raise PrepError(
            f"{path} is no trace; give a bundle, or a file named *.route.csv or *.jsonl."
        )
    try:
        with open(path, encoding="utf-8", newline="") as lines:
            return reader(path.name, lines)
    except UnicodeDecodeError as error:
        raise PrepError(
            f"{path} is not UTF-8 text ({error.reason}); it is damaged or no trace."
        ) from error
    except OSError as error:
        raise PrepError(f"{path} cannot be read: {error.strerror}.") from error


# -- bundles ---------------------------------------------------------------------------------------


def bundle_trace(path: Path, level: int | None = None, prompt: int = 0) -> Trace:
    """The routing of the first tokens of a bundle's calibration text, sequence after sequence, each
    after a prompt of `prompt` tokens token by token."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    trace = bundle.study("trace.safetensors")
    if trace is None:
        raise PrepError(
            f"{path} has no trace: it was built without --calibration, or copied without its "
            f"folder study/; build it "
            "with one, or copy that too."
        )
    if prompt < 0:
        raise PrepError(f"A prompt of {prompt} tokens was asked for; 0 or more are wanted.")
    loaded = safetensors_file.load(trace)
    for layer, spec in enumerate(manifest.layers):
        ids = loaded[key(layer, "ids")]
        if ids.size and not (ids.min() >= 0 and ids.max() <= spec.experts):
            raise PrepError(
                f"{path}: layer {layer} of the trace has experts {ids.min()} to {ids.max()}, the "
                f"layer 0 to "
                f"{spec.experts - 1}; build the bundle again."
            )
    starts = np.flatnonzero(loaded["starts"]).tolist()
    spans = list(_spans(sorted({0, *starts}), len(loaded["tokens"]), prompt))
    steps = [
        _bundle_step(loaded, layer, low, high, decode)
        for low, high, decode in spans
        for layer in range(len(manifest.layers))
    ]
    share, tables = _tables(bundle)
    return Trace(
        path.name,
        [spec.experts for spec in manifest.layers],
        _record_sizes(bundle, level),
        steps,
        share,
        [spec.routing for spec in manifest.layers],
        tables,
    )


def _spans(starts: list[int], end: int, prompt: int) -> Iterator[tuple[int, int, bool]]:
    """(first token, one after the last, whether it is decoded)."""
    for low, high in zip(starts, [*starts[1:], end], strict=True):
        first = min(low + prompt, high)
        if first > low:
            yield low, first, False
        yield from ((at, at + 1, True) for at in range(first, high))


def _bundle_step(
    loaded: dict[str, np.ndarray], layer: int, low: int, high: int, decode: bool
) -> TraceStep:
    scores = loaded.get(key(layer, "scores"))
    return TraceStep(
        layer,
        loaded[key(layer, "ids")][low:high].astype(np.int64),
        decode,
        loaded[key(layer, "weights")][low:high],
        None if scores is None else scores[low:high].astype(np.float32),
    )


def _record_sizes(bundle: Bundle, level: int | None) -> list[int]:
    at = checked_level(encoding_named(bundle.manifest.experts.encoding), level) - 1
    return [layout.levels[at] for layout in bundle.layouts]


def _tables(bundle: Bundle) -> tuple[np.ndarray | None, dict[str, list[np.ndarray]]]:
    """What part of its layer's slots each expert got, and the tables that substitutions use."""
    counts = bundle.tables.column("counts")
    if not counts:
        return None, {}
    share = np.concatenate([c / max(1, c.sum()) for c in counts])
    return share, {name: bundle.tables.column(name) for name in ("coactivation", "output_error")}


# -- files of others -------------------------------------------------------------------------------

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert")


def route_csv(name: str, lines: Iterable[str]) -> Trace:
    """BigMoeOnEdge's trace: comments that say each layer's record size and the number of experts,
    then a row per slot. Phase 0 is a prompt, which ran as one batch layer by layer, phase 1 one
    token per step."""
    records: dict[int, int] = {}
    shape: dict[str, int] = {}
    groups: dict[tuple[int, int, int, int], dict[int, list[tuple[int, int]]]] = {}
    columns: list[str] = []
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        if line.startswith("#"):
            fields = {
                k: _number(v, where, k)
                for k, v in re.findall(r"(layer|expert_bytes|n_layer|n_expert)=(\S+)", line)
            }
            if "layer" in fields and "expert_bytes" in fields:
                records[fields["layer"]] = fields["expert_bytes"]
            shape |= {k: v for k, v in fields.items() if k.startswith("n_")}
        elif not columns:
            columns = line.strip().split(",")
            _wanted_columns(columns, where)
        elif line.strip():
            row = dict(zip(columns, next(csv.reader([line])), strict=False))
            turn, phase, step, layer, slot, expert = (
                _number(row.get(c), where, c) for c in COLUMNS
            )
            if phase > 1:
                raise PrepError(f"{where}: phase is {phase}; 0 (prompt) or 1 (decode) was wanted.")
            at = turn, phase, step if phase else 0, layer
            groups.setdefault(at, {}).setdefault(step, []).append((slot, expert))
    layers, experts = _shape(name, shape, records)
    steps = [_route_step(name, at, groups[at], layers, experts) for at in sorted(groups)]
    return _trace(name, [experts] * layers, [records[layer] for layer in range(layers)], steps)


def _wanted_columns(columns: list[str], where: str) -> None:
    missing = [c for c in COLUMNS if c not in columns]
    if missing:
        raise PrepError(
            f"{where}: there is no column {missing[0]!r}; a route trace has {', '.join(COLUMNS)}."
        )


def _shape(name: str, shape: dict[str, int], records: dict[int, int]) -> tuple[int, int]:
    """Layers and experts, as the comments said."""
    if set(shape) != {"n_layer", "n_expert"}:
        raise PrepError(
            f"{name}: no comment says n_layer and n_expert; a route trace starts with them."
        )
    layers, experts = shape["n_layer"], shape["n_expert"]
    if not (1 <= layers <= MOST_LAYERS and 1 <= experts <= MOST_EXPERTS):
        raise PrepError(
            f"{name}: {layers} layers of {experts} experts; 1 to {MOST_LAYERS} of 1 to "
            f"{MOST_EXPERTS} were wanted."
        )
    unsized = [layer for layer in range(layers) if not records.get(layer)]
    if unsized:
        raise PrepError(
            f"{name}: no comment says expert_bytes of layer {unsized[0]}; every layer's are wanted."
        )
    return layers, experts


def _route_step(
    name: str,
    at: tuple[int, int, int, int],
    rows: dict[int, list[tuple[int, int]]],
    layers: int,
    experts: int,
) -> TraceStep:
    turn, phase, step, layer = at
    where = f"{name}: turn {turn}, phase {phase}, step {step}, layer {layer}"
    if layer >= layers:
        raise PrepError(f"{where}: this trace has layers 0 to {layers - 1}.")
    tokens = [[expert for _, expert in sorted(slots)] for _, slots in sorted(rows.items())]
    return TraceStep(layer, _ids(where, tokens, experts), bool(phase))


def token_lines(name: str, lines: Iterable[str]) -> Trace:
    """One token per line: a list of experts per layer. Sizes are not known, so a record counts as
    one."""
    steps: list[TraceStep] = []
    layers = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            chosen = json.loads(line)["layers"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PrepError(
                f'{where}: {{"layers": [[expert, …], …]}} was wanted, found {line[:40]!r}.'
            ) from error
        if (
            not isinstance(chosen, list)
            or not chosen
            or (layers and len(chosen) != layers)
            or len(chosen) > MOST_LAYERS
        ):
            raise PrepError(
                f"{where}: {layers or 'one or more'} layers were wanted, found {_many(chosen)}."
            )
        layers = len(chosen)
        steps += [
            TraceStep(layer, _ids(f"{where}, layer {layer}", [ids], MOST_EXPERTS))
            for layer, ids in enumerate(chosen)
        ]
    # The number of experts is not said either: as many as the highest number names, in all layers
    # alike.
    experts = 1 + max((int(step.ids.max()) for step in steps), default=0)
    return _trace(name, [experts] * layers, [1] * layers, steps)


def _many(value: object) -> str:
    return str(len(value)) if isinstance(value, list) else repr(value)[:40]


def _trace(name: str, experts: list[int], records: list[int], steps: list[TraceStep]) -> Trace:
    if not steps:
        raise PrepError(f"{name} has no routed token; it is empty or no trace.")
    return Trace(name, experts, records, steps)


def _ids(where: str, tokens: list, experts: int) -> np.ndarray:
    """int64 `[T, k]` of a list of tokens' experts."""
    for ids in tokens:
        if not isinstance(ids, list) or not ids or len(ids) != len(tokens[0]):
            raise PrepError(
                f"{where}: {_many(tokens[0])} experts for every token were wanted, found "
                f"{_many(ids)}."
            )
        wrong = [e for e in ids if type(e) is not int or not 0 <= e < experts]
        if wrong:
            raise PrepError(f"{where}: {wrong[0]!r} is no expert; 0 to {experts - 1} were wanted.")
        if len(set(ids)) < len(ids):
            raise PrepError(f"{where}: an expert occurs twice for one token in {ids}.")
    return np.array(tokens, np.int64)


def _number(text: str | None, where: str, what: str) -> int:
    if text is None or not re.fullmatch(r"[0-9]{1,15}", text):
        raise PrepError(f"{where}: {what} is {text!r}; an integer from 0 on was wanted.")
    return int(text)
