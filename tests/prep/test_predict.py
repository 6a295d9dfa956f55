"""Predictors against independent arithmetic, and on the trained model against one another."""

import numpy as np
import torch
from sklearn.linear_model import Ridge

from smoe.artifacts.tables import load_tables
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.seam import experts_run_by, zeros
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.statistics import predict
from smoe.prep.sweep.forward import sweep


def _learned(checkpoint, rows, held_out):
    """The tables of predictors that learn from `rows` and are measured on `held_out`."""
    both = [*rows, *held_out]
    ends = np.cumsum([0, *map(len, both)])
    cut = ends[len(rows)]
    predictors = predict.Predictors(
        checkpoint, learned=np.arange(cut), held_out=np.arange(cut, ends[-1]), starts=ends
    )
    sweep(checkpoint, both, [predictors])
    return predictors.finish()


def test_recalls_are_those_of_transformers_own_routers(checkpoints, make):
    """Hidden states, choices and router are caught in transformers' own model by hooks."""
    checkpoint, model = open_checkpoint(checkpoints("qwen3_moe")), make("qwen3_moe")
    random = np.random.default_rng(0)
    rows, held = (
        [random.integers(3, 211, 60) for _ in range(4)],
        [random.integers(3, 211, 60) for _ in range(2)],
    )
    tables = _learned(checkpoint, rows, held)
    assert "predict_recall" not in tables[0] and np.isnan(tables[1]["predict_recall"][:, 1:]).all()
    hidden, logits = {0: [], 1: []}, {0: [], 1: []}
    for layer in (0, 1):
        gate = model.model.layers[layer].mlp.gate

        def note(module, args, output, layer=layer):
            hidden[layer].append(args[0].reshape(-1, args[0].shape[-1]))
            logits[layer].append(args[0].reshape(-1, args[0].shape[-1]) @ module.weight.T)

        gate.register_forward_hook(note)
    with torch.no_grad():
        for row in [*rows, *held]:
            model(torch.from_numpy(row)[None], use_cache=False)
        x, later = torch.cat(hidden[0]).numpy(), torch.cat(logits[1])
        by_router = (torch.cat(hidden[0]) @ model.model.layers[1].mlp.gate.weight.T).numpy()
    k, learned = model.config.num_experts_per_tok, 240
    chosen = [set(row) for row in later.topk(k).indices.tolist()]

    def recall(scores):
        best = np.argsort(-scores, 1)[:, :k]
        return np.mean(
            [len(chosen[learned + i] & set(row)) / k for i, row in enumerate(best.tolist())]
        )

    found = tables[1]["predict_recall"][:, 0]
    previous = [len(chosen[t] & chosen[t - 1]) / k if t % 60 else 0 for t in range(learned, 360)]
    assert np.isclose(found[0], np.mean(previous), atol=1e-6)
    assert np.isclose(found[2], recall(by_router[learned:]), atol=2e-3)
    targets = np.log(np.maximum(later.softmax(-1).numpy(), 1e-9))
    ridge = Ridge(predict.RIDGE).fit(x[:learned], targets[:learned])
    assert np.isclose(found[3], recall(ridge.predict(x[learned:])), atol=1e-2)


def test_on_the_trained_model_the_linear_predictor_is_best_and_farther_is_harder(
    root, reference_bundle
):
    tables = load_tables(reference_bundle / "tables.safetensors", [32] * 6)
    recall = np.stack([table["predict_recall"] for table in tables[3:]]).mean(0)
    previous, transition, router, linear = recall
    assert (linear > router).all() and (linear > transition).all() and (linear > previous).all()
    assert linear[0] > linear[1] > linear[2] > 0.6 and linear[0] > 0.75
    assert all({"predict_1", "predict_2", "predict_3"} <= set(table) for table in tables[3:])


def test_another_use_of_the_seam_may_be_inside_of_one(checkpoints):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    seen = []

    def outer(layer, module, hidden, ids, weights):
        with experts_run_by(checkpoint.model, checkpoint.layers, zeros):
            pass
        seen.append(layer)
        return torch.zeros_like(hidden)

    with experts_run_by(checkpoint.model, checkpoint.layers, outer), torch.no_grad():
        checkpoint.model(torch.tensor([[5, 6, 7]]), use_cache=False)
    assert seen == [0, 1]


def test_families_whose_router_is_elsewhere_are_learned_all_the_same(checkpoints, ids_file):
    for family in ("gpt_oss", "deepseek_v3"):
        checkpoint = open_checkpoint(checkpoints(family))
        rows = Calibration(str(ids_file)).rows(checkpoint)
        for table in _learned(checkpoint, rows, rows)[1:]:
            assert table["predict_recall"][3, 0] > 0.3 and np.isfinite(table["predict_bias"]).all()
