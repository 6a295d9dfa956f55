"""The commands of `smoe-prep` that replay what a build recorded: simulate and plan, without
torch."""

from __future__ import annotations

from pathlib import Path

import click

from smoe.prep.cli_options import json_option, show_text
from smoe.prep.progress import Progress
from smoe.prep.replay.asked import budgets_of, with_bound
from smoe.prep.replay.plan import choose
from smoe.prep.replay.plan import plan as make_plan
from smoe.prep.replay.plan import text_of as plan_text
from smoe.prep.replay.report import simulation_text
from smoe.prep.replay.routing_trace import read_trace
from smoe.prep.replay.simulate import COUNTINGS, REPLAYED
from smoe.prep.replay.simulate import report as simulation_report
from smoe.prep.replay.simulate import simulate as run_simulation
from smoe.runtime.choosers import SUBSTITUTIONS
from smoe.runtime.device_profile import Device
from smoe.runtime.sizes import parse_size

_SUBSTITUTIONS = ", ".join(
    f"{name}:{kind.number.split()[0].upper()}" for name, kind in SUBSTITUTIONS.items()
)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help=f"Eviction, repeatable: {', '.join(REPLAYED)}; NAME:NUMBER sets its parameter, "
    "layer-NAME keeps every layer to its share. [default: all of them that the trace allows]",
)
@click.option(
    "--memory",
    multiple=True,
    metavar="SIZE",
    help="For resident experts alone, like 1GiB, repeatable.",
)
@click.option(
    "--residency",
    multiple=True,
    type=float,
    metavar="PART",
    help="Of all experts, like 0.25, instead; repeatable.",
)
@click.option(
    "--substitute",
    metavar="NAME:NUMBER",
    help=f"Replay a substitution too: {_SUBSTITUTIONS}.",
)
@click.option("--warm", is_flag=True, help="Start from how often calibration used each expert.")
@click.option(
    "--counting",
    type=click.Choice(list(COUNTINGS)),
    default="step",
    show_default=True,
    help="step: as the engine does. whole: over the budget until a step ends, as BigMoeOnEdge's "
    "replay. slot: every slot by itself.",
)
@click.option(
    "--level", type=int, help="Of a bundle: planes of every expert to read, as in `smoe run`."
)
@click.option(
    "--prompt",
    type=int,
    default=0,
    show_default=True,
    help="Of a bundle: first tokens of a sequence that are its prompt.",
)
@json_option
def simulate(
    source: Path,
    policies: tuple[str, ...],
    memory: tuple[str, ...],
    residency: tuple[float, ...],
    substitute: str | None,
    warm: bool,
    counting: str,
    level: int | None,
    prompt: int,
    as_json: bool,
) -> None:
    """Replay the routing trace of SOURCE over eviction policies and budgets, beside Belady's bound.

    SOURCE is a bundle, a .route.csv of BigMoeOnEdge, or a .jsonl with {"layers": [[expert, …], …]}
    per token."""
    trace = read_trace(source, level, prompt)
    progress = Progress()
    budgets = budgets_of(trace, memory, residency)
    rows = run_simulation(
        trace,
        with_bound(trace, policies, budgets),
        budgets,
        substitute,
        warm,
        counting,
        lambda runs: progress.over(runs, "simulate", "runs", len(runs)),
    )
    report = simulation_report(trace, rows)
    show_text(report, simulation_text(trace, report, substitute is not None), as_json)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--machine",
    "device",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="What `smoe bench BUNDLE --machine FILE` wrote on the device.",
)
@click.option(
    "--memory",
    multiple=True,
    metavar="SIZE",
    help="Of the whole process, as in `smoe run`, repeatable. Default: the device's.",
)
@click.option("--context", type=int, metavar="TOKENS", help="Longest sequence, as in `smoe run`.")
@click.option(
    "--speed", type=float, metavar="TOK/S", help="Wish: at least so fast, with the least loss."
)
@click.option(
    "--loss", type=float, metavar="NATS", help="Wish: at most so lossy, and as fast as can be."
)
@click.option(
    "--smoe", is_flag=True, help="Plan SMoE's own eviction and substitution, at several alphas."
)
@json_option
def plan(
    bundle: Path,
    device: Path,
    memory: tuple[str, ...],
    context: int | None,
    speed: float | None,
    loss: float | None,
    smoe: bool,
    as_json: bool,
) -> None:
    """Say how fast BUNDLE will run on a device, at which loss, and with which options."""
    if speed is not None and loss is not None:
        raise click.UsageError("Wish for a --speed or for a --loss; the other one follows.")
    machine, progress = Device.load(device), Progress()
    budgets = [parse_size(size) for size in memory] or [machine.memory]
    candidates = make_plan(
        bundle,
        machine,
        budgets,
        context,
        smoe,
        lambda runs: progress.over(runs, "plan", "runs", len(runs)),
    )
    wished = choose(candidates, speed, loss) if speed is not None or loss is not None else None
    data = {
        "candidates": [c.as_dict() for c in candidates],
        "chosen": wished.as_dict() if wished else None,
    }
    show_text(data, plan_text(bundle, machine, candidates, wished, context), as_json)
