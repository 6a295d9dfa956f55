"""Long contexts at the sizes of models that people run: decoding after 50, 2,000, 8,000 tokens and
more, a prompt, what a token is remembered in, and the memory of it all, beside llama.cpp.

Weights are random, of as few layers as one likes; ids are as frequent as the words of a text. Every
measurement is a fresh process with warm files, in turns. Tokens are decoded after a past that was
really read: one sequence grows from position to position. What does not run, or not in time, is a
row that says why; the others go on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench import models, options, page_cache, readers
from bench.geometries import GEOMETRIES
from bench.harness import ChildFailed, Rows, Run, Table, bench, child, interleave, note, option
from bench.outofcore import installed
from bench.random_models import worded_ids
from smoe.artifacts import SmoeError, open_bundle

WARM = 8  # tokens before a clock starts
POSITIONS = (50, 2000, 8000)
LONG = 32_000  # the position that --long adds
WHOLE = 32_768  # tokens of the context whose state is asked for
KINDS = ("f32", "f16", "int8")  # of a program's state
ENGINES = ("smoe", "llama.cpp")
MIB = 1 << 20

Answer = dict[str, Any]


@bench(
    options.rounds(3), options.tokens(32),
    option("--directory", type=Path, required=True, help="where models are, or are made"),
    option("--geometries", nargs="+", choices=GEOMETRIES, default=[*GEOMETRIES][1:]),
    option("--layers", type=int, default=4, help="of every model"),
    option("--threads", type=int, default=2),
    option("--positions", type=int, nargs="+", default=POSITIONS, help="where tokens are decoded"),
    option("--long", action="store_true", help=f"after {LONG} tokens, too"),
    option("--prompt", type=int, default=2048, help="tokens that are read at once"),
    option("--engines", nargs="+", choices=ENGINES, default=ENGINES),
    option("--executor", default="auto", help="of smoe"),
    option("--state", choices=KINDS, help="of smoe, instead of the bundle's"),
    option("--seconds", type=float, default=1800.0, help="after which a process is stopped"),
)  # fmt: skip
def contexts(run: Run) -> Rows:
    """Decoding, prompts and memory in long contexts at real sizes, beside llama.cpp.

    Makes what is missing in the directory: bundles of random weights, experts rounded to
    nested:2+1+1:128 (gpt-oss: its own codes) and an int8 backbone; GGUF files with experts in Q4_0
    (MXFP4) and the rest in Q8_0. The last columns compare with llama.cpp, the last position with
    the first, and the peak of the process with what the plan says.
    """
    if run.long:
        run.positions = [*run.positions, LONG]
    engines = [engine for engine in run.engines if installed(engine)]
    lines: list[list[Any]] = []
    runs: list[list[str]] = []
    states: list[list[Any]] = []
    for geometry in run.geometries:
        paths = models.at_size(run.directory, geometry, run.layers, "llama.cpp" in engines)
        states += _states(run, geometry, paths["smoe"])
        for path in paths.values():
            page_cache.fetch(path)
        results = _measured(run, geometry, paths, engines)
        lines += _lines(run, geometry, results)
        runs += [[geometry, name, str(a)] for name, answers in results.items() for a in answers]
    title = f"{run.rounds} rounds, {run.layers} layers each, {run.threads} threads"
    yield Table("contexts", _columns(run), lines, title)
    yield Table("states", STATES, states, f"Of {WHOLE:,} tokens")
    columns = {"model": "{}", "engine": "{}", "run": "{}"}
    yield Table("runs", columns, runs, "Every run", printed=False)


def _measured(
    run: Run, geometry: str, paths: dict[str, Path], engines: list[str]
) -> dict[str, list[Answer]]:
    """What each engine's processes answered; of one that failed, `why`, and it is not tried
    again."""
    failed: dict[str, str] = {}

    def attempt(engine: str) -> Answer:
        if engine not in failed:
            try:
                return _once(run, geometry, paths[engine], engine)
            except ChildFailed as error:
                failed[engine] = error.why
                note(f"{geometry}, {engine}: {error.why}")
        return {"why": failed[engine]}

    ways: dict[str, Callable[[], Answer]] = {name: partial(attempt, name) for name in engines}
    return interleave(ways, run.rounds)


def _once(run: Run, geometry: str, model: Path, engine: str) -> Answer:
    of_smoe = {"executor": run.executor, "state": run.state} if engine == "smoe" else {}
    answer: Answer = child(
        "contexts:smoe" if engine == "smoe" else "contexts:llama",
        seconds=run.seconds,
        model=model,
        threads=run.threads,
        vocabulary=GEOMETRIES[geometry](layers=1).vocabulary,
        positions=run.positions,
        prompt=run.prompt,
        tokens=run.tokens,
        **of_smoe,
    )
    rates = ", ".join(f"{answer[str(position)]:.1f} at {position}" for position in run.positions)
    note(f"{geometry}, {engine}: {rates}; prompt {answer['prompt']:.0f} tokens/s", *answer["ran"])
    return answer


# -- what the runs say -----------------------------------------------------------------

STATES = {
    "model": "{}", "state": "{}", "bytes a token": "{:.0f}", "MiB": "{:.1f}",
    "GiB, all layers": "{:.3f}", "backbone": "{}",
}  # fmt: skip


def _columns(run: Run) -> dict[str, str]:
    places = {f"at {position}": "{:.1f}" for position in run.positions}
    return {
        "model": "{}", "engine": "{}", **places, "last / first": "{:.2f}",
        f"prompt of {run.prompt}": "{:.0f}", "first token, s": "{:.2f}", "opened, s": "{:.2f}",
        "peak, MiB": "{:.0f}", "of the plan": "{:.3f}", "state": "{}",
        "last x llama.cpp": "{:.2f}", "prompt x": "{:.2f}",
    }  # fmt: skip


def _lines(run: Run, geometry: str, results: dict[str, list[Answer]]) -> Iterator[list[Any]]:
    first, last = str(run.positions[0]), str(run.positions[-1])

    def median(engine: str, key: str) -> float | None:
        values = [answer[key] for answer in results.get(engine, []) if answer.get(key) is not None]
        return statistics.median(values) if values else None

    def over(numerator: float | None, denominator: float | None) -> float | None:
        return numerator / denominator if numerator and denominator else None

    for engine, answers in results.items():
        why = next((answer["why"] for answer in answers if "why" in answer), None)
        ran = [answer for answer in answers if "why" not in answer]
        yield [
            geometry,
            engine if why is None else f"{engine}: {why}",
            *(median(engine, str(position)) for position in run.positions),
            over(median(engine, last), median(engine, first)),
            median(engine, "prompt"),
            median(engine, "first"),
            median(engine, "opened"),
            over(median(engine, "peak"), MIB),
            over(median(engine, "peak"), median(engine, "planned")),
            ran[0]["kind"] if ran else None,
            over(median(engine, last), median("llama.cpp", last)),
            over(median(engine, "prompt"), median("llama.cpp", "prompt")),
        ]


def _states(run: Run, geometry: str, path: Path) -> Iterator[list[Any]]:
    """What the bundle's state and each other kind of it takes by the plan: for a token more, of a
    long sequence, and that of the model with all of its layers, of which there are equally many of
    each kind here."""
    from smoe.runtime.execution import Execution, divide

    bundle, shape = open_bundle(path), GEOMETRIES[geometry]
    share = run.layers / shape().layers
    for kind in (None, *KINDS):
        name = kind or "the bundle's"
        try:
            division = divide(bundle.manifest, bundle.program, Execution(run.executor, kind))
        except SmoeError as error:
            yield [geometry, f"{name}: {error}", None, None, None, None]
            continue
        whole, half = (division.state_bytes(tokens) for tokens in (WHOLE, WHOLE // 2))
        slope = (whole - half) / (WHOLE - WHOLE // 2)
        line = division.lines()[0].removeprefix("backbone: ")
        yield [geometry, name, slope, whole / MIB, whole / MIB / 1024 / share, line]


# -- one engine, in a process of its own -----------------------------------------------


def _timed(
    reader: readers.Reader, vocabulary: int, positions: list[int], prompt: int, tokens: int
) -> Answer:
    """Tokens per second at each position, rising, and of a prompt."""
    ids = worded_ids(max(positions[-1] + tokens, prompt), vocabulary)
    answer: Answer = {"opened": reader.opened}
    started, done = time.perf_counter(), 0
    reader.read(ids[:1])
    answer["one"] = time.perf_counter() - started
    reader.forget()
    for position in positions:
        reader.read(ids[done : position - WARM])
        for token in ids[position - WARM : position]:
            reader.read([token])
        started, done = time.perf_counter(), position + tokens
        for token in ids[position:done]:
            reader.read([token])
        answer[str(position)] = tokens / (time.perf_counter() - started)
    reader.forget()
    started = time.perf_counter()
    reader.read(ids[:prompt])
    answer["first"] = time.perf_counter() - started
    return answer | {"prompt": prompt / answer["first"]}


def smoe(model: str, threads: int, executor: str, state: str | None, **settings: Any) -> Answer:
    """smoe; what its plan says that it holds at most, and what it held."""
    from smoe.runtime.system import peak_memory, reset_peak_memory

    reset_peak_memory()
    with readers.smoe(model, threads, _longest(**settings), executor, state) as reader:
        answer = _timed(reader, **settings)
        plan, lines = reader.engine.plan, reader.lines()
    return answer | {
        "planned": plan.total,
        "budget": plan.budget,
        "experts": [plan.capacity, plan.experts],
        "peak": peak_memory(),
        "kind": _kind(lines),
        "ran": lines,
    }


def llama(model: str, threads: int, **settings: Any) -> Answer:
    """llama.cpp."""
    from smoe.runtime.system import peak_memory

    reader = readers.llama(model, threads, _longest(**settings))
    answer = _timed(reader, **settings)
    return answer | {"peak": peak_memory(), "kind": "f16", "ran": reader.lines()}


def _longest(positions: list[int], prompt: int, tokens: int, vocabulary: int) -> int:
    return max(positions[-1] + tokens, prompt)


def _kind(lines: list[str]) -> str:
    """Which state a program keeps, as the mode line says it; "" where none does."""
    said = [line for line in lines if line.startswith("backbone: ") and ", state " in line]
    return said[0].split(", state ")[1].split(" ")[0] if said else ""
