"""What is away while it is not needed: a large backbone's export in a process of its own, the two
ends of a model, and the hidden states of passes that wait."""

import gc
import os
import sys

import numpy as np
import pytest
import torch

from smoe.prep.backbone.alone import export_apart
from smoe.prep.checkpoint import ends
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.errors import PrepError
from smoe.prep.pack.pack import unpacked
from smoe.prep.progress import Progress
from smoe.prep.sweep.forward import sweep
from smoe.prep.workdir import FinishedLayers

QUIET = Progress(quiet=True)


def _exported(source, directory, large):
    checkpoint = open_checkpoint(source)
    directory.mkdir()
    manifest = export_apart(
        checkpoint, directory, unpacked(checkpoint, "f32"), "int8", QUIET, large
    )
    files = {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return checkpoint, manifest, files


def test_an_export_in_a_process_of_its_own_is_the_same(checkpoints, tmp_path):
    _, here, ours = _exported(checkpoints("olmoe"), tmp_path / "here", large=1 << 40)
    checkpoint, apart, theirs = _exported(checkpoints("olmoe"), tmp_path / "apart", large=0)
    assert apart == here and theirs == ours
    assert checkpoint.backbone_bytes == 0


def test_code_that_lies_where_a_build_is_started_does_not_run(checkpoints, tmp_path, monkeypatch):
    """Somebody may start it in the directory of a checkpoint."""
    for module in ("onnx", "json", "smoe"):
        (tmp_path / f"{module}.py").write_text("open('ran', 'w'); raise SystemExit(9)")
    source = checkpoints("olmoe").resolve()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
    monkeypatch.chdir(tmp_path)
    _exported(source, tmp_path / "apart", large=0)
    assert not (tmp_path / "ran").exists()


def test_an_expert_is_read_as_all_of_them_are(checkpoints):
    """One at a time, so that what is stored and what is made of it do not exist at once."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(checkpoints("olmoe"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    for layer, (name, _) in enumerate(checkpoint.layers):
        with checkpoint.experts(layer) as module:
            for part in ("gate_up_proj", "down_proj"):
                whole = model.get_parameter(f"{name}.{part}")
                assert torch.equal(getattr(module, part).float(), whole)


def test_what_the_other_process_refuses_is_our_error(checkpoints, tmp_path):
    checkpoint = open_checkpoint(checkpoints("olmoe"))
    experts = unpacked(checkpoint, "f32")
    (checkpoint.path / "config.json").rename(checkpoint.path / "elsewhere.json")
    try:
        with pytest.raises(PrepError, match="has no config.json"):
            export_apart(checkpoint, tmp_path, experts, "f32", QUIET, large=0)
    finally:
        (checkpoint.path / "elsewhere.json").rename(checkpoint.path / "config.json")


def test_a_disk_that_cannot_be_written_is_our_error_too(checkpoints, tmp_path):
    checkpoint = open_checkpoint(checkpoints("olmoe"))
    (tmp_path / "backbone").write_text("in the way")
    with pytest.raises(PrepError, match="File exists"):
        export_apart(checkpoint, tmp_path, unpacked(checkpoint, "f32"), "f32", QUIET, large=0)


@pytest.mark.parametrize("tied", [False, True])
def test_ends_leave_and_come_again(make, tmp_path, monkeypatch, tied):
    monkeypatch.setattr(ends, "LARGE", 0)
    make("olmoe", tie_word_embeddings=tied).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    modules = [checkpoint.model.get_input_embeddings(), checkpoint.model.get_output_embeddings()]
    before = [module.weight.clone() for module in modules]
    ids = torch.arange(8)[None]
    with ends.Ends(checkpoint) as both:
        both.leave()
        assert all(module.weight.numel() == 0 for module in modules)
        modules[0](ids)
        assert torch.equal(modules[0].weight, before[0])
        both.leave()
    assert all(torch.equal(m.weight, w) for m, w in zip(modules, before, strict=True))


class _Seen:
    """What a layer's experts received, and the bytes of tensors of `numbers` meanwhile."""

    name = "seen"

    def __init__(self, numbers=0):
        self.hidden, self.held, self._numbers = [], [], numbers

    def visit(self, at):
        self.hidden.append(at.hidden.clone())
        alive = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        alike = [t for t in alive if not t.is_meta and t.numel() == self._numbers]
        self.held.append(sum(t.untyped_storage().nbytes() for t in alike))
        return {}

    def resume(self, at, known):
        pass

    def finish(self):
        return []


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "nemotron_h"])
def test_a_pass_that_waits_holds_nothing_and_goes_on_as_it_was(checkpoints, tmp_path, family):
    checkpoint = open_checkpoint(checkpoints(family))
    rows = list(np.random.default_rng(0).integers(0, 90, (6, 23)))  # passes of four and of two rows
    plain, aside = (_Seen(4 * 23 * checkpoint.config.hidden_size) for _ in range(2))
    sweep(checkpoint, rows, [plain])
    with FinishedLayers(tmp_path) as finished:
        sweep(checkpoint, rows, [aside], finished=finished)
    assert all(torch.equal(a, b) for a, b in zip(plain.hidden, aside.hidden, strict=True))
    assert len(aside.hidden) == len(checkpoint.layers)
    assert min(plain.held) > 0 and max(aside.held) == 0


