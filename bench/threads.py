"""From which size on do two threads pay for one product?  python bench/threads.py

Four square products in one session, one token and 128, with idle workers that do not spin; medians, interleaved.
"""

import statistics
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from smoe.runtime.segments import session_options


def session(size: int, threads: int) -> ort.InferenceSession:
    weights = [
        numpy_helper.from_array(np.random.randn(size, size).astype(np.float32), f"w{i}")
        for i in range(4)
    ]
    names = ["x", *(f"y{i}" for i in range(4))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(4)]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, size])
        for n in (names[0], names[-1])
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ort.InferenceSession(
        model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
    )


if __name__ == "__main__":
    print("MiB per matrix   tokens   us, 1 thread   us, 2 threads   ratio")
    for size in (256, 512, 1024, 1448, 2048):
        sessions = {threads: session(size, threads) for threads in (1, 2)}
        for tokens in (1, 128):
            x = np.random.randn(tokens, size).astype(np.float32)
            times: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(25 if tokens == 1 else 7):
                for threads, runner in sessions.items():
                    started = time.perf_counter()
                    runner.run(None, {"x": x})
                    times[threads].append((time.perf_counter() - started) * 1e6)
            one, two = (statistics.median(values) for values in times.values())
            print(
                f"{size * size * 4 / 2**20:14.2f} {tokens:8} {one:14.0f} {two:15.0f} {one / two:7.2f}"
            )
