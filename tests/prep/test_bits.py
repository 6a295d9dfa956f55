"""Routers of levels: what they are trained on against brute force, what training gives on the
trained example, and bundles that are what they were whatever happens."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.parts import routed_step

from smoe.artifacts import open_bundle
from smoe.artifacts.manifest import VERSION
from smoe.artifacts.tables import BITS_FILE
from smoe.prep.bits import train
from smoe.prep.bits.apart import slot_moments
from smoe.prep.bits.coarse import CoarseExperts
from smoe.prep.bits.goal import Goal
from smoe.prep.bits.router import LevelRouter
from smoe.prep.bits.together import Together
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import expert_outputs
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.options import BitTraining, Recipe
from smoe.prep.progress import Progress
from smoe.prep.sweep.forward import sweep
from smoe.prep.sweep.gradients import Backward
from smoe.runtime import Engine, Policies
from smoe.runtime.choose.bits import Scale, TrainedLevels

QUIET = Progress(quiet=True)
ENCODING = "nested:2+1+1:32"


@pytest.fixture(scope="module")
def pico(checkpoints, ids_file, exports, tmp_path_factory):
    """A checkpoint, its text, and its bundle in planes."""
    model, out = checkpoints("qwen3_moe"), tmp_path_factory.mktemp("planes") / "pico.smoe"
    recipe = Recipe(ENCODING, quantiser="nearest", prices=240, self_tokens=0)
    exports.build(model, out, Calibration(str(ids_file), length=40), recipe)
    return model, Calibration(str(ids_file), length=40), out


@pytest.fixture
def given(pico, tmp_path):
    """The same, of which the bundle may be changed."""
    model, text, bundle = pico
    return model, text, shutil.copytree(bundle, tmp_path / "pico.smoe")


def test_moments_are_those_of_the_changes_that_levels_make(pico):
    model, text, path = pico
    bundle, checkpoint, seen = open_bundle(path), open_checkpoint(model), {}

    class Watch:
        name = "watch"

        def visit(self, at):
            seen[at.layer] = slot_moments(bundle, at).numpy()
            coarse = CoarseExperts(bundle, at.layer, at.module, "cpu", kept=True)
            for token, rank in ((0, 0), (7, 1), (50, 0)):
                expert = int(at.ids[token, rank])
                y = coarse(expert, at.hidden[token][None])[:, 0]
                change = float(at.weights[token, rank]) * (y - y[-1])
                p = torch.einsum("dh,jh->dj", at.gradients[:, token], change).square().mean(0) / 2
                assert seen[at.layer][token, rank] == pytest.approx(p.numpy(), rel=1e-4, abs=1e-12)
            exact = expert_outputs(at.module, expert, at.hidden[:1])
            apart = [float((level - exact).norm()) for level in coarse(expert, at.hidden[:1])]
            assert apart[0] > apart[1] > apart[2]
            return {}

        def finish(self):
            return []

    rows = np.stack(text.rows(checkpoint)[:3])
    sweep(checkpoint, [], [], backward=Backward(checkpoint, rows, 2, 0, [Watch()]))
    assert all((moments[..., -1] == 0).all() for moments in seen.values()) and len(seen) == 2


def test_what_was_trained_is_what_a_device_chooses_by():
    """In each of its forms: all slots at once, those of one expert, and the bundle's tables."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    bits, usual = np.array([2.0, 3.0, 4.0]), random.random(5)
    router = LevelRouter(random.standard_normal((5, 3)), usual, bits, 7)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    ids = np.stack([random.permutation(5)[:2] for _ in range(40)])
    weights = random.random((40, 2)).astype(np.float32)
    hidden = random.standard_normal((40, 7)).astype(np.float32)
    with torch.no_grad():
        logits = router(*map(torch.from_numpy, (hidden, ids, weights)))
        for expert in range(5):
            tokens, ranks = np.nonzero(ids == expert)
            x, w = torch.from_numpy(hidden[tokens]), torch.from_numpy(weights[tokens, ranks])
            assert torch.allclose(router.of_expert(expert, x, w), logits[tokens, ranks], atol=1e-5)
    tables = router.tables()
    routers = [(tables["bits_weight"], tables["bits_bias"], float(tables["bits_mixing"][0]))]
    rule = TrainedLevels(routers, Scale(bits, np.ones(1)))
    routed = routed_step(ids, weights, layer=0, hidden=hidden)
    wanted = 1 + logits.numpy().argmax(2)
    assert len(np.unique(wanted)) == 3
    assert (rule(routed, np.zeros(40), np.arange(40)) == wanted).mean() > 0.97  # in float16


