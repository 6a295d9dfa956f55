"""The commands of `smoe-prep`: build does all; profile, pack, export and verify are its steps.

Each parses, calls one library function and prints. Results on stdout, progress on stderr. What
loads torch is imported by the command that needs it, so that help, mistakes and replays answer at
once.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from smoe.artifacts.encodings import ENCODINGS
from smoe.artifacts.manifest import STATE_KINDS
from smoe.prep.checkpoint.text import DEFAULT_TOKENS, Calibration
from smoe.prep.cli_add import add, train_bits
from smoe.prep.cli_options import (
    SEED,
    calibration_options,
    device_option,
    json_option,
    model_argument,
    show,
)
from smoe.prep.cli_replay import plan, simulate
from smoe.prep.options import PRICE_TOKENS, QUANTISERS, SELF_TOKENS, STATE_LIMIT, Recipe
from smoe.prep.progress import Progress

RECIPE = Recipe()

_output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="What to write."
)
_encoding = click.option(
    "--encoding",
    default=RECIPE.encoding,
    show_default=True,
    help=f"How experts are stored: {', '.join(ENCODINGS)}, or nested:SPLIT[/DOWN_SPLIT][:GROUP] "
    "like nested:2+1+1:128. stored: as in the checkpoint, its own codes of 4 bits too.",
)
_quantiser = click.option(
    "--quantiser",
    help=f"How nested encodings are made: {', '.join(QUANTISERS)}; nearest is plain rounding. "
    "[default: kept for a checkpoint's own codes, else calibrated]",
)
_own = click.option(
    "--self",
    "own",
    type=int,
    metavar="N",
    help="Tokens that the model writes itself and learns from, beside --calibration or in place of "
    f"it; 0: none. [default: {SELF_TOKENS}; beside --calibration none unless codes are calibrated]",
)
_backbone = click.option(
    "--backbone",
    default=RECIPE.backbone,
    show_default=True,
    help="Precision of the backbone: f32, int8 or int4, which is calibrated where there is text "
    "and keeps 8 bits where 4 cost most.",
)
_state = click.option(
    "--state",
    help=f"What the backbone's program keeps keys and values in: {', '.join(STATE_KINDS)}. "
    f"[default: the narrowest that differs from f32 by less than {STATE_LIMIT:g} nats per "
    "token, by a measurement; f32 beside a float32 backbone]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="smoe")
def cli() -> None:
    """Prepare a mixture-of-experts model once, for small devices.

    MODEL is the directory of a Hugging Face checkpoint, or the name ORG/NAME[@REVISION] of one to
    fetch."""


@cli.command()
@model_argument
@_output
@calibration_options(required=False)
@click.option(
    "--profile",
    "profiled",
    type=click.Path(path_type=Path),
    help="What `smoe-prep profile` wrote (from --calibration, if both are given), instead of "
    "profiling now.",
)
@_own
@_encoding
@_quantiser
@_backbone
@click.option(
    "--prices",
    type=int,
    help=f"Tokens of the text that prices come from; 0: no prices. [default: {PRICE_TOKENS}]",
)
@_state
@device_option
@json_option
def build(
    model: Path,
    output: Path,
    calibration: str | None,
    tokens: int | None,
    seed: int,
    profiled: Path | None,
    own: int | None,
    encoding: str,
    quantiser: str | None,
    backbone: str,
    prices: int | None,
    state: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Make a bundle of the checkpoint MODEL: profile, pack, price, export. MODEL is a directory, or
    the name ORG/NAME[@REVISION] of a model to fetch; what stopped in the middle is gone on with.
    Without --calibration the model learns from text that it writes itself."""
    source = _source(calibration, tokens, seed, writes=profiled is None and own != 0)
    from smoe.prep.build import build

    recipe = Recipe(
        encoding=encoding,
        backbone=backbone,
        quantiser=quantiser,
        prices=prices,
        device=device,
        self_tokens=own,
        seed=seed,
        state=state,
    )
    show(build(model, output, source, recipe, profiled, Progress()), as_json)


