"""The options that several benches share."""

from __future__ import annotations

from pathlib import Path

from bench.harness import EXAMPLES, Option, option


def rounds(default: int) -> Option:
    return option(
        "--rounds", type=int, default=default, help="turns of all alternatives; medians are printed"
    )


def tokens(default: int) -> Option:
    return option("--tokens", type=int, default=default, help="of the text")


def residency(*default: float) -> Option:
    return option(
        "--residency", type=float, nargs="+", default=list(default),
        help="shares of the experts that are in memory",
    )  # fmt: skip


def io(default: str | None) -> Option:
    return option(
        "--io", choices=["direct", "buffered"], default=default,
        help="direct reads past the page cache",
    )  # fmt: skip


BUNDLE = option("--bundle", type=Path, required=True, help="the bundle to run")
TEXT = option(
    "--text", type=Path, default=EXAMPLES / "heldout.jsonl", help="JSON lines with a text each"
)
