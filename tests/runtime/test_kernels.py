"""Native kernels against their NumPy twin, bit for bit, and the twin against float64."""

import numpy as np
import pytest

from smoe.artifacts.encodings import ENCODINGS, encode_expert, from_bf16, record_layout, to_bf16
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import Gate
from smoe.runtime import EngineError, kernels, reference

VARIANTS = kernels.available()
SIZES = [(1, 1, 1), (1, 16, 4), (1, 17, 5), (2, 31, 3), (3, 64, 9), (4, 40, 7), (5, 48, 8), (9, 100, 13), (0, 16, 4)]


def _weight(kind: str, n_out: int, n_in: int, random) -> tuple[np.ndarray, np.ndarray | None]:
    w = random.standard_normal((n_out, n_in)).astype(np.float32)
    if kind == "bf16":
        return to_bf16(w), None
    if kind == "int8":
        return (w * 40).astype(np.int8), random.random(n_out, np.float32)
    return w, None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_variant_gives_the_bits_of_the_twin(variant, kind, size):
    tokens, n_in, n_out = size
    random = np.random.default_rng(n_in)
    x = random.standard_normal((tokens, n_in)).astype(np.float32)
    w, scale = _weight(kind, n_out, n_in, random)
    assert np.array_equal(kernels.choose(variant).linear(x, w, scale), reference.linear(x, w, scale))


@pytest.mark.parametrize("variant", VARIANTS)
def test_extremes_keep_their_bits(variant):
    tiny, huge = np.float32(1e-42), np.float32(3e38)  # a denormal; two of the huge overflow
    x = np.array([[tiny, huge, 0, -huge, np.inf], [1, tiny, huge, huge, 0]], np.float32)
    w = np.array([[1, 1, 1, 1, 0], [tiny, 0.5, -1, 1, 1], [0, 0, 0, 0, 0]], np.float32)
    with np.errstate(all="ignore"):
        wanted = reference.linear(x, w)
        found = kernels.choose(variant).linear(x, w, None)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.isnan(found[0, 0]) and found[1, 2] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_does_not_depend_on_its_company(variant):
    random = np.random.default_rng(1)
    x = random.standard_normal((11, 37)).astype(np.float32)
    w = random.standard_normal((6, 37)).astype(np.float32)
    linear = kernels.choose(variant).linear
    together = linear(x, w, None)
    for t in range(11):
        assert np.array_equal(linear(x[t : t + 1], w, None)[0], together[t])


def test_the_twin_is_the_product():
    random = np.random.default_rng(2)
    x, w = random.standard_normal((5, 333)).astype(np.float32), random.standard_normal((7, 333)).astype(np.float32)
    assert np.allclose(reference.linear(x, w), x.astype(np.float64) @ w.astype(np.float64).T, rtol=1e-5, atol=1e-5)
    bits = to_bf16(w)
    assert np.allclose(
        reference.linear(x, bits), x.astype(np.float64) @ from_bf16(bits).T.astype(np.float64), atol=1e-4
    )


@pytest.mark.skipif(len(VARIANTS) == 1, reason="built without native kernels")
@pytest.mark.parametrize("x, w, scale", [
    (np.zeros((2, 3), np.float32), np.zeros((4, 5), np.float32), None),
    (np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32), np.zeros(3, np.float32)),
    (np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float64), None),
    (np.zeros((2, 6), np.float32)[:, ::2], np.zeros((4, 3), np.float32), None),
])  # fmt: skip
def test_the_binding_refuses_what_does_not_fit(x, w, scale):
    with pytest.raises((ValueError, TypeError)):
        kernels.choose(VARIANTS[0]).linear(x, w, scale)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "spec",
    [
        Gate("gated", "silu"), Gate("plain", "relu2"), Gate("clamped", "", 1.702, 0.5), Gate("bounded", "silu", 0, 0.5),
        Gate("softcapped", "", 3, 2),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("normed", [True, False])
def test_the_ffn_is_the_formula(encoding, biased, spec, normed):
    shape = ExpertShape(23, 18, gated=spec.kind != "plain", biased=biased, normed=normed)
    random = np.random.default_rng(5)
    w = {n: random.standard_normal(d).astype(np.float32) for n, d in shape.matrices().items()}
    if biased:
        w |= {f"{n}_bias": random.standard_normal(d[0]).astype(np.float32) for n, d in shape.matrices().items()}
    if normed:
        w["norm"] = random.standard_normal(23).astype(np.float32)
    layout = record_layout(shape, encoding, 512)
    record = encode_expert(layout, encoding, w)
    from smoe.artifacts.encodings import decode_expert

    d = {n: v.astype(np.float64) for n, v in decode_expert(layout, encoding, record).items()}
    x = random.standard_normal((4, 23)).astype(np.float32)

    def matrix(name, x):
        return x @ d[name].T + d.get(f"{name}_bias", 0)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    u = matrix("up", x.astype(np.float64))
    g = matrix("gate", x.astype(np.float64)) if shape.gated else None
    if spec.kind == "gated":
        inner = g * sigmoid(g) * u
    elif spec.kind == "plain":
        inner = np.maximum(u, 0) ** 2
    elif spec.kind == "softcapped":
        inner = 2 * np.tanh(g / 2) * sigmoid(g) * 3 * np.tanh(u / 3)
    else:
        g, u = np.minimum(g, 0.5), np.clip(u, -0.5, 0.5)
        inner = (u + 1) * g * sigmoid(1.702 * g) if spec.kind == "clamped" else g * sigmoid(g) * u
    wanted = matrix("down", inner)
    if normed:
        z = wanted * d["norm"]
        wanted = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6)
    for name in VARIANTS:
        found = kernels.choose(name).ffn(spec, layout.views(record), x)
        assert found.dtype == np.float32 and np.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_variant_can_be_forced_and_an_unknown_one_is_refused(monkeypatch):
    monkeypatch.setenv("SMOE_KERNELS", "reference")
    assert kernels.choose().name == "reference"
    monkeypatch.setenv("SMOE_KERNELS", "abacus")
    with pytest.raises(EngineError, match=r"no kernels 'abacus' on this machine; it has .*reference"):
        kernels.choose()


def test_activations_are_finite_and_known_far_out():
    x = np.array([-1e4, -20, 0, 20, 1e4], np.float32)
    for name, act in reference.ACTIVATIONS.items():
        assert np.isfinite(act(x)).all() or name == "relu2", name
    assert np.allclose(reference.ACTIVATIONS["silu"](x), [0, 0, 0, 20, 1e4], atol=1e-6)
    assert np.allclose(reference.ACTIVATIONS["gelu"](np.float32([1])), 0.8413447, atol=1e-6)
    assert np.allclose(reference.ACTIVATIONS["gelu_tanh"](np.float32([1])), 0.8411920, atol=1e-6)