def _source(
    calibration: str | None, tokens: int | None, seed: int, writes: bool = False
) -> Calibration | None:
    """The text that was given; a usage error for options that would say nothing without it, where
    the model `writes` its own or does not."""
    if calibration is None and (tokens is not None or (seed != SEED and not writes)):
        raise click.UsageError(
            "--tokens and --seed say how to read --calibration, which is not given"
            + ("; --self N says how much the model writes itself." if writes else ".")
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
@_quantiser
@_backbone
@_own
@click.option(
    "--tokens",
    type=click.IntRange(0),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Of calibration text; 0: without any, as by build without --calibration.",
)
@click.option(
    "--prices",
    type=click.IntRange(0),
    default=PRICE_TOKENS,
    show_default=True,
    help="Of these for prices; 0: no prices.",
)
@json_option
@click.pass_context
def inspect(
    context: click.Context,
    model: Path | None,
    list_families: bool,
    encoding: str,
    quantiser: str | None,
    backbone: str,
    tokens: int,
    own: int | None,
    prices: int,
    as_json: bool,
) -> None:
    """Say whether the checkpoint MODEL can be prepared, and what that takes in disk, memory and
    time.

    It needs a config.json and no more; of a MODEL that is named as ORG/NAME[@REVISION], the config
    and the weights' headers are fetched. Exits with 1 if the model cannot be prepared."""
    if (model is None) != list_families:
        raise click.UsageError("Give either MODEL or --families.")
    if list_families:
        _refuse_given(context, "encoding", "quantiser", "backbone", "own", "tokens", "prices")
    from smoe.prep import inspect as inspection

    if list_families or model is None:
        show(inspection.families(), as_json)
        return
    result = inspection.inspect(model, encoding, tokens, prices, backbone, quantiser, own)
    show(result, as_json)
    if result.refusal:
        raise SystemExit(1)


def _refuse_given(context: click.Context, *names: str) -> None:
    """A usage error if one of these options was typed: the command would do nothing with it."""
    for name in names:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} says nothing about families; leave it out.")


@cli.command()
@model_argument
@_output
@calibration_options(required=True)
@device_option
@json_option
def profile(
    model: Path,
    output: Path,
    calibration: str,
    tokens: int | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Learn which experts matter, which resemble each other and which follow each other; write
    PROFILE."""
    from smoe.prep.steps import profile_to

    source = Calibration(calibration, tokens, seed)
    show(profile_to(model, output, source, Progress(), device), as_json)


@cli.command()
@model_argument
@_output
@calibration_options(required=False)
@_encoding
@_quantiser
@device_option
@json_option
def pack(
    model: Path,
    output: Path,
    calibration: str | None,
    tokens: int | None,
    seed: int,
    encoding: str,
    quantiser: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Write only the experts, as shards, with experts.json beside them."""
    source = _source(calibration, tokens, seed)
    from smoe.prep.steps import pack_to

    show(pack_to(model, output, source, encoding, quantiser, Progress(), device), as_json)


@cli.command()
@model_argument
@_output
@_backbone
@json_option
def export(model: Path, output: Path, backbone: str, as_json: bool) -> None:
    """Write only the backbone, as ONNX segments, with backbone.json beside them."""
    from smoe.prep.steps import export_to

    show(export_to(model, output, backbone, Progress()), as_json)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@model_argument
@click.option(
    "--text",
    required=True,
    metavar="SOURCE",
    help="Held-out text, in any form that --calibration takes.",
)
@click.option("--tokens", type=int, default=4096, show_default=True)
@click.option(
    "--memory", metavar="SIZE", help="What the runtime may take beside the checkpoint, like 4GiB."
)
@click.option("--level", type=int, help="Planes of every expert to read, as in `smoe run`.")
@click.option(
    "--prices",
    is_flag=True,
    help="Compare the prices of random shortcuts with what they cost, instead.",
)
@json_option
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
    """Compare BUNDLE with the checkpoint MODEL token by token on held-out text, through the
    runtime's own path."""
    held_out = Calibration(text, tokens, length=256)
    if prices:
        if memory is not None or level is not None:
            raise click.UsageError(
                "--prices are checked with all experts at every level; leave out --memory and "
                "--level."
            )
        from smoe.prep.checkpoint.checkpoint import open_checkpoint
        from smoe.prep.prices.verify import verify_prices

        progress = Progress()
        checkpoint = open_checkpoint(model, progress)
        show(verify_prices(bundle, checkpoint, held_out, progress), as_json)
        return
    from smoe.prep.verify import verify

    show(verify(bundle, model, held_out, memory, Progress(), level), as_json)


cli.add_command(add)
cli.add_command(train_bits)
cli.add_command(simulate)
cli.add_command(plan)
