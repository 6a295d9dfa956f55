"""Text that a model writes itself: every token is the one that its draw decides, whoever computes
the probabilities; an interrupted build goes on; and a build needs no other text."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from smoe.artifacts import open_bundle, safetensors_file
from smoe.prep.backbone.positions import reach
from smoe.prep.build import build
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration, Origin
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.pack.pack import unpacked
from smoe.prep.progress import Progress
from smoe.prep.statistics.profile import Statistics
from smoe.prep.written import Shape, draws, vocabulary, write
from smoe.runtime import Engine

QUIET = Progress(True)
ROUNDING = 1e-4  # of probabilities: what two orders of the same float32 arithmetic may differ by


def written(path, folder, texts=2, seed=0):
    """So many texts, int64 `[texts, length]`."""
    checkpoint = open_checkpoint(path)
    length = min(512, reach(checkpoint.config).tokens)
    origin = Origin("", seed, 512, own=texts * length)
    ids = write(checkpoint, folder, origin, unpacked(checkpoint, "f32"), None, "cpu", QUIET)
    return ids.reshape(texts, length)


@pytest.mark.parametrize("family", ["olmoe", "jamba", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_every_token_is_what_its_draw_decides(checkpoints, tmp_path, family):
    """By `transformers`' own model, all experts and the whole text at once."""
    ids = written(checkpoints(family), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family), dtype="float32").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.double()
    likely = torch.nn.functional.pad(logits.softmax(-1).cumsum(-1), (1, 0)).numpy()
    ends = open_checkpoint(checkpoints(family)).end_ids
    for row, text in enumerate(ids):
        drawn = draws(0, row, len(text))
        for at in range(1, len(text)):
            if text[at - 1] not in ends:
                low, high = likely[row, at - 1, text[at] : text[at] + 2]
                assert low - ROUNDING <= drawn[at] <= high + ROUNDING, (row, at)


def test_a_text_begins_anywhere_and_so_does_what_follows_its_end(checkpoints, tmp_path):
    """The first token, and one after a token that ends a text (2), is drawn from all but 2."""
    path = checkpoints("olmoe")
    begins = np.delete(np.arange(211), 2)
    ids = written(path, tmp_path, 40)
    assert (ids == 2).any()
    for row, text in enumerate(ids):
        drawn = draws(0, row, len(text))
        fresh = [0, *(np.flatnonzero(text[:-1] == 2) + 1)]
        assert (text[fresh] == begins[(drawn[fresh] * 210).astype(int)]).all()
    assert len(np.unique(ids[:, 0])) > 25


