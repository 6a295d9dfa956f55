"""What many requests at once give on a text: tokens per second, and how long anybody waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from smoe.runtime.engine import Engine
from smoe.runtime.evaluate import Measured, read_documents, rows
from smoe.runtime.generation import Token
from smoe.runtime.sampling import Sampling
from smoe.runtime.serve.loop import Loop
from smoe.runtime.serve.request import Generation, Request
from smoe.runtime.system import peak_memory, reset_peak_memory
from smoe.runtime.text import StopWhen

NEVER = StopWhen(ids=())


def bench_requests(
    opened: Callable[[], Engine],
    text: Path,
    tokens: int,
    length: int,
    prompt: int,
    log: Callable[..., None] = lambda *lines: None,
) -> Measured:
    """Rows of `length` tokens of `text`, `tokens` in all, are asked at once of the engine that
    `opened()` gives: the first `prompt` of a row are its prompt, and as many tokens as it has left
    are drawn. As many advance together as the engine has room for."""
    documents = read_documents(text)
    reset_peak_memory()
    with opened() as engine, Loop(engine, waiting=tokens) as loop:
        log(*engine.mode_lines())
        return measure_requests(loop, rows(engine, documents, tokens, length), prompt)


def measure_requests(loop: Loop, texts: list[np.ndarray], prompt: int) -> Measured:
    """The same of rows of token ids."""
    loop.engine.reset_stats()
    clocks = [_Clock() for _ in texts]
    started = time.perf_counter()
    generations = [
        loop.submit(_request(row, prompt, seed), clock)
        for seed, (row, clock) in enumerate(zip(texts, clocks, strict=True))
    ]
    while loop.step():
        pass
    return _results(loop, generations, clocks, time.perf_counter() - started)


def _request(row: np.ndarray, prompt: int, seed: int) -> Request:
    prompt = min(prompt, len(row) - 1)
    # Drawn, since greedy text of a small model loops.
    how = Sampling(1.0, seed=seed)
    return Request(row[:prompt], max_new_tokens=len(row) - prompt, sampling=how, stop=NEVER)


class _Clock:
    """Listens to a request: when its tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, token: Token | None) -> None:
        if token is not None:
            self.times.append(time.perf_counter())


def _results(
    loop: Loop, generations: list[Generation], clocks: list[_Clock], seconds: float
) -> Measured:
    stats, made = loop.engine.stats, sum(generation.made for generation in generations)
    between = np.concatenate([np.diff(clock.times) for clock in clocks] or [np.zeros(0)])
    first = [g.seconds for g in generations if g.seconds is not None]
    failed = sum(generation.finish == "failed" for generation in generations)
    return {
        "requests": len(generations),
        "at_once": loop.engine.plan.requests,
        "failed": failed or None,
        "new_tokens": made,
        "tokens_per_second": made / seconds,
        "ttft": float(np.median(first)) if first else None,
        "tpot": float(np.median(between)) if len(between) else None,
        "tpot_longest": float(between.max()) if len(between) else None,
        "shared_tokens": sum(generation.shared for generation in generations),
        "hit_rate_before": stats.wanted_hit_rate,
        "hit_rate_after": stats.hit_rate,
        "substituted_share": stats.substituted_share,
        "nats_spent": stats.nats_spent / max(1, made),
        "bytes_read": stats.bytes_read,
        "stall_share": stats.stall_seconds / seconds,
        "peak_memory": peak_memory(),
    }
