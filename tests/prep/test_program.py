"""Backbones of pico models as programs: what a segment's operations compute, in NumPy, is what
ONNX Runtime makes of its graph, over prompts and single tokens."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
from support import pico
from support.backbones import compiled, logits_of, operations

from smoe.artifacts import open_bundle
from smoe.artifacts.program import PROGRAM, PROGRAM_WEIGHTS, View
from smoe.prep.backbone import checked
from smoe.prep.backbone.quantise import Known as Sizes
from smoe.prep.backbone.quantise import reduce
from smoe.prep.build import build
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.program import views
from smoe.prep.program.probe import Probe
from smoe.prep.program.values import Early, Interval
from smoe.prep.progress import Progress
from smoe.runtime.execution import Execution, divide

WHOLE = [
    "qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "glm4_moe", "ernie4_5_moe", "granitemoe",
    "phimoe", "gpt_oss",
]  # fmt: skip
PARTS = (37, 1, 1, 13, 1)  # tokens of the calls that a sequence is cut into
VOCABULARY, HIDDEN = 211, 64  # of a pico model
CLOSE = {"f32": 1e-5, "int8": 0.03}  # of the largest logit; a rounding may fall the other way


def _logits(path, manifest, division=None):
    ids = np.random.default_rng(3).integers(0, VOCABULARY, sum(PARTS))
    parts = np.split(ids, np.cumsum(PARTS)[:-1])
    return logits_of(path, manifest, parts, division, "reference")


def _in_program(path, manifest, program):
    execution = Execution(state="f32" if program.states else None)
    return _logits(path, manifest, divide(manifest, program, execution))


def _copied(bundle, path, precision="f32"):
    """The backbone of a bundle alone, and its manifest, in `precision`."""
    shutil.copytree(bundle / "backbone", path / "backbone")
    manifest = open_bundle(bundle).manifest
    if precision != "f32":
        known = Sizes(VOCABULARY, HIDDEN)
        backbone, _ = reduce(path, manifest.backbone, manifest.layers, precision, known)
        manifest = dataclasses.replace(manifest, backbone=backbone)
    return manifest


@pytest.mark.parametrize("precision", ["f32", "int8"])
@pytest.mark.parametrize("family", WHOLE)
def test_a_program_computes_what_the_graphs_do(bundles, tmp_path, family, precision):
    manifest = _copied(bundles(family), tmp_path, precision)
    program = compiled(tmp_path, manifest)
    assert [part.reason for part in program.parts if part.ops is None] == []
    found, wanted = _in_program(tmp_path, manifest, program), _logits(tmp_path, manifest)
    assert np.abs(found - wanted).max() <= CLOSE[precision] * np.abs(wanted).max()
    forms = {constant.form for constant in program.constants}
    assert forms == ({"f32"} if precision == "f32" else {"f32", "int8"})
    assert not any(constant.wide for constant in program.constants)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_bundles_from_before_the_prelude_compile_too(root, tmp_path, version):
    manifest = _copied(root / "tests" / "golden" / f"{version}.smoe", tmp_path)
    assert not manifest.backbone.prelude
    program = compiled(tmp_path, manifest)
    assert all(part.ops for part in program.parts)
    found, wanted = _in_program(tmp_path, manifest, program), _logits(tmp_path, manifest)
    assert np.abs(found - wanted).max() <= CLOSE["f32"] * np.abs(wanted).max()


@pytest.mark.parametrize(
    "family, windows", [("qwen3_moe", [0, 0]), ("mixtral", [16, 16]), ("gpt_oss", [16, 0])]
)
def test_masks_are_intervals_of_the_models_own_windows(bundles, family, windows):
    program = open_bundle(bundles(family)).program
    assert [op.numbers["window"] for op in operations(program, "attention")] == windows


def test_a_build_checks_its_program_and_lists_it(
    bundles, checkpoints, ids_file, tmp_path, capfd, monkeypatch
):
    opened = open_bundle(bundles("olmoe"))
    assert {PROGRAM, PROGRAM_WEIGHTS} <= set(opened.manifest.files)
    assert opened.manifest.backbone.prelude and len(opened.program.parts) == 4

    def fails(*_):
        raise PrepError("No segment of this backbone compiles: a node of nobody's")

    monkeypatch.setattr(checked, "compile", fails)
    recipe, text = Recipe("f32", prices=0), Calibration(str(ids_file))
    built = build(checkpoints("olmoe"), tmp_path / "b", text, recipe, progress=Progress())
    said = capfd.readouterr().err
    assert "no program, ONNX Runtime runs the backbone: No segment" in said
    assert PROGRAM not in built.manifest.files


def test_a_node_that_is_not_known_leaves_its_segment_to_onnx_runtime(bundles, tmp_path):
    """A Dropout, which at rest is nothing."""
    manifest = _copied(bundles("qwen3_moe"), tmp_path)
    file = tmp_path / manifest.backbone.segments[2].file
    model = onnx.load(str(file), load_external_data=False)
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    dropout = onnx.helper.make_node("Dropout", [softmax.input[0]], ["dropped"])
    softmax.input[0] = "dropped"
    model.graph.node.insert(list(model.graph.node).index(softmax), dropout)
    file.write_bytes(model.SerializeToString())
    program = compiled(tmp_path, manifest)
    reasons = [part.reason for part in program.parts]
    assert "which others take" in reasons[0]  # a mask, which only ONNX Runtime needs
    assert reasons[1:] == ["", "Dropout dropped: no operation does it", ""]
    found, wanted = _in_program(tmp_path, manifest, program), _logits(tmp_path, manifest)
    assert np.abs(found - wanted).max() <= CLOSE["f32"] * np.abs(wanted).max()


def test_sums_of_squares_and_of_exponentials_are_operations(bundles, tmp_path):
    """A router's softmax written out, times a length over itself."""
    manifest = _copied(bundles("qwen3_moe"), tmp_path)
    file = tmp_path / manifest.backbone.segments[2].file
    model = onnx.load(str(file), load_external_data=False)
    nodes, make = list(model.graph.node), onnx.helper.make_node
    (softmax,) = [node for node in nodes if node.op_type == "Softmax"]
    x, last = softmax.input[0], onnx.numpy_helper.from_array(np.array([-1]), "last")
    model.graph.initializer.append(last)
    added = [
        make("ReduceLogSumExp", [x, "last"], ["total"], keepdims=1),
        make("Sub", [x, "total"], ["less"]),
        make("Exp", ["less"], ["shares"]),
        make("ReduceSumSquare", [x, "last"], ["square"], keepdims=1),
        make("Sqrt", ["square"], ["root"]),
        make("ReduceL2", [x, "last"], ["length"], keepdims=1),
        make("Div", ["root", "length"], ["one"]),
        make("Mul", ["shares", "one"], list(softmax.output)),
    ]
    place = nodes.index(softmax)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *added, *nodes[place + 1 :]])
    file.write_bytes(model.SerializeToString())
    program = compiled(tmp_path, manifest)
    assert [part.reason for part in program.parts if part.ops is None] == []
    found, wanted = _in_program(tmp_path, manifest, program), _logits(tmp_path, manifest)
    assert np.abs(found - wanted).max() <= CLOSE["f32"] * np.abs(wanted).max()


