"""Pico bundles on both executors: what the program runs whole, and what ONNX Runtime shares with
it."""

import numpy as np
import pytest

from smoe.artifacts import open_bundle
from smoe.runtime import Engine
from smoe.runtime.budget import memory_for
from smoe.runtime.execution import Execution

IDS = np.random.default_rng(4).integers(0, 211, 150)  # longer than a chunk
CLOSE = 1e-5


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "deepseek_v3", "zaya"])
def bundle(request, bundles):
    """The last two are shared: what one executor made, the other takes."""
    return bundles(request.param)


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_both_executors_say_the_same(bundle):
    program = open_bundle(bundle).program
    with Engine.open(bundle, context=200, executor="onnx") as engine:
        assert "backbone: ONNX Runtime (asked for)" in "\n".join(engine.mode_lines())
        wanted, scored = engine.logits(IDS), np.stack(list(engine.score(IDS, prompt=130)))
    state = "f32" if program.states else None
    with Engine.open(bundle, context=200, executor="program", state=state) as engine:
        known = sum(part.ops is not None for part in program.parts)
        every, lines = len(program.parts), "\n".join(engine.mode_lines())
        assert f"backbone: {known} of {every} segments in the program" in lines
        assert (" segments in ONNX Runtime: " in lines) == (known < every)
        assert _relative(engine.logits(IDS), wanted) < CLOSE
        assert _relative(np.stack(list(engine.score(IDS, prompt=130))), scored) < CLOSE


def test_a_budget_changes_no_bit(bundle):
    opened = open_bundle(bundle)
    experts = max(layer.top_k for layer in opened.manifest.layers) + 1
    with Engine.open(bundle, context=200) as engine:
        wanted = engine.logits(IDS), [t.id for t in engine.generate(IDS[:30], max_new_tokens=9)]
    budget = memory_for(opened, experts, 200, execution=Execution())
    with Engine.open(bundle, context=200, beside=budget) as engine:
        assert engine.plan.capacity < engine.plan.experts
        assert np.array_equal(engine.logits(IDS), wanted[0])
        for reuse in (False, True):
            tokens = engine.generate(IDS[:30], max_new_tokens=9, reuse=reuse)
            assert [token.id for token in tokens] == wanted[1]
