"""Text of any token ids, one after another, against decoding them at once: every kind of tokenizer
and decoder."""

import json
import time

import pytest
from click.testing import CliRunner
from support.vocabularies import SETTINGS, random_rows, tokenizer_json
from tokenizers import Regex, Tokenizer, decoders, models

from smoe.artifacts.manifest import File
from smoe.runtime import Engine
from smoe.runtime.cli import cli
from smoe.runtime.decoding import IncrementalDecoder, special_tokens
from smoe.runtime.text import StopWhen, Stream, Text

ROWS = 10_000  # over all kinds


def _streamed(tokenizer, ids, special):
    decoder = IncrementalDecoder(tokenizer, special)
    return "".join(map(decoder.push, ids)) + decoder.finish()


@pytest.mark.parametrize("name", SETTINGS)
def test_any_ids_stream_without_an_error_to_the_text_of_all_at_once(name):
    tokenizer = Tokenizer.from_str(tokenizer_json(name))
    for number, ids in enumerate(random_rows(name, -(-ROWS // len(SETTINGS)), seed=3)):
        special = bool(number % 2)
        wanted = tokenizer.decode(ids, skip_special_tokens=not special)
        assert _streamed(tokenizer, ids, special) == wanted, ids


WORDS = [
    "▁the",
    "▁▁",
    "▁",
    "##a",
    "##",
    " .",
    " n't",
    "'s",
    "a</w>",
    "</w>",
    "Ġa",
    " ",
    "日",
    "a▁b",
]
MARKED, SPELLED, JOINED = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
DECODERS = {
    "none": None,
    "three spaces": decoders.Sequence([MARKED, SPELLED, JOINED, decoders.Strip(" ", 3, 0)]),
    "each stripped": decoders.Strip(" ", 1, 0),
    "never a space": decoders.Metaspace(prepend_scheme="never"),
    "bytes and marks": decoders.Sequence([SPELLED, decoders.Metaspace(), JOINED]),
    "wordpiece": decoders.WordPiece("##", cleanup=False),
    "suffixes": decoders.BPEDecoder(),
    "bytes, stripped": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
    "nested": decoders.Sequence([decoders.Sequence([MARKED, SPELLED]), JOINED, JOINED]),
    # whose text is held to the end, since it may depend on what follows
    "repeats": decoders.CTC(),
    "of the whole": decoders.Sequence([JOINED, decoders.Replace(Regex("a+ "), "b")]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_any_decoder_streams_to_what_it_decodes_at_once(name):
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    tokenizer = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=[]))
    if DECODERS[name] is not None:
        tokenizer.decoder = DECODERS[name]
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["<think>", " y"])
    for number, ids in enumerate(random_rows("mistral", 400, seed=4)):
        ids = [i % (len(words) + 5) for i in ids]
        special = bool(number % 2)
        wanted = tokenizer.decode(ids, skip_special_tokens=not special)
        assert _streamed(tokenizer, ids, special) == wanted, ids


def _text(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(name), "utf-8")
    return Text(tmp_path, {"tokenizer.json": File(0, "")})


def test_a_long_text_costs_no_more_per_token_than_a_short_one(tmp_path):
    text = _text(tmp_path, "mistral")
    ids = text.encode("the quick brown fox 日本語 jumps " * 20)
    stream, started = Stream(text, ("no such text",)), time.perf_counter()
    shown = 0
    for token in ids * (40_000 // len(ids)):
        shown += len(stream.push(token))
    assert shown > 20_000 and time.perf_counter() - started < 5  # once quadratic: minutes


def _stopped(text, ids, *stops, special=False):
    stream = Stream(text, stops, special)
    return "".join(map(stream.push, ids)) + stream.finish(), stream.stopped


def test_stop_strings_match_the_text_of_special_tokens(tmp_path):
    text = _text(tmp_path, "gpt-oss")
    written = "<|channel|>analysis<|message|>think 日<|end|><|start|>assistant<|message|>Hi"
    ids = text.encode(written, special=False)
    assert _stopped(text, ids, "<|end|>") == ("analysisthink 日", True)
    assert _stopped(text, ids, "日<|end|>") == ("analysisthink ", True)
    assert _stopped(text, ids, "sis<|message|>th") == ("analy", True)
    assert _stopped(text, ids, "nothing", "<|message|>") == ("analysis", True)
    assert _stopped(text, ids, "<|none|>") == ("analysisthink 日assistantHi", False)
    assert _stopped(text, ids, "<|none|>", special=True) == (written, False)
    assert _stopped(text, ids, "<|end|>", special=True) == (written.split("<|end|>")[0], True)


def test_a_stop_at_a_special_token_shows_the_bytes_before_it(tmp_path):
    text = _text(tmp_path, "mistral")
    # Byte by byte: which words the vocabulary learned differs from training to training.
    spelled = [text.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🙂𝔘".encode()]
    ids = [*text.encode("x", special=False), *spelled]
    shown = text.decode(ids)
    assert "🙂𝔘" in shown
    assert _stopped(text, [1, *ids, 2, *ids], "</s>") == (shown, True)
    assert _stopped(text, [1, *ids, 2, *ids], "𝔘</s>") == (shown[:-1], True)


def test_a_stop_counts_a_space_that_is_not_shown(tmp_path):
    text = _text(tmp_path, "llama2")
    ids = text.encode("the quick")  # <s>, and a space in front that is stripped
    for stop in ("e q", "quick", "he", "t"):
        assert _stopped(text, ids, stop) == ("the quick".split(stop)[0], True)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_stop_string_loses_or_repeats_anything(name, tmp_path):
    text = _text(tmp_path, name)
    for ids in random_rows(name, 60, seed=5):
        whole = text.tokenizer.decode(ids, skip_special_tokens=False)
        shown = text.tokenizer.decode(ids)
        assert _stopped(text, ids, "no such text", "<|x") == (shown, False)
        for stop in (whole[len(whole) // 2 :][:2], whole[-1:]):
            if stop:
                before, stopped = _stopped(text, ids, stop)
                # A special token may come amid a character's bytes, and text end there.
                assert stopped and shown.startswith(before.rstrip("\ufffd"))
                if shown == whole:
                    assert before == whole.split(stop)[0]
                assert _stopped(text, ids, stop, special=True)[0] == whole.split(stop)[0]


def test_a_generation_shows_special_tokens_where_asked_and_stops_at_them(golden):
    with Engine.open(golden) as engine:
        asked = {"max_new_tokens": 90, "temperature": 50.0, "seed": 24}
        never = StopWhen(ids=())
        tokens = list(engine.generate("a", stop=never, special=True, **asked))
        ids = [token.id for token in tokens]
        decode = engine.text.tokenizer.decode
        whole, shown = decode(ids, skip_special_tokens=False), decode(ids)
        assert "".join(token.text for token in tokens) == whole != shown
        assert "".join(t.text for t in engine.generate("a", stop=never, **asked)) == shown
        (end,) = special_tokens(engine.text.tokenizer)
        first = ids.index(engine.text.tokenizer.token_to_id(end)) + 1
        stopped = list(engine.generate("a", stop=StopWhen((end,), ids=()), **asked))
        assert engine.stats.finish == "stop" and [t.id for t in stopped] == ids[:first]


def test_commands_take_special_and_stop_at_special_tokens(golden):
    options = ["--temperature", "50", "--seed", "24", "--max-new-tokens", "90"]
    run = ["run", str(golden), "a", "--json", *options]
    made = [CliRunner().invoke(cli, [*run, *more]).stdout for more in ([], ["--special"])]
    made = [lines.splitlines()[-1] for lines in made]  # click 8.1 has stderr before it
    shown, whole = (json.loads(line)["text"] for line in made)
    assert whole.startswith(shown) and len(whole) > len(shown)
    talk = CliRunner().invoke(cli, ["chat", str(golden), *options, "--special"], input="a\nb\n\n")
    assert talk.exit_code == 0, talk.output
