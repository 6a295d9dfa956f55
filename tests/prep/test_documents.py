"""Calibration text as people have it: every form gives the tokens that `transformers` gives of it,
or a sentence with file and line."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import tracemalloc

import datasets
import numpy as np
import pyarrow
import pytest
import transformers

from smoe.prep.checkpoint import documents
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.documents import PIECE, read_documents
from smoe.prep.checkpoint.records import Conversation
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "the quick brown fox jumps over the lazy dog " * 40
ASKED = {"role": "user", "content": "How many? " + WORDS}
ANSWERED = {"role": "assistant", "content": "Twelve. " + WORDS}
TURNS = [ASKED, ANSWERED]
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.fixture(scope="module")
def plain(root):
    """A model without a chat template."""
    return open_checkpoint(root / "examples" / "reference")


@pytest.fixture(scope="module")
def talking(root, tmp_path_factory):
    """The same with one."""
    copied = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(root / "examples" / "reference", copied)
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    return open_checkpoint(copied)


def _ids(source, checkpoint, **options) -> list[int]:
    return np.concatenate(Calibration(str(source), **options).rows(checkpoint)).tolist()


def _lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


RECORDS = [
    ({"messages": TURNS}, TURNS),
    ({"messages": [SYSTEM, *TURNS], "source": "x"}, [SYSTEM, *TURNS]),
    ({"conversations": TURNS}, TURNS),
    (
        {
            "conversations": [
                {"from": "human", "value": ASKED["content"]},
                {"from": "gpt", "value": ANSWERED["content"]},
            ],
            "system": "Be short.",
        },
        [SYSTEM, *TURNS],
    ),
    ({"prompt": ASKED["content"], "completion": ANSWERED["content"]}, TURNS),
    ({"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]}, [SYSTEM, *TURNS]),
    ({"instruction": ASKED["content"], "input": "", "output": ANSWERED["content"]}, TURNS),
    ({"instruction": "How many?", "input": WORDS, "response": WORDS}, [
        {"role": "user", "content": "How many?\n\n" + WORDS},
        {"role": "assistant", "content": WORDS},
    ]),
    ({"question": ASKED["content"], "answer": ANSWERED["content"]}, TURNS),
]  # fmt: skip


@pytest.mark.parametrize("record, messages", RECORDS)
def test_a_conversation_is_written_by_the_models_own_template(talking, tmp_path, record, messages):
    tokenizer = transformers.AutoTokenizer.from_pretrained(talking.path)
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert _ids(_lines(tmp_path / "c.jsonl", record), talking) == expected


def test_a_model_without_a_template_joins_messages_and_says_so_once(plain, tmp_path):
    source, said = _lines(tmp_path / "c.jsonl", *[{"messages": TURNS}] * 3), []
    rows = Calibration(str(source)).rows(plain, said.append)
    joined = {"text": f"{ASKED['content']}\n\n{ANSWERED['content']}"}
    assert np.concatenate(rows).tolist() == _ids(_lines(tmp_path / "t.jsonl", *[joined] * 3), plain)
    assert len(said) == 1 and "no chat template" in said[0]


def _zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}
RECORD = json.dumps({"text": WORDS})
FORMS = {
    "bom.jsonl": f"\ufeff{RECORD}\n",
    "bom.txt": f"\ufeff{WORDS}",
    "b.ndjson": f"\n  \r\n{RECORD}\r\n",
    "content.jsonl": json.dumps({"content": WORDS, "text": None}),
    "list.json": json.dumps([{"text": WORDS}], indent=2),
    "one.json": json.dumps({"text": WORDS}, indent=2),
    "lines.json": RECORD + "\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_one_text_gives_its_tokens(plain, tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name].encode())
    expected = transformers.AutoTokenizer.from_pretrained(plain.path)(WORDS)["input_ids"]
    assert _ids(tmp_path / name, plain) == expected


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", ["bom.jsonl", "bom.txt", "list.json"])
def test_compressed_files_are_unpacked_and_damaged_ones_are_a_sentence(
    plain, tmp_path, name, suffix
):
    (tmp_path / name).write_bytes(FORMS[name].encode())
    packed = tmp_path / (name + suffix)
    packed.write_bytes(PACKED[suffix](FORMS[name].encode()))
    assert _ids(packed, plain) == _ids(tmp_path / name, plain)
    whole = packed.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive" * 20):
        packed.write_bytes(damaged)
        with pytest.raises(PrepError, match=f"{name}{suffix} cannot be unpacked"):
            _ids(packed, plain)


def test_parquet_is_read_in_pieces_and_its_missing_fields_are_left_out(talking, tmp_path):
    turns = [{"role": "user", "content": WORDS, "name": None}, {**ANSWERED, "name": "x"}]
    records = [{"messages": turns, "n": n} for n in range(150)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    read = list(read_documents(str(tmp_path / "a.parquet")))
    assert len(read) == 150 and read[149].where.endswith("a.parquet, row 150")
    content = read[0].content
    assert isinstance(content, Conversation) and content.messages == [
        {"role": "user", "content": WORDS},
        {**ANSWERED, "name": "x"},
    ]
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    with pytest.raises(PrepError, match="a.parquet is not a whole Parquet file"):
        _ids(tmp_path / "a.parquet", talking)


def test_a_directory_is_all_its_files_in_order_and_a_bad_one_is_named_with_its_line(
    plain, tmp_path
):
    (tmp_path / "b").mkdir()
    _lines(tmp_path / "b" / "z.jsonl", {"text": "third"}, {"text": "fourth"})
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "second"}'))
    (tmp_path / "README.md").write_text("no text of it")
    (tmp_path / ".hidden.jsonl").write_text("neither")
    (tmp_path / "dataset_info.json").write_text("{}")
    read = [document.content for document in read_documents(str(tmp_path))]
    assert read == ["first", "third", "fourth", "second"]
    (tmp_path / "b" / "z.jsonl").write_text('{"text": "third"}\n{"text": ')
    with pytest.raises(PrepError, match="b/z.jsonl, line 2 is not JSON"):
        _ids(tmp_path, plain)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("s.jsonl", b'{"text": "' + WORDS.encode() + b'"}\n{"text": "a\\ud800"}',
         "s.jsonl, line 2 has \\\\ud800 at character 1"),
        ("s.jsonl", json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode(),
         "s.jsonl, line 1 has \\\\ud800 at character"),
        ("u.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "line 2 is not UTF-8 at its byte 10"),
        ("r.jsonl", b'{"messages": [{"content": "no role"}]}', "line 1 has neither"),
        ("c.jsonl", b'{"messages": [{"role": "user", "content": 5}]}', "line 1 has neither"),
        ("m.jsonl", b'{"messages": []}', "line 1 has neither"),
        ("l.json", b'[{"text": "x"}, 5]', "l.json, record 2 has neither"),
        ("b.json", b'[{"text": "x"}', "b.json is not JSON"),
        ("e.jsonl", b"", "holds 0 tokens"),
        ("e.txt", b"", "holds 0 tokens"),
        ("e.json", b"", "is not JSON"),
        ("e.jsonl.gz", gzip.compress(b"", mtime=0), "holds 0 tokens"),
        ("p.parquet", b"", "is not a whole Parquet file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_sentence(talking, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrepError, match=said):
        _ids(tmp_path / name, talking)


def test_a_conversation_that_the_template_refuses_is_named(talking, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(talking.path, model)
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    _lines(tmp_path / "c.jsonl", {"text": WORDS}, {"messages": TURNS})
    with pytest.raises(PrepError, match="c.jsonl, line 2: .*roles must alternate"):
        _ids(tmp_path / "c.jsonl", open_checkpoint(model))


def test_what_unpacks_into_a_huge_file_does_not_fill_the_memory(plain, tmp_path):
    """256 MB without an end of line, in a file of 256 KB."""
    for name, head in (("bomb.jsonl.gz", b'{"text": "'), ("bomb.txt.gz", b"")):
        with gzip.open(tmp_path / name, "wb") as file:
            file.write(head)
            for _ in range(32):
                file.write(b"a" * (8 << 20))
    tracemalloc.start()
    with pytest.raises(PrepError, match="line 1 is longer than 64 MiB"):
        list(read_documents(str(tmp_path / "bomb.jsonl.gz")))
    pieces = [len(document.content) for document in read_documents(str(tmp_path / "bomb.txt.gz"))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(pieces) == 256 << 20 and max(pieces) <= PIECE
    assert peak < 3 * documents.LONGEST


def test_a_long_text_is_cut_at_ends_of_lines_and_loses_nothing(plain, tmp_path):
    text = "".join(f"line {n} of é\u2028 many\r\n" for n in range(150_000))
    (tmp_path / "long.txt").write_bytes(text.encode())
    pieces = [document.content for document in read_documents(str(tmp_path / "long.txt"))]
    assert len(pieces) > 2 and all(piece.endswith("\n") for piece in pieces)
    assert "".join(pieces) == text.replace("\r\n", "\n")
    (tmp_path / "long.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(PrepError, match=f"not UTF-8 at byte {len(text.encode())}"):
        list(read_documents(str(tmp_path / "long.txt")))


def test_so_many_of_a_data_set_are_streamed_and_shuffled(plain, tmp_path):
    """The last file is no Parquet: who reads on is told."""
    (tmp_path / "set").mkdir()
    texts = [f"{n} {WORDS}" for n in range(300)]
    for part in range(3):
        table = datasets.Dataset.from_dict({"text": texts[part * 100 : part * 100 + 100]})
        table.to_parquet(tmp_path / "set" / f"train-{part}.parquet")
    (tmp_path / "set" / "train-3.parquet").write_bytes(b"no parquet" * 100)
    source = f"{tmp_path}/set:150"
    streamed, chosen = _ids(source, plain, seed=5), texts[:150]
    np.random.default_rng(5).shuffle(chosen)
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain.path)
    assert streamed == [i for text in chosen for i in tokenizer(text)["input_ids"]][: 128 * 512]
    with pytest.raises(PrepError, match="set' cannot be loaded"):
        _ids(f"{tmp_path}/set:301", plain)
    with pytest.raises(PrepError, match="has the splits train, not 'test'"):
        _ids(f"{tmp_path}/set(test):5", plain)


def test_an_empty_source_is_not_the_directory_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("not meant")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrepError, match="calibration source is empty"):
        next(read_documents(""))


def test_a_pipe_with_the_name_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(PrepError, match="is no file"):
        next(read_documents(str(tmp_path / "pipe.jsonl")))
