"""Small ONNX graphs that `micro` compares with. Imports onnx where one is made, since only prep
installs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

BLOCK = 32  # weights that share a scale in MatMulNBits
HEADS, KV_HEADS, HEAD_SIZE, POSITIONS = 4, 2, 16, 40
CPU = ["CPUExecutionProvider"]
Arrays = dict[str, np.ndarray]


def _session(
    graph: Any, threads: int | None = None, contrib: bool = False
) -> onnxruntime.InferenceSession:
    """A session on an opset that ONNX Runtime knows; idle workers wait without spinning."""
    from onnx import helper

    opsets = [helper.make_opsetid("", 23)]
    opsets += [helper.make_opsetid("com.microsoft", 1)] if contrib else []
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=CPU)


def products(size: int, threads: int) -> onnxruntime.InferenceSession:
    """Four products with square float32 matrices, one after another: x `[T, size]`."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((size, size), np.float32), f"w{i}")
        for i in range(4)
    ]
    names = ["x", *(f"y{i}" for i in range(4))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(4)]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size])
        for name in (names[0], names[-1])
    ]
    return _session(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), threads)


def nbits_bytes(hidden: int, width: int) -> int:
    """Bytes of one expert in MatMulNBits: 4 bits a weight, a float32 scale a block."""
    return int(3 * hidden * width * (4 + 32 / BLOCK) / 8)


def nbits_experts(
    hidden: int, width: int, seed: int, threads: int, experts: int
) -> onnxruntime.InferenceSession:
    """So many experts of random 4-bit weights on the same x `[n, hidden]`, in one graph."""
    from onnx import TensorProto, helper

    random = np.random.default_rng(seed)
    nodes, weights = [], []
    for e in range(experts):
        for part, n, k in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            name, source = f"{part}{e}", f"inner{e}" if part == "down" else "x"
            data = random.integers(0, 256, (n, k // BLOCK, BLOCK // 2), np.uint8)
            scale = np.full(n * k // BLOCK, 5e-3, np.float32)
            weights += [_raw(f"{name}_w", TensorProto.UINT8, data),
                        _raw(f"{name}_s", TensorProto.FLOAT, scale)]  # fmt: skip
            nodes.append(helper.make_node(
                "MatMulNBits", [source, f"{name}_w", f"{name}_s"], [name], domain="com.microsoft",
                K=k, N=n, bits=4, block_size=BLOCK, accuracy_level=4,
            ))  # fmt: skip
            if part == "up":
                nodes += [helper.make_node("Sigmoid", [f"gate{e}"], [f"s{e}"]),
                          helper.make_node("Mul", [f"gate{e}", f"s{e}"], [f"a{e}"]),
                          helper.make_node("Mul", [f"a{e}", name], [f"inner{e}"])]  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", hidden])
        for name in ("x", *(f"down{e}" for e in range(experts)))
    ]
    return _session(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), threads, True)


def _raw(name: str, dtype: int, array: np.ndarray) -> Any:
    from onnx import helper

    return helper.make_tensor(name, dtype, array.shape, array.tobytes(), raw=True)


# -- attention over several sequences --------------------------------------------------


def lengths_per_sequence() -> float:
    """Largest difference between one GroupQueryAttention over sequences of 5, 17 and 30 tokens and
    a call for each, in what comes out and in what was appended to the buffers."""
    session, random = _attention(), np.random.default_rng(0)
    lengths = np.array([5, 17, 30], np.int32)
    new = {
        name: random.standard_normal((3, 1, heads * HEAD_SIZE)).astype(np.float32)
        for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
    }
    shape = (3, KV_HEADS, POSITIONS, HEAD_SIZE)
    together = {n: random.standard_normal(shape).astype(np.float32) for n in ("key", "value")}
    alone = {name: buffer.copy() for name, buffer in together.items()}
    out = _attend(session, new, lengths, together, 31)
    worst = 0.0
    for i, length in enumerate(lengths):
        part = slice(i, i + 1)
        own = {name: np.ascontiguousarray(buffer[part]) for name, buffer in alone.items()}
        one = {name: array[part] for name, array in new.items()}
        single = _attend(session, one, lengths[part], own, int(length) + 1)
        appended = np.abs(own["key"][0, :, : length + 1] - together["key"][i, :, : length + 1])
        worst = max(worst, float(np.abs(single - out[i]).max()), float(appended.max()))
    return worst


def _attention() -> onnxruntime.InferenceSession:
    from onnx import TensorProto, helper

    names = ["query", "key", "value", "past_key", "past_value", "seqlens", "total"]
    node = helper.make_node("GroupQueryAttention", names, ["out", "present_key", "present_value"],
                            domain="com.microsoft", num_heads=HEADS,
                            kv_num_heads=KV_HEADS)  # fmt: skip
    types = [TensorProto.FLOAT] * 5 + [TensorProto.INT32] * 2
    ranks = [3, 3, 3, 4, 4, 1, 0]
    inputs = [
        helper.make_tensor_value_info(name, dtype, [None] * rank)
        for name, dtype, rank in zip(names, types, ranks, strict=True)
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    return _session(helper.make_graph([node], "g", inputs, outputs), contrib=True)


def _attend(
    session: onnxruntime.InferenceSession,
    new: Arrays,
    lengths: np.ndarray,
    buffers: Arrays,
    total: int,
) -> np.ndarray:
    """The output, float32 `[sequences, 1, heads * size]`; `buffers` are past and present at
    once."""
    binding = session.io_binding()
    feeds = new | {"seqlens": lengths, "total": np.array(total, np.int32)}
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for name, array in buffers.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input("past_" + name, value)
        binding.bind_ortvalue_output("present_" + name, value)
    binding.bind_output("out", "cpu")
    session.run_with_iobinding(binding)
    return next(value.numpy() for value in binding.get_outputs() if value.shape()[1] == 1)