def test_a_pass_that_waits_leaves_the_weights_where_they_are(make, tmp_path):
    """A router of six experts has as many weights as six tokens have numbers, and its code takes
    them as they are."""
    make("deepseek_v3").bfloat16().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layers[0][1].down_proj.shape[0] == 6
    seen = _Seen()

    def visit(at):
        weights = [w for w in checkpoint.model.parameters() if not w.is_meta]
        seen.held.append(sum(w.untyped_storage().nbytes() < w.nbytes for w in weights))
        return {}

    seen.visit = visit
    with FinishedLayers(tmp_path) as finished:
        sweep(checkpoint, [np.arange(6)], [seen], finished=finished)
    assert seen.held == [0] * len(checkpoint.layers)


def test_what_is_wider_than_a_hidden_state_stays_in_memory(checkpoints, tmp_path):
    checkpoint, seen = open_checkpoint(checkpoints("mixtral")), _Seen()
    block = checkpoint.model.model.layers[1]
    plain = block.forward

    def forward(hidden, *args, **kwargs):
        wide = hidden.double()
        return plain(hidden, *args, **kwargs) + (wide - wide).float()

    block.forward = forward
    with FinishedLayers(tmp_path) as finished:
        sweep(checkpoint, [np.arange(8), np.arange(8)], [seen], finished=finished)
    assert len(seen.hidden) == len(checkpoint.layers)


def test_hidden_states_that_are_no_numbers_are_refused(make, tmp_path):
    model = make("mixtral")
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(1e38)
    model.save_pretrained(tmp_path)
    with pytest.raises(PrepError, match="what model.layers.0.mlp.experts receives .* not finite"):
        sweep(open_checkpoint(tmp_path), [np.arange(8)], [])


def test_logits_are_those_of_the_model_although_everything_is_away(checkpoints, monkeypatch):
    monkeypatch.setattr(ends, "LARGE", 0)
    checkpoint = open_checkpoint(checkpoints("olmoe"))
    random = np.random.default_rng(0)
    rows = [random.integers(0, 90, 24), random.integers(0, 90, 24), random.integers(0, 90, 7)]
    seen, logits = _Seen(), []
    sweep(checkpoint, rows, [seen], logits=logits.append)
    assert [len(hidden) for hidden in seen.hidden] == [sum(map(len, rows))] * 2
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    for row, ours in zip(rows, logits, strict=True):
        theirs = model(torch.from_numpy(row)[None]).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
