"""Native kernels against their NumPy twin, bit for bit, on every instruction set there is; and the
twin against float64."""

import numpy as np
import pytest

from smoe.artifacts import record_layout
from smoe.artifacts.bfloat16 import to_bf16
from smoe.artifacts.encodings import ENCODINGS, decode_expert, encode_expert, encoding_named
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import ExpertActivation
from smoe.runtime import EngineError, kernels
from smoe.runtime.kernels import activations, reference

VARIANTS = kernels.available()
NATIVE = VARIANTS[:-1]
NESTED = (
    "nested:2+1+1:32",
    "nested:5+1+1+1:128",
    "nested:2+1+1+1/3+1+1+1:64",
    "nested:4+1+1:32",
    "nested:2:128",
    "nested:2+1+1:32:fp4",
    "nested:2+1+1:64:int4",
)
SPECS = [
    ExpertActivation("gated", "silu"), ExpertActivation("plain", "relu2"),
    ExpertActivation("clamped", "", 1.702, 0.5), ExpertActivation("bounded", "gelu", 0, 0.5),
    ExpertActivation("softcapped", "", 3, 2),
]  # fmt: skip
# tokens, n_in, n_out: one and many, whole blocks and odd ends, fewer than a tile and more, nothing
# at all
SIZES = [
    (1, 1, 1),
    (1, 32, 16),
    (1, 300, 40),
    (2, 31, 3),
    (3, 64, 17),
    (4, 129, 7),
    (17, 160, 48),
    (35, 100, 13),
    (0, 33, 4),
]


