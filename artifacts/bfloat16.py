"""bfloat16 in NumPy, which has no such type: its bits as uint16."""

from __future__ import annotations

import numpy as np


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Float32 to the bits of bfloat16 (uint16), nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
