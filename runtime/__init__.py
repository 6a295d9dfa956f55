"""On the device: opens a bundle and generates from it inside a memory budget. No torch, no
transformers.

    from smoe.runtime import Engine
    with Engine.open("model.smoe", memory="64MiB", context=2048) as engine:
        for token in engine.generate("def main():", max_new_tokens=64):
            print(token.text, end="")

`engine.Engine.step` is the page to read first.
"""

from smoe.runtime.engine import Engine, Token
from smoe.runtime.errors import EngineError
from smoe.runtime.options import Policies
from smoe.runtime.stats import Stats
from smoe.runtime.text import StopWhen

__all__ = ["Engine", "EngineError", "Policies", "Stats", "StopWhen", "Token"]