def _weights(shape: ExpertShape, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    w = {n: random.standard_normal(d).astype(np.float32) for n, d in shape.matrices().items()}
    if shape.biased:
        w |= {
            f"{n}_bias": random.standard_normal(d[0]).astype(np.float32)
            for n, d in shape.matrices().items()
        }
    if shape.normed:
        w["norm"] = random.standard_normal(shape.hidden).astype(np.float32)
    return w


def _product(variant, encoding, layout, shape, record, level, x):
    """Matrix `up` times x, by a native variant."""
    layer = kernels.native_layer(ExpertActivation("plain", "identity"), shape, encoding, layout)
    y = np.empty((len(x), -(-shape.width // 16) * 16), np.float32)
    layer.product(variant, "up", record[None, : layout.levels[level - 1]].copy(), level, x, y)
    assert not np.nan_to_num(y[:, shape.width :]).any()  # NaN where the activations are
    return y[:, : shape.width]


def _twin(encoding, layout, shape, record, level, x):
    tensors = layout.views(record)
    if encoding.startswith("nested"):
        from smoe.artifacts import nested

        dims = shape.matrices()["up"]
        return reference.nested_product(nested.parse(encoding), "up", tensors, dims, level, x)
    return reference.dense(x, tensors["up"], tensors.get("up_scale"))


def _cases():
    for encoding in (*ENCODINGS, *NESTED):
        for level in range(1, encoding_named(encoding).levels + 1):
            yield encoding, level


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("encoding, level", list(_cases()))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_variant_gives_the_bits_of_the_twin(variant, encoding, level, size):
    tokens, n_in, n_out = size
    shape = ExpertShape(n_in, n_out, gated=False)
    layout = record_layout(shape, encoding, 512)
    record = encode_expert(layout, encoding, _weights(shape, n_in))
    x = np.random.default_rng(1).standard_normal((tokens, n_in)).astype(np.float32)
    x[: tokens // 2, : n_in // 3] = 0  # groups of zeros
    found = _product(variant, encoding, layout, shape, record, level, x)
    assert np.array_equal(found, _twin(encoding, layout, shape, record, level, x))


EXTREMES = np.array([
    [1e-42, 3e38, 0, -3e38, 1], [1, 1e-42, 3e38, 3e38, 0], [np.inf, 1, 2, 3, 4],
    [np.nan, 1, 2, 3, 4],
    [1e-42, -1e-42, 1e-42, 0, 0], [1e-31, 1e-31, 0, 0, 0], [1e-29, 5e-30, -1e-29, 0, 0],
    [-127, 127, 63.5, 0.5, -0.5],
], np.float32)  # fmt: skip


@pytest.mark.parametrize("variant", NATIVE)
def test_every_float16_is_read_as_numpy_reads_it(variant):
    # As a matrix of one column times 1; in a row of many another lane's load would do.
    shape = ExpertShape(1, 1 << 16, gated=False)
    layout = record_layout(shape, "f16", 512)
    record = np.zeros(layout.nbytes, np.uint8)
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    layout.views(record)["up"][...] = every[:, None]
    found = _product(variant, "f16", layout, shape, record, 1, np.ones((1, 1), np.float32))
    assert np.array_equal(found[0], every.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("encoding", [*ENCODINGS, *NESTED])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1, 1e30, 2e38])
def test_extremes_keep_their_bits(variant, encoding, magnitude):
    # Denormals, sums that overflow, what is not finite; weights and scales of any size.
    shape = ExpertShape(5, 3, gated=False)
    layout = record_layout(shape, encoding, 512)
    most = 65504 if encoding == "f16" else 2e38
    weights = {n: (w * np.float32(magnitude)).clip(-most, most) for n, w in _weights(shape).items()}
    with np.errstate(all="ignore"):
        record = encode_expert(layout, encoding, weights)
        for x in (EXTREMES, EXTREMES[:1], EXTREMES[2:3]):
            level = encoding_named(encoding).levels
            wanted = _twin(encoding, layout, shape, record, level, x)
            assert np.array_equal(
                _product(variant, encoding, layout, shape, record, level, x), wanted, equal_nan=True
            )


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("spec", [
    *SPECS,
    *(
        ExpertActivation(kind, name, 0, 1)
        for name in activations.ACTIVATIONS
        for kind in ("gated", "plain", "bounded")
    ),
], ids=str)  # fmt: skip
def test_what_lies_between_the_matrices_has_the_twins_bits(variant, spec):
    far = np.float32(
        [
            0,
            -0.0,
            1e-42,
            -1e-42,
            87,
            -87,
            88.5,
            -1e4,
            1e4,
            3e38,
            -3e38,
            np.inf,
            -np.inf,
            np.nan,
            0.625,
        ]
    )
    x = np.concatenate([far, np.linspace(-20, 20, 1009, dtype=np.float32)])
    gate, up = np.meshgrid(x[::7], x)
    shape = ExpertShape(3, 5, gated=spec.kind != "plain")
    layer = kernels.native_layer(spec, shape, "f32", record_layout(shape, "f32", 512))
    found = np.empty_like(up)
    layer.between(variant, np.ascontiguousarray(gate), np.ascontiguousarray(up), found)
    assert np.array_equal(found, activations.gate(spec, gate, up), equal_nan=True)


def _call(variant, spec, encoding, shape, records, x, work, threads=2):
    layout = record_layout(shape, encoding, 512)
    return kernels.choose(variant, threads).layer(spec, shape, encoding, layout)(records, work, x)


def _work(levels, slots, tokens):
    """Experts 0, 1, .. in frames of the same numbers, with so many slots each."""
    starts = np.concatenate([[0], np.cumsum(slots)]).astype(np.int64)
    chosen = np.random.default_rng(7).integers(0, tokens, starts[-1])
    return kernels.Work(np.arange(len(slots)), np.array(levels, np.int64), starts, chosen)


@pytest.mark.parametrize("encoding", [*ENCODINGS, *NESTED])
@pytest.mark.parametrize("biased, normed", [(False, False), (True, True)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_experts_in_one_call_are_the_formula_on_every_variant(encoding, biased, normed, spec):
    shape = ExpertShape(150, 70, gated=spec.kind != "plain", biased=biased, normed=normed)
    layout, count = record_layout(shape, encoding, 512), encoding_named(encoding).levels
    records = np.stack([encode_expert(layout, encoding, _weights(shape, e)) for e in range(4)])
    levels = [1, count, max(1, count - 1), count]
    work = _work(levels, [3, 1, 0, 18], 6)
    x = np.random.default_rng(5).standard_normal((6, 150)).astype(np.float32)
    found = _call("reference", spec, encoding, shape, records, x, work)
    for e in range(4):
        slots = slice(work.starts[e], work.starts[e + 1])
        decoded = decode_expert(shape, layout, encoding, records[e], levels[e])
        wanted = _formula(
            spec, {n: v.astype(np.float64) for n, v in decoded.items()}, x[work.tokens[slots]]
        )
        # float32 keeps 1e-4; activations in int8 steps of 1/127 of the largest, twice, and gates
        # that are steep
        bound = 0.08 if encoding.startswith("nested") else 1e-4
        assert np.linalg.norm(found[slots] - wanted) <= bound * (np.linalg.norm(wanted) + 1e-9)
    for variant in NATIVE:
        assert np.array_equal(_call(variant, spec, encoding, shape, records, x, work), found), (
            variant
        )


def _formula(spec: ExpertActivation, d: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def matrix(name, x):
        return x @ d[name].T + d.get(f"{name}_bias", 0)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    def gelu(v):
        import math

        return v * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(v / math.sqrt(2)))

    u = matrix("up", x.astype(np.float64))
    g = matrix("gate", x.astype(np.float64)) if "gate" in d else None
    if spec.kind == "gated":
        inner = g * sigmoid(g) * u
    elif spec.kind == "plain":
        inner = np.maximum(u, 0) ** 2
    elif spec.kind == "softcapped":
        inner = 2 * np.tanh(g / 2) * sigmoid(g) * 3 * np.tanh(u / 3)
    else:
        g, u = np.minimum(g, 0.5), np.clip(u, -0.5, 0.5)
        inner = (u + 1) * g * sigmoid(1.702 * g) if spec.kind == "clamped" else gelu(g) * u
    y = matrix("down", inner)
    if "norm" in d:
        z = y * d["norm"]
        y = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6)
    return y


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("encoding", ["bf16", "nested:2+1+1:64"])
def test_neither_company_nor_threads_change_a_bit(variant, encoding):
    shape = ExpertShape(320, 272)
    layout = record_layout(shape, encoding, 512)
    records = np.stack([encode_expert(layout, encoding, _weights(shape, e)) for e in range(3)])
    x = np.random.default_rng(1).standard_normal((40, 320)).astype(np.float32)
    work = _work([encoding_named(encoding).levels] * 3, [40, 1, 23], 40)
    together = _call(
        variant, ExpertActivation("gated", "silu"), encoding, shape, records, x, work, threads=5
    )
    for e in range(3):
        for slot in range(work.starts[e], work.starts[e + 1]):
            alone = kernels.Work(np.array([e]), work.levels[:1], np.array([0, 1]), np.array([0]))
            token = np.ascontiguousarray(x[work.tokens[slot]][None])
            found = _call(
                variant,
                ExpertActivation("gated", "silu"),
                encoding,
                shape,
                records,
                token,
                alone,
                threads=1,
            )
            assert np.array_equal(found[0], together[slot])


def test_calls_from_several_threads_do_not_meet():
    from concurrent.futures import ThreadPoolExecutor

    shape, encoding = ExpertShape(256, 192), "nested:2+1+1:64"
    layout = record_layout(shape, encoding, 512)
    records = np.stack([encode_expert(layout, encoding, _weights(shape, e)) for e in range(3)])
    kernel = kernels.choose(VARIANTS[0], 3).layer(
        ExpertActivation("gated", "silu"), shape, encoding, layout
    )
    work = _work([3, 2, 1], [5, 9, 2], 8)
    inputs = [
        np.random.default_rng(i).standard_normal((8, 256)).astype(np.float32) for i in range(24)
    ]
    wanted = [kernel(records, work, x) for x in inputs]
    with ThreadPoolExecutor(4) as several:
        for found, one in zip(
            several.map(lambda x: kernel(records, work, x), inputs), wanted, strict=True
        ):
            assert np.array_equal(found, one)


def test_the_twin_is_the_product():
    random = np.random.default_rng(2)
    x, w = (
        random.standard_normal((5, 333)).astype(np.float32),
        random.standard_normal((7, 333)).astype(np.float32),
    )
    wanted = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.allclose(reference.dense(x, w), wanted, rtol=1e-5, atol=1e-5)
    assert np.allclose(reference.dense(x, to_bf16(w)), wanted, atol=0.3)


def test_quantised_activations_by_eye():
    q, step = reference.quantise(np.float32([[127, -63.5, 62.5, 0.5, 1e-40], [0, 0, 0, 0, 0]]), 4)
    # half to even; the second group has one number, too small to be anything
    assert q[0].tolist() == [[127, -64, 62, 0], [0, 0, 0, 0]] and step[0].tolist() == [1, 0]
    assert not q[1].any() and not step[1].any()
    q, step = reference.quantise(np.float32([[1, np.inf, 0, 0]]), 4)
    assert not q.any() and np.isnan(step).all()


@pytest.mark.skipif(not NATIVE, reason="built without native kernels")
def test_the_binding_refuses_what_does_not_fit():
    shape, encoding = ExpertShape(40, 24), "nested:2+1+1:32"
    layout = record_layout(shape, encoding, 512)
    layer = kernels.native_layer(ExpertActivation("gated", "silu"), shape, encoding, layout)
    good = {
        "variant": NATIVE[0], "records": np.zeros((2, layout.nbytes), np.uint8),
        "frames": np.array([0, 1]),
        "levels": np.array([1, 3]), "starts": np.array([0, 1, 3]), "tokens": np.array([0, 1, 0]),
        "x": np.zeros((2, 40), np.float32), "y": np.zeros((3, 40), np.float32), "threads": 1,
    }  # fmt: skip
    layer.ffn(**good)
    for name, bad in {
        "variant": "abacus", "records": good["records"][:, : layout.levels[1]].copy(),
        "frames": np.array([0, 2]),
        "levels": np.array([1, 4]), "starts": np.array([0, 2, 1]), "tokens": np.array([0, 2, 0]),
        "x": np.zeros((2, 39), np.float32), "y": np.zeros((2, 40), np.float32),
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            layer.ffn(**good | {name: bad})
    for name, bad in {
        "levels": np.array([0, 1]),
        "frames": np.array([-1, 0]),
        "x": np.zeros((2, 40)),
    }.items():
        with pytest.raises((ValueError, TypeError)):
            layer.ffn(**good | {name: bad})


@pytest.mark.skipif(not NATIVE, reason="built without native kernels")
def test_the_binding_knows_activations_by_the_names_of_the_manifest():
    shape = ExpertShape(40, 24)
    layout = record_layout(shape, "f32", 512)
    for spec in (ExpertActivation("gated", "abacus"), ExpertActivation("odd", "silu")):
        with pytest.raises(ValueError, match="no activation of this name"):
            kernels.native_layer(spec, shape, "f32", layout)


def test_a_variant_can_be_forced_and_an_unknown_one_is_refused(monkeypatch):
    monkeypatch.setenv("SMOE_KERNELS", "reference")
    assert kernels.choose().name == "reference"
    monkeypatch.setenv("SMOE_KERNELS", "abacus")
    with pytest.raises(
        EngineError, match=r"no kernels 'abacus' on this machine; it has .*reference"
    ):
        kernels.choose()


def test_activations_are_finite_and_known_far_out():
    x = np.array([-1e4, -20, 0, 20, 1e4], np.float32)
    for name, act in activations.ACTIVATIONS.items():
        assert np.isfinite(act(x)).all() or name == "relu2", name
    assert np.allclose(activations.ACTIVATIONS["silu"](x), [0, 0, 0, 20, 1e4], atol=1e-6)
    assert np.allclose(activations.ACTIVATIONS["gelu"](np.float32([1])), 0.8413447, atol=1e-6)
    assert np.allclose(activations.ACTIVATIONS["gelu_tanh"](np.float32([1])), 0.8411920, atol=1e-6)


def test_functions_of_our_own_are_as_exact_as_they_say():
    x = np.linspace(-86, 86, 100001).astype(np.float32)
    assert np.abs(activations.exp(x) / np.exp(x.astype(np.float64)) - 1).max() < 1.2e-7
    x = np.linspace(-9, 9, 100001).astype(np.float32)
    near = np.where(x == 0, 1, x)
    assert np.abs(activations.tanh(near) / np.tanh(near.astype(np.float64)) - 1).max() < 2.5e-7
    from math import erf

    assert np.abs(activations.erf(x) - np.array([erf(v) for v in x])).max() < 5e-7
