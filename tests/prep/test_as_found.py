"""Checkpoints as they are found on disks: what is beside the weights, or around them, changes
nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pico import make_model
from transformers import AutoModelForCausalLM

from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import expert_weights


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint in several files whose head is its embedding."""
    path = tmp_path_factory.mktemp("plain") / "m"
    make_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(path, max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").exists()
    return path


def _added(path, name, tensors):
    save_file(tensors, path / name, {"format": "pt"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _layer_that_predicts_ahead(path):
    """Layers of multi-token prediction come after the last, and nobody runs them."""
    first = load_file(sorted(path.glob("*.safetensors"))[0])
    names = {f"model.layers.2.{n.split('.', 3)[-1]}" for n in first if ".layers.0." in n}
    nan = {
        name: torch.full((3, 5), torch.nan) for name in names | {"model.layers.2.eh_proj.weight"}
    }
    _added(path, "model-mtp.safetensors", nan)


def _snapshot_of_links(path):
    blobs = path.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")


def _stale_head(path):
    """Of the same values, as a copy of the embedding that some other program saved."""
    tensors = {k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    _added(path, "model-head.safetensors", head)


def test_a_head_of_its_own_is_what_transformers_makes_of_it(plain, tmp_path):
    found = shutil.copytree(plain, tmp_path / "m")
    _added(found, "model-head.safetensors", {"lm_head.weight": torch.full((211, 64), 7.0)})
    head = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32).lm_head.weight
    assert torch.equal(open_checkpoint(found).model.lm_head.weight, head)


def _shards_without_an_index(path):
    (path / "model.safetensors.index.json").unlink()
    stale = {
        "layers.0.attention.wq.weight": torch.ones(3, 5),
        "tok_embeddings.weight": torch.ones(2),
    }
    save_file(stale, path / "consolidated.safetensors", {"format": "pt"})


def _other_files(path):
    (path / "modeling_mine.py").write_text("raise SystemExit('code of a checkpoint ran')\n")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    (path / "model-Q4_K_M.gguf").write_bytes(b"GGUF, never read")
    (path / "original").mkdir()
    (path / "original" / "params.json").write_text("{")


@pytest.mark.parametrize(
    "change",
    [_layer_that_predicts_ahead, _snapshot_of_links, _stale_head, _shards_without_an_index,
     _other_files],
)  # fmt: skip
def test_what_is_beside_the_weights_changes_nothing(plain, tmp_path, change):
    found = shutil.copytree(plain, tmp_path / "ein Modell, für später" / "m")
    change(found)
    wanted, opened = open_checkpoint(plain), open_checkpoint(found)
    for name, weight in wanted.model.state_dict().items():
        assert weight.is_meta or torch.equal(weight, opened.model.state_dict()[name]), name
    with wanted.experts(1) as theirs, opened.experts(1) as ours:
        for name, weight in expert_weights(theirs, 4).items():
            assert np.array_equal(weight, expert_weights(ours, 4)[name])
