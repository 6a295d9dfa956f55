"""The commands of `smoe-prep` that give a bundle what it lacks: add and train-bits."""

from __future__ import annotations

from pathlib import Path

import click

from smoe.prep.checkpoint.text import Calibration
from smoe.prep.cli_options import (
    calibration_options,
    device_option,
    json_option,
    model_argument,
    show,
)
from smoe.prep.options import BitTraining
from smoe.prep.progress import Progress

TRAINING = BitTraining()
HOW = ("end-to-end", "layer-by-layer")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option(
    "--program",
    is_flag=True,
    help="The backbone as a table of operations, which runs faster and without ONNX Runtime.",
)
@click.option(
    "--bits",
    is_flag=True,
    help="Routers of levels, trained on --calibration beside MODEL, as by train-bits.",
)
@calibration_options(required=False)
@json_option
def add(
    bundle: Path,
    model: Path | None,
    program: bool,
    bits: bool,
    calibration: str | None,
    tokens: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Give BUNDLE, which an older smoe-prep built, what is new, without packing it again."""
    if program == bits:
        raise click.UsageError("Say what to add: --program or --bits.")
    if bits != (model is not None and calibration is not None):
        raise click.UsageError("--bits, and nothing else, wants MODEL and --calibration.")
    if bits:
        assert model is not None and calibration is not None
        from smoe.prep.bits.train import train_bits

        source = Calibration(calibration, tokens, seed)
        show(train_bits(bundle, model, source, BitTraining(seed=seed), Progress()), as_json)
        return
    from smoe.prep.add import add_program

    show(add_program(bundle, Progress()), as_json)


@click.command("train-bits")
@click.argument("bundle", type=click.Path(path_type=Path))
@model_argument
@calibration_options(required=True)
@click.option(
    "--average",
    type=float,
    metavar="BITS",
    help="Mean bits of a weight that routers are trained around; --bits trained:MEAN asks for "
    "others. Default: the middle of what the encoding has.",
)
@click.option(
    "--spread",
    type=click.FloatRange(0, 8),
    default=TRAINING.spread,
    show_default=True,
    help="How far the price of a bit is drawn from that, as a logarithm; 0: one price, as "
    "published.",
)
@click.option(
    "--capacity",
    metavar="SHARES",
    help="The share of an expert's tokens that may have each level while training, like "
    "0.3,0.4,0.3; the others skip the expert. End-to-end only. Default: any.",
)
@click.option(
    "--how",
    type=click.Choice(HOW),
    help="Default: end-to-end where the model fits into memory with its experts at every level.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=TRAINING.epochs,
    show_default=True,
    help="Times that end-to-end training goes through the text.",
)
@device_option
@json_option
def train_bits(
    bundle: Path,
    model: Path,
    calibration: str,
    tokens: int | None,
    seed: int,
    average: float | None,
    spread: float,
    capacity: str | None,
    how: str | None,
    epochs: int,
    device: str,
    as_json: bool,
) -> None:
    """Train routers of levels for BUNDLE, which was built from the checkpoint MODEL, and add them:
    what --bits trained runs by. Those it has are replaced."""
    shares = _shares(capacity)
    if shares and how == HOW[1]:
        raise click.UsageError("--capacity is for end-to-end training; leave it out.")
    from smoe.prep.bits.train import train_bits

    training = BitTraining(average, spread, shares, how, epochs, seed, device)
    source = Calibration(calibration, tokens, seed)
    show(train_bits(bundle, model, source, training, Progress()), as_json)


def _shares(text: str | None) -> tuple[float, ...]:
    """The numbers of --capacity."""
    try:
        shares = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        shares = (-1.0,)
    if any(not 0 <= share <= 1 for share in shares) or (shares and sum(shares) <= 0):
        raise click.UsageError(
            f"--capacity is {text!r}; shares from 0 to 1 with commas between them are wanted, one "
            "a level."
        )
    return shares
