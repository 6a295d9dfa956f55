"""How a router chose: found by walking back from the ids and weights that reach the experts. Op
patterns, no families.

ids are TopK's second output, so TopK's input is the selection score. Weights are TopK's values or a
gather of raw weights at ids, then nothing, a division by their sum, or a softmax over them, then
perhaps a scale. `check` replays the rule on real values; a rule that does not reproduce ids and
weights is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from smoe.artifacts.manifest import Routing
from smoe.runtime.routing import route


@dataclass(frozen=True)
class Found:
    """`scores` and `raw` name values `[T, E]` of the graph; `rule` is how ids and weights follow
    from them."""

    scores: str
    raw: str
    rule: Routing


_SHAPING = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze")


def find(ids: ir.Value | None, weights: ir.Value | None) -> Found | None:
    """The routing behind `ids` and `weights`, or None where no pattern fits."""
    top = _producer(_unshaped(ids))
    if top is None or top.op_type != "TopK" or _unshaped(ids) is not top.outputs[1]:
        return None
    scores = top.inputs[0]
    scale, value = _peel_scale(_unshaped(weights))
    normaliser, epsilon, value = _peel_normaliser(value)
    inner_scale, value = _peel_scale(value)
    if inner_scale != 1.0:
        return None
    node = _producer(value)
    if node is top and value is top.outputs[0]:
        raw = scores
    elif (
        node is not None
        and node.op_type == "GatherElements"
        and _unshaped(node.inputs[1]) is top.outputs[1]
    ):
        raw = node.inputs[0]
    else:
        return None
    rule = Routing(normaliser, scale, epsilon)
    return Found(scores=name_of(scores), raw=name_of(raw), rule=rule)


def check(
    pattern: Found, scores: np.ndarray, raw: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> str:
    """Why the rule does not reproduce `ids` and `weights` `[T, k]` from `scores` and `raw` `[T,
    E]`; '' if it does."""
    k = ids.shape[-1]
    again, mixed = route(pattern.rule, scores, raw, k)
    if not np.array_equal(np.sort(again, -1), np.sort(ids, -1)):
        return "the top scores are not the experts that the router chose"
    order, ids_order = np.argsort(again, -1), np.argsort(ids, -1)
    mixed = np.take_along_axis(mixed, order, -1)
    weights = np.take_along_axis(weights, ids_order, -1)
    if not np.allclose(mixed, weights, rtol=1e-4, atol=1e-6):
        return "the mixing weights do not follow from the raw weights"
    return ""


def name_of(value: ir.Value | None) -> str:
    """The name of a value that a graph holds. For `onnx_ir` any input may be left out, and a value
    outside of a graph be without a name."""
    assert value is not None and value.name is not None
    return value.name


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _unshaped(value: ir.Value | None) -> ir.Value | None:
    """`value` before casts and reshapes."""
    node = _producer(value)
    while node is not None and node.op_type in _SHAPING:
        value = node.inputs[0]
        node = _producer(value)
    return value


def _scalar(value: ir.Value | None) -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def _peel_scale(value: ir.Value | None) -> tuple[float, ir.Value | None]:
    """(c, x) where value = x * c with a constant c; (1, value) otherwise."""
    node = _producer(value)
    if node is not None and node.op_type == "Mul":
        for constant, rest in (node.inputs, node.inputs[::-1]):
            if (number := _scalar(constant)) is not None:
                return number, _unshaped(rest)
    return 1.0, value


def _peel_normaliser(value: ir.Value | None) -> tuple[str, float, ir.Value | None]:
    """(normaliser, epsilon, x): what was done to the selected weights x."""
    node = _producer(value)
    if node is not None and node.op_type == "Softmax":
        inner = _unshaped(node.inputs[0])
        if (_producer(inner) or node).op_type in ("TopK", "GatherElements"):
            return "softmax", 0.0, inner
    if node is not None and node.op_type == "Div":
        inner, total = _unshaped(node.inputs[0]), _unshaped(node.inputs[1])
        epsilon, total = _peel_epsilon(total)
        divisor = _producer(total)
        if (
            divisor is not None
            and divisor.op_type == "ReduceSum"
            and _unshaped(divisor.inputs[0]) is inner
        ):
            return "sum", epsilon, inner
    return "none", 0.0, value


def _peel_epsilon(value: ir.Value | None) -> tuple[float, ir.Value | None]:
    node = _producer(value)
    if node is not None and node.op_type in ("Add", "Max", "Clip"):
        for constant, rest in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            if (number := _scalar(constant)) is not None:
                return (number if node.op_type == "Add" else 0.0), _unshaped(rest)
    return 0.0, value
