"""On the device: opens a bundle and generates from it inside a memory budget. No torch, no
transformers.

    from smoe.runtime import Engine
    with Engine.open("model.smoe", memory="64MiB", context=2048) as engine:
        for token in engine.generate("def main():", max_new_tokens=64):
            print(token.text, end="")

`engine.Engine.step` is the page to read first. Names are loaded when they are asked for, so that
the rooms without I/O come without ONNX Runtime.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smoe.runtime.engine import Engine
    from smoe.runtime.errors import EngineError
    from smoe.runtime.generation import Token
    from smoe.runtime.options import Policies
    from smoe.runtime.stats import Stats
    from smoe.runtime.text import StopWhen

__all__ = ["Engine", "EngineError", "Policies", "Stats", "StopWhen", "Token"]

_ROOMS = {
    "Engine": "engine",
    "EngineError": "errors",
    "Policies": "options",
    "Stats": "stats",
    "StopWhen": "text",
    "Token": "generation",
}


# ONNX Runtime (from 1.29 on) else reports to its makers which models are run, in a thread, and
# writes to ~/.cache. It asks once, when it is loaded; who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("smoe")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
