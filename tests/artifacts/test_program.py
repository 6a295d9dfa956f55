"""The door of programs: a pico program with every kind of operation passes, and whatever is changed
in it is refused with a sentence, or is a program still."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from support import damage
from support.tables import LAYERS, TOP_K, VOCABULARY, opened, pico

from smoe.artifacts import BundleError, Manifest, open_bundle
from smoe.artifacts.manifest import State
from smoe.artifacts.program import OPS, PROGRAM, PROGRAM_WEIGHTS, Buffer, Part, Program
from smoe.artifacts.program_checks import problems
from smoe.artifacts.validate import file_at

WHOLE, DATA, MANIFEST = pico()


def test_the_pico_program_uses_every_operation_and_passes():
    assert {op.kind for _, op in WHOLE.operations()} == set(OPS)
    assert list(problems(WHOLE, MANIFEST, len(DATA))) == []
    assert Program.parse(WHOLE.to_json(), "again") == WHOLE


@pytest.mark.parametrize("form, shape, group, wide, nbytes", [
    ("f32", (3, 5), 0, False, 60),
    ("bf16", (3, 5), 0, False, 30),
    ("int8", (17, 33), 32, False, 2 * 2 * 512 + 2 * 2 * 16 * 2),  # two tiles of two blocks
    ("int8", (17, 33), 64, True, 2 * 2 * 512 + 2 * 1 * 16 * 4),
    ("int4", (16, 32), 32, False, 256 + 16 * 2),
])  # fmt: skip
def test_sizes_of_constants(form, shape, group, wide, nbytes):
    constant = dataclasses.replace(
        WHOLE.constants[0], form=form, shape=shape, group=group, wide=wide
    )
    assert constant.wanted == nbytes


def _first(table: dict, part: int, kind: str) -> dict:
    return next(op for op in table["parts"][part]["ops"] if op["kind"] == kind)


def _named(items: list[dict], name: str) -> dict:
    return next(item for item in items if item["name"] == name)


def _op(part: int, kind: str, *path_and_value):
    """Set something of the first operation of this kind in a part."""
    *path, key, value = path_and_value

    def change(table: dict) -> None:
        held = _first(table, part, kind)
        for step in path:
            held = held[step]
        held[key] = value

    return change


def _of(room: str, which: str, **fields):
    return lambda table: _named(table[room], which).update(fields)


def _moved(part: int, kind: str, place: int):
    def change(table: dict) -> None:
        ops = table["parts"][part]["ops"]
        ops.insert(place, ops.pop(ops.index(_first(table, part, kind))))

    return change


def _doubled(part: int, kind: str, into: int | None = None):
    def change(table: dict) -> None:
        ops = table["parts"][part if into is None else into]["ops"]
        ops.append(_first(table, part, kind))

    return change


BROKEN = {
    "a field too many": (lambda t: t.update(more=1), "more are missing or unknown"),
    "text for a number": (_op(0, "embedding", "numbers", "scale", "x"), "scale: float was wanted"),
    "parts too few": (lambda t: t["parts"].pop(), "3 parts for 4 segments"),
    "a name twice": (_of("buffers", "turn", name="position"), "'position' stands for 2"),
    "a name of buffer and constant": (_of("buffers", "turn", name="head"), "'head' stands for 2"),
    "a reason beside operations": (
        lambda t: t["parts"][0].update(reason="a node"),
        "part 0 must have operations, or a reason",
    ),
    "a reason that a terminal obeys": (
        lambda t: t["parts"][0].update(ops=None, reason="\x1b[2J"),
        "reason of part 0 holds characters",
    ),
    "a buffer of no kind": (_of("buffers", "turn", kind="f64"), "'turn' is 'f64'"),
    "a buffer of absurd size": (_of("buffers", "turn", shape=[2**30]), "'turn' is 'f32'"),
    "a buffer of negative size": (_of("buffers", "turn", shape=[-5]), r"'turn' is 'f32' \[-5\]"),
    "a buffer of too many axes": (_of("buffers", "turn", shape=[1] * 7), "'turn' is 'f32'"),
    "a constant behind the file": (_of("constants", "head", offset=2**40), "'head' is 'bf16'"),
    "a constant before the file": (_of("constants", "head", offset=-64), "'head' is 'bf16'"),
    "a constant between lines": (_of("constants", "floor.0", offset=4), "'floor.0' is 'f32'"),
    "a constant of another size": (_of("constants", "head", nbytes=4), "'head' is 'bf16'"),
    "a constant of no form": (_of("constants", "head", form="q4"), "'head' is 'q4'"),
    "a constant of no group": (_of("constants", "embedding", group=33), "'embedding' is 'int8'"),
    "a quantised vector": (_of("constants", "embedding", shape=[40]), "'embedding' is 'int8'"),
    "a file with a tail": (
        lambda t: t["constants"].remove(_named(t["constants"], "head")),
        "its last constant ends at",
    ),
    "a state of no segment": (
        lambda t: t["states"][0].update(segment=9),
        "of part 9, which is not known",
    ),
    "a state of another segment": (lambda t: t["states"][0].update(segment=2), "is not one of"),
    "a state of other heads": (lambda t: t["states"][0].update(heads=3), "is not one of the"),
    "a state of no heads": (lambda t: t["states"][0].update(heads=0), "is not one of the"),
    "a state twice": (lambda t: t["states"].append(t["states"][0]), "is not one of the"),
    "a state that is lacking": (lambda t: t["states"].pop(), "part 2 lacks the state 'keys.1'"),
    "a state for two attentions": (_doubled(1, "attention"), "used twice"),
    "a state in another part": (_doubled(1, "attention", 3), "is of another segment"),
    "no buffer for a wire": (_of("buffers", "ids.0", name="i"), "'ids.0', which is no buffer"),
    "a wire of another kind": (_of("buffers", "ids.0", kind="f32"), "'ids.0' is f32"),
    "a wire of another size": (_of("buffers", "ids.0", shape=[4]), r"i64 \[3\] was wanted"),
    "logits of another size": (_of("buffers", "logits", shape=[7]), rf"f32 \[{VOCABULARY}\] was"),
    "an unknown operation": (_op(0, "position", "kind", "eval"), "no such operation"),
    "an input too many": (_op(0, "position", "inputs", [{}]), "inputs.*fields"),
    "no input": (_op(0, "unary", "inputs", []), "it has 0 inputs and 1 outputs, 1 and 1"),
    "an input that must be": (
        _op(1, "norm", "inputs", 0, {"source": "", "offset": 0, "shape": [], "strides": []}),
        "x is absent",
    ),
    "numbers of others": (_op(1, "softmax", "numbers", {"epsilon": 0.1}), r"are not \[\]"),
    "no number": (_op(1, "norm", "numbers", None), r"are not \['epsilon', 'how'\]"),
    "not a number": (_op(1, "norm", "numbers", "epsilon", float("nan")), "epsilon is nan"),
    "a number beyond float32": (_op(0, "embedding", "numbers", "scale", 1e39), "scale is 1e.39"),
    "a window that is none": (_op(1, "attention", "numbers", "window", 1.5), "window is 1.5"),
    "an unknown way": (_op(0, "unary", "names", "how", "lgamma"), "how is 'lgamma'"),
    "an unknown state": (_op(1, "attention", "names", "state", "k"), "the keys of a state"),
    "a weight for nothing": (_op(1, "softmax", "weight", "head"), "'head', none was wanted"),
    "no weight": (_op(1, "product", "weight", ""), "weight is '', a constant was wanted"),
    "a weight that is none": (_op(1, "product", "weight", "turn"), "weight is 'turn', a constant"),
    "a weight of another shape": (_op(1, "product", "weight", "head"), r"f32 \[37\] was wanted"),
    "a vector for a weight": (_op(1, "product", "weight", "norm.0"), "which is no matrix"),
    "an embedding of few words": (_op(0, "embedding", "weight", "router.0"), "row for each of 37"),
    "a view of nothing": (_op(1, "softmax", "inputs", 0, "source", "x"), "'x', which is no buffer"),
    "a view of codes": (
        _op(1, "softmax", "inputs", 0, "source", "embedding"),
        "no f32 constant",
    ),
    "a view behind its buffer": (_op(1, "softmax", "inputs", 0, "offset", 1), "x is .7. at 1 with"),
    "a view before its buffer": (_op(1, "softmax", "inputs", 0, "offset", -1), "x is .7. at -1"),
    "a view with strides backwards": (_op(1, "softmax", "inputs", 0, "strides", [-1]), "x is .7."),
    "a view without strides": (_op(1, "softmax", "inputs", 0, "strides", []), "x is .7."),
    "a view of nothing at all": (_op(1, "softmax", "inputs", 0, "shape", [0]), "x is .0."),
    "a view repeated without bound": (
        _op(1, "softmax", "inputs", 0, {
            "source": "position", "offset": 0, "shape": [2**20] * 6, "strides": [0] * 6,
        }),
        "x is .1048576",
    ),
    "an output twice in one place": (
        _op(1, "softmax", "outputs", 0, "strides", [0]),
        "reaches a number twice",
    ),
    "an output that is a constant": (
        _op(1, "softmax", "outputs", 0, "source", "norm.0"),
        "y is a constant",
    ),
    "more of the best than there are": (
        _op(1, "top_k", "inputs", 0, {
            "source": "scores.0", "offset": 0, "shape": [2], "strides": [1],
        }),
        f"it takes {TOP_K} of 2",
    ),
    "ids that are no integers": (
        _op(1, "gather", "inputs", 1, "source", "best.0"),
        r"at is f32 \[3\], i64",
    ),
    "another kind of numbers": (
        _op(1, "reduce", "inputs", 0, "source", "ids.0"),
        r"x is i64 \[3\], f32 of 1 axes",
    ),
    "a product of a constant": (
        _op(1, "product", "inputs", 0, "source", "norm.0"),
        "x is a constant, a buffer was wanted",
    ),
    "a bias for every row": (
        _op(1, "product", "inputs", 1, "source", "qkv.0"),
        "bias is a buffer, a constant was wanted",
    ),
    "a softcap that is next to nothing": (
        _op(2, "attention", "numbers", "softcap", 1e-300),
        "softcap is 1e-300",
    ),
    "a query with gaps": (
        _op(1, "attention", "inputs", 0, "strides", [1, 6]),
        "q has strides .1, 6., with gaps",
    ),
    "a read before the write": (_moved(1, "softmax", 0), "softmax.*what was not written"),
    "a read of a later part": (
        _op(0, "unary", "inputs", 0, {
            "source": "router_logits.1", "offset": 0, "shape": [5], "strides": [1],
        }),
        "'router_logits.1' what was not written",
    ),
    "a write twice": (_doubled(1, "softmax"), "what was written before"),
    "a write from two parts": (_doubled(1, "softmax", 2), "which another segment gives"),
    "a write into an input of the experts": (
        lambda t: t["parts"][1]["ops"].append(
            {**_first(t, 1, "fill"), "outputs": [{
                "source": "output.0", "offset": 0, "shape": [40], "strides": [1],
            }]}
        ),
        "'output.0' is written before part 2",
    ),
    "a half that is not written": (
        lambda t: t["parts"][1]["ops"].remove(
            next(op for op in t["parts"][1]["ops"] if "-inf" in str(op["numbers"]))
        ),
        "scatter.*not written before",
    ),
    "a buffer that nothing writes": (
        lambda t: t["buffers"].append(dataclasses.asdict(Buffer("more", "f32", (3,)))),
        "'more' is not written whole",
    ),
    "kept rows beside all": (_of("buffers", "last", kept=False), "mixes all rows with the kept"),
    "kept rows in an early part": (_of("buffers", "turn", kept=True), "mixes all rows|kept rows"),
    "rows that are kept twice": (_of("buffers", "kept", kept=False), "mixes all rows with"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_program_is_refused(name):
    change, expected = BROKEN[name]
    table = json.loads(WHOLE.to_json())
    change(table)
    with pytest.raises(BundleError, match=expected):
        opened(table)


def test_operations_without_end_are_refused():
    first, *others = WHOLE.parts
    program = dataclasses.replace(WHOLE, parts=(Part((first.ops or ()) * 20_000), *others))
    assert "operations, more than 65536" in next(problems(program, MANIFEST, len(DATA)))


def test_a_program_that_works_without_end_is_refused():
    """Each operation is possible, and they are few."""
    view = {"source": "position", "offset": 0, "shape": [2**26], "strides": [0]}
    op = _first(json.loads(WHOLE.to_json()), 1, "reduce") | {"inputs": [view]}
    table = json.loads(WHOLE.to_json())
    for n in range(2000):
        table["buffers"].append(dataclasses.asdict(Buffer(f"sum{n}", "f32", ())))
        output = {"source": f"sum{n}", "offset": 0, "shape": [], "strides": []}
        table["parts"][0]["ops"].append(op | {"outputs": [output]})
    program = Program.parse(json.dumps(table), "program.json")
    assert re.search("more than 68719476736", *problems(program, MANIFEST, len(DATA)))


def test_damaged_tables_end_at_the_door():
    counts, wrong = damage.many(4000, seed=0)
    assert not wrong
    assert counts[damage.HEALTHY] > 100 and counts[damage.REFUSED] > 1000


# -- beside ONNX Runtime ---------------------------------------------------------------------------


def _mixed(known: tuple[int, ...]) -> tuple[Program, Manifest]:
    """The pico program where only these parts are known, and a manifest whose graphs give what the
    others did."""
    parts, segments, backbone = [], [], MANIFEST.backbone
    for number, part in enumerate(WHOLE.parts):
        views = [view for op in part.ops or () for view in (*op.inputs, *op.outputs)]
        gives = {view.source for op in part.ops or () for view in op.outputs}
        named = {view.source for view in views} & {buffer.name for buffer in WHOLE.buffers}
        takes = (named - gives) | {"input_ids"}
        segments.append(
            dataclasses.replace(
                backbone.segments[number], inputs=tuple(takes), outputs=tuple(gives)
            )
        )
        parts.append(part if number in known else Part(None, "an unknown node"))
    states, carried = (
        tuple(state for state in room if state.segment in known)
        for room in (WHOLE.states, WHOLE.recurrent)
    )
    program = dataclasses.replace(WHOLE, parts=tuple(parts), states=states, recurrent=carried)
    return program, dataclasses.replace(
        MANIFEST, backbone=dataclasses.replace(backbone, segments=tuple(segments))
    )


@pytest.mark.parametrize("known", [(), (0,), (1,), (0, 2), (1, 2, 3)])
def test_parts_that_are_not_known_pass_values_by_name(known):
    program, manifest = _mixed(known)
    assert list(problems(program, manifest, len(DATA))) == []


def test_what_an_unknown_part_takes_has_a_buffer():
    program, manifest = _mixed((0, 2, 3))
    segments = list(manifest.backbone.segments)
    segments[1] = dataclasses.replace(segments[1], inputs=("mask",))
    backbone = dataclasses.replace(manifest.backbone, segments=tuple(segments))
    manifest = dataclasses.replace(manifest, backbone=backbone)
    assert "takes 'mask', which has no buffer" in next(problems(program, manifest, len(DATA)))
    segments[1] = dataclasses.replace(segments[1], inputs=(), outputs=("logits",))
    backbone = dataclasses.replace(manifest.backbone, segments=tuple(segments))
    manifest = dataclasses.replace(manifest, backbone=backbone)
    assert "part 1 gives 'logits'" in next(problems(program, manifest, len(DATA)))


def test_state_of_one_number_needs_no_attention():
    def with_state(shape: tuple[int, ...], growing: int) -> Manifest:
        state = State(1, "more", "new.more", "I64", shape, growing, False)
        backbone = dataclasses.replace(MANIFEST.backbone, state=(*MANIFEST.backbone.state, state))
        return dataclasses.replace(MANIFEST, backbone=backbone)

    assert not list(problems(WHOLE, with_state((), -1), len(DATA)))
    assert "lacks the state 'more'" in next(problems(WHOLE, with_state((1, 4), -1), len(DATA)))


# -- in a bundle -----------------------------------------------------------------------------------


def _given(bundle: Path, text: str | None = None, data: bytes = b"") -> None:
    """Write a program that leaves all to ONNX Runtime beside the backbone, and list it."""
    manifest = Manifest.parse((bundle / "manifest.json").read_text(), "manifest.json")
    parts = (Part(None, "an unknown node"),) * len(manifest.backbone.segments)
    program = Program((), (), (), parts)
    (bundle / PROGRAM).write_text(program.to_json() if text is None else text)
    (bundle / PROGRAM_WEIGHTS).write_bytes(data)
    files = manifest.files | {name: file_at(bundle / name) for name in (PROGRAM, PROGRAM_WEIGHTS)}
    (bundle / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())


def test_a_bundle_has_the_program_that_it_lists(copied):
    assert open_bundle(copied).program is None
    _given(copied)
    program = open_bundle(copied, hashes=True).program
    assert program is not None and len(program.parts) == LAYERS + 1
    (copied / PROGRAM).unlink()
    with pytest.raises(BundleError, match=r"program\.json is missing"):
        open_bundle(copied)


@pytest.mark.parametrize("text, data, said", [
    ("[" * 100_000, b"", "program.json is not JSON"),
    ("{}", b"", "program.json: the fields buffers"),
    (None, bytes(64), "program.data has 64 bytes, its last constant ends at 0"),
])  # fmt: skip
def test_a_program_that_is_none_is_refused(copied, text, data, said):
    _given(copied, text, data)
    with pytest.raises(BundleError, match=said):
        open_bundle(copied)


def test_a_program_without_its_weights_is_refused(copied):
    _given(copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["files"][PROGRAM_WEIGHTS]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"files does not list backbone/program\.data"):
        open_bundle(copied)


def test_a_prelude_shifts_the_layers(copied):
    """A bundle without one has a segment less than it then must have."""
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["backbone"]["prelude"] = True
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="3 segments for 2 layers, 4 were wanted"):
        open_bundle(copied)
