import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe.artifacts import BundleError, record_layout
from smoe.artifacts.encodings import ENCODINGS, decode_expert, encode_expert, from_bf16, to_bf16
from smoe.artifacts.layout import ALIGN, ExpertShape

SHAPE = ExpertShape(hidden=13, width=7, gated=True, biased=True)


def _weights(shape, seed=0):
    random = np.random.default_rng(seed)
    weights = {name: random.standard_normal(dims).astype(np.float32) for name, dims in shape.matrices().items()}
    if shape.biased:
        weights |= {f"{n}_bias": random.standard_normal(d[0]).astype(np.float32) for n, d in shape.matrices().items()}
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
    decoded = decode_expert(layout, encoding, record)
    assert decoded.keys() == weights.keys()
    # f32 exactly; bf16 to half a unit of its 8 bits; int8 to half a step of the row's scale.
    for name, w in weights.items():
        bound = {"f32": 0, "bf16": np.abs(w) * 2**-8, "int8": np.abs(w).max(-1, keepdims=True) / 127 * 0.5001}[
            encoding
        ]
        assert np.all(np.abs(decoded[name] - w) <= (0 if name.endswith("_bias") else bound)), name


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(sorted(ENCODINGS)), st.booleans(), st.booleans())
def test_tensors_of_a_record_are_aligned_and_apart(hidden, width, encoding, gated, biased):
    layout = record_layout(ExpertShape(hidden, width, gated, biased), encoding, 4096)
    end = 0
    for field in layout.fields:
        assert field.offset >= end and field.offset % ALIGN == 0
        end = field.offset + field.nbytes
    assert layout.levels == (end,) and end <= layout.nbytes
    # What the header declares covers the record without a hole.
    assert sum(tensor.nbytes for tensor in layout.tensors(0)) == layout.nbytes


def test_bf16_by_eye():
    # 1 + 2^-8 lies half way between 1 and 1 + 2^-7: to even is down; 1 + 3 * 2^-8 is up.
    x = np.array([1, -2, 1 + 2**-8, 1 + 3 * 2**-8, 0, np.inf], np.float32)
    assert [hex(b) for b in to_bf16(x)] == ["0x3f80", "0xc000", "0x3f80", "0x3f82", "0x0", "0x7f80"]
    assert np.array_equal(from_bf16(to_bf16(x)), np.array([1, -2, 1, 1 + 2**-6, 0, np.inf], np.float32))
    assert np.isnan(from_bf16(to_bf16(np.array([np.nan], np.float32))))


def test_int8_by_eye():
    w = np.array([[127, -63.6, 0], [0, 0, 0]], np.float32)
    encoded = ENCODINGS["int8"].encode("up", w)
    assert encoded["up"].tolist() == [[127, -64, 0], [0, 0, 0]]
    assert encoded["up_scale"].tolist() == [1, 0]


def test_an_unknown_encoding_names_those_there_are():
    with pytest.raises(BundleError, match="no encoding 'int3' in this version; it has f32, bf16, int8"):
        record_layout(SHAPE, "int3", 512)
