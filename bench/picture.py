"""A line picture as SVG, written by hand: one line per series over shared places on x, y in powers of ten."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 380, 64, 120, 44, 52
COLOURS = ("#0b6e4f", "#c1440e", "#5b5b95", "#8a8a8a")
STYLE = "text{font:13px sans-serif;fill:#222}.title{font-weight:bold}.grid{stroke:#ddd}.line{fill:none;stroke-width:2.5}"


def lines(title: str, places: list[str], below: str, series: dict[str, list[float | None]]) -> str:
    """`series[name][i]` is drawn over `places[i]`; None leaves a gap. Every point has its value beside it."""
    known = [value for values in series.values() for value in values if value]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)) + 1e-9)
    high = max(high, low + 1)

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(places)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / (high - low)

    out = [
        _text(LEFT, 24, title, "title"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, below, anchor="middle"),
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        out.append(_text(LEFT - 8, at + 4, f"{10.0**power:g}", anchor="end"))
    out += [
        _text(x(i), HEIGHT - BOTTOM + 20, place, anchor="middle") for i, place in enumerate(places)
    ]
    for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
        points = [(x(i), y(value), value) for i, value in enumerate(values) if value]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        out.append(f'<polyline class="line" stroke="{colour}" points="{path}"/>')
        for px, py, value in points:
            out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{colour}"/>')
            out.append(_text(px, py - 9, f"{value:.3g}", anchor="middle"))
        if points:
            out.append(_text(points[-1][0] + 12, points[-1][1] + 4, name, colour=colour))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *out, "</svg>\n"])


def _text(
    x: float, y: float, text: str, kind: str = "", anchor: str = "start", colour: str = ""
) -> str:
    fill = f' style="fill:{colour};font-weight:bold"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{fill}>{escape(text)}</text>'
