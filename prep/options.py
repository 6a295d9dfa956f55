"""How a bundle is to be built: what its user chooses. Nothing heavy is loaded here, so that the
commands answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smoe.artifacts.encodings import encoding_named
from smoe.prep.errors import PrepError

if TYPE_CHECKING:
    from smoe.prep.checkpoint.text import Calibration

QUANTISERS = ("calibrated", "nearest")
PRICE_TOKENS = 8192  # of the calibration text


@dataclass(frozen=True)
class Recipe:
    """The defaults are those of the command line."""

    encoding: str = "bf16"
    backbone: str = "f32"
    quantiser: str | None = None  # of nested encodings: one of `QUANTISERS`; None is the first
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
        raise PrepError(f"There is no quantiser {asked!r}; there are {' and '.join(QUANTISERS)}.")
    if not name.startswith("nested"):
        if asked is not None:
            raise PrepError(
                f"--quantiser {asked} says how nested encodings are made; {name} has one way only."
            )
        return None
    quantiser = asked or QUANTISERS[0]
    if quantiser == "calibrated" and calibration is None:
        raise PrepError(
            f"{name} is quantised on calibration text; give --calibration FILE, or --quantiser "
            "nearest for plain rounding."
        )
    return quantiser


def quantiser_settings(encoding: str, asked: str | None) -> dict[str, str]:
    """What an interrupted run must have in common with the next one."""
    return {"--quantiser": asked or QUANTISERS[0]} if encoding.startswith("nested") else {}