def test_no_text_holds_a_token_that_the_tokenizer_does_not_have(make, tmp_path):
    """A vocabulary is padded to a round size, and special tokens begin no text."""
    model = make("olmoe")
    model.save_pretrained(tmp_path / "m")
    words = {f"w{i}": i for i in range(180)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    tokenizer.add_special_tokens(["w3", "<mask>"])  # <mask> is 180
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    there, begins = vocabulary(open_checkpoint(tmp_path / "m"))
    assert there[:181].all() and not there[190:].any()  # `transformers` adds a few of its own
    assert np.flatnonzero(there & ~begins)[:3].tolist() == [2, 3, 180] and not begins[180:].any()
    ids = written(tmp_path / "m", tmp_path / "w", 8)
    assert ids.max() < 190 and begins[ids[:, 0]].all()


def test_a_model_that_ends_every_text_at_once_fills_rows_all_the_same(make, tmp_path):
    model = make("olmoe")
    model.config.eos_token_id = model.generation_config.eos_token_id = list(range(211))
    model.save_pretrained(tmp_path / "m")
    ids = written(tmp_path / "m", tmp_path / "w", 1)[0]
    assert (ids == (draws(0, 0, len(ids)) * 211).astype(int)).all()


def test_logits_that_are_no_numbers_are_refused(make, tmp_path):
    model = make("olmoe")
    model.lm_head.weight.data.mul_(1e38)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(PrepError, match="logits that are not finite when it writes text"):
        written(tmp_path / "m", tmp_path / "w", 1)


@pytest.mark.parametrize(
    "tokens, state, longest, shape",
    [
        (49152, 6144, 2048, Shape(96, 512, 64)),  # the example model
        (49152, 262144, 4096, Shape(384, 128, 32)),  # OLMoE: short texts rather than few at once
        (49152, 196608, 40960, Shape(290, 170, 32)),  # Qwen3-30B-A3B
        (49152, 1 << 22, 4096, Shape(384, 128, 2)),
        (49152, 1 << 40, 4096, Shape(384, 128, 1)),
        (49152, 0, 256, Shape(192, 256, 64)),  # all state of a fixed size
        (100, 6144, 2048, Shape(1, 100, 1)),
    ],
)
def test_how_texts_are_written_follows_from_the_model(tokens, state, longest, shape):
    assert Shape.of(tokens, state, longest) == shape


@pytest.fixture(scope="module")
def short(make, tmp_path_factory):
    """A model of short contexts, so that few tokens are several lots of texts."""
    path = tmp_path_factory.mktemp("short") / "m"
    make("olmoe", max_position_embeddings=32).save_pretrained(path)
    return path


def files(bundle):
    return {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def test_killed_while_it_writes_a_build_goes_on_and_gives_the_same_bytes(exports, short, tmp_path):
    """3,000 tokens are 94 texts, 64 and 30 at once."""
    recipe = Recipe("nested:2+1+1:32", prices=0, self_tokens=3000)
    exports.build(short, tmp_path / "whole", None, recipe)
    command = [sys.executable, "-m", "smoe.prep", "build", str(short), "-o", str(tmp_path / "b")]
    command += ["--encoding", recipe.encoding, "--prices", "0", "--self", "3000"]
    for sign in ("rounded/experts/*.safetensors", "written/00000.safetensors", "lost/00.json"):
        with open(tmp_path / "said", "ab") as said:
            process = subprocess.Popen(command, stderr=said, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "b.partial/finished").glob(sign)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "b").exists(), sign
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(32 of an earlier run kept)" in (tmp_path / "said").read_text()
    assert files(tmp_path / "b") == files(tmp_path / "whole")
    lost = json.loads(open_bundle(tmp_path / "b").manifest.provenance["output_lost_by_level"])
    assert set(lost) == {"gate+up", "down"}
    assert all(0.5 > one > two > three > 0 for one, two, three in lost.values())


def test_the_seed_decides_the_text(short, tmp_path):
    same = [written(short, tmp_path / str(i), 3, seed=5) for i in range(2)]
    assert (same[0] == same[1]).all() and (same[0] != written(short, tmp_path / "o", 3)).any()
    assert (written(short, tmp_path / "fewer", 2, seed=5)[0] == same[0][0]).all()


def test_a_bundle_comes_from_nothing_but_a_model_and_runs(smoe_prep, checkpoints, tmp_path):
    options = "-o", tmp_path / "b", "--self", 600, "--seed", 3
    done = smoe_prep("build", checkpoints("olmoe"), *options)
    assert done.returncode == 0, done.stderr
    assert "the model writes 600 tokens itself, 3 texts of 256 at once" in done.stderr
    provenance = open_bundle(tmp_path / "b", hashes=True).manifest.provenance
    assert provenance["calibration"] == "text written by the model"
    assert provenance["calibration_tokens"] == provenance["calibration_own_tokens"] == "600"
    assert provenance["calibration_seed"] == "3"
    assert provenance["calibration_written_with"] == "bf16"
    profile = json.loads((tmp_path / "b" / "study" / "profile.json").read_text())
    assert profile["calibration"]["source"] == "text written by the model"
    assert profile["calibration"]["own_tokens"] == profile["calibration"]["tokens"] == 600
    assert "price_fit" in open_bundle(tmp_path / "b").tables.layers()[0]
    with Engine.open(tmp_path / "b", memory="2GiB") as engine:
        assert len(list(engine.generate([1, 2, 3], 4))) == 4


def test_own_text_comes_after_what_was_given(exports, short, ids_file, tmp_path):
    text = Calibration(str(ids_file), seed=3)
    exports.build(short, tmp_path / "b", text, Recipe("f32", self_tokens=400, prices=0))
    trace = open_bundle(tmp_path / "b").study("trace.safetensors")
    tokens = safetensors_file.load(trace)["tokens"]
    given = np.concatenate(text.rows(open_checkpoint(short)))
    own = written(short, tmp_path / "w", 13, seed=3).reshape(-1)[:400]
    assert (tokens == np.concatenate([given, own])).all()
    provenance = open_bundle(tmp_path / "b").manifest.provenance
    assert provenance["calibration"] == "ids.jsonl and text written by the model"
    assert provenance["calibration_tokens"] == str(len(given) + 400)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--self", -1], "--self is -1; 128 to 16777216 tokens are wanted"),
        (["--self", 127], "--self is 127; 128 to"),
        (["--self", 1 << 40], "to 16777216 tokens are wanted"),
        (["--self", 0], "no text to learn from"),
        (["--seed", -1], "--seed is -1; 0 and more"),
        (["--self", 500, "--profile", "p"], "--profile that there is a profile already"),
        (["--tokens", 500], "--self N says how much the model writes itself"),
        (["--self", 0, "--encoding", "nested:2+1+1:32"], "no text to learn from"),
        (["--profile", "p", "--encoding", "nested:2+1+1:32"], "give --calibration FILE, or"),
    ],
)
def test_what_cannot_be_is_refused(smoe_prep, short, tmp_path, options, said):
    done = smoe_prep("build", short, "-o", tmp_path / "b", *options)
    assert done.returncode and said in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.partial").exists()


