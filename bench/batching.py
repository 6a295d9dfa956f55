"""Two ways to a batch of independent sequences, and what they cost.  python bench/batching.py BUNDLE

1. Attention per request: every segment runs once per sequence, experts once for all. Works for any state.
2. One GroupQueryAttention over all sequences, with a length for each. First shown here to give, on buffers bound as past
   and present at once, what single calls give; then bounded by the time of one segment call over B tokens, which is
   what such a graph would cost at best.
"""

import statistics
import sys
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from smoe.runtime import Engine

HEADS, KV, SIZE, CONTEXT = 4, 2, 16, 40


def attention() -> ort.InferenceSession:
    names = ["query", "key", "value", "past_key", "past_value", "seqlens", "total"]
    node = helper.make_node("GroupQueryAttention", names, ["out", "present_key", "present_value"],
                            domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV)  # fmt: skip
    types = [TensorProto.FLOAT] * 5 + [TensorProto.INT32] * 2
    ranks = [3, 3, 3, 4, 4, 1, 0]
    inputs = [
        helper.make_tensor_value_info(n, t, [None] * r)
        for n, t, r in zip(names, types, ranks, strict=True)
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=10
    )
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session, feeds, buffers):
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name, array in buffers.items():
        value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input("past_" + name, value)
        binding.bind_ortvalue_output("present_" + name, value)
    binding.bind_output("out", "cpu")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[
        list(o.name for o in session.get_outputs()).index("out") - 3
    ].numpy()


def lengths_per_sequence() -> float:
    """Largest difference between one call over sequences of 5, 17 and 30 tokens and a call for each."""
    session, random = attention(), np.random.default_rng(0)
    past = np.array([5, 17, 30])
    q, k, v = (random.standard_normal((3, 1, h * SIZE)).astype(np.float32) for h in (HEADS, KV, KV))
    buffers = {
        n: random.standard_normal((3, KV, CONTEXT, SIZE)).astype(np.float32)
        for n in ("key", "value")
    }
    alone = {n: b.copy() for n, b in buffers.items()}
    feeds = {
        "query": q,
        "key": k,
        "value": v,
        "seqlens": past.astype(np.int32),
        "total": np.array(31, np.int32),
    }
    together = run(session, feeds, buffers)
    worst = 0.0
    for i, length in enumerate(past):
        own = {n: np.ascontiguousarray(b[i : i + 1]) for n, b in alone.items()}
        single = {"query": q[i : i + 1], "key": k[i : i + 1], "value": v[i : i + 1],
                  "seqlens": np.array([length], np.int32), "total": np.array(length + 1, np.int32)}  # fmt: skip
        worst = max(worst, float(np.abs(run(session, single, own) - together[i]).max()))
        worst = max(
            worst,
            float(
                np.abs(own["key"][0, :, : length + 1] - buffers["key"][i, :, : length + 1]).max()
            ),
        )
    return worst


def segments(engine: Engine, tokens: int, calls: int) -> float:
    """Microseconds for all segments, `calls` times over `tokens` tokens."""
    backbone, sequence, layers = engine._backbone, engine._sequence, engine.manifest.layers
    started = time.perf_counter()
    for _ in range(calls):
        values = backbone.begin(sequence, np.ones(tokens, np.int64), np.arange(tokens))
        for i in range(len(layers) + 1):
            backbone.run(i, values, sequence)
            if i < len(layers):
                values[layers[i].wires.output] = values[layers[i].wires.hidden]
    return (time.perf_counter() - started) * 1e6


if __name__ == "__main__":
    with Engine.open(sys.argv[1], context=512) as engine:
        print(f"lengths per sequence in one call: largest difference {lengths_per_sequence():.1e}")
        list(engine.generate(np.ones(200, np.int64), max_new_tokens=1))
        print("sequences   us per request   us in one call (bound)   ratio")
        for batch in (1, 2, 4, 8):
            rounds = [(segments(engine, 1, batch), segments(engine, batch, 1)) for _ in range(31)]
            each, one = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"{batch:9} {each:16.0f} {one:24.0f} {each / one:7.2f}")