def test_a_full_level_has_had_its_share_and_the_rest_is_dropped(pico):
    model, _, path = pico
    bundle = open_bundle(path)
    goal = Goal.of(bundle, None, 1.0)
    layers = bundle.manifest.layers
    each = zip(goal.biases, goal.usual, layers, strict=True)
    routers = [LevelRouter(b, usual, goal.scale.bits, a.hidden) for b, usual, a in each]
    together = Together(open_checkpoint(model), bundle, routers, goal, (0.2, 0.5, 0.3), 0)
    levels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    kept = together.within_capacity(levels)
    assert kept.sum(0).tolist() == [20, 30, 20] and kept.sum(1).max() == 1
    assert (kept.argmax(1) == levels)[kept.sum(1) > 0].all()


@pytest.mark.parametrize("how", ["end-to-end", "layer-by-layer"])
def test_a_bundle_is_given_routers_and_runs_by_them(given, how):
    model, text, bundle = given
    training = BitTraining(how=how, average=2.7)
    first = train.train_bits(bundle, model, text, training, QUIET)
    opened = open_bundle(bundle, hashes=True)
    tables = opened.tables.layers("bits_weight", "bits_bias", "bits_curve")
    assert opened.manifest.version == VERSION
    said = json.loads(opened.manifest.provenance["bits"])
    assert said["how"] == how and said["seed"] == 0 and said["average"] == 2.7
    prices, means = tables[0]["bits_curve"].T
    assert (np.diff(prices) > 0).all() and (np.diff(means) <= 0).all()
    assert means[0] == pytest.approx(4, abs=0.01) and means[-1] == pytest.approx(2, abs=0.01)
    bytes_before = (bundle / BITS_FILE).read_bytes()
    again = train.train_bits(bundle, model, text, training, QUIET)  # they are replaced
    assert (bundle / BITS_FILE).read_bytes() == bytes_before
    assert again.loss == first.loss and any(how in line for line in first.lines())
    with Engine.open(bundle, policies=Policies(bits="trained:3.2")) as engine:
        ids = np.random.default_rng(0).integers(3, 211, 200)
        list(engine.score(ids, 4))
        assert engine.sequence.ledger.mean == pytest.approx(3.2, rel=0.02)


def test_what_interrupts_leaves_a_bundle_that_opens(given, monkeypatch):
    model, text, bundle = given
    before = (bundle / "manifest.json").read_bytes()
    training = BitTraining(how="layer-by-layer")

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "settle", fails)
        with pytest.raises(KeyboardInterrupt):
            train.train_bits(bundle, model, text, training, QUIET)
    assert (bundle / "manifest.json").read_bytes() == before and open_bundle(bundle, hashes=True)
    train.train_bits(bundle, model, text, training, QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(train, "settle", fails)
        with pytest.raises(KeyboardInterrupt):
            train.train_bits(bundle, model, text, training, QUIET)
    assert BITS_FILE not in open_bundle(bundle, hashes=True).manifest.files


def test_what_cannot_be_trained_is_a_sentence(given, goldens, tmp_path):
    model, text, bundle = given
    for training, sentence in (
        (BitTraining(average=4.0), "--average is 4.0; it goes from 2 to 4 bits"),
        (BitTraining(capacity=(0.5, 0.5)), "--capacity names 2 shares; .* has 3 levels"),
    ):
        with pytest.raises(PrepError, match=sentence):
            train.train_bits(bundle, model, text, training, QUIET)
    with pytest.raises(PrepError, match="was not built from"):
        train.train_bits(bundle, given_other(model, tmp_path), text, BitTraining(), QUIET)
    with pytest.raises(PrepError, match="experts in f32, of one level"):
        train.train_bits(goldens[0], model, text, BitTraining(), QUIET)
    with pytest.raises(PrepError, match="has no prices of levels"):
        train.train_bits(goldens[2], model, text, BitTraining(), QUIET)


def given_other(model, tmp_path):
    """A checkpoint that differs by a byte."""
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    return other


def test_the_commands_say_what_they_did(given, smoe_prep):
    model, text, bundle = given
    command = ("train-bits", bundle, model, "--calibration", text.source, "--json")
    done = smoe_prep(*command, "--how", "layer-by-layer", "--tokens", "300")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["how"] == "layer-by-layer"
    added = smoe_prep("add", bundle, model, "--bits", "--calibration", text.source)
    assert added.returncode == 0 and "routers of levels trained end-to-end" in added.stdout
    for wrong in (["--capacity", "a,b,c"], ["--capacity", "1,1,1", "--how", "layer-by-layer"]):
        refused = smoe_prep(*command, *wrong)
        assert refused.returncode == 2 and "--capacity" in refused.stderr
    assert smoe_prep("add", bundle, "--bits").returncode == 2
