import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe.artifacts import BundleError, nested, record_layout
from smoe.artifacts.bfloat16 import from_bf16, to_bf16
from smoe.artifacts.encodings import ENCODINGS, decode_expert, encode_expert, encoding_named
from smoe.artifacts.layout import ALIGN, ExpertShape

SHAPE = ExpertShape(hidden=13, width=7, gated=True, biased=True)


def _weights(shape, seed=0):
    random = np.random.default_rng(seed)
    weights = {
        name: random.standard_normal(dims).astype(np.float32)
        for name, dims in shape.matrices().items()
    }
    if shape.biased:
        weights |= {
            f"{n}_bias": random.standard_normal(d[0]).astype(np.float32)
            for n, d in shape.matrices().items()
        }
    return weights


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_record_gives_back_what_went_in(encoding, gated, biased):
    shape = ExpertShape(13, 7, gated, biased)
    layout = record_layout(shape, encoding, 512)
    weights = _weights(shape)
    record = encode_expert(layout, encoding, weights)
    assert record.shape == (layout.nbytes,) and layout.nbytes % 512 == 0
    decoded = decode_expert(shape, layout, encoding, record)
    assert decoded.keys() == weights.keys()
    # f32 exactly; bf16 and f16 to half a unit of their 8 and 11 bits; int8 to half a step.
    for name, w in weights.items():
        bound = {
            "f32": 0,
            "bf16": np.abs(w) * 2**-8,
            "f16": np.abs(w) * 2**-11 + 2**-25,
            "int8": np.abs(w).max(-1, keepdims=True) / 127 * 0.5001,
        }[encoding]
        assert np.all(np.abs(decoded[name] - w) <= (0 if name.endswith("_bias") else bound)), name


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(sorted(ENCODINGS)),
    st.booleans(),
    st.booleans(),
)
def test_tensors_of_a_record_are_aligned_and_apart(hidden, width, encoding, gated, biased):
    layout = record_layout(ExpertShape(hidden, width, gated, biased), encoding, 4096)
    end = 0
    for field in layout.fields:
        assert field.offset >= end and field.offset % ALIGN == 0
        end = field.offset + field.nbytes
    assert layout.levels == (layout.nbytes,) and end <= layout.nbytes
    # What the header declares covers the record without a hole.
    assert sum(tensor.nbytes for tensor in layout.tensors(0)) == layout.nbytes


def test_bf16_by_eye():
    # 1 + 2^-8 lies half way between 1 and 1 + 2^-7: to even is down; 1 + 3 * 2^-8 is up.
    x = np.array([1, -2, 1 + 2**-8, 1 + 3 * 2**-8, 0, np.inf], np.float32)
    assert [hex(b) for b in to_bf16(x)] == ["0x3f80", "0xc000", "0x3f80", "0x3f82", "0x0", "0x7f80"]
    assert np.array_equal(
        from_bf16(to_bf16(x)), np.array([1, -2, 1, 1 + 2**-6, 0, np.inf], np.float32)
    )
    assert np.isnan(from_bf16(to_bf16(np.array([np.nan], np.float32))))


def test_int8_by_eye():
    w = np.array([[127, -63.6, 0], [0, 0, 0]], np.float32)
    encoded = ENCODINGS["int8"].encode("up", w)
    assert encoded["up"].tolist() == [[127, -64, 0], [0, 0, 0]]
    assert encoded["up_scale"].tolist() == [1, 0]


def test_a_weight_beyond_float16_is_refused_and_not_infinite():
    assert ENCODINGS["f16"].encode("up", np.array([[65504, -1e-8]], np.float32))["up"].tolist() == [
        [65504, 0]
    ]
    with pytest.raises(BundleError, match="up to 65600, and float16 ends at 65504; use bf16"):
        ENCODINGS["f16"].encode("up", np.array([[1, 65600]], np.float32))


def test_an_unknown_encoding_names_those_there_are():
    with pytest.raises(
        BundleError, match="no encoding 'int3' in this version; it has f32, bf16, f16, int8"
    ):
        record_layout(SHAPE, "int3", 512)


NESTED = [
    "nested:2+1+1:128",
    "nested:5+1+1+1:64",
    "nested:3+1/4+1:32",
    "nested:2:32",
    "nested:5:32",
    "nested:2+1+1:32:fp4",
    "nested:3+1:128:int4",
]


