"""How a bundle is to be built: what its user chooses. Nothing heavy is loaded here, so that the
commands answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smoe.artifacts import nested
from smoe.artifacts.encodings import encoding_named
from smoe.prep.errors import PrepError

if TYPE_CHECKING:
    from smoe.prep.checkpoint.text import Calibration

STORED = "stored"  # the encoding that keeps what a checkpoint has
QUANTISERS = ("calibrated", "nearest", "kept")
PRICE_TOKENS = 8192  # of the calibration text


@dataclass(frozen=True)
class Recipe:
    """The defaults are those of the command line."""

    encoding: str = STORED
    backbone: str = "f32"
    # Of nested encodings, one of `QUANTISERS`; None: kept for a checkpoint's own codes, else
    # calibrated.
    quantiser: str | None = None
    # Tokens that prices come from; None: `PRICE_TOKENS` where there is text; 0: no prices.
    prices: int | None = None
    device: str = "cpu"  # what the sweep runs on, as torch names it

    def price_tokens(self, calibration: Calibration | None) -> int:
        """How many tokens prices come from; 0 for none. A `PrepError` if there is no text for
        them."""
        if self.prices is not None and self.prices < 0:
            raise PrepError(f"--prices is {self.prices}; 0 (none) or more tokens are wanted.")
        if self.prices and calibration is None:
            raise PrepError(
                "Prices come from text; give --calibration FILE too, or leave out --prices."
            )
        if self.prices is None:
            return PRICE_TOKENS if calibration is not None else 0
        return self.prices


def chosen_quantiser(
    encoding: str, asked: str | None, calibration: Calibration | None
) -> str | None:
    """How a nested encoding's codes are found, None for the others; a `PrepError` if that cannot
    be."""
    name = encoding_named(encoding).name
    if asked is not None and asked not in QUANTISERS:
        raise PrepError(f"There is no quantiser {asked!r}; there are {', '.join(QUANTISERS)}.")
    quantiser = default_quantiser(name)
    if quantiser is None:
        if asked is not None:
            raise PrepError(
                f"--quantiser {asked} says how nested encodings are made; {name} has one way only."
            )
        return None
    quantiser = asked or quantiser
    if quantiser == "kept" and not nested.parse(name).split.table:
        raise PrepError(
            f"--quantiser kept keeps a checkpoint's own codes, and {name} has other values than "
            "those; leave out --encoding to keep them."
        )
    if quantiser == "calibrated" and calibration is None:
        raise PrepError(
            f"{name} is quantised on calibration text; give --calibration FILE, or --quantiser "
            "nearest for plain rounding."
        )
    return quantiser


def default_quantiser(encoding: str) -> str | None:
    """How codes of a nested encoding are found where nobody says how; None for the others."""
    if not encoding.startswith("nested"):
        return None
    return "kept" if nested.parse(encoding).split.table else "calibrated"


def quantiser_settings(encoding: str, asked: str | None) -> dict[str, str]:
    """What an interrupted run must have in common with the next one."""
    quantiser = asked or default_quantiser(encoding)
    return {} if quantiser is None else {"--quantiser": quantiser}
