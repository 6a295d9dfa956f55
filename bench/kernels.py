"""Expert kernels against what a user would pick instead:  python bench/kernels.py [--seconds 60] [--threads 2] [--experts 8]

Side by side in one run, interleaved, medians: our kernels per level of V1 (nested:2+1+1:128), ONNX Runtime's MatMulNBits
(4 bits, blocks of 32, int8 activations, the same experts in one graph), and the rate at which the machine reads a large
array (a plain sum). A call computes as many experts as a token of a large model has; every call takes others, so many
that the working set lies far beyond the caches.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from smoe.artifacts import record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import ExpertActivation
from smoe.runtime import kernels

ENCODING = "nested:2+1+1:128"
SHAPES = [(2048, 768), (2048, 1024)]
TOKENS = [1, 2, 4, 16, 64, 256]
WORKING_SET = 600 << 20  # bytes
BLOCK = 32


def ours(hidden: int, width: int, tokens: int, level: int, threads: int, experts: int):
    """A function whose call i computes `experts` experts on the same tokens: gate, up, activation and down."""
    shape = ExpertShape(hidden, width)
    layout = record_layout(shape, ENCODING, 16384)
    size = layout.levels[level - 1]
    records = np.random.default_rng(0).integers(
        0, 256, (max(2 * experts, WORKING_SET // size), size), np.uint8
    )
    for record in records:
        for name, view in layout.views(record).items():
            if name.endswith("_scale"):
                view[...] = 0x3A00  # about 5e-4
    kernel = kernels.choose(threads=threads).layer(
        ExpertActivation("gated", "silu"), shape, ENCODING, layout
    )
    x = np.random.default_rng(1).standard_normal((tokens, hidden)).astype(np.float32)
    works = [
        kernels.Work(
            np.arange(i, i + experts), np.full(experts, level), np.arange(experts + 1) * tokens,
            np.tile(np.arange(tokens), experts),
        )
        for i in range(0, len(records) - experts + 1, experts)
    ]  # fmt: skip
    return (lambda i: kernel(records, works[i % len(works)], x)), size * experts


def matmul_nbits(hidden: int, width: int, tokens: int, threads: int, experts: int):
    """The same in ONNX Runtime: many sessions, of which a run takes the next."""
    nbytes = experts * 3 * hidden * width * (4 + 32 / BLOCK) / 8
    count = max(2, int(WORKING_SET // nbytes))
    sessions = [_session(hidden, width, seed, threads, experts) for seed in range(count)]
    x = np.random.default_rng(1).standard_normal((tokens, hidden)).astype(np.float32)
    return (lambda i: sessions[i % count].run(None, {"x": x})), nbytes


def _session(
    hidden: int, width: int, seed: int, threads: int, experts: int
) -> onnxruntime.InferenceSession:
    random = np.random.default_rng(seed)
    nodes, weights = [], []
    three = (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width))
    for e, (what, n, k) in ((e, matrix) for e in range(experts) for matrix in three):
        name = f"{what}{e}"
        data = random.integers(0, 256, (n, k // BLOCK, BLOCK // 2), np.uint8)
        scale = np.full(n * k // BLOCK, 5e-3, np.float32)
        weights += [helper.make_tensor(f"{name}_w", TensorProto.UINT8, data.shape, data.tobytes(), raw=True),
                    helper.make_tensor(f"{name}_s", TensorProto.FLOAT, scale.shape, scale.tobytes(), raw=True)]  # fmt: skip
        nodes.append(helper.make_node(
            "MatMulNBits", [f"inner{e}" if what == "down" else "x", f"{name}_w", f"{name}_s"], [name],
            domain="com.microsoft", K=k, N=n, bits=4, block_size=BLOCK, accuracy_level=4,
        ))  # fmt: skip
        if what == "up":
            nodes += [helper.make_node("Sigmoid", [f"gate{e}"], [f"s{e}"]),
                      helper.make_node("Mul", [f"gate{e}", f"s{e}"], [f"a{e}"]),
                      helper.make_node("Mul", [f"a{e}", name], [f"inner{e}"])]  # fmt: skip
    graph = helper.make_graph(
        nodes, "expert", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", hidden])],
        [helper.make_tensor_value_info(f"down{e}", TensorProto.FLOAT, ["n", hidden]) for e in range(experts)], weights,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def bandwidth(threads: int):
    """A plain sum over a large array by as many threads: bytes per call, and a function that does it."""
    array = np.ones(WORKING_SET // 8, np.int64)
    parts = np.array_split(array, threads)
    pool = ThreadPoolExecutor(threads)
    return (lambda i: list(pool.map(np.sum, parts))), array.nbytes


def compare(candidates: dict, seconds: float) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times = {name: [] for name in candidates}
    until, i = time.perf_counter() + seconds, 0
    while time.perf_counter() < until or i < 7:
        for name, (call, repeats) in candidates.items():
            started = time.perf_counter()
            for j in range(repeats):
                call(i * repeats + j)
            times[name].append((time.perf_counter() - started) / repeats)
        i += 1
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def main(seconds: float, threads: int, experts: int, tokens: list[int]) -> None:
    chosen = kernels.choose(threads=threads)
    print(
        f"kernels {chosen.name} ({chosen.reason}), {threads} threads, {ENCODING}, {experts} experts a call; medians"
    )
    print(
        f"{'shape':10} {'tokens':>6}  {'what':14} {'us':>8} {'Gweights/s':>10} {'GB/s':>6} {'of sum':>7} {'x NBits':>8}"
    )
    for hidden, width in SHAPES:
        for count in tokens:
            made = {
                f"level {n}": ours(hidden, width, count, n, threads, experts) for n in (1, 2, 3)
            }
            made["MatMulNBits"] = matmul_nbits(hidden, width, count, threads, experts)
            made["sum"] = bandwidth(threads)
            repeats = {name: 1 if name == "sum" else max(1, 16 // count) for name in made}
            found = compare(
                {n: (call, repeats[n]) for n, (call, _) in made.items()}, seconds / len(tokens) / 2
            )
            rate = made["sum"][1] / found["sum"]
            for name, took in found.items():
                weights = 0 if name == "sum" else experts * 3 * hidden * width / took
                read = made[name][1] / took
                print(
                    f"{hidden}x{width:<5} {count:6}  {name:14} {took * 1e6:8.0f} {weights / 1e9:10.2f} {read / 1e9:6.1f} "
                    f"{read / rate:7.2f} {found['MatMulNBits'] / took if weights else 0:8.2f}", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    main(**vars(parser.parse_args()))
