"""How fast experts become shards: rounding, encoding, decoding what checkpoints are stored in, all
of it from file to file; beside llama.cpp's quantisers and transformers' decoding."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench import options
from bench.harness import Rows, Run, Table, bench, child, interleave, note, option, spread
from bench.random_models import Mxfp4Shape, Shape, random_checkpoint
from smoe.artifacts import nested, record_layout
from smoe.artifacts.layout import ExpertShape

HIDDEN, WIDTH, EXPERTS = 2048, 1024, 64  # a layer of OLMoE-1B-7B
ENCODINGS = (
    "nested:2+1+1:128",
    "nested:2+1+1:32",
    "nested:5+1+1+1:128",
    "int8",
    "f16",
    "bf16",
    "f32",
)
SECONDS = 0.4  # of a measurement, at least
# By name: the number of ggml's type, and whether it goes by an importance of columns.
GGML = {
    "Q4_0": (2, False), "Q4_0, importance": (2, True), "IQ4_NL": (20, False), "Q5_0": (6, False),
    "Q8_0": (8, False),
}  # fmt: skip
THREADS = (1, 2)

Call = Callable[[int], None]  # with so many threads


@bench(
    options.rounds(5),
    option("--encodings", nargs="+", default=list(ENCODINGS)),
    option("--directory", type=Path, help="where checkpoints are, or are made"),
)
def packing(run: Run) -> Rows:
    """Million weights a second that packing rounds, encodes and decodes, and from file to shards.

    Experts of OLMoE's size, random. A thread of llama.cpp takes rows of its own, as its tool does.
    From file to shards: one layer, what the operating system keeps of files in memory, and
    synchronised to disk; the time of loading torch and opening the checkpoint is not in it. A
    processor second, of one thread, is what a busy machine changes little.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = run.directory or Path(scratch)
        files = {
            "bf16": random_checkpoint(folder / "olmoe", Shape(1, EXPERTS, 8, HIDDEN, WIDTH)),
            "mxfp4": random_checkpoint(folder / "mxfp4", Mxfp4Shape(2, EXPERTS, 4, HIDDEN, WIDTH)),
        }
        calls = _roundings(run.encodings) | _calibrated(run.encodings) | _decodings() | _llama()
        ways: dict[tuple[str, str, int], Callable[[], list[float]]] = {
            (*key, threads): partial(_rate, call, weights, threads)
            for key, (call, weights) in calls.items()
            for threads in THREADS
        }
        stored = [("bf16", encoding) for encoding in run.encodings]
        for source, encoding in [*stored, ("mxfp4", "nested:2+1+1:32:fp4")]:
            for threads in THREADS:
                ways[f"{source} file to shards", encoding, threads] = partial(
                    child, "packing:file_to_shards", checkpoint=files[source], encoding=encoding,
                    threads=threads, output=folder / "shards",
                )  # fmt: skip
        results = interleave({str(key): way for key, way in ways.items()}, run.rounds)
    rows = dict.fromkeys((what, encoding) for what, encoding, _ in ways)
    lines = []
    for row in rows:
        one, two = (results[str((*row, threads))] for threads in THREADS)
        walls = [_shown([wall for wall, _ in turns]) for turns in (one, two)]
        lines.append([*row, *walls, spread([busy for _, busy in one]).median])
    rate = "{:.4g} ({:.4g} to {:.4g})"
    columns = {"what": "{}", "encoding": "{}", "1 thread": rate, "2 threads": rate,
               "a processor second": "{:.4g}"}  # fmt: skip
    yield Table("packing", columns, lines, "Million weights a second: median, lowest and highest")


def _shown(rates: list[float]) -> list[float]:
    found = spread(rates)
    return [found.median, found.low, found.high]


def _rate(call: Call, weights: int, threads: int) -> list[float]:
    """Million weights a second, and a processor second, of calls of about `SECONDS`."""
    call(threads)
    started, busy, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - started < SECONDS:
        call(threads)
        calls += 1
    return _rates(weights * calls, time.perf_counter() - started, time.process_time() - busy)


def _rates(weights: int, seconds: float, busy: float) -> list[float]:
    return [weights / seconds / 1e6, weights / busy / 1e6]


Calls = dict[tuple[str, str], tuple[Call, int]]


def _roundings(encodings: list[str]) -> Calls:
    """Rounding a matrix alone, an expert's whole record, and finding kept codes again."""
    from smoe.prep.pack.encode import encode_record, round_matrix
    from smoe.prep.pack.kept import kept_codes

    shape, random = ExpertShape(HIDDEN, WIDTH), np.random.default_rng(0)
    weights = {n: random.standard_normal(d, np.float32) for n, d in shape.matrices().items()}
    up, total = weights["up"], sum(w.size for w in weights.values())
    calls: Calls = {}
    for name in encodings:
        if name.startswith("nested"):
            rounding = partial(round_matrix, nested.parse(name), "up", up, "")
            calls["rounding alone", name] = (rounding, up.size)
    for name in encodings:
        layout = record_layout(shape, name, 16384)
        calls["an expert's record", name] = (
            partial(encode_record, layout, name, weights, ""),
            total,
        )
    split = nested.Split((2, 1, 1), "fp4")
    codes = split.values(3)[random.integers(0, 16, up.shape)].astype(np.float32)
    coded = codes * np.float32(2**-9)
    calls["kept codes", "nested:2+1+1:32:fp4"] = (
        lambda n: _kept(kept_codes, split, coded, n),
        up.size,
    )
    return calls


