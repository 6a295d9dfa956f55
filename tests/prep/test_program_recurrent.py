"""Backbones with recurrent layers as programs that take any number of tokens, whatever their graphs
take: what they give is what `transformers` does, and what ONNX Runtime makes of the graphs token by
token."""

import numpy as np
import pytest
import torch
from support import pico
from support.backbones import logits_of

from smoe.artifacts import open_bundle
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe
from smoe.runtime import Engine, kernels
from smoe.runtime.execution import Execution, divide

# Of every family whether its graphs take a single token, and how its layers carry what they do from
# one to the next. kimi_linear, qwen3_next and qwen3_5_moe, whose export takes minutes, are in
# `python -m bench families`; the delta rule is in `tests/runtime/test_recurrent.py`.
FAMILIES = {
    "lfm2_moe": (False, {"convolution"}),
    "jamba": (True, {"convolution", "recall", "store"}),
}
TOKENS = 600
CLOSE = 1e-4  # of the largest logit
CARRYING = {"recall", "store", "delta_rule", "convolution"}


@pytest.fixture(scope="module")
def models(exports, tmp_path_factory, ids_file):
    """family -> its pico model, and its bundle in f32 for more than `TOKENS`."""
    made = {}

    def get(family: str):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            model = pico.make_model(family, max_position_embeddings=1024)
            model.save_pretrained(path / "model")
            recipe, text = Recipe("f32", prices=0), Calibration(str(ids_file))
            exports.build(path / "model", path / "bundle", text, recipe)
            made[family] = model, path / "bundle"
        return made[family]

    return get


def kinds_of(program) -> set[str]:
    return {op.kind for _, op in program.operations()}


@pytest.mark.parametrize("family", FAMILIES)
def test_programs_of_one_token_graphs_are_the_models(models, family):
    model, bundle = models(family)
    opened, (single, kinds) = open_bundle(bundle), FAMILIES[family]
    assert opened.manifest.backbone.one_at_a_time == single
    assert [part.reason for part in opened.program.parts] == [""] * len(opened.program.parts)
    assert kinds_of(opened.program) & CARRYING == kinds
    ids = np.random.default_rng(1).integers(0, 211, TOKENS)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    with Engine.open(bundle, executor="program") as engine:
        found = engine.logits(ids)
    assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


def cut(lengths: list[int]) -> list[np.ndarray]:
    """Ids of a sequence, in parts of so many."""
    ids = np.random.default_rng(3).integers(0, 211, sum(lengths))
    return np.split(ids, np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_many_rows_are_what_the_graphs_say_token_by_token(models, family):
    _, bundle = models(family)
    opened = open_bundle(bundle)
    manifest, parts = opened.manifest, [37, 1, 1, 13, 1]
    division = divide(manifest, opened.program, Execution(state="f32"))
    twin = logits_of(bundle, manifest, cut(parts), division, "reference")
    wanted = logits_of(bundle, manifest, cut([1] * sum(parts)))
    assert np.abs(twin - wanted).max() <= 1e-5 * np.abs(wanted).max()
    for name in kernels.available()[:-1]:
        for cuts in (parts, [53], [1, 30, 22]):
            assert np.array_equal(logits_of(bundle, manifest, cut(cuts), division, name), twin)
