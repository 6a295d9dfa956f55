"""Routers of levels for a bundle that is there: trained beside its checkpoint, and added to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from smoe.artifacts import Bundle, Manifest, open_bundle
from smoe.artifacts.manifest import STUDY_SINCE, VERSION
from smoe.artifacts.tables import BITS, BITS_FILE, save_bits
from smoe.artifacts.validate import file_at
from smoe.prep.bits.apart import Apart
from smoe.prep.bits.goal import Goal
from smoe.prep.bits.router import LevelRouter
from smoe.prep.bits.together import Together
from smoe.prep.checkpoint.checkpoint import Checkpoint, open_checkpoint
from smoe.prep.checkpoint.text import Calibration, digest
from smoe.prep.errors import NotDifferentiableError, PrepError
from smoe.prep.options import BitTraining
from smoe.prep.prices.price import DRAWS
from smoe.prep.progress import Progress
from smoe.prep.sweep.forward import Arrays, AtExperts, sweep
from smoe.prep.sweep.gradients import Backward
from smoe.prep.workdir import settle, write_whole
from smoe.runtime.machine import memory_room

CURVE, REACH = BITS["bits_curve"].shape, 12.0  # the curve's prices go so far from the middle
MEASURED = 8192  # tokens that the curve is measured on, at most


@dataclass(frozen=True)
class Trained:
    """Routers of levels that a bundle was given: how, for which mean bits at which nats per bit of
    it, losses in nats per token before and after, bytes."""

    bundle: Path
    how: str
    tokens: int
    average: float
    nats_per_bit: float
    loss: tuple[float, float]
    nbytes: int

    def as_dict(self) -> dict:
        return dataclasses.asdict(self) | {"bundle": str(self.bundle)}

    def lines(self) -> list[str]:
        return [
            f"{self.bundle}: routers of levels trained {self.how} on {self.tokens} tokens, for "
            f"{self.average:.2f} bits on average at {self.nats_per_bit:.2g} nats per bit",
            f"loss {self.loss[0]:.4f} to {self.loss[1]:.4f} nats per token, "
            f"{self.nbytes / 1e6:.2f} MB",
        ]


def train_bits(
    bundle: str | Path,
    model: str | Path,
    calibration: Calibration,
    training: BitTraining | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train routers of levels for the bundle at `bundle` on `calibration` text, with the checkpoint
    at `model` that it was built from as their teacher, and add them to it; those it had are
    replaced.

    End to end where the model fits into memory with its experts at every level, else layer by
    layer. A bundle in an encoding of one level, without prices, or of another checkpoint is a
    `PrepError`. Whatever interrupts, the bundle opens.
    """
    bundle, training, progress = Path(bundle), training or BitTraining(), progress or Progress()
    opened = open_bundle(bundle)
    goal = _goal(opened, training)
    checkpoint = open_checkpoint(model, progress)
    if opened.manifest.provenance.get("source_fingerprint") != checkpoint.fingerprint():
        raise PrepError(f"{bundle} was not built from {model}: their fingerprints differ.")
    rows = calibration.rows(checkpoint, progress.say)
    whole = np.stack([row for row in rows if len(row) == len(rows[0])])
    torch.manual_seed(training.seed)
    routers = [
        LevelRouter(bias, usual, goal.scale.bits, layer.hidden)
        for bias, usual, layer in zip(goal.biases, goal.usual, opened.manifest.layers, strict=True)
    ]
    how = training.how or _how(opened, checkpoint)
    progress.say(f"routers of levels: {how}, {whole.size} tokens")
    train = _end_to_end if how == "end-to-end" else _layer_by_layer
    loss = train(checkpoint, opened, routers, goal, training, whole, progress)
    tables = _with_curve(checkpoint, routers, goal, whole)
    trained = Trained(
        bundle=bundle,
        how=how,
        tokens=whole.size,
        average=goal.average,
        nats_per_bit=float(np.exp(goal.price) * sum(a.top_k for a in opened.manifest.layers)),
        loss=loss,
        nbytes=sum(array.nbytes for layer in tables for array in layer.values()),
    )
    _add(opened, tables, trained, calibration, digest(rows), training)
    return trained


def _goal(bundle: Bundle, training: BitTraining) -> Goal:
    if bundle.levels < 2:
        raise PrepError(
            f"{bundle.path} has experts in {bundle.manifest.experts.encoding}, of one level; "
            "routers of levels need a nested encoding, like nested:2+1+1."
        )
    if training.capacity and len(training.capacity) != bundle.levels:
        raise PrepError(
            f"--capacity names {len(training.capacity)} shares; {bundle.path} has "
            f"{bundle.levels} levels."
        )
    return Goal.of(bundle, training.average, training.spread)


def _how(bundle: Bundle, checkpoint: Checkpoint) -> str:
    """By what memory there is: the original experts, and every level in float32, and as much again
    for a step."""
    layers = bundle.manifest.layers
    weights = [
        layer.experts * sum(a * b for a, b in bundle.manifest.expert_shape(i).matrices().values())
        for i, layer in enumerate(layers)
    ]
    needed = 2 * (checkpoint.backbone_bytes + 4 * (bundle.levels + 1) * sum(weights))
    room = memory_room()
    return "layer-by-layer" if room is not None and room.nbytes < needed else "end-to-end"


