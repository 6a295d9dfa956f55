"""Which executor runs which segment, what that takes, and what has no effect."""

import dataclasses

import pytest
from support.program_bundle import wired, without
from support.tables import pico

from smoe.runtime import EngineError
from smoe.runtime.execution import Execution, divide, runs_of, weights_of

UNKNOWN = "it has a node LSTM"


@pytest.fixture(scope="module")
def program():
    return pico()[0]


@pytest.fixture(scope="module")
def manifest():
    return wired(pico()[2])


def test_a_whole_program_needs_no_onnxruntime(program, manifest):
    division = divide(manifest, program)
    assert division.onnx == (False,) * 4 and division.program is program
    assert not division.needs_onnxruntime and not division.onnx_states()
    (line,) = division.lines()
    assert "backbone: 4 of 4 segments in the program, int4, state f16" in line


def test_without_a_program_onnxruntime_runs_all(program, manifest):
    for there, asked, why in (
        (None, "auto", "the bundle has no program"),
        (program, "onnx", "asked for"),
    ):
        division = divide(manifest, there, Execution(asked))
        assert division.onnx == (True,) * 4 and division.program is None
        assert division.onnx_states() == manifest.backbone.state
        assert division.lines() == [f"backbone: ONNX Runtime ({why}), int4"]


def test_what_is_not_known_runs_in_onnxruntime_and_says_why(program, manifest):
    division = divide(manifest, without(program, {2: UNKNOWN, 3: UNKNOWN}))
    assert division.onnx == (False, False, True, True)
    assert {spec.segment for spec in division.onnx_states()} == {2}
    first, second = division.lines()
    assert "2 of 4 segments in the program" in first
    assert second == f"backbone: 2 of 4 segments in ONNX Runtime: {UNKNOWN}"
    assert {"total.0", "output.0", "cos", "total.1", "logits"} <= division.wires()
    assert "total.0" not in divide(manifest, program).wires()


def test_graphs_that_did_not_travel_cannot_be_asked_for(program, manifest):
    assert divide(manifest, program, graphs=False).program is program
    with pytest.raises(EngineError, match="did not travel along; leave executor onnx out"):
        divide(manifest, program, Execution("onnx"), graphs=False)


def test_a_state_that_is_looked_at_from_outside_is_refused(program, manifest):
    segments = list(manifest.backbone.segments)
    segments[2] = dataclasses.replace(segments[2], inputs=(*segments[2].inputs, "keys.0"))
    backbone = dataclasses.replace(manifest.backbone, segments=tuple(segments))
    manifest = dataclasses.replace(manifest, backbone=backbone)
    assert divide(manifest, program).onnx == (False,) * 4
    with pytest.raises(EngineError, match="Segment 2, which the program does not know, looks at"):
        divide(manifest, without(program, {2: UNKNOWN}))


@pytest.mark.parametrize("execution, said", [
    (Execution("torch"), "no executor 'torch'; there are auto, program, onnx"),
    (Execution(state="f8"), "no state 'f8'; there are f16, f32"),
    (Execution("program"), r"smoe-prep add BUNDLE --program"),
    (Execution(state="f32"), "State f32 has no effect"),
])  # fmt: skip
def test_what_cannot_be_or_has_no_effect_is_a_sentence(manifest, execution, said):
    with pytest.raises(EngineError, match=said):
        divide(manifest, None, execution)


def test_a_program_that_knows_nothing_cannot_be_asked_for(program, manifest):
    nothing = without(program, dict.fromkeys(range(4), UNKNOWN))
    assert divide(manifest, nothing).program is None
    assert (
        divide(manifest, nothing).lines()[1].endswith(f"4 of 4 segments in ONNX Runtime: {UNKNOWN}")
    )
    with pytest.raises(EngineError, match="knows none of its segments"):
        divide(manifest, nothing, Execution("program"))
    with pytest.raises(EngineError, match="State f16 has no effect"):
        divide(manifest, nothing, Execution(state="f16"))
    with pytest.raises(EngineError, match="State f16 has no effect"):
        divide(manifest, program, Execution("onnx", "f16"))


def test_states_in_float16_take_half(program, manifest):
    half, whole = (divide(manifest, program, Execution(state=name)) for name in ("f16", "f32"))
    assert 2 * half.state_bytes(100) == whole.state_bytes(100)
    assert whole.state_bytes(100) == sum(spec.nbytes(100) for spec in manifest.backbone.state)


def test_onnxruntime_takes_of_the_weight_file_what_its_segments_take(golden):
    from smoe.artifacts import open_bundle

    manifest = open_bundle(golden).manifest
    every = weights_of(manifest, range(len(manifest.backbone.segments)))
    assert runs_of(every) == [(0, manifest.files[manifest.backbone.weights].size)]
    mine = weights_of(manifest, [1])
    assert {w.name for w in mine} == set(manifest.backbone.segments[1].weights)
    taken = sum(end - start for start, end in runs_of(mine))
    assert sum(w.nbytes for w in mine) <= taken < sum(w.nbytes + 64 for w in mine)
