"""Pictures of records: docs/outofcore.svg and docs/decoding.svg (pip install --group bench)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Record, Rows, Run, Table, bench, option, read_record
from bench.outofcore import UNIT

Line = Sequence[float | None]


@bench(option("--records", type=Path, default=ROOT / "docs" / "figures", help="a folder of them"))
def picture(run: Run) -> Rows:
    """Draw docs/outofcore.svg and docs/decoding.svg from the records of those runs."""
    written = []
    pictures = ("outofcore", "outofcore", draw_limits), ("decoding-16", "decoding", draw_decoding)
    for record, name, draw in pictures:
        out = ROOT / "docs" / f"{name}.svg"
        draw(read_record(run.records / f"{record}.json"), out)
        written.append([str(out.relative_to(ROOT))])
    yield Table("picture", {"written": "{}"}, written)


def limits(record: Record) -> tuple[list[str], dict[str, Line]]:
    """The limits, most memory first, and each engine's tokens per second at them; None where it
    did not run."""
    table = record.table("outofcore")
    engines = [name.removesuffix(UNIT) for name in table.columns][1:-1]
    places, *rates = zip(*(row[:-1] for row in table.rows), strict=True)
    return list(places), {name: list(rate) for name, rate in zip(engines, rates, strict=True)}


def draw_limits(record: Record, out: Path) -> None:
    """One line per engine over the limits, tokens per second in powers of ten."""
    places, rates = limits(record)
    figure, (axes,) = _axes(1)
    _lines(axes, [place.replace(" (", "\n(") for place in places], rates)
    axes.set(yscale="log", title="Tokens per second", xlabel="memory (of the bundle's size)")
    _save(figure, [axes], out)


def decoded(record: Record) -> tuple[list[int], dict[str, dict[int, Line]]]:
    """Positions, and of every engine its tokens per second at them, by threads."""
    table = record.table("decoding")
    columns = list(table.columns)
    at = {name: int(found[1]) for name in columns if (found := re.fullmatch(r"at (\d+)", name))}
    rates: dict[str, dict[int, Line]] = {}
    for row in table.rows:
        of = dict(zip(columns, row, strict=True))
        rates.setdefault(of["engine"], {})[of["threads"]] = [of[name] for name in at]
    return list(at.values()), rates


def draw_decoding(record: Record, out: Path) -> None:
    """Tokens per second at the first position over threads, and with the most threads over
    positions."""
    positions, rates = decoded(record)
    threads = sorted({count for by_threads in rates.values() for count in by_threads})
    figure, (left, right) = _axes(2)
    first = {name: [by[n][0] if n in by else None for n in threads] for name, by in rates.items()}
    most = {name: by[max(by)] for name, by in rates.items()}
    _lines(left, [str(count) for count in threads], first)
    _lines(right, [f"{position:,}" for position in positions], most)
    left.set(title=f"Tokens per second at {positions[0]}", xlabel="threads", ylim=(0, None))
    title = f"Tokens per second with {max(threads)} threads"
    right.set(title=title, xlabel="tokens before", ylim=(0, None))
    _save(figure, [left, right], out)


def _axes(count: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "smoe", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, count, figsize=(7 if count == 1 else 9, 4), layout="constrained", squeeze=False
    )
    return figure, list(axes[0])


def _lines(axes: Any, places: list[str], rates: dict[str, Line]) -> None:
    """A line for each name, with its figures above."""
    for name, values in rates.items():
        axes.plot(places, [math.nan if v is None else v for v in values], marker="o", label=name)
        points = [(p, v) for p, v in zip(places, values, strict=True) if v is not None]
        for point in points:
            above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{point[1]:.3g}", point, fontsize=9, **above)


def _save(figure: Any, axes: list[Any], out: Path) -> None:
    for each in axes:
        each.margins(y=0.12)
        each.grid(axis="y", color="#dddddd")
    axes[0].legend(frameon=False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
