import json
import tracemalloc

import datasets
import numpy as np
import pytest

from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError


@pytest.fixture(scope="module")
def reference(root):
    return open_checkpoint(root / "examples" / "reference")


@pytest.fixture(scope="module")
def pico(checkpoints):
    return open_checkpoint(checkpoints("mixtral"))


WORDS = "the quick brown fox jumps over the lazy dog " * 200


def _stream(calibration, checkpoint):
    return np.concatenate(calibration.rows(checkpoint))


def test_text_jsonl_and_datasets_give_the_same_tokens(reference, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": WORDS, "domain": "x"}) + "\n\n")
    datasets.Dataset.from_dict({"text": [WORDS]}).save_to_disk(tmp_path / "disk")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "part.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    streams = [
        _stream(Calibration(str(tmp_path / name)), reference)
        for name in ("a.txt", "a.jsonl", "disk", "files")
    ]
    assert len(streams[0]) > 500
    for stream in streams[1:]:
        assert np.array_equal(stream, streams[0])


def test_rows_have_the_length_asked_for_and_nothing_is_padded(pico, tmp_path):
    ids = list(range(200)) * 3
    (tmp_path / "i.jsonl").write_text(json.dumps({"input_ids": ids}))
    rows = Calibration(str(tmp_path / "i.jsonl"), length=250).rows(pico)
    assert [len(row) for row in rows] == [250, 250, 100] and np.concatenate(rows).tolist() == ids
    assert (
        sum(map(len, Calibration(str(tmp_path / "i.jsonl"), tokens=300, length=250).rows(pico)))
        == 300
    )


def test_the_seed_orders_documents(pico, tmp_path):
    lines = [json.dumps({"input_ids": [n] * 40}) for n in range(20)]
    (tmp_path / "i.jsonl").write_text("\n".join(lines))

    def stream(seed):
        return _stream(Calibration(str(tmp_path / "i.jsonl"), seed=seed), pico).tolist()

    assert stream(1) == stream(1) != stream(2) and sorted(stream(1)) == sorted(stream(2))


@pytest.mark.parametrize(
    "name, content, options, said",
    [
        ("none.txt", None, {}, "none.txt does not exist"),
        ("a.pdf", "x", {}, "a.pdf is none of .txt, .jsonl"),
        ("empty.jsonl", "", {}, "holds 0 tokens; at least 128"),
        ("little.jsonl", '{"input_ids": [1, 2, 3]}', {}, "holds 3 tokens; at least 128"),
        (
            "short.jsonl",
            json.dumps({"input_ids": [1] * 200}),
            {"tokens": 300},
            "holds 200 tokens, fewer than the 300",
        ),
        ("bad.jsonl", '{"input_ids": [1]}\n{oops', {}, "bad.jsonl, line 2 is not JSON"),
        ("other.jsonl", '{"body": "x"}', {}, "line 1 has neither a string `text` or"),
        ("list.jsonl", "[1]", {}, "line 1 has neither"),
        ("deep.jsonl", "[" * 100_000, {}, "line 1 is not JSON"),
        ("wide.jsonl", '{"input_ids": [99999999999999999999]}', {}, "line 1 has neither"),
        ("neg.jsonl", '{"input_ids": [-1]}', {}, "line 1 has neither"),
        (
            "large.jsonl",
            json.dumps({"input_ids": [211] * 200}),
            {},
            "token id 211; this model has 0 to 210",
        ),
        ("text.jsonl", '{"text": "hello"}', {}, "no tokenizer, so text cannot be used"),
        ("few.jsonl", json.dumps({"input_ids": [1] * 200}), {"tokens": 10}, "--tokens is 10"),
    ],
)
def test_a_bad_source_is_a_sentence(pico, tmp_path, name, content, options, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PrepError, match=said):
        Calibration(str(tmp_path / name), **options).rows(pico)


def test_a_name_that_is_no_dataset_is_a_sentence(pico):
    with pytest.raises(PrepError, match="dataset 'no-such/thing' cannot be loaded"):
        Calibration("no-such/thing[sub](train):5").rows(pico)


def test_unusual_line_ends_belong_to_the_text(reference, tmp_path):
    (tmp_path / "web.jsonl").write_text(
        json.dumps({"text": "a\u2028b\x85c " * 300}, ensure_ascii=False)
    )
    assert len(_stream(Calibration(str(tmp_path / "web.jsonl")), reference)) > 300


def test_text_that_is_not_utf8_is_a_sentence(reference, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"abc\xff")
    with pytest.raises(PrepError, match="not UTF-8 at byte 3"):
        Calibration(str(tmp_path / "latin.txt")).rows(reference)


def test_a_large_source_is_not_held_in_memory(checkpoints, tmp_path):
    """24 MB of documents, of which a few tokens are asked for: the same rows as a shuffle of all of
    them gives."""
    source = tmp_path / "large.jsonl"
    documents = [[1 + i % 200] * 2000 for i in range(4000)]
    source.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    tracemalloc.start()
    rows = Calibration(str(source), tokens=6000, seed=3).rows(checkpoint)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.random.default_rng(3).shuffle(documents)
    assert np.concatenate(rows).tolist() == np.concatenate(documents)[:6000].tolist()
    assert peak < source.stat().st_size
