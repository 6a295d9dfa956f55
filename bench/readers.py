"""Engines that read ids, one at a time or many at once: what speed is measured of.

smoe as it is opened by anybody; llama.cpp as it comes: its weights repacked, prompts in batches of
512, what it remembers in float16, and of layers with a window only that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

BATCH = 512  # tokens of a prompt that llama.cpp reads at once


@dataclass(frozen=True)
class Reader:
    """`read` takes further ids, and waits for the logits after the last; `forget` begins anew;
    `opened` are the seconds that opening took; `lines` are what an engine says of itself."""

    read: Callable[[list[int]], None]
    forget: Callable[[], None]
    opened: float
    lines: Callable[[], list[str]]
    engine: Any = None


@contextmanager
def smoe(
    model: str, threads: int, context: int, executor: str = "auto", state: str | None = None
) -> Iterator[Reader]:
    """smoe, on one of its executors, its state of a kind."""
    from smoe.runtime import Engine
    from smoe.runtime.step import Phase, Span, Step

    started = time.perf_counter()
    with Engine.open(
        model, threads=threads, context=context, executor=executor, state=state
    ) as engine:
        opened = time.perf_counter() - started
        sequence = engine.new_sequence()

        def read(ids: list[int]) -> None:
            given = np.array(ids, np.int64)
            if len(ids) > 1:
                engine.prefill(sequence, given).finish()
            else:
                engine.step(Step((Span(sequence, given, np.array([0]), Phase.DECODE),)))

        yield Reader(read, lambda: sequence.rewind(0), opened, engine.mode_lines, engine)


def llama(model: str, threads: int, context: int) -> Reader:
    """llama.cpp. A `SystemExit` where it cannot open the model."""
    import llama_cpp as api

    silent = api.llama_log_callback(_complain)
    api.llama_log_set(silent, None)
    api.llama_backend_init()
    started = time.perf_counter()
    how = api.llama_model_default_params()
    how.n_gpu_layers = 0
    opened = api.llama_model_load_from_file(model.encode(), how)
    if not opened:
        raise SystemExit(f"llama.cpp cannot open {model}.")
    size = api.llama_context_default_params()
    size.n_ctx, size.n_batch, size.n_ubatch = context, BATCH, BATCH
    size.n_threads = size.n_threads_batch = threads
    size.swa_full = False
    session = api.llama_init_from_model(opened, size)
    if not session:
        raise SystemExit(f"llama.cpp has no context of {context} tokens for {model}.")
    took = time.perf_counter() - started

    def read(ids: list[int]) -> None:
        for low in range(0, len(ids), BATCH):
            part = ids[low : low + BATCH]
            tokens = (api.llama_token * len(part))(*part)  # which the batch does not keep
            if code := api.llama_decode(session, api.llama_batch_get_one(tokens, len(part))):
                raise SystemExit(f"llama.cpp could not decode {len(part)} tokens: {code}.")
        api.llama_get_logits_ith(session, -1)

    def forget() -> None:
        api.llama_memory_clear(api.llama_get_memory(session), True)

    def lines() -> list[str]:
        return [f"llama-cpp-python {api.__version__}"]

    return Reader(read, forget, took, lines, (silent, opened, session))


def _complain(level: int, text: bytes, data: object) -> None:
    """Pass on errors, and nothing else."""
    import sys

    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


ERROR = 4  # of ggml's levels of logging
