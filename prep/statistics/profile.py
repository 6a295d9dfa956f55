"""Profiling: calibration text runs through the model, and every layer's statistics are written as tables.

All text runs in lockstep, one layer at a time; the experts are run by `_Observer` through the seam, which sees what
each layer received and chose. Selection scores are the input of the topk whose indices reach the experts, caught as the router calls it, so no router needs to
be known. Output similarity and error come from a stated, seeded subsample of tokens on which all experts are run.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from smoe.artifacts import safetensors_file
from smoe.artifacts.tables import key, save_tables
from smoe.prep.checkpoint.checkpoint import Checkpoint
from smoe.prep.checkpoint.seam import expert_geometry, expert_outputs
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.progress import Progress
from smoe.prep.statistics.sums import LayerSums, activity
from smoe.prep.sweep.forward import Arrived, lockstep, mixed
from smoe.prep.workdir import Finished, write_whole

PROFILE_FILES = (
    "tables.safetensors",
    "study/tables.safetensors",
    "study/trace.safetensors",
    "study/profile.json",
)
SAMPLE = 1024  # tokens on which all experts are run
TRACE = 8192  # tokens kept in the trace
BATCH = 4  # rows at once
SAMPLED_AT_ONCE = 32 << 20  # bytes, in float64, of all experts' outputs for sampled tokens


# Threads of NumPy's own pool that wait for work take the processors from torch's: with both, three times the time.
@threadpool_limits.wrap(limits=1, user_api="blas")
def profile(
    checkpoint: Checkpoint,
    directory: Path,
    calibration: Calibration,
    progress: Progress,
    rows: list[np.ndarray] | None = None,
) -> dict:
    """Profile `checkpoint` on `calibration` and write tables, and their study with trace and profile.json, into `directory`.

    `rows` are those of the calibration, if they are there already. Layers that an interrupted run finished are not
    profiled again. Returns what profile.json says.
    """
    with Finished(directory) as finished:
        if (directory / "study" / "profile.json").exists():  # written last
            finished.clear()
            progress.say("profile: kept from an earlier run")
            return json.loads((directory / "study" / "profile.json").read_text("utf-8"))
        about = _profile(checkpoint, directory, calibration, rows, finished, progress)
        finished.clear()
        return about


def _profile(
    checkpoint: Checkpoint,
    directory: Path,
    calibration: Calibration,
    rows: list[np.ndarray] | None,
    finished: Finished,
    progress: Progress,
) -> dict:
    together = list(batches(calibration.rows(checkpoint) if rows is None else rows))
    total = sum(batch.size for batch in together)
    sample = np.sort(np.random.default_rng(calibration.seed).permutation(total)[:SAMPLE])
    observer = _Observer(checkpoint, together, sample, finished, progress)
    passes = [partial(run, checkpoint.model, batch) for batch in together]
    with observer.scores:
        for _ in lockstep(checkpoint, passes, observer.visit, observer.scores.take):
            pass
    tables = [sums.tables() for sums in observer.sums]
    about = _about(checkpoint, calibration, total, len(sample), tables)
    save_tables(directory / "tables.safetensors", tables, {"fingerprint": about["fingerprint"]})
    safetensors_file.save(directory / "study" / "trace.safetensors", observer.trace())
    write_whole(directory / "study" / "profile.json", json.dumps(about, indent=1) + "\n")
    return about


def open_profile(directory: Path, checkpoint: Checkpoint) -> dict:
    """profile.json of a directory that `profile` wrote for this checkpoint; a `PrepError` if it is not."""
    missing = [name for name in PROFILE_FILES if not (directory / name).is_file()]
    if missing:
        raise PrepError(
            f"{directory} has no {missing[0]}; give a directory that `smoe-prep profile` wrote."
        )
    try:
        about = json.loads((directory / "study" / "profile.json").read_text("utf-8"))
        fingerprint = about["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise PrepError(
            f"{directory}/study/profile.json is damaged ({error}); profile again."
        ) from error
    if fingerprint != checkpoint.fingerprint():
        raise PrepError(
            f"{directory} is the profile of another checkpoint ({about.get('model')}); profile this one."
        )
    return about


def run(model: torch.nn.Module, batch: np.ndarray) -> None:
    """One pass over a batch of token ids int64 `[rows, length]`; nobody reads what comes out."""
    model(input_ids=torch.from_numpy(batch), use_cache=False, **_fewest_logits(model))


def _fewest_logits(model: torch.nn.Module) -> dict[str, int]:
    """Ask for one position's logits where the model can: nobody reads them, and over a large vocabulary they are most
    of the memory."""
    return (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )


def batches(rows: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Rows of one length, a few at a time, and the last one if it is shorter: int64 `[n, length]`."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    for i in range(0, len(whole), BATCH):
        yield np.stack(whole[i : i + BATCH])
    if len(rows[-1]) != len(rows[0]):
        yield rows[-1][None]


class Scores:
    """A context in which every topk since the last `take` is remembered: (its input, its indices). A TorchFunctionMode would
    look at every operation, and that takes 5 % of the time."""

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> None:
        self._function = torch.topk
        torch.topk, torch.Tensor.topk = (
            self._remembered(torch.topk),
            self._remembered(torch.Tensor.topk),
        )

    def __exit__(self, *_: object) -> None:
        torch.topk = self._function
        del torch.Tensor.topk  # what it inherits is there again

    def _remembered(self, topk: Callable) -> Callable:
        @functools.wraps(topk)
        def call(*args, **kwargs):
            result = topk(*args, **kwargs)
            self._seen.append((args[0] if args else kwargs["input"], result[1]))
            return result

        return call

    def take(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The scores `[T, E]` whose topk gave `ids`, if there was one."""
        seen, self._seen = self._seen, []
        for scores, indices in reversed(seen):
            if indices.numel() == ids.numel() and torch.equal(indices.reshape(ids.shape), ids):
                return scores.reshape(len(ids), -1)
        return None


