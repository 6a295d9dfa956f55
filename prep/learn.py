"""What one sweep over the calibration text learns: tables, trace and shards, each by an observer.

A layer's experts are read twice: on the way forward for all observers together, and on the way back
for the prices.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import safetensors_file
from smoe.artifacts.manifest import Experts
from smoe.artifacts.tables import load_tables, save_tables
from smoe.prep.backbone.watch import BackboneCodes
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry
from smoe.prep.checkpoint.text import Origin
from smoe.prep.pack.pack import Packing, pack
from smoe.prep.prices.price import DRAWS, Packed, Prices, sampled
from smoe.prep.progress import Progress
from smoe.prep.statistics.predict import Predictors
from smoe.prep.statistics.profile import (
    PROFILE_FILES,
    Statistics,
    Trace,
    merged_tables,
    write_profile,
)
from smoe.prep.sweep.forward import Arrays, Observer, sweep
from smoe.prep.sweep.gradients import Backward
from smoe.prep.workdir import FINISHED, FinishedLayers, write_whole

HELD_OUT = 2048  # tokens on which predictors are compared


@dataclass(frozen=True)
class Text:
    """The text of a build: `rows` of token ids, and the token positions of those that prices and
    predictors are learnt from (`drawn`) and measured on (`held_out`), per row. No rows where
    nothing needs them, nothing drawn where there are to be no prices. `origin` says where the text
    comes from."""

    origin: Origin
    rows: list[np.ndarray]
    drawn: list[np.ndarray]
    held_out: list[np.ndarray]

    @classmethod
    def split(cls, origin: Origin, rows: list[np.ndarray], price_tokens: int) -> Text:
        """`rows`, with so many tokens for prices."""
        drawn: list[np.ndarray] = []
        held_out: list[np.ndarray] = []
        if price_tokens and rows:
            drawn, held_out = sampled(rows, price_tokens, origin.seed)
        return cls(origin=origin, rows=rows, drawn=drawn, held_out=held_out)

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def held_out_first(self) -> np.ndarray:
        """All token ids, those of the held-out text before others."""
        if not self.rows:
            return np.zeros(0, np.int64)
        return np.concatenate(self.ids([*self.held_out, *self.drawn]) or self.rows)

    def ids(self, positions: list[np.ndarray]) -> list[np.ndarray]:
        """The token ids at `positions`."""
        stream = np.concatenate(self.rows)
        return [stream[part] for part in positions]


@dataclass(frozen=True)
class How:
    """How experts are packed, by which of `options.QUANTISERS`, whether the backbone is calibrated
    too, and where a sweep runs: `profiled` is a finished profile's directory, or None to profile
    now."""

    experts: Experts
    quantiser: str | None
    watch_backbone: bool
    profiled: Path | None
    device: str


def learn(checkpoint: Checkpoint, directory: Path, text: Text, how: How, progress: Progress) -> str:
    """Write tables, trace, profile.json and the shards into `directory`, once. Returns "" or, where
    the model has no prices, why."""
    marker = directory / FINISHED / "learned.json"
    if marker.exists():
        progress.say("sweep: kept from an earlier run")
        return json.loads(marker.read_text("utf-8"))["no_prices"]
    with FinishedLayers(directory) as finished:
        refusal = _learn(checkpoint, directory, text, how, finished, progress)
        write_whole(marker, json.dumps({"no_prices": refusal}))
        finished.clear()
    return refusal


def _learn(
    checkpoint: Checkpoint,
    directory: Path,
    text: Text,
    how: How,
    finished: FinishedLayers,
    progress: Progress,
) -> str:
    if not text.rows:
        pack(checkpoint, directory, how.experts.encoding, progress, how.quantiser)
        _copy_profile(how.profiled, directory)
        return ""
    packing = Packing(checkpoint, directory, how.experts, how.quantiser, progress)
    observers: list[Observer] = [packing]
    if how.watch_backbone:
        observers.insert(0, BackboneCodes(checkpoint, directory, text.tokens))
    statistics = trace = None
    if how.profiled is None:
        statistics, trace = _profilers(checkpoint, text)
        observers += [statistics, trace]
    prices, backward = None, None
    if text.drawn:
        observers.append(_predictors(checkpoint, text, directory))
        prices = Prices(checkpoint, Packed(how.experts, directory))
        backward = _backward(checkpoint, directory, text, prices)
    sweep(checkpoint, text.rows, observers, how.device, backward, finished, progress)
    refusal = backward.refusal if backward else ""
    tables = [observer.finish() for observer in observers if observer is not statistics]
    if prices is not None and not refusal:
        tables.append(prices.finish())
    if statistics is not None and trace is not None:
        if line := statistics.hardly_reached():
            progress.say(line)
        write_profile(checkpoint, directory, text.origin, statistics, trace, tables)
    else:
        _copy_profile(how.profiled, directory)
        _add_tables(checkpoint, directory / "tables.safetensors", tables)
    return refusal


def _profilers(checkpoint: Checkpoint, text: Text) -> tuple[Statistics, Trace]:
    return Statistics(checkpoint, text.tokens, text.origin.seed), Trace(text.rows)


def _predictors(checkpoint: Checkpoint, text: Text, directory: Path) -> Predictors:
    lengths = np.cumsum([len(part) for part in text.held_out])
    enough = 1 + int(np.searchsorted(lengths, HELD_OUT))
    return Predictors(
        checkpoint,
        learned=np.concatenate(text.drawn),
        held_out=np.concatenate(text.held_out[:enough]),
        starts=np.cumsum([0, *(len(row) for row in text.rows)]),
        directory=directory,
    )


def _backward(checkpoint: Checkpoint, directory: Path, text: Text, prices: Prices) -> Backward:
    rows, seed = np.stack(text.ids(text.drawn)), text.origin.seed
    return Backward(checkpoint, rows, DRAWS, seed, [prices], directory)


def _copy_profile(profiled: Path | None, directory: Path) -> None:
    (directory / "study").mkdir(exist_ok=True)
    if profiled is None:
        return
    for name in PROFILE_FILES:
        shutil.copyfile(profiled / name, directory / name)


def _add_tables(checkpoint: Checkpoint, file: Path, more: list[list[Arrays]]) -> None:
    experts = [expert_geometry(module)[0] for _, module in checkpoint.layers]
    merged = merged_tables(load_tables(file, experts), *more)
    save_tables(file, merged, safetensors_file.read_header(file).metadata)
