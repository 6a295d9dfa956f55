"""A bundle's tokenizer.json against what AutoTokenizer makes of the checkpoint."""

import collections
import json

import numpy as np
import pytest
from support.vocabularies import CONTROLS, SETTINGS, write_text_side
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from smoe.artifacts.manifest import File
from smoe.artifacts.validate import sha256
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.checkpoint.tokenizer import battery, bundle_text, open_tokenizer
from smoe.prep.errors import PrepError
from smoe.runtime.cli import cli as smoe
from smoe.runtime.text import Text


def _auto(path):
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _bundled(path, out):
    """The text side that a bundle of the checkpoint at `path` has."""
    out.mkdir()
    for name, content in bundle_text(path, open_tokenizer(path)).items():
        (out / name).write_bytes(content)
    return Text(out, {f.name: File(f.stat().st_size, sha256(f)) for f in out.iterdir()})


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """family -> AutoTokenizer, and the bundle's text."""
    made = {}

    def get(name):
        if name not in made:
            root = tmp_path_factory.mktemp("side")
            path = write_text_side(root / "model", name)
            made[name] = _auto(path), _bundled(path, root / "bundle")
        return made[name]

    return get


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_and_streamed_text_are_those_of_autotokenizer(sides, name):
    auto, text = sides(name)
    texts = battery(auto.added_tokens_encoder)
    assert len(texts) >= 300
    for sample in texts:
        for special in (True, False):
            ids = auto(sample, add_special_tokens=special)["input_ids"]
            assert text.encode(sample, special) == ids, sample
            assert text.decode(ids) == auto.decode(ids, skip_special_tokens=True)
            assert text.decode(ids, special=True) == auto.decode(ids, skip_special_tokens=False)


HARMLESS = [{"role": "user", "content": " héllo\n\n  wörld "}]


def test_the_scores_of_a_unigram_are_read_as_they_were_written(tmp_path):
    letters, chance = [chr(97 + n) for n in range(26)], np.random.default_rng(0)
    pieces = ["<pad>", "</s>", "<unk>", *letters, *(a + b for a in letters for b in letters)]
    scores = chance.uniform(-16, -2, len(pieces)).tolist()
    model = {"type": "Unigram", "unk_id": 2, "vocab": list(zip(pieces, scores, strict=True))}
    write_text_side(tmp_path / "model", "t5")  # whose class takes the scores from JSON in Python
    written = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    (tmp_path / "model" / "tokenizer.json").write_text(written)
    opened, out = open_tokenizer(tmp_path / "model"), tmp_path / "bundle"
    text = _bundled(tmp_path / "model", out)
    read = [
        np.array([score for _, score in json.loads(backend.to_str())["model"]["vocab"]])
        for backend in (opened.backend_tokenizer, text.tokenizer)
    ]
    # Of few there is no decimal that is read so; one step of the last digit is then missing.
    assert np.mean(read[0] != read[1]) < 0.005 and np.allclose(*read, rtol=3e-16, atol=0)
    again = Tokenizer.from_str(opened.backend_tokenizer.to_str()).to_str()
    careless = np.array([score for _, score in json.loads(again)["model"]["vocab"]])
    assert np.mean(read[0] != careless) > 0.02, "or it need not be done"


SPELLED = ("a{0}b", "{0}", " {0} x", "a\n{0}\n b", "{0}{0}日本", "x{0}{1}obey{0}")


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_user_spells_is_no_control_token_and_the_templates_own_are(sides, name):
    auto, text = sides(name)
    ids = auto.apply_chat_template(HARMLESS, add_generation_prompt=True)["input_ids"]
    assert text.chat(HARMLESS) == ids, "nothing is spelled: as ever"
    unknown = text.tokenizer.token_to_id("[UNK]" if name == "wordpiece" else "<unk>")

    def special(ids):
        return collections.Counter(i for i in ids if i in auto.all_special_ids and i != unknown)

    own = special(text.chat([{"role": "user", "content": ""}]))
    controls = CONTROLS.get(name, ["[SEP]", "[CLS]"])
    pairs = zip(controls, controls[::-1], strict=True)
    for content in (shape.format(*pair) for pair in pairs for shape in SPELLED):
        messages = [{"role": "user", "content": content}]
        made = text.chat(messages)
        assert special(made) == own
        if name in ("llama3", "deepseek", "gpt-oss", "tekken", "gemma"):  # nothing is normalised
            assert content in text.decode(made, special=True)
        try:
            wanted = auto.apply_chat_template(
                messages, add_generation_prompt=True, sanitize_control_tokens=True
            )["input_ids"]
        except ValueError:  # it has no other spelling there; in two parts there is one
            continue
        assert made == wanted, content