@pytest.mark.parametrize("name", NESTED)
def test_levels_are_prefixes_and_each_is_nearer(name):
    shape, encoding = ExpertShape(147, 70, biased=True), encoding_named(name)
    layout, weights = record_layout(shape, name, 512), _weights(shape)
    record = encode_expert(layout, name, weights)
    assert all(end % 512 == 0 for end in layout.levels) and layout.levels[-1] == len(record)
    errors = []
    for level in range(1, encoding.levels + 1):
        prefix = record[: layout.levels[level - 1]].copy()  # no more than the level's bytes
        decoded = decode_expert(shape, layout, name, prefix, level)
        assert np.array_equal(decoded["up_bias"], weights["up_bias"])
        errors.append(
            [
                np.square(decoded[n] - weights[n]).sum() / np.square(weights[n]).sum()
                for n in shape.matrices()
            ]
        )
    for lower, higher in pairwise(errors):
        assert np.all(np.array(higher) < 0.5 * np.array(lower))
    # A normal source, 2 bits and a scale per group: the best quantiser has 0.117 (Max, 1960).
    assert max(errors[0]) < {2: 0.135, 3: 0.05, 5: 0.006}[nested.parse(name).split.planes[0]]


@pytest.mark.parametrize("name", NESTED)
def test_codes_and_scales_come_back_from_their_slices(name):
    encoding, random = nested.parse(name), np.random.default_rng(4)
    for dims in ((1, 1), (16, 32), (35, 150), (48, 128)):
        codes = random.integers(0, 1 << encoding.down.total, dims).astype(np.uint8)
        scale = from_bf16(
            to_bf16(random.random((dims[0], -(-dims[1] // encoding.group)), np.float32))
        )
        tensors = nested.pack_matrix(encoding, "down", codes, scale)
        planned = {
            p.name: (p.shape, p.nbytes)
            for plane in nested.matrix_planes(encoding, "down", dims)
            for p in plane
        }
        assert planned == {n: (t.shape, t.nbytes) for n, t in tensors.items()}
        for level in range(1, encoding.levels + 1):
            found, scales = nested.unpack_matrix(encoding, "down", tensors, dims, level)
            assert np.array_equal(found, codes >> (encoding.down.total - encoding.down.bits(level)))
            assert np.array_equal(scales, scale)


def test_a_slice_by_eye():
    # Row 2, column 5: byte 4*2 + 1; 5 div 4 = 1 = 2*0 + 1, so m = 0, h = 1. Code 8 of 4 bits has
    # bit 0 (of slice 0) only, at 0 + 4*1; code 1 has bit 3 only, in slice 3 at 3 + 4.
    encoding = nested.parse("nested:4:32")
    for code, t, bit in ((8, 0, 4), (1, 3, 7)):
        codes = np.zeros((16, 32), np.uint8)
        codes[2, 5] = code
        slices = nested.pack_matrix(encoding, "up", codes, np.ones((16, 1), np.float32))[
            "up_plane0"
        ]
        assert (
            slices.shape == (1, 1, 4, 64)
            and slices[0, 0, t, 9] == 1 << bit
            and np.count_nonzero(slices) == 1
        )


def test_values_are_symmetric_rise_and_refine():
    for text in ("2+1+1", "3+1", "2+1", "5+1+1+1", "4+1+1", "2+1+1+1"):
        split = nested.parse(f"nested:{text}").split
        for level in range(1, len(split.planes) + 1):
            values = split.values(level).astype(int)
            assert len(values) == 1 << split.bits(level) and np.all(np.diff(values) > 0)
            if level > 1:  # a cell's value lies between those of its halves
                coarse, halves = split.values(level - 1).astype(int), values.reshape(-1, 2)
                assert np.all((halves[:, 0] <= coarse) & (coarse <= halves[:, 1]))
            elif split.total <= 4:
                assert np.array_equal(values, -values[::-1])


def test_groups_of_zeros_stay_zeros():
    w = np.zeros((20, 200), np.float32)
    w[3, 140] = 1
    encoding = nested.parse("nested:2+1+1:64")
    tensors = nested.pack_matrix(encoding, "up", *nested.round_matrix(encoding, "up", w))
    decoded = nested.decode_matrix(encoding, "up", tensors, w.shape, 3)
    assert not decoded[:3].any() and not decoded[3, :128].any() and decoded[3, 140] > 0.3


@pytest.mark.parametrize("name, said", [
    ("nested", "is no nested encoding"), ("nested:", "is no nested encoding"),
    ("nested:1+1", "base of 2 to 5 bits"),
    ("nested:6+1", "base of 2 to 5 bits"), ("nested:2+2", "planes of 1 bit"),
    ("nested:5+1+1+1+1", "8 in all"),
    ("nested:2+1:100", "groups of 100 columns"), ("nested:2+1/4:32", "same number of planes"),
    ("nested:2++1", "planes of 1"),
])  # fmt: skip
def test_a_split_that_cannot_be_is_refused_with_the_reason(name, said):
    with pytest.raises(BundleError, match=re.escape(said)):
        encoding_named(name)
    assert encoding_named("nested:2+1+1").name == "nested:2+1+1:128"
    assert encoding_named("nested:2+1/2+1:64").name == "nested:2+1:64"
