import json

import numpy as np
import pytest

from smoe.artifacts import BundleError, safetensors_file
from smoe.artifacts.safetensors_file import TensorSpec, load, read_header, save, write

ARRAYS = {
    "a": np.arange(6, dtype=np.int16).reshape(2, 3),
    "b": np.linspace(0, 1, 5, dtype=np.float64),
    "c": np.array(True),
    "empty": np.zeros((0, 4), np.float32),
}


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "x.safetensors", ARRAYS, {"who": "me"})
    loaded = load(tmp_path / "x.safetensors")
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)
    assert read_header(tmp_path / "x.safetensors").metadata == {"who": "me"}


def test_data_starts_where_it_is_told(tmp_path):
    for align in (8, 512, 16384):
        write(
            tmp_path / "x",
            [TensorSpec("t", "U8", (5,))],
            [np.arange(5, dtype=np.uint8)],
            align=align,
        )
        assert read_header(tmp_path / "x").data_start % align == 0


def test_a_write_that_comes_short_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="4 bytes came for tensors of 5"):
        write(tmp_path / "x", [TensorSpec("t", "U8", (5,))], [np.arange(4, dtype=np.uint8)])
    assert list(tmp_path.iterdir()) == []


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def _tensor(begin=0, end=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN = {
    "nothing": b"",
    "shorter than its length field": b"\x01\x02",
    "header beyond the file": _file({}, length=1 << 20),
    "absurd header": _file({}, length=2**63),
    "not json": _file(b"{nonsense"),
    "not utf-8": _file(b'{"\xff": 1}'),
    "a list": _file([]),
    "deeply nested": _file(b"[" * 200_000),
    "unknown dtype": _file({"t": _tensor(dtype="F4")}, b"1234"),
    "unhashable dtype": _file(
        {"t": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"
    ),
    "shape that is none": _file(
        {"t": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, b"1234"
    ),
    "negative size": _file({"t": _tensor(shape=(-1,))}, b"1234"),
    "boolean size": _file({"t": _tensor(shape=(True,))}, b"1234"),
    "float offset": _file({"t": _tensor(end=4.0)}, b"1234"),
    "one offset": _file({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
    "size that is not the shape's": _file({"t": _tensor(shape=(2,))}, b"1234"),
    "huge shape": _file({"t": _tensor(shape=(2**61, 2**61))}, b"1234"),
    "hole": _file({"t": _tensor(4, 8)}, b"12345678"),
    "overlap": _file({"t": _tensor(0, 4), "u": _tensor(0, 4)}, b"1234"),
    "file too long": _file({"t": _tensor()}, b"12345"),
    "file too short": _file({"t": _tensor()}, b"123"),
    "twice the same name": _file(
        b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
    ),
    "metadata that is no text": _file({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_that_names_it(tmp_path, name):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(BundleError, match=r"broken\.safetensors") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        read_header(tmp_path / "none")


def test_every_dtype_has_its_size():
    sizes = {name: dtype.itemsize for name, dtype in safetensors_file.DTYPES.items()}
    assert sizes == {
        "F64": 8,
        "F32": 4,
        "F16": 2,
        "BF16": 2,
        "I64": 8,
        "I32": 4,
        "I16": 2,
        "I8": 1,
        "U16": 2,
        "U8": 1,
        "BOOL": 1,
    }