MARK = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False}
MARK |= {"normalized": False, "single_word": False}
STRIPPING = MARK | {"content": "<mask>", "lstrip": True, "rstrip": True, "special": False}
CHANGES = {
    "added_tokens_decoder": {"added_tokens_decoder": {"4000": MARK, "4001": STRIPPING}},
    "additional_special_tokens": {"additional_special_tokens": ["<|extra|>", "quick"]},
    "extra_special_tokens": {"extra_special_tokens": {"image_token": "<|image|>"}},
    "add_bos_token": {"add_bos_token": False, "add_eos_token": True, "eos_token": "</s>"},
    "bos_token": {"bos_token": "<|novel|>", "pad_token": "<|pad|>"},
    "add_prefix_space": {"add_prefix_space": False},
    "clean_up": {"clean_up_tokenization_spaces": True, "model_max_length": 8},
}


@pytest.mark.parametrize("name", ["qwen", "llama3", "mistral", "llama2", "deepseek", "t5"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_tokenizer_config_adds_is_in_the_bundles_tokenizer(tmp_path, name, change):
    path = write_text_side(tmp_path / "model", name, **CHANGES[change])
    auto, text = _auto(path), _bundled(path, tmp_path / "bundle")
    for sample in battery(["<|new|>", " <mask>\n", "<|extra|>", "quick", "<|image|>", "<|novel|>"]):
        for special in (True, False):
            ids = auto(sample, add_special_tokens=special)["input_ids"]
            assert text.encode(sample, special) == ids
            assert text.decode(ids) == text.tokenizer.decode(ids)


def test_special_tokens_that_are_split_are_refused_with_the_way_out(tmp_path):
    path = write_text_side(tmp_path / "model", "qwen", split_special_tokens=True)
    with pytest.raises(PrepError, match="AutoTokenizer gives .* set split_special_tokens to false"):
        bundle_text(path, open_tokenizer(path))


def test_special_tokens_of_an_older_file_reach_the_template(tmp_path):
    path = write_text_side(tmp_path / "model", "mistral")
    legacy = {"bos_token": {"content": "<s>"} | dict.fromkeys(("lstrip", "rstrip"), False)}
    (path / "special_tokens_map.json").write_text(json.dumps(legacy | {"eos_token": "</s>"}))
    text = _bundled(path, tmp_path / "bundle")
    assert text.chat(HARMLESS)[0] == text.tokenizer.token_to_id("<s>")


def test_several_templates_are_in_the_bundle_whatever_files_they_were_in(tmp_path):
    path = write_text_side(tmp_path / "model", "qwen")
    (path / "chat_template.jinja").write_text("default {{ messages[0].content }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    text = _bundled(path, tmp_path / "bundle")
    assert text.decode(text.chat(HARMLESS)).startswith("default ")


TRAINING = {
    "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<|endoftext|>",
    },
}  # fmt: skip


def _trained(source, out, dropout=None):
    """A copy of the checkpoint `source` whose tokenizer.json has settings of training in it."""
    out.mkdir()
    for file in source.iterdir():
        (out / file.name).symlink_to(file)
    settings = json.loads((source / "tokenizer.json").read_text("utf-8")) | TRAINING
    settings["model"]["dropout"] = dropout
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").write_text(json.dumps(settings), "utf-8")
    return out


def test_texts_are_neither_cut_nor_filled_as_in_training_in_a_bundle_and_in_calibration(
    root, tmp_path
):
    source = root / "examples" / "reference"
    path = _trained(source, tmp_path / "trained", dropout=0.5)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    text = Calibration(str(tmp_path / "text.txt"))
    rows = [np.concatenate(text.rows(open_checkpoint(model))) for model in (source, path)]
    assert len(rows[0]) > 300 and np.array_equal(*rows)
    bundled = _bundled(path, tmp_path / "bundle")
    for sample in ("short", "long " * 100):
        assert bundled.encode(sample) == _auto(source)(sample)["input_ids"]


def _ends(make, path, config=None, generation=None, tokenizer=None):
    """The end tokens of a small model that names them in these places."""
    make("qwen3_moe", eos_token_id=config).save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        written = json.dumps({"eos_token_id": generation})
        (path / "generation_config.json").write_text(written)
    if tokenizer is not None:
        model = {"type": "WordLevel", "vocab": {"a": 5, tokenizer: 9}, "unk_token": "a"}
        written = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
        (path / "tokenizer.json").write_text(written)
        settings = {"eos_token": tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_checkpoint(path).end_ids


@pytest.mark.parametrize("places, ends", [
    ({"config": 3}, (3,)),
    ({"generation": [4, 7]}, (4, 7)),
    ({"tokenizer": "</s>"}, (9,)),
    ({"config": [3, 4], "generation": [4, 7], "tokenizer": "</s>"}, (4, 7, 3, 9)),
    ({}, ()),
])  # fmt: skip
def test_the_end_of_a_text_is_what_any_of_its_places_says(make, tmp_path, places, ends):
    assert _ends(make, tmp_path, **places) == ends


def test_what_only_a_config_class_knows_ends_nothing_where_a_file_says_it(make, tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 4}')
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).end_ids == (4,)
    (tmp_path / "generation_config.json").unlink()
    assert open_checkpoint(tmp_path).end_ids == (2,), "as transformers' generate has it"


def test_a_model_without_an_end_is_said_at_build_and_by_info(
    smoe_prep, make, tmp_path, ids_file, capsys
):
    assert _ends(make, tmp_path / "m") == ()
    out = tmp_path / "b"
    built = smoe_prep("build", tmp_path / "m", "-o", out, "--calibration", ids_file)
    assert built.returncode == 0 and "generation will run to its limit" in built.stderr
    with pytest.raises(SystemExit):
        smoe(["info", str(out)])
    assert "none: a generation runs to its limit" in capsys.readouterr().out


CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"


def test_code_in_a_checkpoint_is_neither_run_nor_asked_about(
    smoe_prep, make, tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    path = tmp_path / "model"
    make("mixtral").save_pretrained(path)
    for name in ("configuration_novel", "tokenization_novel", "modeling_novel"):
        (path / f"{name}.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    auto = {"AutoConfig": "configuration_novel.C", "AutoModelForCausalLM": "modeling_novel.M"}
    (path / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    assert open_checkpoint(path).layers, "a family that transformers has needs no code"
    (path / "config.json").write_text(
        json.dumps(config | {"auto_map": auto, "model_type": "novel"})
    )
    for command in (("inspect", path), ("build", path, "-o", tmp_path / "b", "--calibration", "x")):
        done = smoe_prep(*command)
        assert done.returncode == 1 and "runs no code out of a checkpoint" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("ran"))


def test_a_tokenizer_of_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    (tmp_path / "tokenization_novel.py").write_text(CODE)
    (tmp_path / "novel.tiktoken").write_text("IQ== 0\n")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_novel.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(PrepError, match="smoe runs no code out of a checkpoint"):
        open_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content, said", [
    ("{", "not even JSON: download it again"),
    ('{"version": "1.0", "added_tokens": [], "model": {"type": "Novel"}}', "pip install --upgrade"),
])  # fmt: skip
def test_a_tokenizer_that_is_damaged_is_told_from_one_that_is_newer(tmp_path, content, said):
    write_text_side(tmp_path, "qwen")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(PrepError, match=said):
        open_tokenizer(tmp_path)


def test_a_tokenizer_model_alone_is_converted_or_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    (tmp_path / "tokenizer.model").write_bytes(b"no such thing")
    with pytest.raises(PrepError, match=r"no tokenizer\.json. `pip install .*save_pretrained"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_moe"}))
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(PrepError, match="does not read the vocabulary that is there"):
        open_tokenizer(tmp_path)


def test_settings_of_a_tokenizer_that_are_no_settings_are_a_sentence(tmp_path):
    write_text_side(tmp_path, "qwen")
    for damaged in ("[]", '{"added_tokens_decoder": 5}', "{"):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(PrepError, match="is damaged: download it again"):
            open_tokenizer(tmp_path)
