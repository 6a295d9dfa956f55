"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

import numpy as np

from smoe.runtime.errors import EngineError

MIB = 1 << 20
_UNITS = {
    unit: 1 << 10 * power
    for power, letter in enumerate("kmgtp", 1)
    for unit in (letter, f"{letter}i", f"{letter}ib")
} | {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15}
# Below, a number without a unit is no budget: an interpreter alone takes more bytes, and as MiB it
# is what machines have.
BARE = MIB
MOST = 1 << 60  # bytes; no machine has more


def parse_size(text: str | int) -> int:
    """Bytes of a size as people write it: "64MiB", "4Gi", "1.5G", "1,5 GiB", "500 MB", "1e9", or an
    integer. The letters alone are powers of 1024, as Java and Docker have them; KB, MB, … are
    powers of 1000. An `EngineError` for anything else."""
    if isinstance(text, (int, np.integer)) and not isinstance(text, bool):
        text = str(int(text))
    if not isinstance(text, str):
        raise EngineError(f"{text!r} is not a size; give an integer of bytes, or text like 64MiB.")
    match = re.fullmatch(
        r"\s*(-?[0-9]{1,400}(?:[.,][0-9]{1,400})?(?:[eE][+-]?[0-9]{1,3})?)\s*([a-zA-Z]*)\s*", text
    )
    shown = repr(text if len(text) <= 40 else text[:40] + "…")
    if not match or match[2].lower() not in _UNITS:
        raise EngineError(f"{shown} is not a size; write it like 64MiB, 1.5GiB or 500MB.")
    number, unit = match[1], match[2].lower()
    if re.fullmatch(r"[0-9]{1,3},[0-9]{3}", number):
        meant = f"{number.replace(',', '')}{match[2]} or {number.replace(',', '.')}{match[2]}"
        raise EngineError(f"{shown} can be read in two ways; write {meant}.")
    nbytes = float(number.replace(",", ".")) * _UNITS[unit]
    if nbytes < 1:
        raise EngineError(f"{shown} is not a size: it is less than a byte. Write it like 64MiB.")
    if nbytes > MOST:
        raise EngineError(f"{shown} is more than any machine has; write it like 64MiB or 4GiB.")
    if not unit and nbytes < BARE:
        raise EngineError(
            f"{shown} has no unit, and as bytes it would be less than an interpreter takes. Was "
            f"{number}MiB meant? Write {number}MiB, or {number}B if bytes were."
        )
    return int(number) if number.isdigit() and not unit else int(nbytes)


def show_size(size: int, up: bool = False) -> str:
    """Bytes for people. With `up` rounded up, so that the figure can be given back as a budget."""
    mib = size / MIB
    return f"{-(-size * 10 // MIB) / 10:.1f}MiB" if up else f"{mib:.1f}MiB"
