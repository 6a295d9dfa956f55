"""What a file may say of a state: of attention i the pieces of its blocks, "i.keys" and so on,
`[heads, tokens, ..]` of the last tokens, and "recurrent.i.value"."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from smoe.runtime.errors import EngineError
from smoe.runtime.kernels.blocks import TOKENS
from smoe.runtime.program.layout import StateLayout

Kinds = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # and shapes of arrays, by name


def check(kinds: Kinds, layout: StateLayout, length: int) -> None:
    """An `EngineError` where such arrays are not those of `length` tokens."""
    wanted: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for number, block in enumerate(layout.attentions):
        tokens = _tokens(kinds, layout, number, length)
        for name, (_, (heads, _, width), kind) in block.pieces.items():
            wanted[f"{number}.{name}"] = kind, (heads, tokens, width)
    for number, shape in enumerate(layout.recurrent):
        wanted[f"recurrent.{number}.value"] = np.dtype(np.float32), shape
    odd = sorted(n for n in kinds.keys() | wanted.keys() if kinds.get(n) != wanted.get(n))
    if odd:
        raise EngineError(
            f"The array {odd[0][:40]!r} is not one of a state of {length} tokens in {layout.kind} "
            "of this program."
        )


def _tokens(kinds: Kinds, layout: StateLayout, number: int, length: int) -> int:
    """How many are there of an attention: all, or, where there is a window, from the start of a
    block on as many as the next token sees, and up to those that a rewind needs."""
    _, shape = kinds.get(f"{number}.keys", (None, ()))
    first = length - shape[1] if len(shape) == 3 else 0
    low, high = layout.first_kept(number, length), layout.first_seen(number, length)
    possible = low // TOKENS * TOKENS <= first <= high and first % TOKENS == 0
    return length - (first if possible else low // TOKENS * TOKENS)


def named(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """One of them, whose kind was checked. An `EngineError` for a code that there is not."""
    array = arrays[name]
    if array.dtype == np.int8 and array.size and array.min() == -128:
        raise EngineError(f"The array {name!r} of a state has codes below -127.")
    return array
