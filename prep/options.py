"""How a bundle is to be built: what its user chooses. Nothing heavy is loaded here, so that the
commands answer at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from smoe.artifacts import nested
from smoe.artifacts.encodings import encoding_named
from smoe.prep.errors import PrepError

STORED = "stored"  # the encoding that keeps what a checkpoint has
QUANTISERS = ("calibrated", "nearest", "kept")
PRICE_TOKENS = 8192  # of the calibration text
# Tokens that a model writes itself, beside calibration text or in place of it (docs/log.md,
# 2026-11-27); more than the most would be weeks of writing.
SELF_TOKENS, SELF_MOST = 49152, 1 << 24
# Nats per token by which a narrower state may differ from float32. Beside int8 activations a
# difference of nothing has some 5e-4, by roundings that fall the other way; at 1.5e-3 the KL from
# the original model is what it was (docs/log.md, 2026-11-27).
STATE_LIMIT = 2e-3
MINIMUM = 128  # tokens: below this the statistics would be of nothing


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
    # Tokens that the model writes itself and learns from, beside its calibration text or in place
    # of it; None: `SELF_TOKENS`, or none where they would gain little (`own_tokens`).
    self_tokens: int | None = None
    seed: int = 0  # of what the model writes
    # What a program keeps keys and values in; None: the narrowest that costs next to nothing
    # (`state_kind`).
    state: str | None = None

    def resolved(self, encoding: str, calibration: bool, profiled: bool) -> Recipe:
        """The same with nothing left open, for experts in `encoding`, and where there is
        `calibration` text or a finished profile. A `PrepError` where there is no text for it."""
        text = self.has_text(calibration, profiled)
        quantiser = chosen_quantiser(encoding, self.quantiser, text)
        return replace(
            self,
            encoding=encoding,
            quantiser=quantiser,
            prices=self.price_tokens(text),
            self_tokens=self.own_tokens(calibration, profiled, quantiser),
        )

    def price_tokens(self, text: bool) -> int:
        """How many tokens prices come from; 0 for none. A `PrepError` if there is no `text` for
        them."""
        if self.prices is not None and self.prices < 0:
            raise PrepError(f"--prices is {self.prices}; 0 (none) or more tokens are wanted.")
        if self.prices and not text:
            raise PrepError(
                "Prices come from text; give --calibration FILE too, or leave out --prices."
            )
        if self.prices is None:
            return PRICE_TOKENS if text else 0
        return self.prices

    def has_text(self, calibration: bool, profiled: bool) -> bool:
        """Whether there is text to learn from: `calibration` text, or what the model writes itself
        where there is neither that nor a finished profile."""
        return calibration or (not profiled and self.self_tokens != 0)

    def own_tokens(self, calibration: bool, profiled: bool, quantiser: str | None) -> int:
        """How many tokens the model is to write itself: by default some beside `calibration` text
        where codes are calibrated, which gain by it, and none beside a finished profile."""
        if self.self_tokens is not None:
            return self.self_tokens
        gains = quantiser == "calibrated" or not calibration
        return SELF_TOKENS if gains and not profiled else 0

    def refuse_wrong_self(self, calibration: bool, profiled: bool) -> None:
        """A `PrepError` for a number of tokens or a seed with which nothing can be written."""
        tokens, alone = self.self_tokens, not calibration and not profiled
        if tokens and profiled:
            raise PrepError(
                "--self says how much text the model writes and is profiled on, and --profile that "
                "there is a profile already; leave one of them out."
            )
        if tokens == 0 and alone:
            raise PrepError(
                "There is no text to learn from; give --calibration FILE or --profile PROFILE, or "
                "leave out --self 0, so that the model writes its own."
            )
        least = MINIMUM if alone else 0
        if tokens is not None and not least <= tokens <= SELF_MOST:
            raise PrepError(f"--self is {tokens}; {least} to {SELF_MOST} tokens are wanted.")
        if self.seed < 0:
            raise PrepError(f"--seed is {self.seed}; 0 and more are wanted.")


def chosen_quantiser(encoding: str, asked: str | None, text: bool) -> str | None:
    """How a nested encoding's codes are found, None for the others; a `PrepError` if that cannot
    be: "calibrated" takes `text`."""
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
    if quantiser == "calibrated" and not text:
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


@dataclass(frozen=True)
class BitTraining:
    """How routers of levels are trained (`prep.bits`): the defaults are those of the command line.

    `average` is the mean bits that they are trained around (None: the middle of what the encoding
    has), `spread` how far prices are drawn from the one that gives it, as a logarithm; 0 is one
    price, as published. `capacity` is the share of an expert's tokens that may have each level
    while training (empty: any). `how` is "end-to-end" or "layer-by-layer", None: as memory
    allows."""

    average: float | None = None
    spread: float = 2.0
    capacity: tuple[float, ...] = ()
    how: str | None = None
    epochs: int = 1
    seed: int = 0
    device: str = "cpu"