def _kept(find: Callable[..., Any], split: nested.Split, w: np.ndarray, threads: int) -> None:
    if find(split, 32, w, threads) is None:
        raise SystemExit("the codes of mxfp4 were not found again")


def _calibrated(encodings: list[str]) -> Calls:
    """Codes that calibration finds for two experts, with all that they are learnt from: as many
    tokens each as 65,536 with 8 of 64 experts bring."""
    import torch
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    from smoe.prep.pack.calibrated import Calibrated
    from smoe.prep.sweep.forward import AtExperts

    experts, tokens, random = 2, 8192, torch.Generator().manual_seed(0)
    config = OlmoeConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=experts)
    module = OlmoeExperts(config).to(torch.bfloat16)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02, generator=random)
    hidden = torch.randn(tokens, HIDDEN, generator=random)
    hidden += hidden @ torch.randn(HIDDEN, HIDDEN, generator=random) * 0.03  # inputs go together
    ids = torch.arange(experts).repeat(tokens, 1)
    at = AtExperts(0, module, (0, tokens), hidden, ids, torch.rand(ids.shape, generator=random))

    @torch.no_grad()
    def codes(name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        layout = record_layout(ExpertShape(HIDDEN, WIDTH), name, 16384)
        list(Calibrated(at, nested.parse(name), layout).records())

    total = experts * 3 * HIDDEN * WIDTH
    names = [name for name in encodings if name.startswith("nested")]
    return {("calibrated codes", name): (partial(codes, name), total) for name in names}


def _decodings() -> Calls:
    """Codes of checkpoints to numbers, by smoe and by transformers."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from smoe.prep.checkpoint.few_bits import block_fp8_decoded, mxfp4_decoded

    random = np.random.default_rng(0)
    blocks = torch.from_numpy(random.integers(0, 256, (1, WIDTH, HIDDEN // 32, 16), np.uint8))
    scales = torch.from_numpy(random.integers(100, 130, (1, WIDTH, HIDDEN // 32), np.uint8))
    codes = torch.from_numpy(random.integers(0, 127, (WIDTH, HIDDEN), np.uint8))
    codes = codes.view(torch.float8_e4m3fn)
    factors = torch.rand(WIDTH // 128, HIDDEN // 128)
    theirs = Fp8Dequantize(SimpleNamespace(quantization_config=None))
    stored = {"weight": codes, "weight_scale_inv": factors}

    def by_torch(call: Callable[[], object]) -> Call:
        def on(threads: int) -> None:
            torch.set_num_threads(threads)
            call()

        return on

    ways: dict[tuple[str, str], Call] = {
        ("decoding", "mxfp4"): lambda n: _done(mxfp4_decoded(blocks, scales, n)),
        ("decoding, transformers", "mxfp4"): by_torch(
            lambda: convert_moe_packed_tensors(blocks, scales)
        ),
        ("decoding", "block fp8"): lambda n: _done(
            block_fp8_decoded(codes, factors, (128, 128), torch.float32, n)
        ),
        ("decoding, transformers", "block fp8"): by_torch(lambda: theirs.convert(dict(stored))),
    }
    return {key: (call, WIDTH * HIDDEN) for key, call in ways.items()}


def _done(result: object) -> None:
    assert result is not None


def _llama() -> Calls:
    """llama.cpp's quantisers, where llama_cpp_python is installed."""
    spec = util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    if folder is None:
        note("llama.cpp is left out: llama_cpp_python is not installed.")
        return {}
    ggml = ctypes.CDLL(str(folder / "libggml-base.so"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, pointer, ctypes.c_void_p, integer, integer, integer, pointer,
    ]  # fmt: skip
    random = np.random.default_rng(0)
    w = random.standard_normal((WIDTH, HIDDEN), np.float32)
    importance = random.uniform(0.5, 2, HIDDEN).astype(np.float32)
    out = np.empty(w.nbytes, np.uint8)

    def quantise(kind: int, weighed: bool, threads: int) -> None:
        by = importance.ctypes.data_as(pointer) if weighed else None
        rows = WIDTH // threads

        def some(first: int) -> None:
            ggml.ggml_quantize_chunk(
                kind, w.ctypes.data_as(pointer), out.ctypes.data, first * HIDDEN, rows, HIDDEN, by
            )

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(some, range(0, WIDTH, rows)))

    return {
        ("llama.cpp", name): (partial(quantise, kind, weighed), w.size)
        for name, (kind, weighed) in GGML.items()
    }


def file_to_shards(checkpoint: str, encoding: str, threads: int, output: str) -> list[float]:
    """Million weights a second, and a processor second, of one packing, in a process that may use
    so many processors."""
    from smoe.prep.checkpoint.checkpoint import open_checkpoint
    from smoe.prep.checkpoint.seam import expert_geometry
    from smoe.prep.pack.pack import pack
    from smoe.prep.progress import Progress

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    opened = open_checkpoint(Path(checkpoint))
    sizes = [expert_geometry(module) for _, module in opened.layers]
    quantiser = None if not encoding.startswith("nested") else "nearest"
    if encoding.endswith("fp4"):
        quantiser = "kept"
    with tempfile.TemporaryDirectory(dir=Path(output).parent) as folder:
        started, busy = time.perf_counter(), time.process_time()
        pack(opened, Path(folder), encoding, Progress(quiet=True), quantiser)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return _rates(sum(3 * experts * hidden * w for experts, hidden, w in sizes), seconds, busy)
