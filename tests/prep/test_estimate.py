"""What inspect says before anything is read, against what is there in the end; and the pages that
quote it."""

import dataclasses
import json
import re

import pytest
from safetensors.torch import load_file, save_file

from smoe.artifacts import open_bundle
from smoe.prep.build import build
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.errors import PrepError
from smoe.prep.estimate import short_of_memory
from smoe.prep.inspect import families, inspect
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress


@pytest.mark.parametrize(
    "family, layers",
    [("mixtral", 2), ("gpt_oss", 2), ("deepseek_v3", 2), ("nemotron_h", 1), ("gemma4_text", 2)],
)
def test_counts_are_those_of_the_model(make, checkpoints, family, layers):
    model, about = make(family), inspect(checkpoints(family))
    experts = sum(
        p.numel() for n, p in model.named_parameters() if ".experts." in n and "shared" not in n
    )
    assert (about.family, about.architecture) == (family, type(model).__name__)
    assert (about.layers, about.experts, about.top_k, about.hidden) == (layers, 6, 3, 64)
    assert (
        about.parameters == sum(p.numel() for p in model.parameters())
        and about.expert_parameters == experts
    )
    assert about.active_parameters == about.parameters - experts + experts // 2
    assert about.refusal == about.weights == "" and about.download > 0


def test_it_needs_a_config_and_no_more(checkpoints, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoints("mixtral") / "config.json").read_bytes())
    about = inspect(tmp_path)
    assert "no .safetensors files" in about.weights and about.download is None
    ours, theirs = dataclasses.asdict(about), dataclasses.asdict(inspect(checkpoints("mixtral")))
    assert {name for name in ours if ours[name] != theirs[name]} <= {
        "weights",
        "download",
        "seconds",
        "stage_seconds",
    }


def test_weights_that_are_missing_are_said(checkpoints, tmp_path):
    weights = load_file(checkpoints("mixtral") / "model.safetensors")
    for name in [name for name in weights if ".layers.1." in name and "experts" in name]:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((checkpoints("mixtral") / "config.json").read_bytes())
    assert "2 are missing, model.layers.1.mlp.experts.down_proj first" in inspect(tmp_path).weights


def test_sizes_are_about_those_of_the_bundle(root, reference_bundle):
    about = inspect(root / "examples" / "reference", "f32", tokens=2048)
    files = open_bundle(reference_bundle).manifest.files
    assert about.bundle - (32 << 20) == pytest.approx(
        sum(file.size for file in files.values()), rel=0.05
    )


def test_more_tokens_take_more_and_smaller_encodings_less(checkpoints):
    source = checkpoints("mixtral")
    assert (
        inspect(source, "f32").bundle
        > inspect(source, "bf16").bundle
        > inspect(source, "int8").bundle
    )
    assert inspect(source, tokens=10**8).disk > inspect(source, tokens=10**5).disk
    assert inspect(source, tokens=10**8).memory > inspect(source, tokens=10**5).memory


def test_every_family_on_the_interface_is_listed():
    found = {family["family"]: family for family in families().families}
    assert len(found) >= 60 and found["mixtral"] == {
        "family": "mixtral", "experts": "gated", "text": "MixtralForCausalLM"
    }  # fmt: skip
    assert found["gpt_oss"]["experts"] == "transposed, interleaved, biased"
    assert (
        found["nemotron_h"]["experts"] == "not gated"
        and found["muse_spark"]["experts"] == "normalised"
    )
    assert found["openai_privacy_filter"]["text"] == ""


def test_a_dense_model_and_no_model_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1})
    )
    with pytest.raises(PrepError, match="is a llama model without experts"):
        inspect(tmp_path)
    with pytest.raises(PrepError, match="is not a directory"):
        inspect(tmp_path / "none")


def test_the_command_says_it_and_takes_one_of_two(smoe_prep, checkpoints, tmp_path):
    done = smoe_prep("inspect", checkpoints("olmoe"))
    assert done.returncode == 0 and "olmoe (OlmoeForCausalLM): can be prepared" in done.stdout
    assert json.loads(smoe_prep("inspect", "--families", "--json").stdout)["families"]
    for wrong in ((), (checkpoints("olmoe"), "--families")):
        done = smoe_prep("inspect", *wrong)
        assert done.returncode == 2 and "Give either MODEL or --families" in done.stderr


def test_the_walkthrough_quotes_what_inspect_says(smoe_prep, root):
    page = (root / "docs" / "walkthrough.md").read_text()
    quoted = re.findall(r"^\$ smoe-prep inspect (docs/models/.*)\n((?:.+\n)+?)```", page, re.M)
    named = {options.split()[0] for options, _ in quoted}
    assert named == {f"docs/models/{model.name}" for model in (root / "docs" / "models").iterdir()}
    for options, written in quoted:
        said = smoe_prep("inspect", *options.split()).stdout.splitlines()
        lines = [line for line in said if not line.startswith(("weights:", "  of which"))]
        assert [re.sub(r"; about [^;]* on this machine", "", line) for line in lines] == (
            written.splitlines()
        )


