"""The commands of `smoe-prep`: build does all; profile, pack, export and verify are its steps.

Each parses, calls one library function and prints. Results on stdout, progress on stderr. What loads torch is imported by
the command that needs it, so that help, mistakes and replays answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from smoe.artifacts.encodings import ENCODINGS
from smoe.artifacts.errors import printable
from smoe.prep.checkpoint.text import DEFAULT_TOKENS, MINIMUM, Calibration
from smoe.prep.options import PRICE_TOKENS, QUANTISERS, Recipe, chosen_quantiser, quantiser_settings
from smoe.prep.progress import Progress
from smoe.prep.replay.plan import choose
from smoe.prep.replay.plan import plan as make_plan
from smoe.prep.replay.plan import text_of as plan_text
from smoe.prep.replay.routing_trace import read_trace
from smoe.prep.replay.simulate import COUNTINGS, budgets_of, with_bound
from smoe.prep.replay.simulate import report as simulation_report
from smoe.prep.replay.simulate import simulate as run_simulation
from smoe.prep.show import families_text, inspection_text, profile_text, simulation_text
from smoe.runtime.budget import parse_size
from smoe.runtime.cache.eviction import EVICTIONS
from smoe.runtime.device_profile import Device
from smoe.runtime.options import SUBSTITUTIONS

if TYPE_CHECKING:
    from smoe.prep.checkpoint.checkpoint import Checkpoint

RECIPE = Recipe()
CALIBRATION = Calibration("")

_model = click.argument("model", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
_output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="What to write."
)
_encoding = click.option(
    "--encoding",
    default=RECIPE.encoding,
    show_default=True,
    help=f"How experts are stored: {', '.join(ENCODINGS)}, or nested:SPLIT[/DOWN_SPLIT][:GROUP] like nested:2+1+1:128.",
)
_quantiser = click.option(
    "--quantiser",
    help=f"How nested encodings are made: {' or '.join(QUANTISERS)} (plain rounding). [default: {QUANTISERS[0]}]",
)
_backbone = click.option(
    "--backbone",
    default=RECIPE.backbone,
    show_default=True,
    help="Precision of the backbone: f32, int8 or int4.",
)


def _calibration(required: bool) -> Callable:
    options = (
        click.option(
            "--calibration",
            metavar="SOURCE",
            required=required,
            help=".txt, .jsonl (text or input_ids), a dataset directory, or name[subset](split):n.",
        ),
        click.option(
            "--tokens", type=int, help="How many tokens to use. Default: 65536, or all there are."
        ),
        click.option(
            "--seed",
            type=int,
            default=CALIBRATION.seed,
            show_default=True,
            help="Order of documents, sample.",
        ),
    )

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="smoe")
def cli() -> None:
    """Prepare a mixture-of-experts model once, for small devices."""


@cli.command()
@_model
@_output
@_calibration(required=False)
@click.option(
    "--profile",
    "profiled",
    type=click.Path(path_type=Path),
    help="What `smoe-prep profile` wrote (from --calibration, if both are given), instead of profiling now.",
)
@_encoding
@_quantiser
@_backbone
@click.option(
    "--prices",
    type=int,
    help=f"Tokens of the calibration text that prices come from; 0: no prices. [default: {PRICE_TOKENS}]",
)
@_json
def build(
    model: Path,
    output: Path,
    calibration: str | None,
    tokens: int | None,
    seed: int,
    profiled: Path | None,
    encoding: str,
    quantiser: str | None,
    backbone: str,
    prices: int | None,
    as_json: bool,
) -> None:
    """Make a bundle of the checkpoint MODEL: profile, pack, price, export."""
    source = _source(calibration, tokens, seed)
    from smoe.prep.build import build

    manifest = build(
        model, output, source, Recipe(encoding, backbone, quantiser, prices), profiled, Progress()
    )
    size = sum(file.size for file in manifest.files.values())
    _print({"bundle": str(output), "bytes": size}, f"{output}: {size / 1e6:.1f} MB", as_json)


def _source(calibration: str | None, tokens: int | None, seed: int) -> Calibration | None:
    if calibration is None and (tokens is not None or seed != CALIBRATION.seed):
        raise click.UsageError(
            "--tokens and --seed say how to read --calibration, which is not given."
        )
    return None if calibration is None else Calibration(calibration, tokens, seed)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option(
    "--families",
    "list_families",
    is_flag=True,
    help="List the families that can be prepared, instead.",
)
@_encoding
@click.option(
    "--tokens",
    type=click.IntRange(MINIMUM),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Of calibration text.",
)
@click.option(
    "--prices",
    type=click.IntRange(0),
    default=PRICE_TOKENS,
    show_default=True,
    help="Of these for prices; 0: no prices.",
)
@_json
def inspect(
    model: Path | None, list_families: bool, encoding: str, tokens: int, prices: int, as_json: bool
) -> None:
    """Say whether the checkpoint MODEL can be prepared, and what that takes in disk, memory and time.

    It needs a config.json and no more. Exits with 1 if the model cannot be prepared."""
    if (model is None) != list_families:
        raise click.UsageError("Give either MODEL or --families.")
    from smoe.prep import inspect as inspection

    if list_families or model is None:
        found, version = inspection.families(), importlib.metadata.version("transformers")
        _print({"transformers": version, "families": found}, families_text(found, version), as_json)
        return
    about = inspection.inspect(model, encoding, tokens, prices)
    _print(dataclasses.asdict(about), inspection_text(about, encoding, tokens), as_json)
    if about.refusal:
        raise SystemExit(1)


@cli.command()
@_model
@_output
@_calibration(required=True)
@_json
def profile(
    model: Path, output: Path, calibration: str, tokens: int | None, seed: int, as_json: bool
) -> None:
    """Learn which experts matter, which resemble each other and which follow each other; write PROFILE."""
    from smoe.prep.statistics.profile import profile

    source = Calibration(calibration, tokens, seed)
    with _writing(model, output, lambda opened: source.settings(source.rows(opened))) as (
        checkpoint,
        partial,
    ):
        about = profile(checkpoint, partial, source, Progress())
    _print(about, profile_text(about), as_json)


@cli.command()
@_model
@_output
@_calibration(required=False)
@_encoding
@_quantiser
@_json
def pack(
    model: Path,
    output: Path,
    calibration: str | None,
    tokens: int | None,
    seed: int,
    encoding: str,
    quantiser: str | None,
    as_json: bool,
) -> None:
    """Write only the experts, as shards, with experts.json beside them."""
    source = _source(calibration, tokens, seed)
    calibrated = chosen_quantiser(encoding, quantiser, source) == "calibrated"
    if source is not None and not calibrated:
        raise click.UsageError("--calibration is for nested encodings with --quantiser calibrated.")
    from smoe.prep.pack.pack import pack

    rows: list[np.ndarray] = []

    def settings(opened: Checkpoint) -> dict[str, str]:
        about = {"--encoding": encoding} | quantiser_settings(encoding, quantiser)
        if source is None:
            return about
        rows.extend(source.rows(opened))
        return about | source.settings(rows)

    with _writing(model, output, settings) as (checkpoint, partial):
        experts = pack(checkpoint, partial, encoding, Progress(), rows if calibrated else None)
        (partial / "experts.json").write_text(
            json.dumps(dataclasses.asdict(experts), indent=1) + "\n"
        )
    _print(dataclasses.asdict(experts), f"{output}: experts in {encoding}", as_json)


@cli.command()
@_model
@_output
@_backbone
@_json
def export(model: Path, output: Path, backbone: str, as_json: bool) -> None:
    """Write only the backbone, as ONNX segments, with backbone.json beside them."""
    from smoe.prep.build import export_checked
    from smoe.prep.pack.pack import unpacked

    with _writing(model, output, lambda _: {"--backbone": backbone}) as (checkpoint, partial):
        manifest = export_checked(
            checkpoint, partial, unpacked(checkpoint, "f32"), backbone, Progress()
        )
        parts = {name: dataclasses.asdict(manifest)[name] for name in ("backbone", "layers")}
        (partial / "backbone.json").write_text(json.dumps(parts, indent=1) + "\n")
    _print(parts, f"{output}: {len(manifest.backbone.segments)} segments", as_json)


@contextlib.contextmanager
def _writing(
    model: Path, output: Path, settings: Callable[[Checkpoint], dict[str, str]]
) -> Iterator[tuple[Checkpoint, Path]]:
    """The opened checkpoint, and the directory that becomes `output`."""
    from smoe.prep.build import made_by
    from smoe.prep.checkpoint.checkpoint import open_checkpoint
    from smoe.prep.workdir import beside, refuse_existing

    refuse_existing(output)
    checkpoint = open_checkpoint(model)
    with beside(output, settings(checkpoint) | made_by(checkpoint), Progress()) as partial:
        yield checkpoint, partial


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_model
@click.option(
    "--text",
    required=True,
    metavar="SOURCE",
    help="Held-out text, in any form that --calibration takes.",
)
@click.option("--tokens", type=int, default=4096, show_default=True)
@click.option("--memory", metavar="SIZE", help="Budget of the runtime, as in `smoe run`.")
@click.option("--level", type=int, help="Planes of every expert to read, as in `smoe run`.")
@click.option(
    "--prices",
    is_flag=True,
    help="Compare the prices of random shortcuts with what they cost, instead.",
)
@_json
def verify(
    bundle: Path,
    model: Path,
    text: str,
    tokens: int,
    memory: str | None,
    level: int | None,
    prices: bool,
    as_json: bool,
) -> None:
    """Compare BUNDLE with the checkpoint MODEL token by token on held-out text, through the runtime's own path."""
    held_out = Calibration(text, tokens, length=256)
    if prices:
        if memory is not None or level is not None:
            raise click.UsageError(
                "--prices are checked with all experts at every level; leave out --memory and --level."
            )
        from smoe.prep.checkpoint.checkpoint import open_checkpoint
        from smoe.prep.prices.verify import text_of, verify_prices

        checked = verify_prices(bundle, open_checkpoint(model), held_out, Progress())
        _print(checked, text_of(checked), as_json)
        return
    from smoe.prep.verify import verify

    found = verify(bundle, model, held_out, memory, Progress(), level)
    lines = "\n".join(f"{name.replace('_', ' '):28} {value}" for name, value in found.items())
    _print(found, lines, as_json)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help=f"Eviction, repeatable: {', '.join(EVICTIONS)}; NAME:NUMBER sets its parameter, layer-NAME keeps every layer to "
    "its share. [default: all of them that the trace allows]",
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
    help=f"Replay a substitution too: {', '.join(f'{n}:{kind.number.split()[0].upper()}' for n, kind in SUBSTITUTIONS.items())}.",
)
@click.option("--warm", is_flag=True, help="Start from how often calibration used each expert.")
@click.option(
    "--counting",
    type=click.Choice(list(COUNTINGS)),
    default="step",
    show_default=True,
    help="step: as the engine does. whole: over the budget until a step ends, as BigMoeOnEdge's replay. slot: every slot "
    "by itself.",
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
@_json
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

    SOURCE is a bundle, a .route.csv of BigMoeOnEdge, or a .jsonl with {"layers": [[expert, …], …]} per token."""
    trace = read_trace(source, level, prompt)
    progress = Progress()
    rows = run_simulation(
        trace,
        with_bound(trace, policies),
        budgets_of(trace, memory, residency),
        substitute,
        warm,
        counting,
        lambda runs: progress.over(runs, "simulate", "runs", len(runs)),
    )
    about = simulation_report(trace, rows)
    _print(about, simulation_text(trace, about, substitute is not None), as_json)


@cli.command()
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
    help="Of the whole engine, repeatable. Default: the device's.",
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
@_json
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
    about, progress = Device.load(device), Progress()
    budgets = [parse_size(size) for size in memory] or [about.memory]
    found = make_plan(
        bundle,
        about,
        budgets,
        context,
        smoe,
        lambda runs: progress.over(runs, "plan", "runs", len(runs)),
    )
    wished = choose(found, speed, loss) if speed is not None or loss is not None else None
    data = {
        "candidates": [c.as_dict() for c in found],
        "chosen": wished.as_dict() if wished else None,
    }
    _print(data, plan_text(bundle, about, found, wished, context), as_json)


def _print(data: dict, text: str, as_json: bool) -> None:
    click.echo(json.dumps(data) if as_json else printable(text))
