"""The expert FFN on a record's tensors: the native product where there is one, its NumPy twin where it is asked for.

`SMOE_KERNELS` names a variant (`avx512`, `avx2`, `portable`, `reference`); unset takes the best that the processor
runs. All variants give the same bits. A build without the native module (`SMOE_NO_NATIVE=1`) has the reference only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.manifest import Gate
from smoe.runtime import reference
from smoe.runtime.errors import EngineError

try:
    import smoe.runtime._native as _native
except ModuleNotFoundError:
    _native = None  # type: ignore[assignment]
    # Only a build with SMOE_NO_NATIVE=1 carries this marker: without it a missing module is an error, not slowness.
    try:
        import smoe.runtime._without_native  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError(
            "This install of smoe lacks its native kernels. Install it again where there is a C++ compiler, or with "
            "SMOE_NO_NATIVE=1 for the slow reference kernels."
        ) from None

Linear = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], np.ndarray]


@dataclass(frozen=True)
class Kernels:
    """A choice with its reason: `name` and `reason` are for the mode line, `linear` does the work."""

    name: str
    reason: str
    linear: Linear

    def ffn(self, spec: Gate, tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        """One expert on `x` float32 `[n, hidden]`, before its mixing weight: float32 `[n, hidden]`.

        `tensors` are the views of its record (`RecordLayout.views`).
        """

        def matrix(name: str, x: np.ndarray) -> np.ndarray:
            y = self.linear(x, tensors[name], tensors.get(f"{name}_scale"))
            return y + tensors[f"{name}_bias"] if f"{name}_bias" in tensors else y

        up = matrix("up", x)
        inner = reference.gate(spec, matrix("gate", x) if "gate" in tensors else None, up)
        y = matrix("down", np.ascontiguousarray(inner, np.float32))
        return reference.normalise(y, tensors["norm"]) if "norm" in tensors else y


def available() -> list[str]:
    """The variants that this machine runs, best first; `reference` is always the last."""
    return [*(_native.variants() if _native else []), "reference"]


def choose(name: str | None = None) -> Kernels:
    """The kernels called `name`, or by `SMOE_KERNELS`, or the best there are. An unknown name is an `EngineError`."""
    wanted = name or os.environ.get("SMOE_KERNELS")
    names = available()
    if wanted and wanted not in names:
        raise EngineError(f"There are no kernels {wanted!r} on this machine; it has {', '.join(names)}.")
    chosen = wanted or names[0]
    reason = "asked for" if wanted else "best of " + ", ".join(names) if _native else "built with SMOE_NO_NATIVE=1"
    return Kernels(chosen, reason, reference.linear if chosen == "reference" else _native_linear(chosen))


def _native_linear(variant: str) -> Linear:
    def linear(x: np.ndarray, w: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        y = np.empty((x.shape[0], w.shape[0]), np.float32)
        _native.linear(variant, x, w, scale, y)
        return y

    return linear