@pytest.mark.parametrize(
    "recipe, calibration, profiled, tokens",
    [
        (Recipe(), False, False, 49152),
        (Recipe("nested:2+1+1"), False, False, 49152),
        (Recipe("nested:2+1+1"), True, False, 49152),
        (Recipe("nested:2+1+1", quantiser="nearest"), True, False, 0),
        (Recipe("f32"), True, False, 0),
        (Recipe("f32"), False, True, 0),
        (Recipe("nested:2+1+1"), True, True, 0),
        (Recipe("f32", self_tokens=77), True, False, 77),
    ],
)
def test_how_much_a_model_writes_if_nobody_says(recipe, calibration, profiled, tokens):
    encoding = "bf16" if recipe.encoding == "stored" else recipe.encoding
    assert recipe.resolved(encoding, calibration, profiled).self_tokens == tokens


def test_experts_that_the_text_hardly_reached_are_named(exports, short, tmp_path, capsys):
    recipe = Recipe("f32", self_tokens=160, prices=0)
    exports.begin(short, tmp_path / "b", recipe)
    build(short, tmp_path / "b", None, recipe)
    lines = capsys.readouterr().err.splitlines()
    line = next(line for line in lines if "got fewer than 128 tokens" in line)
    counts = open_bundle(tmp_path / "b").tables.column("counts")
    few = [int((layer < 128).sum()) for layer in counts]
    assert f"text: {sum(few)} of {sum(map(len, counts))} experts" in line
    assert all(f"{n} in layer {layer}" in line for layer, n in enumerate(few) if n)
    assert "--self N" in line


def test_of_many_layers_those_that_the_text_reached_least_are_named(checkpoints):
    statistics = Statistics(open_checkpoint(checkpoints("mixtral")), 1000, 0)
    statistics.sums = [replace(statistics.sums[0], counts=np.full(6, 128)) for _ in range(48)]
    assert statistics.hardly_reached() == ""
    for layer, sums in enumerate(statistics.sums):
        sums.counts[: layer % 5] = 127
    line = statistics.hardly_reached()
    assert "text: 93 of 288 experts got fewer than 128 tokens (4 in layer 4, 4 in layer 9" in line
    assert "4 in layer 29, 69 in others)" in line and line.count("in layer") == 6