class _Observer:
    """Runs the experts of every layer and adds up what it sees."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: list[np.ndarray],
        sample: np.ndarray,
        finished: Finished,
        progress: Progress,
    ):
        self._checkpoint, self._finished = checkpoint, finished
        sizes = [expert_geometry(module)[0] for _, module in checkpoint.layers]
        self.sums = [LayerSums.zeros(e, sizes[i - 1] if i else 0) for i, e in enumerate(sizes)]
        self.scores = Scores()
        ends = np.cumsum([batch.size for batch in batches])
        self._starts = ends - [batch.size for batch in batches]
        self._picked = [
            sample[slice(*np.searchsorted(sample, (low, high)))] - low
            for low, high in zip(self._starts, ends, strict=True)
        ]
        self._before: list[np.ndarray | None] = [None] * len(
            batches
        )  # the previous layer's activity
        self._trace: dict[str, list[np.ndarray]] = {}
        for i, batch in enumerate(batches):
            starts = np.zeros(batch.shape, np.uint8)
            starts[:, 0] = 1
            self._note(i, "tokens", batch.reshape(-1).astype(np.int32))
            self._note(i, "starts", starts.reshape(-1))
        self._count = progress.counter("profile", "layers", len(sizes))

    def visit(self, layer: int, arrived: list[Arrived]) -> Iterator[torch.Tensor]:
        """The experts of one layer, as `lockstep` wants them."""
        known = self._finished.sums(layer, self.sums[layer])
        if known is not None:
            self.sums[layer] = known
            outputs = self._finished.outputs(layer, [slots.hidden for slots in arrived])
        else:
            outputs = self._finished.keeping(
                layer, self._observed(layer, arrived), self.sums[layer]
            )
        for i, output in enumerate(outputs):
            self._remember(i, layer, arrived[i])
            yield output
        self._count.done(layer + 1, worked=known is None)

    def _observed(self, layer: int, arrived: list[Arrived]) -> Iterator[torch.Tensor]:
        sums = self.sums[layer]
        with self._checkpoint.experts(layer) as module:
            self._sampled(module, sums, arrived)
            computed = mixed(module, arrived)
            for slots, before, (output, norms) in zip(arrived, self._before, computed, strict=True):
                weights = slots.weights.double().numpy()
                sums.add_routing(slots.ids.numpy(), weights, norms.double().numpy(), before)
                if slots.noted is not None:
                    sums.add_scores(slots.noted[:, : len(sums.counts)].numpy())
                yield output

    def _sampled(self, module: torch.nn.Module, sums: LayerSums, arrived: list[Arrived]) -> None:
        """Run all experts on the sampled tokens."""
        picked = list(zip(arrived, self._picked, strict=True))
        x = torch.cat([slots.tokens[of] for slots, of in picked])
        experts = len(sums.counts)
        active = activity(np.concatenate([slots.ids.numpy()[of] for slots, of in picked]), experts)
        at_once = max(1, SAMPLED_AT_ONCE // (experts * x.shape[1] * 8))
        for start in range(0, len(x), at_once):
            group = slice(start, start + at_once)
            every = torch.empty(len(x[group]), experts, x.shape[1], dtype=torch.float64)
            for expert in range(experts):
                every[:, expert] = expert_outputs(module, expert, x[group])
            sums.add_outputs(every.numpy(), active[group])

    def _remember(self, i: int, layer: int, slots: Arrived) -> None:
        """What the next layer and the trace need of this one."""
        ids = slots.ids.numpy()
        self._before[i] = activity(ids, len(self.sums[layer].counts))
        self._note(i, key(layer, "ids"), ids.astype(np.int16))
        self._note(i, key(layer, "weights"), slots.weights.float().numpy())
        if slots.noted is not None:
            scores = slots.noted[
                :, : len(self.sums[layer].counts)
            ]  # a score for "no expert" comes last
            self._note(i, key(layer, "scores"), scores.numpy().astype(np.float16))

    def _note(self, i: int, name: str, values: np.ndarray) -> None:
        if self._starts[i] < TRACE:
            self._trace.setdefault(name, []).append(values)

    def trace(self) -> dict[str, np.ndarray]:
        """The first tokens of the run, names as in `artifacts.tables.TRACE`."""
        return {name: np.concatenate(parts)[:TRACE] for name, parts in self._trace.items()}


def _about(
    checkpoint: Checkpoint, calibration: Calibration, total: int, sampled: int, tables: list[dict]
) -> dict:
    names = [name for name, _ in checkpoint.layers]
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
        "mean_output_similarity": round(float(t["output_similarity"][off].mean()), 4)
        if off.any()
        else None,
        "best_standin_error": round(float(np.median(best[np.isfinite(best)])), 3)
        if np.isfinite(best).any()
        else None,
    }
