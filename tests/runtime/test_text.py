import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from smoe.artifacts import open_bundle
from smoe.artifacts.manifest import File
from smoe.runtime import EngineError
from smoe.runtime.text import Stream, Text


def _files(path):
    """A manifest's files, as if it listed all that is there."""
    return {file.name: File(0, "") for file in path.iterdir()}


HARD = "Köln 日本語 🙂👩‍👩‍👧 ß — end"


@pytest.fixture(scope="module")
def text(golden):
    return Text(golden, open_bundle(golden).manifest.files)


@pytest.mark.parametrize("sample", [HARD, "def main(argument):\n    return 1\n", "ü" * 9])
def test_a_stream_never_splits_a_character(text, sample):
    stream = Stream(text, ())
    pieces = [stream.push(i) for i in text.encode(sample)] + [stream.finish()]
    assert "".join(pieces) == sample
    assert not any("\ufffd" in piece for piece in pieces)
    if sample == HARD:
        assert sum(map(bool, pieces)) > 5, "it should not all come at the end"


WORDS = ["▁the", "é", "▁", "日", "x"]


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A tokenizer as Llama and Mixtral have it: what is not in the vocabulary is spelled in byte
    tokens 0 to 255."""
    path = tmp_path_factory.mktemp("bytewise")
    vocabulary = [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[], byte_fallback=True))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return Text(path, _files(path))


def _streamed(text, ids):
    stream = Stream(text, ())
    return "".join(stream.push(i) for i in ids) + stream.finish()


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 300), max_size=60))
def test_a_stream_is_the_text_of_all_ids_at_once_with_byte_fallback(bytewise, ids):
    assert _streamed(bytewise, ids) == bytewise.tokenizer.decode(ids)


@given(sample=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_characters_spelled_in_bytes_are_shown_when_their_run_ends(bytewise, sample):
    stream = Stream(bytewise, ())
    ids = [261, *sample.encode(), 261, 260]  # a special token has no text, and ends no run
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    # A leading space is stripped by the decoder.
    assert "".join(pieces) == bytewise.tokenizer.decode(ids) == sample.removeprefix(" ") + "x"
    assert pieces[-2].endswith("x") and not pieces[-1]


@pytest.mark.parametrize("ids, shown", [
    ([0xE2, 0x82, 0xAC, 0xE2, 260], "\ufffd" * 4 + "x"),  # broken bytes are held back, none shown
    ([0x80] * 40 + [260], "\ufffd" * 40 + "x"),
    ([260, *[261] * 50, 256], "x the"),
    ([258, 258, 260], " x"),
    ([260, 0xE2, 0x82], "x\ufffd\ufffd"),
])  # fmt: skip
def test_broken_bytes_and_spaces_in_a_stream(bytewise, ids, shown):
    assert _streamed(bytewise, ids) == bytewise.tokenizer.decode(ids) == shown


@settings(deadline=None)
@given(
    sample=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    stop=st.text("ab ü", min_size=1, max_size=3),
)
def test_text_ends_before_a_stop_string_and_nothing_is_lost(golden, sample, stop):
    text = Text(golden, open_bundle(golden).manifest.files)
    stream = Stream(text, (stop,))
    shown = "".join(stream.push(i) for i in text.encode(sample)) + stream.finish()
    whole = text.tokenizer.decode(text.encode(sample))
    assert shown == whole.split(stop)[0]
    assert stream.stopped == (stop in whole)


def test_what_may_begin_a_stop_string_is_held_back(text):
    stream = Stream(text, ("##end",))
    pieces = [stream.push(i) for i in text.encode("a##e##en##end b")]
    assert "".join(pieces) == "a##e##en" and stream.stopped
    stream = Stream(text, ("##end",))
    pieces = [stream.push(i) for i in text.encode("a##en")]
    assert "".join(pieces) == "a" and stream.finish() == "##en"


def test_an_empty_stop_string_is_refused(text):
    with pytest.raises(EngineError, match="stop string is empty"):
        Stream(text, ("",))


def test_without_a_tokenizer_text_is_an_error_and_ids_are_not(tmp_path):
    text = Text(tmp_path, _files(tmp_path))
    with pytest.raises(EngineError, match="no tokenizer; give token ids"):
        text.encode("hello")
    assert Stream(text, ()).push(3) == ""
    with pytest.raises(EngineError, match="no tokenizer"):
        Stream(text, ("x",))


def test_a_damaged_tokenizer_is_a_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError, match="is not a tokenizer"):
        Text(tmp_path, _files(tmp_path))


def test_a_conversation_is_rendered_by_the_template(text):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "?"},
    ]
    wanted = "<user>hi</user>\n<assistant>yo</assistant>\n<user>?</user>\n<assistant>"
    assert text.chat(messages) == text.encode(wanted)


def test_a_template_can_be_a_file_or_one_of_several(text, tmp_path, golden):
    (tmp_path / "tokenizer.json").write_bytes((golden / "tokenizer.json").read_bytes())
    named = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    message = [{"role": "user", "content": "hello"}]
    assert Text(tmp_path, _files(tmp_path)).chat(message) == text.encode("hello")
    (tmp_path / "chat_template.jinja").write_text(
        "{{ eos_token }}{{ messages[0].content | tojson }}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert Text(tmp_path, _files(tmp_path)).chat(message) == text.encode('<end>"hello"')


def test_tools_documents_and_variables_reach_the_template(text, tmp_path, golden):
    (tmp_path / "tokenizer.json").write_bytes((golden / "tokenizer.json").read_bytes())
    named = [
        {"name": "default", "template": "{{ messages[0].content }}{{ mood }}"},
        {"name": "tool_use", "template": "{{ tools[0].name }}{{ documents[0].text }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    opened, messages = Text(tmp_path, _files(tmp_path)), [{"role": "user", "content": "hello"}]
    tools, documents = [{"name": "tool"}], [{"text": "paper"}]
    assert opened.chat(messages, mood="calm") == text.encode("hellocalm")
    assert opened.chat(messages, tools=tools, documents=documents) == text.encode("toolpaper")
    assert opened.chat(messages, "default", tools=tools) == text.encode("hello")


@pytest.mark.parametrize("template", [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception('roles must alternate') }}",
    "{% for x in range(999999999) %}{% endfor %}",
    "{{ messages | nofilter }}",
    "{% if %}",
    "{% for a in 'x' %}" * 25 + "{% endfor %}" * 25,
    "{{ 'x' * 10 ** 12 }}",
])  # fmt: skip
def test_a_template_cannot_reach_python_and_its_errors_are_sentences(text, template):
    with pytest.raises(EngineError, match="chat template cannot render"):
        text.chat([{"role": "user", "content": "x"}], template)


def test_files_that_the_manifest_does_not_list_are_not_used(golden, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((golden / "tokenizer.json").read_bytes())
    files = _files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("planted")
    assert Text(tmp_path, {}).tokenizer is None
    with pytest.raises(EngineError, match="no chat template"):
        Text(tmp_path, files).chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name, content, said", [
    ("chat_template.jinja", b"\xff", "not UTF-8 at byte 0"),
    ("tokenizer_config.json", b"[" * 100_000, "not JSON"),
    ("tokenizer_config.json", b'{"chat_template": ["x"]}', "no chat template"),
])  # fmt: skip
def test_damaged_settings_are_a_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EngineError, match=said):
        Text(tmp_path, _files(tmp_path)).chat([{"role": "user", "content": "x"}])


def test_no_template_says_what_to_do(tmp_path):
    with pytest.raises(EngineError, match="no chat template.*smoe run"):
        Text(tmp_path, _files(tmp_path)).chat([{"role": "user", "content": "x"}])
