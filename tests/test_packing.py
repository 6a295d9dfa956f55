"""The native packer against its specification in NumPy, byte for byte. It stands here, not with the
other tests of prep, because it needs no torch: it also runs under the sanitizers."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from smoe.artifacts import BundleError, nested
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.encodings import ENCODINGS, encode_expert, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.prep.pack.compiled import native
from smoe.prep.pack.encode import codes_record, encode_record, round_matrix
from smoe.prep.pack.kept import kept_codes, specified_codes

if native is None:
    pytest.skip("built with SMOE_NO_NATIVE=1", allow_module_level=True)

SPLITS = [
    "2+1+1", "2+1", "3+1", "2", "3", "4", "5", "4+1", "5+1+1/4+1+1", "5+1+1+1",
    "2+1+1+1+1+1+1", "2+1+1:fp4", "3+1:int4",
]  # fmt: skip
FORMS = [f"nested:{s.partition(':')[0]}:{g}{':' * (':' in s)}{s.partition(':')[2]}"
         for s in SPLITS for g in nested.GROUPS]  # fmt: skip
SHAPE = ExpertShape(hidden=300, width=130, biased=True)  # several runs, short groups, tiles, blocks


def _normal(random, dims):
    return random.standard_normal(dims).astype(np.float32)


def _coarse(random, dims):
    """Many ties, rows and groups of zeros, zeros with a sign, and very small weights."""
    w = from_bf16(to_bf16(np.round(random.standard_normal(dims) * 8) / 64))
    w[3], w[5, 7], w[6, :150] = 0, 1e-30, -0.0
    w[7] = 1e-40
    return w


def _heavy(random, dims):
    return (random.standard_normal(dims) * np.exp(2 * random.standard_normal(dims))).astype("f4")


def _weights(kind=_normal, shape=SHAPE):
    random = np.random.default_rng(0)
    biases = {f"{n}_bias": _normal(random, d[0]) for n, d in shape.matrices().items()}
    return {n: kind(random, d) for n, d in shape.matrices().items()} | biases


@pytest.mark.parametrize("kind", [_normal, _coarse, _heavy])
@pytest.mark.parametrize("encoding", [*ENCODINGS, *FORMS])
def test_a_record_is_as_specified_to_the_byte(encoding, kind):
    layout, weights = record_layout(SHAPE, encoding, 64), _weights(kind)
    wanted = encode_expert(layout, encoding, weights)
    for variant in native.variants():
        for threads in (1, 3):
            record = encode_record(layout, encoding, weights, variant, threads)
            assert np.array_equal(record, wanted), (variant, threads)


@pytest.mark.parametrize("dims", [(1, 1), (1, 31), (17, 33), (2, 20000)])
def test_any_shape_will_do(dims):
    encoding, w = nested.parse("nested:2+1+1:64"), _normal(np.random.default_rng(1), dims)
    wanted = nested.round_matrix(encoding, "up", w)
    for variant in native.variants():
        for ours, theirs in zip(round_matrix(encoding, "up", w, variant), wanted, strict=True):
            assert np.array_equal(ours, theirs), variant


@pytest.mark.parametrize("name", ["nested:2+1+1:128", "nested:2+1+1:32", "nested:5+1+1+1:128"])
def test_the_same_scale_is_best_where_two_are_as_good(name):
    """One weight of every row is moved to where the choice of the scale tips over: what the last
    bit of a sum decides."""
    encoding = nested.parse(name)
    w = _normal(np.random.default_rng(3), (64, encoding.group))
    sides = np.repeat(np.array([[0.25], [2]], np.float32), 64, axis=1)

    def rounded(first):
        w[:, 0] = first
        return nested.round_matrix(encoding, "up", w)

    below = rounded(sides[0])[1]
    for _ in range(40):
        middle = (sides[0] + sides[1]) / 2
        same = (rounded(middle)[1] == below).ravel()
        sides[0, same], sides[1, ~same] = middle[same], middle[~same]
    for first in sides:
        wanted = rounded(first)
        for variant in native.variants():
            for ours, theirs in zip(round_matrix(encoding, "up", w, variant), wanted, strict=True):
                assert np.array_equal(ours, theirs), variant


def test_a_matrix_that_lies_across_is_taken_as_it_is_meant():
    w = _normal(np.random.default_rng(2), (130, 70))
    encoding = nested.parse("nested:3+1:32")
    for ours, theirs in zip(
        round_matrix(encoding, "up", w.T), round_matrix(encoding, "up", w.T.copy()), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_codes_that_are_known_lie_as_specified():
    encoding, random = nested.parse("nested:5+1+1+1/4+1+1+1:32"), np.random.default_rng(3)
    codes, tensors = {}, {}
    vectors = {n: w for n, w in _weights().items() if n.endswith("_bias")}
    for name, dims in SHAPE.matrices().items():
        found = random.integers(0, 1 << encoding.of(name).total, dims, dtype=np.uint8)
        scale = from_bf16(to_bf16(_normal(random, (dims[0], -(-dims[1] // 32)))))
        codes[name] = found, scale
        tensors |= nested.pack_matrix(encoding, name, found, scale)
    layout = record_layout(SHAPE, encoding.name, 64)
    views = layout.views(codes_record(layout, encoding, codes, vectors))
    for name, values in (tensors | vectors).items():
        assert np.array_equal(views[name], values), name


@pytest.mark.parametrize("weight", [65520.0, -65520.0, 1e30])
def test_a_weight_that_float16_cannot_hold_is_refused(weight):
    weights, layout = _weights(), record_layout(SHAPE, "f16", 64)
    weights["down"][70, 3] = 65519  # rounds to the largest
    encode_record(layout, "f16", weights)
    weights["down"][70, 3] = weight
    with pytest.raises(BundleError, match="down holds weights up to .* ends at 65504"):
        encode_record(layout, "f16", weights)


def test_several_callers_at_once_do_not_disturb_one_another():
    layout, weights = record_layout(SHAPE, "nested:2+1+1", 64), _weights()
    wanted = encode_expert(layout, "nested:2+1+1", weights)
    with ThreadPoolExecutor(4) as pool:
        records = pool.map(
            lambda threads: encode_record(layout, "nested:2+1+1", weights, "", threads),
            [1, 2, 3] * 8,
        )
        assert all(np.array_equal(record, wanted) for record in records)


# -- codes of checkpoints --------------------------------------------------------------------------


def _powers(random, dims):
    return np.ldexp(np.float32(1), random.integers(-12, -3, dims)).astype(np.float32)


def _factors(random, dims):
    return from_bf16(to_bf16(random.uniform(0.01, 1, dims).astype(np.float32)))


@pytest.mark.parametrize("rounded", [np.float32, np.float16, "bfloat16"])
@pytest.mark.parametrize("factors", [_powers, _factors])
@pytest.mark.parametrize("table, group", [("fp4", 32), ("int4", 64), ("int4", 128)])
def test_kept_codes_are_found_as_specified(table, group, factors, rounded):
    random, dims = np.random.default_rng(4), (300, 289)
    split = nested.Split((2, 1, 1), table)
    values = split.values(3).astype(np.float32)
    wide = np.repeat(factors(random, (dims[0], -(-dims[1] // group))), group, 1)[:, : dims[1]]
    w = values[random.integers(0, 16, dims)] * wide
    w = from_bf16(to_bf16(w)) if rounded == "bfloat16" else w.astype(rounded).astype(np.float32)
    w[5], w[6, :40] = 0, -0.0
    for ours, theirs in zip(
        kept_codes(split, group, w), specified_codes(split, group, w), strict=True
    ):
        assert np.array_equal(ours, theirs)
    w[7, :30] = np.arange(1, 31)  # thirty values, of which there are sixteen
    assert kept_codes(split, group, w) is specified_codes(split, group, w) is None


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4 = np.concatenate([FP4, -FP4])


def test_mxfp4_is_its_values_times_powers_of_two():
    scales = np.arange(255, dtype=np.uint8)  # 255 means that it is no number
    blocks = np.random.default_rng(5).integers(0, 256, (255, 16), dtype=np.uint8)
    with np.errstate(over="ignore"):
        wide = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], -1).reshape(255, 32)
        wanted = np.ldexp(wide, scales[:, None].astype(int) - 127)
    found = np.empty((255, 32), np.uint16)
    native.dequantise_mxfp4(blocks, scales, found, 2)
    assert np.array_equal(found, to_bf16(wanted))


def test_float8_is_multiplied_by_the_factor_of_its_block():
    random = np.random.default_rng(6)
    codes = random.permutation(np.arange(3 * 256, dtype=np.uint16).astype(np.uint8))
    codes = np.tile(codes, 5).reshape(2, 40, 48)
    factors = random.uniform(0.1, 2, (2, 3, 4)).astype(np.float32)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(np.float32)
    size = np.ldexp(mantissa + 8 * (exponent > 0), np.maximum(exponent, 1) - 10)
    size[codes & 127 == 127] = np.nan
    wide = factors.repeat(16, 1).repeat(16, 2)[:, :40, :48]
    wanted = np.where(codes & 128, -size, size).astype(np.float32) * wide
    found, half = np.empty(codes.shape, np.float32), np.empty(codes.shape, np.uint16)
    for out in (found, half):
        native.dequantise_fp8(codes, factors[:, :, :3].copy(), 16, 16, out, 2)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(half, to_bf16(wanted))


# -- what is refused -------------------------------------------------------------------------------


def _zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


WRONG = {
    "planes of other tiles": lambda: native.slice_codes(
        _zeros(17, 33), [_zeros(1, 2, 2, 64)], 1
    ),
    "nine slices": lambda: native.slice_codes(_zeros(16, 32), [_zeros(1, 1, 9, 64)], 1),
    "codes of another shape": lambda: native.round_nested(
        "", _zeros(2, 64, dtype=np.float32), 64,
        native.Grid([2], [1.0], [1.0], np.zeros((1, 4), np.int8)),
        _zeros(2, 63), _zeros(2, 1, dtype=np.float32), 1,
    ),
    "bits that are not read one by one": lambda: native.Grid(
        [2, 4], [1.0, 1.0], [1.0], np.zeros((2, 16), np.int8)
    ),
    "nine bits": lambda: native.Grid([9], [1.0], [1.0], np.zeros((1, 0), np.int8)),
    "no values": lambda: native.Grid([2], [1.0], [1.0], np.zeros((1, 0), np.int8)),
    "values that fall": lambda: native.keep_codes(
        np.array([1, -1], np.int8), _zeros(1, 32, dtype=np.float32), 32, 1, _zeros(1, 32),
        _zeros(1, 1, dtype=np.float32), 1,
    ),
    "blocks without scales": lambda: native.dequantise_mxfp4(
        _zeros(2, 16), _zeros(1), _zeros(2, 32, dtype=np.uint16), 1
    ),
    "too few factors": lambda: native.dequantise_fp8(
        _zeros(1, 17, 16), _zeros(1, 1, 1, dtype=np.float32), 16, 16,
        _zeros(1, 17, 16, dtype=np.float32), 1,
    ),
    "another instruction set": lambda: native.round_half(
        "abacus", _zeros(1, 1, dtype=np.float32), "bf16", _zeros(1, 1, dtype=np.uint16), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        WRONG[wrong]()
