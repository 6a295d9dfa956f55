"""What follows from the lengths of a call alone, found by running it: masks, and values that are
always the same.

Nothing is read off the nodes. A mask is an interval if at every place that is tried each token
sees itself and what lies before it, or so many of those.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from smoe.prep.program.values import Early, Interval, Known, Value

GIVEN = ("input_ids", "past_length")
NEAR = ((0, 1), (0, 7), (5, 3), (40, 2))  # tokens before a call, and its own
HIDDEN = -1e9  # added to a score, leaves nothing of it
FAR = 1 << 20  # tokens: a window that is longer is none
ORT_ERRORS = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.NotImplemented,
    errors.RuntimeException,
)


class Probe:
    """Runs parts of `graphs`, the segments of a backbone whose longest sequence is `context`;
    `alone`: they take a single token."""

    def __init__(
        self,
        graphs: Sequence[onnx.GraphProto],
        constants: dict[str, np.ndarray],
        context: int,
        alone: bool = False,
    ):
        self._makers = {name: n for graph in graphs for n in graph.node for name in n.output}
        self._order = [node for graph in graphs for node in graph.node]
        self._constants = constants
        self._far = max(2, min(context, FAR))
        self._most = 1 if alone else FAR  # tokens of a call
        self._seen: dict[str, Value] = {}

    def look(self, value: Early) -> Value:
        """What it is: a mask, a constant, or as before where it is neither."""
        if value.name not in self._seen:
            self._seen[value.name] = self._look(value)
        return self._seen[value.name]

    def _look(self, value: Early) -> Value:
        session = self._session(value.name)
        if session is None:
            return value
        places = [self._cut(place) for place in NEAR if sum(place) <= self._far]
        deep = self._cut((self._far - 2, 2))
        try:
            arrays = {place: _run(session, place) for place in (*places, deep)}
            seen = {place: _visible(array, place) for place, array in arrays.items()}
            known = _constant(list(arrays.values()))
            if known is not None and (self._most > 1 or any(m is None for m in seen.values())):
                return known
            window = _window(seen[deep], sum(deep))
            if window is None:
                return value
            edge = [self._cut((window + d, 3)) for d in (-2, -1, 0)] if window > 2 else []
            more = {place: _visible(_run(session, place), place) for place in edge}
        except ORT_ERRORS:
            return value
        fits = all(_is_interval(mask, place, window) for place, mask in (seen | more).items())
        return Interval(window) if fits else value

    def _cut(self, place: tuple[int, int]) -> tuple[int, int]:
        """The last tokens of a call, as many as there may be."""
        past, tokens = place
        few = min(tokens, self._most)
        return past + tokens - few, few

    def _session(self, name: str) -> ort.InferenceSession | None:
        """What leads to a value, as a graph of its own; None where that is more than lengths."""
        wanted, names, open_ = set(), {name}, [name]
        while open_:
            maker = self._makers.get(open_.pop())
            if maker is None:
                continue
            wanted.add(maker.output[0])
            fresh = [n for n in maker.input if n and n not in names]
            names.update(fresh)
            open_ += fresh
        free = {n for n in names if n not in self._makers and n not in self._constants}
        if not free <= set(GIVEN):
            return None
        graph = onnx.helper.make_graph(
            [node for node in self._order if node.output[0] in wanted],
            "probe",
            [_given(n) for n in sorted(free)],
            [onnx.ValueInfoProto(name=name)],
            [
                onnx.numpy_helper.from_array(self._constants[n], n)
                for n in names & set(self._constants)
            ],
        )
        opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        try:
            return ort.InferenceSession(
                model.SerializeToString(), options, ["CPUExecutionProvider"]
            )
        except ORT_ERRORS:
            return None


def _given(name: str) -> onnx.ValueInfoProto:
    shape = [1, None] if name == "input_ids" else [1]
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape)


def _run(session: ort.InferenceSession, place: tuple[int, int]) -> np.ndarray:
    past, tokens = place
    values = {"input_ids": np.zeros((1, tokens), np.int64), "past_length": np.array([past])}
    wanted = {each.name: values[each.name] for each in session.get_inputs()}
    return session.run(None, wanted)[0]


def _constant(arrays: list[np.ndarray]) -> Known | None:
    """The one number that is everywhere."""
    first = arrays[0]
    if not first.size or any(
        not np.array_equal(a, np.broadcast_to(first.flat[0], a.shape)) for a in arrays
    ):
        return None
    return Known(np.full((1,) * first.ndim, first.flat[0], first.dtype))


def _visible(array: np.ndarray, place: tuple[int, int]) -> np.ndarray | None:
    """Which keys each token sees, bool `[tokens, keys]`; None for what is no mask."""
    past, tokens = place
    if array.size != tokens * (past + tokens) or array.shape[-2:] != (tokens, past + tokens):
        return None
    mask = array.reshape(tokens, past + tokens)
    if mask.dtype == bool:
        return mask
    if mask.dtype != np.float32 or not ((mask == 0) | (mask <= HIDDEN)).all():
        return None
    return mask == 0


def _window(mask: np.ndarray | None, length: int) -> int | None:
    """How many keys the last of `length` tokens sees, 0 for all of them."""
    if mask is None:
        return None
    count = int(mask[-1].sum())
    return 0 if count == length else count or None


def _is_interval(mask: np.ndarray | None, place: tuple[int, int], window: int) -> bool:
    past, tokens = place
    behind = np.arange(past, past + tokens)[:, None] - np.arange(past + tokens)
    wanted = (behind >= 0) & ((behind < window) if window else True)
    return mask is not None and np.array_equal(mask, wanted)
