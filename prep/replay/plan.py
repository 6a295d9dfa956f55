"""What a device should do: budgets, levels and loss budgets, replayed over the bundle's trace with
the device's figures.

Every candidate drives the runtime's own residency and policies over the trace of the calibration
text, which gives what is computed and read at every step; `Device.step_seconds` makes time of that,
and prices make nats of shortcuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe.artifacts import Bundle, open_bundle
from smoe.prep.errors import PrepError
from smoe.prep.replay.routing_trace import Trace, bundle_trace
from smoe.prep.replay.simulate import Replay
from smoe.runtime.allowance import usual_process
from smoe.runtime.budget import MemoryPlan, plan_memory, state_line
from smoe.runtime.choose.prices import PRICE_TABLES, LayerPrices, Prices
from smoe.runtime.choosers import make_chooser
from smoe.runtime.device_profile import Device
from smoe.runtime.options import (
    Policies,
    level_sizes,
    make_eviction,
    make_residency,
    tables_bytes,
)
from smoe.runtime.routing import Assignment, Available, Routed
from smoe.runtime.sizes import show_size

TOKENS, SETTLE = 1536, 512  # of the trace: replayed, and of those not counted
LOSSES = (0.0, 0.003, 0.01, 0.03)
ALPHAS = (0.1, 0.25, 0.35, 0.6, 1.0, 1.5)


@dataclass(frozen=True)
class Candidate:
    """One way to run, and what is expected of it: tokens per second, and the rise in KL divergence
    in nats per token, None where the bundle has no prices. `memory` is the whole engine's; `level`
    counts planes."""

    memory: int
    backbone: int
    resident: int
    experts: int
    level: int
    policies: Policies
    tokens_per_second: float
    loss: float | None
    hit_rate: float
    bytes_per_token: float

    @property
    def options(self) -> str:
        """For `smoe run`."""
        p = self.policies
        given: dict[str, object] = {
            "--level": self.level or None,
            "--eviction": p.eviction if p.eviction != Policies().eviction else None,
        }
        given |= {
            "--substitution": p.substitution if p.substitution != "none" else None,
            "--loss": p.loss or None,
        }
        if self.resident == self.experts:
            given = {"--level": given["--level"]}
        return " ".join(f"{name} {value}" for name, value in given.items() if value is not None)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self) | {"options": self.options}


def plan(
    bundle: Path,
    device: Device,
    budgets: Sequence[int],
    context: int | None = None,
    smoe: bool = False,
    progress: Callable[[list], Iterable] = iter,
) -> list[Candidate]:
    """Every candidate for each of `budgets` (bytes of the whole process): lossless, with loss
    budgets, and all experts at a lower level; with `smoe` instead SMoE's eviction and substitution
    at several alphas. A
    `PrepError` if the device was measured with another bundle's experts, an `EngineError` if a
    budget is too small."""
    opened = open_bundle(bundle)
    manifest, levels, tables = opened.manifest, opened.levels, opened.tables
    if len(device.record_bytes) != levels:
        raise PrepError(
            f"The device was measured with experts of {len(device.record_bytes)} levels, {bundle} "
            f"has {levels}; run "
            "smoe bench --machine with this bundle."
        )
    needed = {"price_fit", "price_level"} if levels > 1 else {"price_fit"}
    priced = all(needed <= set(layer_tables) for layer_tables in tables.layers(*PRICE_TABLES))
    ways: list[tuple[int, Policies]] = [
        (levels, Policies(loss=loss)) for loss in LOSSES if priced or not loss
    ]
    ways += [(level, Policies()) for level in range(1, levels)]
    if smoe:
        ways = [(levels, Policies("score", substitution=f"smoe:{alpha}")) for alpha in ALPHAS]
    prices = Prices.of(tables.layers(*PRICE_TABLES)) if priced else None
    trace = _shortened(bundle_trace(bundle), len(manifest.layers))
    runs = [(budget, level, policies) for budget in budgets for level, policies in ways]
    candidates = [
        _candidate(opened, device, trace, budget, context, level, policies, prices)
        for budget, level, policies in progress(runs)
    ]
    return list(
        {(c.memory, c.options): c for c in candidates}.values()
    )  # where all fits, loss budgets have no effect


def choose(candidates: Sequence[Candidate], speed: float | None, loss: float | None) -> Candidate:
    """The one of least loss that is as fast as `speed` (tokens per second), or the fastest within
    `loss` (nats per token; None: lossless). Where none is, a `PrepError` says what there is."""
    known = [c for c in candidates if c.loss is not None]
    if not known:
        raise PrepError(
            "This bundle has no prices, so that what these ways lose is not known; build it "
            "from --calibration text without --prices 0."
        )
    if speed is not None:
        able = [c for c in known if c.tokens_per_second >= speed]
        if not able:
            best = max(c.tokens_per_second for c in known)
            faster = (
                " (without prices in the bundle, what faster ways lose is not known)"
                if len(known) < len(candidates)
                else ""
            )
            raise PrepError(
                f"{speed:g} tokens per second are out of reach; the fastest way gives "
                f"{best:.1f}{faster}. Allow more memory, "
                "or wish for less."
            )
        return min(able, key=lambda c: (c.loss, c.memory, -c.tokens_per_second))
    # An account keeps to its budget, though a replay as short as this one may end above it.
    able = [c for c in known if (c.policies.loss or c.loss or 0) <= (loss or 0)]
    if not able:
        raise PrepError(
            f"No way to run this within {loss} nats per token was tried; wish for another loss."
        )
    return max(able, key=lambda c: (c.tokens_per_second, -c.memory))


def _shortened(trace: Trace, layers: int) -> Trace:
    return dataclasses.replace(trace, steps=trace.steps[: TOKENS * layers])


def _candidate(
    bundle: Bundle,
    device: Device,
    trace: Trace,
    budget: int,
    context: int | None,
    level: int,
    policies: Policies,
    prices: Prices | None,
) -> Candidate:
    manifest, levels = bundle.manifest, bundle.levels
    onnxruntime = plan_memory(bundle, None, context, level).onnxruntime
    process = usual_process(budget, onnxruntime)
    held = plan_memory(bundle, budget, context, level, process=process)
    if held.capacity == held.experts:
        policies = Policies()
    held = plan_memory(bundle, budget, context, level, tables_bytes(policies, bundle), process)
    replay = _Timed(bundle, trace, held, level, policies, prices)
    row = replay.run("", held.capacity)
    counted = (
        slice(SETTLE * len(manifest.layers), None)
        if len(trace.steps) > 2 * SETTLE * len(manifest.layers)
        else slice(None)
    )
    computed, records, nbytes = (
        np.array(values)[counted] for values in zip(*replay.steps, strict=True)
    )
    tokens = len(computed) / len(manifest.layers)
    seconds = (
        device.backbone_seconds
        + device.step_seconds(computed, level, records, nbytes).sum() / tokens
    )
    loss = 0.0 if policies.lossless and level == levels else None
    if prices is not None:
        loss = float(np.sum(replay.nats[counted])) / tokens
    return Candidate(
        memory=held.total,
        backbone=held.backbone,
        resident=held.capacity,
        experts=held.experts,
        level=level if level < levels else 0,
        policies=policies,
        tokens_per_second=float(1 / seconds),
        loss=loss,
        hit_rate=row.after_hit_rate,
        bytes_per_token=float(nbytes.sum() / tokens),
    )


class _Timed(Replay):
    """A replay that notes of every step how many experts were computed, how many reads there were,
    their bytes, and what its shortcuts cost by their prices (where there are any)."""

    def __init__(
        self,
        bundle: Bundle,
        trace: Trace,
        held: MemoryPlan,
        level: int,
        policies: Policies,
        prices: Prices | None,
    ):
        manifest, sizes = bundle.manifest, level_sizes(bundle, level)
        eviction = make_eviction(policies.eviction, manifest)
        choice = make_chooser(policies, manifest, bundle.tables, sizes, held, eviction)
        super().__init__(
            trace=trace,
            residency=make_residency(held, sizes, eviction, policies),
            chooser=choice.chooser,
            ledger=None if choice.new_ledger is None else choice.new_ledger(None),
            full=level,
            sizes=sizes,
        )
        self._prices, self._below = prices, level < bundle.levels
        self.steps: list[tuple[int, int, int]] = []
        self.nats: list[float] = []
        self.cache.warm(bundle.tables.column("counts"), held.capacity, level)
        self.stats.reset()

    def bring(self, layer: int, assignment: Assignment, available: Available) -> None:
        """With what it takes."""
        loads, nbytes = self.stats.loads, self.stats.bytes_read
        super().bring(layer, assignment, available)
        computed = np.unique(assignment.ids[assignment.ids < len(available.level)])
        self.steps.append((len(computed), self.stats.loads - loads, self.stats.bytes_read - nbytes))

    def assigned(self, routed: Routed, assignment: Assignment) -> None:
        """What the shortcuts cost."""
        self.nats.append(self._cost(routed, assignment))

    def _cost(self, routed: Routed, assignment: Assignment) -> float:
        if self._prices is None:
            return 0.0
        prices = self._prices.layers[routed.layer]
        experts = self.trace.experts[routed.layer]
        if assignment.nats is not None:
            return float(assignment.nats.sum())
        if self._below:
            slots = routed.ids < experts
            at_level = prices.at_level(routed.ids[slots], routed.weights[slots], self.full)
            return float(at_level.sum())
        if assignment.ids is routed.ids:
            return 0.0
        return _replaced(prices, routed, assignment, experts)


def _replaced(prices: LayerPrices, routed: Routed, assignment: Assignment, experts: int) -> float:
    """What other experts, and other weights of the same ones, cost by their prices."""
    old, new = routed.ids, assignment.ids
    both = (old < experts) & (new < experts)
    e, s = old[both], new[both]
    w_e, w_s = routed.weights[both], assignment.weights[both]
    changed = (e != s) | (w_e != w_s)
    total = prices.stand_in(e[changed], w_e[changed], s[changed], w_s[changed]).sum()
    gone = (old < experts) & (new >= experts)
    return float(total + prices.skip(old[gone], routed.weights[gone]).sum())


def text_of(
    bundle: Path,
    device: Device,
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
    context: int | None = None,
) -> str:
    """For people."""
    lines = [
        f"device: backbone {device.backbone_seconds * 1e3:.2f} ms a token, an expert "
        f"{device.expert_seconds[-1] * 1e3:.3f} ms, reads ({device.io}) "
        f"{device.read_latency * 1e3:.2f} ms and "
        f"{device.read_bandwidth / 1e9:.2f} GB/s",
        state_line(open_bundle(bundle), context),
        f"{'memory':>12}  {'resident':>9}  {'tok/s':>7}  {'loss':>8}  {'hits':>6}  "
        f"{'read/token':>10}  options",
    ]
    for c in candidates:
        loss = "not known" if c.loss is None else f"{c.loss:.4f}"
        lines.append(
            f"{show_size(c.memory):>12}  {c.resident:>9}  {c.tokens_per_second:7.1f}  {loss:>8}  "
            f"{c.hit_rate:6.1%}  "
            f"{show_size(int(c.bytes_per_token)):>10}  {c.options or 'lossless'}"
        )
    if chosen is not None:
        length = "" if context is None else f"--context {context} "
        lines.append(
            f"smoe run {bundle} --memory {show_size(chosen.memory, up=True)} "
            f"{length}{chosen.options}".rstrip()
        )
    return "\n".join(lines)
