"""A profile: two observers of a forward sweep, and the files that they leave.

`Statistics` adds up what every layer's router chose and what its experts gave; output similarity
and error come from a stated, seeded subsample of tokens on which all experts are run. `Trace` keeps
the first tokens' routing as it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smoe.artifacts import safetensors_file
from smoe.artifacts.tables import key, save_tables
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry, expert_outputs
from smoe.prep.checkpoint.text import Calibration, Origin
from smoe.prep.errors import PrepError
from smoe.prep.options import MINIMUM
from smoe.prep.progress import Progress
from smoe.prep.statistics.sums import LayerSums, activity
from smoe.prep.sweep.forward import Arrays, AtExperts, sweep
from smoe.prep.workdir import FinishedLayers, write_whole

PROFILE_FILES = (
    "tables.safetensors",
    "study/tables.safetensors",
    "study/trace.safetensors",
    "study/profile.json",
)
SAMPLE = 1024  # tokens on which all experts are run
TRACE = 8192  # tokens kept in the trace
SAMPLED_AT_ONCE = 128 << 20  # bytes of all experts' outputs for sampled tokens
SUMMED_AT_ONCE = 32  # tokens of them that are float64 at a time
NAMED = 6  # layers that are named, at most, where text was narrow


class Statistics:
    """The sums of every layer, over all tokens of a sweep."""

    name = "statistics"

    def __init__(self, checkpoint: Checkpoint, tokens: int, seed: int):
        """For a sweep over so many `tokens`; `seed` draws those on which all experts are run."""
        sizes = [expert_geometry(module)[0] for _, module in checkpoint.layers]
        previous = [0, *sizes]
        self.sums = [LayerSums.zeros(e, p) for e, p in zip(sizes, previous, strict=False)]
        self.sample = np.sort(np.random.default_rng(seed).permutation(tokens)[:SAMPLE])
        self.tokens = tokens
        self._before: np.ndarray | None = None  # the previous layer's activity, bool [T, P]

    def visit(self, at: AtExperts) -> Arrays:
        assert at.norms is not None
        sums = self.sums[at.layer]
        experts = len(sums.counts)
        self._run_all(at, sums)
        ids, active = at.ids.cpu().numpy(), self._activity(at)
        weights, norms = at.weights.double().cpu().numpy(), at.norms.double().cpu().numpy()
        for tokens in at.passes():
            before = None if self._before is None else self._before[tokens]
            sums.add_routing(ids[tokens], weights[tokens], norms[tokens], before)
            if at.scores is not None:
                sums.add_scores(at.scores[tokens, :experts].cpu().numpy())
        self._before = active
        return {name: np.asarray(value) for name, value in vars(sums).items()}

    def resume(self, at: AtExperts, known: Arrays) -> None:
        fields: dict[str, Any] = {name: int(a) if a.ndim == 0 else a for name, a in known.items()}
        self.sums[at.layer] = LayerSums(**fields)
        self._before = self._activity(at)

    def finish(self) -> list[Arrays]:
        return [sums.tables() for sums in self.sums]

    def hardly_reached(self) -> str:
        """For people: how many experts the text hardly reached, in the layers with most of them,
        and what to do; "" where it reached all."""
        few = [int((sums.counts < MINIMUM).sum()) for sums in self.sums]
        if not any(few):
            return ""
        most = sorted(range(len(few)), key=lambda layer: -few[layer])[:NAMED]
        named = [f"{few[layer]} in layer {layer}" for layer in most if few[layer]]
        others = sum(few) - sum(few[layer] for layer in most)
        layers = ", ".join(named + ([f"{others} in others"] if others else []))
        experts = sum(len(sums.counts) for sums in self.sums)
        return (
            f"text: {sum(few)} of {experts} experts got fewer than {MINIMUM} tokens ({layers}), so "
            "that little is known of them; give more text, or let the model write more (--self N)"
        )

    def _activity(self, at: AtExperts) -> np.ndarray:
        return activity(at.ids.cpu().numpy(), len(self.sums[at.layer].counts))

    def _run_all(self, at: AtExperts, sums: LayerSums) -> None:
        """Run all experts on the sampled tokens."""
        sample = torch.from_numpy(self.sample).to(at.hidden.device)
        x, active = at.hidden[sample], self._activity(at)[self.sample]
        experts = len(sums.counts)
        together = sampled_at_once(experts, x.shape[1])
        for start in range(0, len(x), together):
            group = slice(start, start + together)
            outputs = torch.empty(len(x[group]), experts, x.shape[1])
            for expert in range(experts):
                outputs[:, expert] = expert_outputs(at.module, expert, x[group])
            for few, routed in zip(
                outputs.split(SUMMED_AT_ONCE), _split(active[group], SUMMED_AT_ONCE), strict=True
            ):
                sums.add_outputs(few.double().numpy(), routed)


def sampled_at_once(experts: int, hidden: int) -> int:
    """How many tokens go through all experts at once."""
    return max(1, SAMPLED_AT_ONCE // (experts * hidden * 4))


def _split(array: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


class Trace:
    """The first tokens of a sweep: names as in `artifacts.tables.TRACE`."""

    name = "trace"

    def __init__(self, rows: Sequence[np.ndarray]):
        starts = [np.arange(len(row)) == 0 for row in rows]
        self.arrays: Arrays = {
            "tokens": np.concatenate(rows)[:TRACE].astype(np.int32),
            "starts": np.concatenate(starts)[:TRACE].astype(np.uint8),
        }

    def visit(self, at: AtExperts) -> Arrays:
        experts = expert_geometry(at.module)[0]
        arrays = {
            "ids": at.ids[:TRACE].cpu().numpy().astype(np.int16),
            "weights": at.weights[:TRACE].float().cpu().numpy(),
        }
        if at.scores is not None:  # a score for "no expert" comes last
            arrays["scores"] = at.scores[:TRACE, :experts].cpu().numpy().astype(np.float16)
        self.arrays |= {key(at.layer, name): array for name, array in arrays.items()}
        return {}

    def resume(self, at: AtExperts, known: Arrays) -> None:
        self.visit(at)

    def finish(self) -> list[Arrays]:
        return []


@dataclass(frozen=True)
class Profile:
    """What profile.json says: the model, the calibration, and every layer at a glance."""

    model: str
    fingerprint: str
    calibration: dict
    layers: list[dict]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        text = self.calibration
        lines = [
            f"{self.model}: {text['tokens']} tokens of {text['source']}",
            f"{'layer':32} experts  unreached  effective  busiest  output similarity  "
            "best stand-in error",
        ]
        for layer in self.layers:
            similarity, error = layer["mean_output_similarity"], layer["best_standin_error"]
            lines.append(
                f"{layer['name']:32} {layer['experts']:7}  {len(layer['unreached']):9}  "
                f"{layer['effective_experts']:9}  {layer['busiest_share']:7.1%}  "
                f"{similarity!s:>17}  {error!s:>19}"
            )
        return lines


def profile(
    checkpoint: Checkpoint,
    directory: Path,
    calibration: Calibration,
    progress: Progress,
    rows: list[np.ndarray] | None = None,
    device: str = "cpu",
) -> Profile:
    """Profile `checkpoint` on `calibration` and write tables, trace and profile.json into
    `directory`.

    `rows` are those of the calibration, if they are there already. Layers that an interrupted run
    finished are not profiled again.
    """
    rows = calibration.rows(checkpoint, progress.say) if rows is None else rows
    statistics = Statistics(checkpoint, sum(len(row) for row in rows), calibration.seed)
    trace = Trace(rows)
    with FinishedLayers(directory) as finished:
        sweep(checkpoint, rows, [statistics, trace], device, finished=finished, progress=progress)
        result = write_profile(checkpoint, directory, calibration.origin, statistics, trace, [])
        finished.clear()
    return result


def write_profile(
    checkpoint: Checkpoint,
    directory: Path,
    origin: Origin,
    statistics: Statistics,
    trace: Trace,
    more: Sequence[list[Arrays]],
) -> Profile:
    """Write tables (and `more` of them, per layer), trace, and last profile.json."""
    tables = statistics.finish()
    result = _summary(checkpoint, origin, statistics, tables)
    merged = merged_tables(tables, *more)
    save_tables(directory / "tables.safetensors", merged, {"fingerprint": result.fingerprint})
    safetensors_file.save(directory / "study" / "trace.safetensors", trace.arrays)
    write_whole(directory / "study" / "profile.json", json.dumps(result.as_dict(), indent=1) + "\n")
    return result


def merged_tables(*tables: Sequence[Arrays]) -> list[Arrays]:
    """Tables per layer, put together; an empty list has none for any layer."""
    layers = max(map(len, tables))
    merged: list[Arrays] = [{} for _ in range(layers)]
    for some in tables:
        for layer, named in enumerate(some):
            merged[layer] |= named
    return merged


def open_profile(directory: Path, checkpoint: Checkpoint) -> dict:
    """profile.json of a directory that `profile` wrote for this checkpoint; a `PrepError` if it is
    not."""
    missing = [name for name in PROFILE_FILES if not (directory / name).is_file()]
    if missing:
        raise PrepError(
            f"{directory} has no {missing[0]}; give a directory that `smoe-prep profile` wrote."
        )
    try:
        data = json.loads((directory / "study" / "profile.json").read_text("utf-8"))
        fingerprint = data["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise PrepError(
            f"{directory}/study/profile.json is damaged ({error}); profile again."
        ) from error
    if fingerprint != checkpoint.fingerprint():
        raise PrepError(
            f"{directory} is the profile of another checkpoint ({data.get('model')}); profile "
            "this one."
        )
    return data


def _summary(
    checkpoint: Checkpoint,
    origin: Origin,
    statistics: Statistics,
    tables: list[Arrays],
) -> Profile:
    names = [name for name, _ in checkpoint.layers]
    return Profile(
        model=checkpoint.model.config.model_type,
        fingerprint=checkpoint.fingerprint(),
        calibration={
            **origin.as_dict(statistics.tokens),
            "sampled_tokens": len(statistics.sample),
        },
        layers=[_layer_summary(name, t) for name, t in zip(names, tables, strict=True)],
    )


def _layer_summary(name: str, t: dict[str, np.ndarray]) -> dict:
    """What a person wants to know of a layer at a glance."""
    share = t["counts"] / max(1, t["counts"].sum())
    off = ~np.eye(len(share), dtype=bool)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    best = t["standin_error"][:, 0]
    return {
        "name": name,
        "experts": len(share),
        "unreached": np.flatnonzero(t["counts"] == 0).tolist(),
        "busiest_share": round(float(share.max()), 4),
        "effective_experts": round(float(np.exp(entropy)), 1),
        "mean_output_similarity": round(float(t["output_similarity"][off].mean()), 4)
        if off.any()
        else None,
        "best_standin_error": round(float(np.median(best[np.isfinite(best)])), 3)
        if np.isfinite(best).any()
        else None,
    }