def test_families_with_options_that_say_nothing_about_them_are_refused(smoe_prep):
    done = smoe_prep("inspect", "--families", "--encoding", "int8")
    assert done.returncode == 2 and "--encoding says nothing about families" in done.stderr


@pytest.mark.parametrize("backbone", ["f32", "int4"])
def test_every_stage_is_estimated_and_measured(checkpoints, tmp_path, backbone):
    text = tmp_path / "ids.jsonl"
    text.write_text("".join(json.dumps({"input_ids": [i % 90] * 64}) + "\n" for i in range(16)))
    built = build(
        checkpoints("olmoe"), tmp_path / "bundle", Calibration(str(text), 1024),
        Recipe("nested:2+1+1:32", backbone, prices=256, self_tokens=300), None,
        Progress(quiet=True),
    ).as_dict()  # fmt: skip
    said = inspect(checkpoints("olmoe"), "nested:2+1+1:32", 1024, 256, backbone, own=300)
    # The trace takes no time.
    assert set(said.stage_seconds) == set(built["seconds"]) - {"trace"}
    assert all(seconds >= 0 for seconds in said.stage_seconds.values())
    assert sum(said.stage_seconds.values()) == pytest.approx(said.seconds, abs=0.01)
    assert max(said.stage_memory.values()) == said.memory
    assert 1e8 < built["memory"] < 4e9


def test_what_is_not_asked_for_takes_nothing(checkpoints):
    stages = inspect(checkpoints("olmoe"), "nested:2+1+1:32", tokens=1024, prices=0, own=0)
    assert not stages.stage_seconds.keys() & {"gradients", "prices", "fit", "predictors"}
    assert set(stages.stage_memory) == {"open", "sweep", "export"}


@pytest.mark.parametrize("model", ["olmoe-1b-7b", "qwen3-30b-a3b"])
def test_more_work_takes_more_time(root, model):
    """At real sizes, where far more is far more than what two measurements differ by."""
    config = root / "docs" / "models" / model
    few = inspect(config, "nested:2+1+1", 8192, 1024, quantiser="nearest")
    many = inspect(config, "nested:2+1+1", 262144, 32768, quantiser="nearest")
    for stage in ("sweep", "gradients", "prices"):
        assert many.stage_seconds[stage] > 4 * few.stage_seconds[stage]
    assert many.stage_memory["sweep"] > few.stage_memory["sweep"]
    assert many.stage_memory["export"] == few.stage_memory["export"]
    assert few.layers > 1 and few.weights and few.seconds > 60


def test_text_that_the_model_writes_takes_time(root):
    config = root / "docs" / "models" / "olmoe-1b-7b"
    some, more = (inspect(config, "nested:2+1+1", 1024, 0, own=own) for own in (4096, 65536))
    none = inspect(config, "nested:2+1+1", 1024, 0, own=0)
    assert none.stage_seconds["text"] == 0 and none.tokens == 1024
    assert more.stage_seconds["text"] > some.stage_seconds["text"] > 1 and more.tokens == 66560


def test_without_calibration_text_there_is_what_the_model_writes(checkpoints, smoe_prep):
    assert inspect(checkpoints("olmoe"), tokens=0).tokens == 49152
    said = smoe_prep("inspect", checkpoints("olmoe"), "--tokens", 0, "--self", 300)
    assert said.returncode == 0 and "for 300 tokens" in said.stdout, said.stderr
    for options, wrong in (
        (("--self", -1), "--self is -1; 0 to"),
        (("--tokens", 127), "--tokens is 127; at least 128"),
        (("--tokens", 0, "--self", 0), "no text to learn from"),
        (("--tokens", 0, "--self", 5), "--self is 5; 128 to"),
    ):
        done = smoe_prep("inspect", checkpoints("olmoe"), *options)
        assert done.returncode == 1 and wrong in done.stderr, (options, done.stderr)


def test_little_memory_is_said_before_the_work():
    assert short_of_memory({"sweep": 1 << 20, "export": 1 << 19}) == ""
    text = short_of_memory({"sweep": 1 << 60, "export": 1 << 59})
    assert text.startswith("sweep needs about 11529") and "less text (--tokens, --self)" in text
    backbone = short_of_memory({"sweep": 1 << 59, "export": 1 << 60})
    assert backbone.startswith("export needs") and backbone.endswith("GB; give more.")
