"""Everything in memory: decoding, prompts and opening beside llama.cpp, and beside what the memory
gives.

Every measurement is a fresh process with warm files, in turns. llama.cpp repacks its weights, reads
prompts in batches of 512 and remembers in float16, as it does unless told. What the memory gives is
the best of several plain reads in the same process, before and after; what a token reads are the
experts that it uses, at their full level, and the backbone but for the rows of the embedding.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import models, options, page_cache, readers
from bench.geometries import GEOMETRIES
from bench.harness import Rows, Run, Table, bench, child, interleave, note, option
from bench.random_models import FIRST_ID
from smoe.artifacts import open_bundle
from smoe.artifacts.bundle import Bundle

PLAIN = 1 << 30  # bytes of a plain read
WARM = 8  # tokens before a clock starts
ENGINES = ("program", "onnx", "llama.cpp")

Answer = dict[str, Any]


@bench(
    options.rounds(5), options.tokens(64),
    option("--directory", type=Path, required=True, help="where models are, or are made"),
    option("--geometry", choices=GEOMETRIES, default="olmoe", help="of a model of random weights"),
    option("--layers", type=int, default=16, help="of that model"),
    option("--threads", type=int, nargs="+", default=[2]),
    option("--positions", type=int, nargs="+", default=[50, 1500], help="where tokens are decoded"),
    option("--prompt", type=int, default=512, help="tokens that are read at once"),
    option("--engines", nargs="+", choices=ENGINES, default=list(ENGINES)),
)  # fmt: skip
def decoding(run: Run) -> Rows:
    """Tokens per second with everything in memory, beside llama.cpp and what the memory gives.

    Makes what is missing in the directory, as outofcore does: a bundle of random weights in
    nested:2+1+1 with an int8 backbone, and a GGUF file with Q4_0 experts and the rest in Q8_0.
    """
    wanted = {"llama.cpp" if engine == "llama.cpp" else "smoe" for engine in run.engines}
    paths = models.at_size(run.directory, run.geometry, run.layers, "llama.cpp" in wanted)
    for path in paths.values():
        page_cache.fetch(path)
    bundle = open_bundle(paths["smoe"])
    ways: dict[str, Callable[[], Answer]] = {}
    for threads in run.threads:
        for engine in run.engines:
            ways[f"{engine}, {threads}"] = partial(_once, run, paths, engine, threads)
    results = interleave(ways, run.rounds)
    title = (
        f"{run.rounds} rounds, {run.tokens} tokens each, {per_token(bundle) / 1e6:.0f} MB a token"
    )
    yield Table("decoding", _columns(run), list(_lines(run, bundle, results)), title)
    runs = [[name, str(answer)] for name, answers in results.items() for answer in answers]
    yield Table("runs", {"way": "{}", "run": "{}"}, runs, "Every run", printed=False)


def _columns(run: Run) -> dict[str, str]:
    places = {f"at {position}": "{:.1f}" for position in run.positions}
    return {
        "threads": "{}", "engine": "{}", **places,
        "GB/s of the memory": "{:.1f}", "of it": "{:.2f}", "x llama.cpp": "{:.2f}",
        f"prompt of {run.prompt}": "{:.0f}", "x": "{:.2f}",
        "opened, s": "{:.2f}", "first token, s": "{:.2f}",
    }  # fmt: skip


def _lines(run: Run, bundle: Bundle, results: dict[str, list[Answer]]) -> Iterator[list[Any]]:
    nbytes, first = per_token(bundle), str(run.positions[0])

    def median(way: str, key: str) -> float:
        answers = results.get(way)
        return statistics.median(answer[key] for answer in answers) if answers else math.nan

    for threads in run.threads:
        other = f"llama.cpp, {threads}"
        for engine in run.engines:
            way = f"{engine}, {threads}"
            shares = [answer[first] * nbytes / answer["memory"] for answer in results[way]]
            yield [
                threads,
                engine,
                *(median(way, str(position)) for position in run.positions),
                median(way, "memory") / 1e9,
                statistics.median(shares),
                median(way, first) / median(other, first),
                median(way, "prompt"),
                median(way, "prompt") / median(other, "prompt"),
                median(way, "opened"),
                median(way, "first"),
            ]


def per_token(bundle: Bundle) -> int:
    """Bytes of the weights that a token reads: of an embedding that is no head it is one row."""
    layers = zip(bundle.manifest.layers, bundle.layouts, strict=True)
    experts = sum(layer.top_k * layout.levels[-1] for layer, layout in layers)
    program = bundle.program
    assert program is not None
    multiplied = {op.weight for _, op in program.operations() if op.kind == "product"}
    return experts + sum(c.nbytes for c in program.constants if c.name in multiplied)


def _once(run: Run, paths: dict[str, Path], engine: str, threads: int) -> Answer:
    side = "llama.cpp" if engine == "llama.cpp" else "smoe"
    shape = GEOMETRIES[run.geometry](layers=1)
    settings = {"positions": run.positions, "prompt": run.prompt, "tokens": run.tokens}
    return child(
        "decoding:llama" if side == "llama.cpp" else "decoding:smoe",
        model=paths[side],
        threads=threads,
        vocabulary=shape.vocabulary,
        executor=engine,
        **settings,
    )


def reads(threads: int) -> float:
    """Bytes per second of plain reads of much memory by so many threads, the best of several."""
    array = np.ones(PLAIN // 8, np.int64)
    parts, times = np.array_split(array, threads), []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            times.append(time.perf_counter() - started)
    return array.nbytes / min(times)


# -- one engine, in a process of its own -----------------------------------------------


def random_ids(count: int, vocabulary: int) -> list[int]:
    draw = random.Random(3)
    return [draw.randrange(FIRST_ID, vocabulary) for _ in range(count)]


def _timed(
    read: Callable[[list[int]], None],
    forget: Callable[[], None],
    threads: int,
    vocabulary: int,
    positions: list[int],
    prompt: int,
    tokens: int,
) -> Answer:
    """What an engine takes whose `read` consumes ids: one at a time, or many at once."""
    ids = random_ids(max(*positions, prompt) + WARM + tokens, vocabulary)
    answer: Answer = {}
    started = time.perf_counter()
    read(ids[:1])
    answer["first"] = time.perf_counter() - started
    before = reads(threads)
    forget()
    read(ids[:prompt])  # once, to warm what grows
    forget()
    started = time.perf_counter()
    read(ids[:prompt])
    answer["prompt"] = prompt / (time.perf_counter() - started)
    for position in positions:
        forget()
        read(ids[: position - WARM])
        for token in ids[position - WARM : position]:
            read([token])
        started = time.perf_counter()
        for token in ids[position : position + tokens]:
            read([token])
        answer[str(position)] = tokens / (time.perf_counter() - started)
    return answer | {"memory": max(before, reads(threads))}


def smoe(model: str, threads: int, vocabulary: int, executor: str, **settings: Any) -> Answer:
    """smoe, on one of its executors."""
    with readers.smoe(model, threads, _longest(settings), executor) as reader:
        answer = _timed(reader.read, reader.forget, threads, vocabulary, **settings)
        note("\n".join(reader.lines()))
    return answer | {"opened": reader.opened, "first": reader.opened + answer["first"]}


def llama(model: str, threads: int, vocabulary: int, executor: str, **settings: Any) -> Answer:
    """llama.cpp as it comes, its weights repacked."""
    reader = readers.llama(model, threads, _longest(settings))
    answer = _timed(reader.read, reader.forget, threads, vocabulary, **settings)
    return answer | {"opened": reader.opened, "first": reader.opened + answer["first"]}


def _longest(settings: Answer) -> int:
    return max(*settings["positions"], settings["prompt"]) + WARM + int(settings["tokens"])
