"""Random checkpoints at the sizes of published models: as many weights as transformers makes of
their configs, words, and what llama.cpp gets."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.geometries import GEOMETRIES
from bench.random_models import Shape, random_checkpoint, worded_ids
from smoe.prep.checkpoint.families import text_class


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_geometry_has_the_weights_that_transformers_makes_of_its_config(geometry, tmp_path):
    shape = GEOMETRIES[geometry](layers=4)
    (tmp_path / "config.json").write_text(json.dumps(shape.config()))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = text_class(type(config))._from_config(config)
    tensors = {name: size for part in shape.parts() for name, size in part.items()}
    stored = {name: size for name, size in tensors.items() if not name.endswith("_scales")}
    numbers = sum(
        math.prod(size) * (2 if name.endswith("_blocks") else 1) for name, size in stored.items()
    )
    assert numbers == model.num_parameters()
    plain = {name for name in tensors if ".experts." not in name}
    assert plain == {name for name, _ in model.named_parameters() if ".experts." not in name}
    assert all(tensors[name] == tuple(model.get_parameter(name).shape) for name in plain)


def test_words_are_drawn_as_often_as_in_a_text():
    ids = worded_ids(20_000, 5000)
    counts = np.sort(np.bincount(ids, minlength=5000))[::-1]
    assert min(ids) >= 3 and max(ids) < 5000 and ids == worded_ids(20_000, 5000)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3), "the tenth a tenth as often"


def test_a_random_checkpoint_has_a_tokenizer_that_works(tmp_path):
    class Worded(Shape):
        worded = True

    shape = Worded(layers=1, experts=4, top_k=2, hidden=64, width=32, vocabulary=5000)
    path = random_checkpoint(tmp_path / "model", shape)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == 5000
    ids = tokenizer("def main():\n    return 1").input_ids
    assert max(ids) < 4096 and tokenizer.decode(ids) == "def main():\n    return 1"
    assert tokenizer.decode([4999]) == "<4999>"
    assert AutoModelForCausalLM.from_pretrained(path).num_parameters() > 0


def test_codes_in_mxfp4_are_those_of_the_checkpoint():
    gguf = pytest.importorskip("gguf")
    from bench.gguf_families import mxfp4_bytes

    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 6, 3, 16), np.uint8)
    scales = random.integers(110, 130, (2, 6, 3), np.uint8)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    pairs = np.stack([values[blocks & 15], values[blocks >> 4]], -1).reshape(2, 6, 3, 32)
    wanted = (pairs * 2.0 ** (scales[..., None] - 127.0)).reshape(2, 6, 96)
    stored = mxfp4_bytes(blocks, scales)
    found = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(found, wanted.astype(np.float32))