def _end_to_end(
    checkpoint: Checkpoint,
    bundle: Bundle,
    routers: Sequence[LevelRouter],
    goal: Goal,
    training: BitTraining,
    rows: np.ndarray,
    progress: Progress,
) -> tuple[float, float]:
    capacity, seed = training.capacity, training.seed
    whole = Together(checkpoint, bundle, routers, goal, capacity, seed, training.device)
    losses = whole.train(rows, training.epochs, progress)
    tenth = max(1, len(losses) // 10)
    return float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))


def _layer_by_layer(
    checkpoint: Checkpoint,
    bundle: Bundle,
    routers: Sequence[LevelRouter],
    goal: Goal,
    training: BitTraining,
    rows: np.ndarray,
    progress: Progress,
) -> tuple[float, float]:
    apart = Apart(bundle, list(routers), goal, training.seed)
    backward = Backward(checkpoint, rows, DRAWS, training.seed, [apart])
    sweep(checkpoint, [], [], training.device, backward, None, progress)
    if backward.refusal:
        raise NotDifferentiableError(
            f"Routers of levels cannot be trained for this model: {backward.refusal}."
        )
    # Of a slot in bits at the middle price; a token has so many.
    slots = [layer.top_k * float(np.exp(goal.price)) for layer in bundle.manifest.layers]
    before, after = np.array([apart.losses[layer] for layer in range(len(slots))]).T @ slots
    return float(before), float(after)


class _Curve:
    """An observer that counts, at many prices, the bits of the slots that it sees."""

    name = "curve"

    def __init__(self, routers: Sequence[LevelRouter], goal: Goal):
        count = int(CURVE.partition(",")[0])
        self.prices = torch.linspace(-REACH, REACH, count)
        self._routers, self._goal = routers, goal
        self._bits, self._weights = torch.zeros(count, dtype=torch.float64), 0.0

    @property
    def means(self) -> np.ndarray:
        """float64, falling."""
        return (self._bits / self._weights).numpy()

    @torch.no_grad()
    def visit(self, at: AtExperts) -> Arrays:
        router, weight = self._routers[at.layer], float(self._goal.scale.weight[at.layer])
        slots = at.ids < len(router.bias)
        for rows in torch.arange(len(at.ids)).split(256):
            logits = router.to(at.hidden.device)(at.hidden[rows], at.ids[rows], at.weights[rows])
            logits = logits[slots[rows]]
            priced = self._goal.priced(logits[:, None], self.prices.to(logits.device))
            bits = self._goal.bits.to(logits.device)[priced.argmax(-1)]
            self._bits += bits.double().sum(0).cpu() * weight
            self._weights += len(bits) * weight
        return {}

    def resume(self, at: AtExperts, known: Arrays) -> None:
        """It is never interrupted half-way: it keeps nothing."""

    def finish(self) -> list[Arrays]:
        curve = np.stack([self.prices.numpy(), self.means], 1).astype(np.float32)
        return [router.tables() | {"bits_curve": curve} for router in self._routers]


def _with_curve(
    checkpoint: Checkpoint, routers: Sequence[LevelRouter], goal: Goal, rows: np.ndarray
) -> list[Arrays]:
    """The tables of all layers."""
    some = rows[: max(1, MEASURED // rows.shape[1])]
    curve = _Curve(routers, goal)
    sweep(checkpoint, list(some), [curve])
    return curve.finish()


def _add(
    bundle: Bundle,
    tables: list[Arrays],
    trained: Trained,
    calibration: Calibration,
    text: str,
    training: BitTraining,
) -> None:
    """The manifest names the file only while it is whole."""
    manifest, path = bundle.manifest, bundle.path
    file = path / BITS_FILE
    without = {name: known for name, known in manifest.files.items() if name != BITS_FILE}
    if len(without) < len(manifest.files):
        write_whole(path / "manifest.json", dataclasses.replace(manifest, files=without).to_json())
    file.unlink(missing_ok=True)
    said = {
        "how": trained.how,
        "average": trained.average,
        "nats_per_bit": trained.nats_per_bit,
        "loss": list(trained.loss),
        "calibration": str(calibration.origin),
        "calibration_sha256": text,
        "calibration_tokens": trained.tokens,
    } | {k: v for k, v in dataclasses.asdict(training).items() if k not in ("how", "average")}
    save_bits(file, tables, {})
    settle(file)
    write_whole(path / "manifest.json", _with_bits(manifest, file, said).to_json())
    open_bundle(path)


def _with_bits(manifest: Manifest, file: Path, said: dict) -> Manifest:
    return dataclasses.replace(
        manifest,
        version=VERSION if manifest.version >= STUDY_SINCE else manifest.version,
        files=manifest.files | {BITS_FILE: file_at(file)},
        provenance=manifest.provenance | {"bits": json.dumps(said)},
    )
