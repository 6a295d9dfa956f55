"""Where a shard's records begin: found without parsing where the header is as written, and as
strictly."""

import json
import os
import time

import numpy as np
import pytest

from smoe.artifacts import BundleError, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.shard import shard_start, write_shard

PAGE, COUNT = 512, 5
LAYOUT = record_layout(ExpertShape(40, 24), "nested:2+1+1:32", PAGE)


@pytest.fixture
def shard(tmp_path):
    record = np.arange(LAYOUT.nbytes, dtype=np.uint8)
    write_shard(tmp_path / "shard", LAYOUT, PAGE, (record for _ in range(COUNT)), COUNT)
    return tmp_path / "shard"


def _parts(shard):
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _with_header(shard, raw: bytes, align: int = PAGE) -> None:
    _, body = _parts(shard)
    raw += b" " * (-(8 + len(raw)) % align)
    shard.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


def _start(shard, count: int = COUNT) -> int:
    return shard_start(shard, LAYOUT, PAGE, count)


def test_records_begin_behind_the_header(shard):
    data, start = shard.read_bytes(), _start(shard)
    assert start % PAGE == 0 and len(data) == start + COUNT * LAYOUT.nbytes
    assert data[start : start + 4] == bytes([0, 1, 2, 3])


def test_the_same_header_in_other_words_is_as_good(shard):
    header = json.loads(_parts(shard)[0])
    _with_header(shard, json.dumps(dict(reversed(header.items())), indent=3).encode())
    start = _start(shard)
    assert shard.read_bytes()[start : start + 4] == bytes([0, 1, 2, 3])


@pytest.mark.parametrize("name, change", [
    ("dtype", lambda entry: entry.update(dtype="I8")),
    ("shape", lambda entry: entry.update(shape=[1, *entry["shape"]])),
])  # fmt: skip
def test_a_header_of_another_layout_is_refused(shard, name, change):
    header = json.loads(_parts(shard)[0])
    change(header["expert.0003.up_plane1"])
    _with_header(shard, json.dumps(header, separators=(",", ":")).encode())
    with pytest.raises(BundleError, match="tensor 'expert.0003.up_plane1'"):
        _start(shard)


def test_what_follows_the_header_as_written_is_looked_at_too(shard):
    raw, _ = _parts(shard)
    with pytest.raises(BundleError, match="is None, the manifest wants"):
        _start(shard, COUNT + 1)
    with pytest.raises(BundleError, match="the manifest wants None"):
        _start(shard, COUNT - 1)
    _with_header(shard, raw.rstrip(), align=8)
    if (8 + len(raw.rstrip())) % PAGE:
        with pytest.raises(BundleError, match="not on a page"):
            _start(shard)
    _with_header(shard, raw.rstrip() + b" x")
    with pytest.raises(BundleError, match="not JSON"):
        _start(shard)
    _with_header(shard, raw)
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(BundleError, match="tensors end at byte"):
        _start(shard)


def test_many_shards_of_one_geometry_are_opened_without_parsing_each(shard, tmp_path):
    count = 400
    record = np.zeros(LAYOUT.nbytes, np.uint8)
    write_shard(tmp_path / "many", LAYOUT, PAGE, (record for _ in range(count)), count)

    def seconds(times):
        started = time.perf_counter()
        for _ in range(times):
            shard_start(tmp_path / "many", LAYOUT, PAGE, count)
        return time.perf_counter() - started

    seconds(1)
    fast = min(seconds(10) for _ in range(3))
    header = json.loads(_parts(tmp_path / "many")[0])
    _with_header(tmp_path / "many", json.dumps(header).encode())  # spaced, so that it is parsed
    assert fast < min(seconds(1) for _ in range(3))
