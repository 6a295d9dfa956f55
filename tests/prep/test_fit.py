"""What prices promise, kept on text that no fit has seen: the trained reference model, and pico
ones for the corners."""

import json

import numpy as np

from bench.budgets import budget_for_share
from smoe.artifacts import open_bundle
from smoe.artifacts.tables import load_tables
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe
from smoe.prep.prices import verify as checking
from smoe.prep.prices.calibrate import fitted
from smoe.prep.prices.price import sampled
from smoe.prep.prices.shortcuts import Outcome, Seen, at_random, cheapest, outcomes
from smoe.prep.progress import Progress
from smoe.runtime import Engine, Policies
from smoe.runtime.choose.prices import KINDS, Prices
from smoe.runtime.evaluate import exact, measure, read_documents, rows

QUIET = Progress(quiet=True)


def _tables(bundle):
    return load_tables(
        bundle / "tables.safetensors",
        [layer.experts for layer in open_bundle(bundle).manifest.layers],
    )


def test_prices_rank_and_add_up_on_held_out_text(root, reference_bundle, monkeypatch):
    monkeypatch.setattr(checking, "SETS", 16)
    text = Calibration(str(root / "examples" / "heldout.jsonl"), tokens=512, length=256)
    found = checking.verify_prices(
        reference_bundle, open_checkpoint(root / "examples" / "reference"), text, QUIET
    )
    for group in found.groups:
        assert group["slots"][0] == group["slots"][1], "the count says nothing"
        assert group["price_spearman"] > 0.8
    mean = {
        of: np.mean([group[of] for group in found.groups])
        for of in ("price_spearman", "square_spearman")
    }
    assert mean["price_spearman"] > max(
        0.9, mean["square_spearman"]
    )  # by little where there are no levels
    ratios = found.predicted_over_measured
    assert set(ratios) == {"skip", "standin", "mixed"}
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
    drawn = "\n".join(found.lines())
    assert drawn.count("\n") > 20 and "o skip" in drawn and "l level" not in drawn


def test_a_loss_budget_is_what_is_lost(root, reference_bundle, tmp_path):
    """KL within 0.5 to 1.5 of what was allowed, here on 500 tokens; on more of them:
    python -m bench
    prices."""
    budget = budget_for_share(reference_bundle, 0.4, 256)
    documents = read_documents(root / "examples" / "heldout.jsonl")
    with Engine.open(reference_bundle, beside=budget, context=256) as engine:
        texts = rows(engine, documents, 512, 256)
        wanted = exact(engine, texts, 16, tmp_path / "exact")
        lossless = measure(engine, texts, 16)
    with Engine.open(
        reference_bundle, beside=budget, context=256, policies=Policies(loss=0.01)
    ) as engine:
        found = measure(engine, texts, 16, wanted)
    assert 0.005 < found["kl"] < 0.015 and found["bytes_read"] < 0.7 * lossless["bytes_read"]
    assert 0.005 < found["nats_spent"] <= 0.0125


