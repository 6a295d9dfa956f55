"""Many requests through one engine. `loop` is the page to read; it needs no more than the runtime
does.

    from smoe.runtime import Engine
    from smoe.runtime.serve import Loop, Request
    with Engine.open("model.smoe", memory="2GiB", requests=8) as engine, Loop(engine) as loop:
        answers = [loop.submit(Request(prompt)) for prompt in prompts]
        for answer in answers:
            print("".join(token.text for token in answer))
"""

from smoe.runtime.serve.loop import Loop
from smoe.runtime.serve.request import Generation, Request

__all__ = ["Generation", "Loop", "Request"]
