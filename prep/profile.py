"""Profiling: calibration text runs through the model, and every layer's statistics are written as tables.

The model's experts are run by `_Observer` through the seam; it sees what each layer received and chose. Selection
scores are the input of the topk whose indices reach the experts, caught as the router calls it, so no router needs to
be known. Output similarity and error come from a stated, seeded subsample of tokens on which all experts are run.
"""

from __future__ import annotations

import datetime
import inspect
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from smoe.artifacts import safetensors_file
from smoe.artifacts.tables import key, save_tables
from smoe.prep.calibration import Calibration
from smoe.prep.checkpoint import Checkpoint
from smoe.prep.errors import PrepError
from smoe.prep.experts import expert_geometry, expert_outputs, experts_modules, experts_run_by
from smoe.prep.progress import Progress
from smoe.prep.statistics import LayerSums

PROFILE_FILES = ("tables.safetensors", "trace.safetensors", "profile.json")
SAMPLE = 2048  # tokens on which all experts are run
TRACE = 8192  # tokens kept in the trace
BATCH = 4  # rows at once
GROUP = 32  # sampled tokens whose experts' outputs are held at once


def profile(checkpoint: Checkpoint, directory: Path, calibration: Calibration, progress: Progress) -> dict:
    """Profile `checkpoint` on `calibration` and write tables, trace and profile.json into `directory`.

    Returns what profile.json says.
    """
    started = time.monotonic()
    rows = calibration.rows(checkpoint)
    total = sum(len(row) for row in rows)
    sample = np.sort(np.random.default_rng(calibration.seed).permutation(total)[:SAMPLE])
    observer = _Observer(checkpoint, sample)
    with torch.no_grad(), experts_run_by(checkpoint.model, observer.run), observer.scores:
        for batch in progress.over(list(_batches(rows)), "profile", "batches"):
            observer.begin(batch)
            checkpoint.model(input_ids=torch.from_numpy(batch), use_cache=False, **_fewest_logits(checkpoint.model))
    tables = [sums.tables() for sums in observer.sums]
    about = _about(checkpoint, calibration, total, len(sample), tables, time.monotonic() - started)
    save_tables(directory / "tables.safetensors", tables, {"fingerprint": about["fingerprint"]})
    safetensors_file.save(directory / "trace.safetensors", observer.trace())
    (directory / "profile.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return about


def open_profile(directory: Path, checkpoint: Checkpoint) -> dict:
    """profile.json of a directory that `profile` wrote for this checkpoint; a `PrepError` if it is not."""
    missing = [name for name in PROFILE_FILES if not (directory / name).is_file()]
    if missing:
        raise PrepError(f"{directory} has no {missing[0]}; give a directory that `smoe-prep profile` wrote.")
    try:
        about = json.loads((directory / "profile.json").read_text("utf-8"))
        fingerprint = about["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise PrepError(f"{directory}/profile.json is damaged ({error}); profile again.") from error
    if fingerprint != checkpoint.fingerprint():
        raise PrepError(f"{directory} is the profile of another checkpoint ({about.get('model')}); profile this one.")
    return about


def _fewest_logits(model: torch.nn.Module) -> dict[str, int]:
    """Ask for one position's logits where the model can: nobody reads them, and over a large vocabulary they are most
    of the memory."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _batches(rows: list[np.ndarray]):
    whole = [row for row in rows if len(row) == len(rows[0])]
    for i in range(0, len(whole), BATCH):
        yield np.stack(whole[i : i + BATCH])
    if len(rows[-1]) != len(rows[0]):
        yield rows[-1][None]


class _Scores(TorchFunctionMode):
    """Remembers every topk since the last `take`: (its input, its indices)."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.topk, torch.Tensor.topk):
            self._seen.append((args[0] if args else kwargs["input"], result[1]))
        return result

    def take(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The scores `[T, E]` whose topk gave `ids`, if there was one."""
        seen, self._seen = self._seen, []
        for scores, indices in reversed(seen):
            if indices.numel() == ids.numel() and torch.equal(indices.reshape(ids.shape), ids):
                return scores.reshape(len(ids), -1)
        return None


class _Observer:
    """Runs the experts of every layer and adds up what it sees."""

    def __init__(self, checkpoint: Checkpoint, sample: np.ndarray):
        sizes = [expert_geometry(module)[0] for _, module in experts_modules(checkpoint.model)]
        self.sums = [LayerSums.zeros(e, sizes[i - 1] if i else 0) for i, e in enumerate(sizes)]
        self.scores = _Scores()
        self._sample = sample
        self._done = 0  # tokens of earlier batches
        self._batch = np.zeros(0, np.int64)
        self._before: np.ndarray | None = None
        self._trace: dict[str, list[np.ndarray]] = {"tokens": [], "starts": []}

    def begin(self, batch: np.ndarray) -> None:
        """A batch of token ids int64 `[rows, length]` is about to run."""
        self._done += len(self._batch)
        self._batch = batch.reshape(-1)
        self._before = None
        low, high = np.searchsorted(self._sample, [self._done, self._done + len(self._batch)])
        self._picked = self._sample[low:high] - self._done
        starts = np.zeros(batch.shape, np.uint8)
        starts[:, 0] = 1
        self._note("tokens", self._batch.astype(np.int32))
        self._note("starts", starts.reshape(-1))

    def run(self, layer, module, hidden, ids, weights):
        """The experts of one layer, as `experts_run_by` wants them."""
        scores = self.scores.take(ids)
        x = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros_like(x)
        norms = torch.zeros_like(weights)
        for expert in ids.unique().tolist():
            tokens, ranks = torch.where(ids == expert)
            y = expert_outputs(module, expert, x[tokens])
            norms[tokens, ranks] = y.norm(dim=-1)
            out.index_add_(0, tokens, y * weights[tokens, ranks, None])
        sums = self.sums[layer]
        mixed = weights.double().numpy()
        active = sums.add_routing(ids.numpy(), mixed, norms.double().numpy(), self._before)
        if scores is not None:
            sums.add_scores(scores.numpy())
            self._note(key(layer, "scores"), scores.numpy().astype(np.float16))
        for group in np.array_split(self._picked, -(-len(self._picked) // GROUP) or 1):
            if len(group):
                every = [expert_outputs(module, e, x[group]) for e in range(active.shape[1])]
                sums.add_outputs(torch.stack(every, 1).numpy(), active[group])
        self._before = active
        self._note(key(layer, "ids"), ids.numpy().astype(np.int16))
        self._note(key(layer, "weights"), mixed.astype(np.float32))
        return out.reshape(hidden.shape)

    def _note(self, name: str, values: np.ndarray) -> None:
        if self._done < TRACE:
            self._trace.setdefault(name, []).append(values)

    def trace(self) -> dict[str, np.ndarray]:
        """The first tokens of the run, names as in `artifacts.tables.TRACE`."""
        return {name: np.concatenate(parts)[:TRACE] for name, parts in self._trace.items()}


def _about(
    checkpoint: Checkpoint, calibration: Calibration, total: int, sampled: int, tables: list[dict], seconds: float
) -> dict:
    names = [name for name, _ in experts_modules(checkpoint.model)]
    return {
        "model": checkpoint.model.config.model_type,
        "fingerprint": checkpoint.fingerprint(),
        "calibration": {
            "source": Path(calibration.source).name,
            "tokens": total,
            "length": calibration.length,
            "seed": calibration.seed,
            "sampled_tokens": sampled,
        },
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds, 1),
        "layers": [_summary(name, t) for name, t in zip(names, tables, strict=True)],
    }


def _summary(name: str, t: dict[str, np.ndarray]) -> dict:
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
        "mean_output_similarity": round(float(t["output_similarity"][off].mean()), 4) if off.any() else None,
        "best_standin_error": round(float(np.median(best[np.isfinite(best)])), 3) if np.isfinite(best).any() else None,
    }