def test_a_bundle_with_planes_has_prices_of_its_levels(
    exports, smoe_prep, checkpoints, ids_file, tmp_path
):
    common = ("--calibration", ids_file, "--encoding", "nested:2+1+1:32", "--quantiser", "nearest")
    model, recipe = checkpoints("qwen3_moe"), Recipe("nested:2+1+1:32")
    exports.begin(model, tmp_path / "b", recipe)
    done = smoe_prep("build", model, "-o", tmp_path / "b", *common, "--prices", "200")
    assert done.returncode == 0, done.stderr
    tables = _tables(tmp_path / "b")
    fit = tables[0]["price_fit"]
    assert (
        (fit.sum(1) > 0).all() and (fit >= 0).all() and (tables[1]["price_level"][:, 0] > 0).all()
    )
    done = smoe_prep(
        "verify",
        tmp_path / "b",
        checkpoints("qwen3_moe"),
        "--text",
        ids_file,
        "--tokens",
        "128",
        "--prices",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["predicted_over_measured"]) == {*KINDS, "mixed"} and found["tokens"] == 128
    exports.begin(model, tmp_path / "none", recipe)
    done = smoe_prep("build", model, "-o", tmp_path / "none", *common, "--prices", "0")
    assert done.returncode == 0 and "price_fit" not in _tables(tmp_path / "none")[0]
    done = smoe_prep(
        "verify",
        tmp_path / "none",
        checkpoints("qwen3_moe"),
        "--text",
        ids_file,
        "--tokens",
        "128",
        "--prices",
    )
    assert (
        done.returncode == 1
        and "This bundle has no prices" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_model_that_cannot_be_differentiated_is_built_without(
    exports, checkpoints, ids_file, tmp_path, monkeypatch, capsys
):
    from smoe.prep.build import build
    from smoe.prep.errors import NotDifferentiableError
    from smoe.prep.prices.price import Prices

    def refuses(*_):
        raise NotDifferentiableError("this one has no gradient")

    monkeypatch.setattr(Prices, "visit", refuses)
    text = Calibration(str(ids_file))
    exports.begin(checkpoints("mixtral"), tmp_path / "b", Recipe("f32"))
    built = build(checkpoints("mixtral"), tmp_path / "b", text, Recipe("f32"), progress=Progress())
    said = "none for this model, and so no --loss: this one has no gradient"
    assert said in capsys.readouterr().err and built.no_prices and built.fit == []
    assert "price_cross" not in _tables(tmp_path / "b")[0]


def test_without_shortcuts_nothing_is_measured_and_counts_are_exact(reference_bundle, root):
    tables = _tables(reference_bundle)
    prices = Prices.of(tables, fitted=False)
    ids = np.random.default_rng(0).integers(3, 500, 70)
    plans = [
        at_random(["skip"], 0.0, 0.0, 1.0, "weights", 0),
        at_random(["skip", "standin"], 0.05, 3.0, 0.5, "experts", 1),
    ]
    none, some = outcomes(reference_bundle, prices, [ids], plans, 0)
    layers, k = len(tables), 4
    assert none.slots == 0 and none.kl == 0 and none.tokens == 70
    assert some.slots == round(0.05 * 70 * layers * k) and some.kl > 0
    (again,) = outcomes(reference_bundle, prices, [ids], plans[1:], 0)
    assert (again.kl, again.slots) == (some.kl, some.slots)


def test_the_cheapest_are_the_cheapest_up_to_the_sum():
    random = np.random.default_rng(0)
    moments = np.abs(random.standard_normal((5, 5))).astype(np.float32)
    prices = Prices.of([{"price_cross": moments, "price_standin": moments}] * 2, fitted=False)
    seen = Seen(
        [random.integers(0, 6, (40, 2)) for _ in range(2)],
        [random.random((40, 2)).astype(np.float32)] * 2,
    )
    kinds = cheapest("skip", prices, 0.05)(seen, random)
    p = [
        prices.layers[i].skip(np.minimum(ids, 4), w)
        for i, (ids, w) in enumerate(zip(seen.ids, seen.weights, strict=True))
    ]
    taken = np.concatenate([of[k >= 0] for of, k in zip(p, kinds, strict=True)])
    assert 0.5 * 40 * 0.05 < taken.sum() <= 40 * 0.05
    assert all(((k < 0) | (ids < 5)).all() for ids, k in zip(seen.ids, kinds, strict=True)), (
        "no expert costs nothing"
    )


def test_a_fit_finds_the_coefficients():
    random = np.random.default_rng(0)
    made = []
    for _ in range(6):
        p = random.random(50) * 10.0 ** random.uniform(-5, -2)
        of = Outcome(tokens=9, kl=1.25 * p.sum() + 0.02 * np.sqrt(p).sum())
        of.moments[1], of.roots[1] = p.sum(), np.sqrt(p).sum()
        made.append(of)
    assert np.allclose(fitted(made, 1), [1.25, 0.02], rtol=0.01)
    assert np.array_equal(fitted([Outcome(tokens=9)], 0), [1, 0])


def test_a_sample_leaves_text_for_the_fit():
    texts = [np.full(10, i) for i in range(8)] + [np.full(4, 99)]
    drawn, left = sampled(texts, 1000, 0)
    assert [len(part) for part in drawn] == [10] * 6 and len(left) == 3
    assert sorted(np.concatenate([*drawn, *left]).tolist()) == list(range(84))
    assert len(sampled(texts, 15, 0)[0]) == 2


def test_a_text_of_one_row_is_cut_so_that_nothing_is_measured_on_what_it_was_taken_from():
    for texts in ([np.zeros(300)], [np.zeros(40), np.zeros(1)]):
        drawn, left = sampled(texts, 1000, 0)
        assert len(drawn) == 1 and len(drawn[0]) == len(texts[0]) * 3 // 4
        assert len(left[0]) > 1 and not set(np.concatenate(left)) & set(np.concatenate(drawn))
