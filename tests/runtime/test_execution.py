"""Which executor runs which segment, what that takes, and what has no effect."""

import dataclasses

import pytest
from support.program_bundle import wired, without
from support.tables import pico

from smoe.artifacts.manifest import STATE_KINDS
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
    (Execution(state="f8"), "no state 'f8'; there are int8, f16, f32"),
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


def test_states_in_float16_take_half_and_in_int8_a_quarter_and_scales(program, manifest):
    def of_tokens(kind: str, context: int) -> int:
        """Beside what no token adds to."""
        division = divide(manifest, program, Execution(state=kind))
        return division.state_bytes(context) - division.state_bytes(0)

    whole = of_tokens("f32", 128)
    assert whole == sum(spec.nbytes(128) for spec in manifest.backbone.state if spec.growing >= 0)
    assert 2 * of_tokens("f16", 128) == whole == of_tokens("f32", 97)  # blocks of 32 tokens
    assert whole / 4 < of_tokens("int8", 128) < whole / 2


def of_kind(manifest, kind: str):
    backbone = dataclasses.replace(manifest.backbone, state_kind=kind)
    return dataclasses.replace(manifest, backbone=backbone)


def test_the_bundle_says_what_its_state_is_kept_in(program, manifest):
    for kind in STATE_KINDS:
        division = divide(of_kind(manifest, kind), program)
        assert division.kind == kind and not division.narrower
        assert f"state {kind} (the bundle's)" in division.lines()[0]
    exact = dataclasses.replace(manifest.backbone, precision="f32")
    assert divide(dataclasses.replace(manifest, backbone=exact), program).kind == "f32"


def test_less_than_the_bundle_says_is_lossy_and_more_is_not(program, manifest):
    for own, asked, lossy in (
        ("f16", "int8", True), ("f32", "f16", True), ("f32", "int8", True), ("", "int8", True),
        ("int8", "f16", False), ("f16", "f32", False), ("int8", "int8", False),
    ):  # fmt: skip
        division = divide(of_kind(manifest, own), program, Execution(state=asked))
        assert division.kind == asked and division.narrower == lossy
        said = f"state {asked} (asked for"
        said += f", LOSSY: narrower than the bundle's {own or 'f16'})" if lossy else ")"
        assert division.lines()[0].endswith(said)


def test_onnxruntime_takes_of_the_weight_file_what_its_segments_take(golden):
    from smoe.artifacts import open_bundle

    manifest = open_bundle(golden).manifest
    every = weights_of(manifest, range(len(manifest.backbone.segments)))
    assert runs_of(every) == [(0, manifest.files[manifest.backbone.weights].size)]
    mine = weights_of(manifest, [1])
    assert {w.name for w in mine} == set(manifest.backbone.segments[1].weights)
    taken = sum(end - start for start, end in runs_of(mine))
    assert sum(w.nbytes for w in mine) <= taken < sum(w.nbytes + 64 for w in mine)
