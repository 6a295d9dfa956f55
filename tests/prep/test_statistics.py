"""Statistics by eye on 3-4-5 vectors, and by brute force."""

import numpy as np
import pytest

from smoe.prep.statistics.sums import LayerSums


def test_by_eye():
    sums = LayerSums.zeros(3, previous=2)
    before = np.array([[True, False], [True, True]])
    # Token 0 goes to experts 0 and 1, token 1 to experts 1 and 0.
    active = sums.add_routing(
        np.array([[0, 1], [1, 0]]),
        np.array([[0.75, 0.25], [0.5, 0.5]]),
        np.array([[5.0, 1.0], [3.0, 5.0]]),
        before,
    )
    outputs = np.array(
        [
            [[3, 4], [-4, 3], [6, 8]],  # |y0| = 5, y1 at a right angle to it, y2 twice y0
            [[3, 4], [3, 4], [0, 0]],  # y1 the same as y0, y2 nothing
        ],
        np.float32,
    )
    sums.add_outputs(outputs, active)
    sums.add_scores(np.array([[3, 1, 0], [1, 3, -np.inf]]))
    t = sums.tables()
    assert t["counts"].tolist() == [2, 2, 0]
    assert t["gate_mass"].tolist() == [1.25, 0.75, 0]
    assert t["saliency"].tolist() == [
        (0.75 * 5 + 0.5 * 5) / 2,
        (0.25 * 1 + 0.5 * 3) / 2,
        2.0,
    ]  # 2: the layer's mean
    assert t["output_norm"].tolist() == [5, 2, 3.5]
    assert t["coactivation"].tolist() == [[2, 2, 0], [2, 2, 0], [0, 0, 0]]
    assert t["transition"].tolist() == [[2, 2, 0], [1, 1, 0]]
    assert t["sampled"].tolist() == [2, 2, 0]
    assert np.allclose(t["output_similarity"], [[1, 0.5, 0.5], [0.5, 1, 0], [0.5, 0, 0.5]])
    # |y1 - y0|^2 = 50 then 0, |y2 - y0|^2 = 25 then 25; sum |y0|^2 = 50.
    assert np.allclose(t["output_error"][0], [0, 1, 1])
    assert np.allclose(t["output_error"][1], [1, 0, (125 + 25) / 50])
    # Expert 2 was never routed to: over all sampled tokens, sum |y2|^2 = 100.
    assert np.allclose(t["output_error"][2], [0.5, 1.5, 0])
    assert t["standin_ids"].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert np.allclose(t["standin_error"], [[1, 1], [1, 3], [0.5, 1.5]])
    # The masked score counts as its row's lowest, 1: columns (3, 1), (1, 3), (0, 1).
    assert np.allclose(t["score_similarity"], [[1, -1, -1], [-1, 1, 1], [-1, 1, 1]])


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    tokens, experts, k = 60, 7, 3
    ids = np.stack([random.permutation(experts)[:k] for _ in range(tokens)])
    return {
        "ids": ids,
        "weights": random.random((tokens, k)),
        "norms": random.random((tokens, k)),
        "before": random.random((tokens, 5)) < 0.4,
        "scores": random.standard_normal((tokens, experts)),
        "outputs": random.standard_normal((tokens, experts, 11)).astype(np.float32),
    }


def _sums(data, rows):
    sums = LayerSums.zeros(7, 5)
    active = sums.add_routing(
        data["ids"][rows], data["weights"][rows], data["norms"][rows], data["before"][rows]
    )
    sums.add_scores(data["scores"][rows])
    sums.add_outputs(data["outputs"][rows], active)
    return sums


def test_by_brute_force(data):
    t = _sums(data, slice(None)).tables()
    count, gate, salient = np.zeros(7, int), np.zeros(7), np.zeros(7)
    joint, follow, cosine, error, energy = (
        np.zeros(s) for s in ((7, 7), (5, 7), (7, 7), (7, 7), 7)
    )
    for token in range(60):
        chosen = data["ids"][token].tolist()
        for rank, e in enumerate(chosen):
            count[e] += 1
            gate[e] += data["weights"][token, rank]
            salient[e] += data["weights"][token, rank] * data["norms"][token, rank]
            y = data["outputs"][token]
            energy[e] += y[e] @ y[e]
            for s in range(7):
                joint[e, s] += s in chosen
                cosine[e, s] += y[e] @ y[s] / np.linalg.norm(y[e]) / np.linalg.norm(y[s])
                error[e, s] += ((y[s] - y[e]) ** 2).sum()
            for p in range(5):
                follow[p, e] += data["before"][token, p]
    assert np.array_equal(t["counts"], count) and np.array_equal(t["coactivation"], joint)
    assert np.array_equal(t["transition"], follow)
    assert np.allclose(t["gate_mass"], gate) and np.allclose(t["saliency"], salient / count)
    assert np.allclose(t["output_similarity"], cosine / count[:, None], atol=1e-6)
    assert np.allclose(t["output_error"], error / energy[:, None], atol=1e-5)
    assert np.allclose(t["score_similarity"], np.corrcoef(data["scores"].T), atol=1e-6)
    for e in range(7):
        others = [s for s in np.argsort(error[e]) if s != e]
        assert t["standin_ids"][e].tolist() == others


def test_sums_merge(data):
    whole = _sums(data, slice(None)).tables()
    parts = _sums(data, slice(0, 23)).merge(_sums(data, slice(23, None))).tables()
    for name, table in whole.items():
        assert np.allclose(parts[name], table, atol=1e-6), name