def test_equal_weights_are_stored_once(ids_file, tmp_path):
    sizes = {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        pico.make_model("qwen3_moe", tie_word_embeddings=tied).save_pretrained(folder / "model")
        recipe = Recipe("f32", "int8", prices=0)
        text = Calibration(str(ids_file))
        build(folder / "model", folder / "b", text, recipe, progress=Progress(True))
        program = open_bundle(folder / "b").program
        (table,) = {op.weight for op in operations(program, "embedding")}
        assert (table == program.parts[-1].ops[-1].weight) == tied
        assert all(constant.offset % 64 == 0 for constant in program.constants)
        sizes[tied] = (folder / "b" / PROGRAM_WEIGHTS).stat().st_size
    tiles = -(-VOCABULARY // 16) * 16
    assert sizes[False] - sizes[True] == tiles * (HIDDEN + HIDDEN // 32 * 2)


# -- views -----------------------------------------------------------------------------------------


def _read(view, row):
    strides = [4 * stride for stride in view.strides]
    return np.lib.stride_tricks.as_strided(row[view.offset :], view.shape, strides)


def test_views_are_numpys():
    row = np.arange(120, dtype=np.float32)
    view, array = views.whole("x", (4, 5, 6)), row.reshape(4, 5, 6)
    view, array = views.transposed(view, (2, 0, 1)), array.transpose(2, 0, 1)
    view, array = views.sliced(view, 0, 1, 2, 3), array[1:6:3]
    assert np.array_equal(_read(view, row), array)
    wide = views.broadcast(view, (3, 2, 4, 5))
    assert np.array_equal(_read(wide, row), np.broadcast_to(array, (3, 2, 4, 5)))
    joined = views.reshaped(view, (2, 1, 2, 2, 5))
    assert np.array_equal(_read(joined, row), array.reshape(2, 1, 2, 2, 5))
    assert views.reshaped(view, (2, 20)) == View("x", 1, (2, 20), (3, 6))
    assert views.reshaped(view, (40,)) is None and not views.is_dense(view)
    with pytest.raises(ValueError):
        views.reshaped(view, (41,))


# -- masks -----------------------------------------------------------------------------------------


def _mask(formula):
    """What a probe says of `formula`(keys, queries), nodes that give a mask "mask"."""
    node = onnx.helper.make_node
    constants = {"zero": np.int64(0), "one": np.int64(1), "four": np.int64(4)}
    nodes = [
        node("Shape", ["input_ids"], ["size"], start=1, end=2),
        node("Squeeze", ["past_length"], ["past"]),
        node("Squeeze", ["size"], ["tokens"]),
        node("Add", ["past", "tokens"], ["total"]),
        node("Range", ["zero", "total", "one"], ["keys"]),
        node("Range", ["past", "total", "one"], ["places"]),
        node("Unsqueeze", ["places", "behind"], ["queries"]),
        *formula(node),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [], [])
    arrays = {name: np.array(number) for name, number in constants.items()}
    arrays["behind"] = np.array([1])
    return Probe([graph], arrays, 300).look(Early("mask"))


def test_a_mask_is_an_interval_or_is_not_known():
    def causal(node):
        return [node("LessOrEqual", ["keys", "queries"], ["mask"])]

    def window(node):
        return [
            node("Sub", ["queries", "four"], ["first"]),
            node("Greater", ["keys", "first"], ["near"]),
            node("LessOrEqual", ["keys", "queries"], ["before"]),
            node("And", ["near", "before"], ["mask"]),
        ]

    def blocks(node):
        return [
            node("Div", ["keys", "four"], ["a"]),
            node("Div", ["queries", "four"], ["b"]),
            node("Equal", ["a", "b"], ["same"]),
            node("LessOrEqual", ["keys", "queries"], ["before"]),
            node("And", ["same", "before"], ["mask"]),
        ]

    def distance(node):
        return [node("Sub", ["keys", "queries"], ["d"]), node("Cast", ["d"], ["mask"], to=1)]

    assert _mask(causal) == Interval(0)
    assert _mask(window) == Interval(4)
    assert _mask(blocks) == Early("mask")
    assert _mask(distance) == Early("mask")
