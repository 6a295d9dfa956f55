"""Checkpoints by name, from a hub on this machine that speaks as the real one does."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from support.hub_server import Content, HubServer, Repository

from smoe.artifacts import open_bundle

OPEN = """
import json, sys
from smoe.artifacts import SmoeError
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.hub import origin
from smoe.prep.progress import Progress
said = []
for name in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint(name, Progress())
        said.append([str(checkpoint.path), origin(checkpoint.path), checkpoint.fingerprint()])
    except SmoeError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def _environment(hub: HubServer, home: Path, **variables: str) -> dict[str, str]:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)} | variables
    if "HF_HUB_OFFLINE" not in variables:
        environment.pop("HF_HUB_OFFLINE", None)
    return environment


def _python(hub: HubServer, home: Path, *arguments: object, **variables: str):
    command = [sys.executable, *map(str, arguments)]
    environment = _environment(hub, home, **variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _opened(hub: HubServer, home: Path, *names: str, **variables: str) -> list:
    done = _python(hub, home, "-c", OPEN, *names, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _fetched(hub: HubServer) -> set[str]:
    """The files whose bytes were asked for."""
    return {line.rpartition("/")[2] for line in hub.served.asked if "GET" in line}


def test_a_build_by_name_through_breaks_is_the_one_by_path_and_fetches_no_code(
    hub, checkpoints, bundles, ids_file, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    for name in ("modeling_acme.py", "consolidated.safetensors", "original/params.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("nobody needs it")
    (source / "LICENSE").write_text("You may.")
    repository = hub.served.add("acme/mixtral", source)
    repository.branches = ("main", "v1")
    random.seed(5)
    size = repository.files["model.safetensors"].size
    places = sorted(random.sample(range(1, size), 10))
    hub.served.breaks = {
        "model.safetensors": [b - a for a, b in zip([0, *places], places, strict=False)],
        "config.json": [10],
        "LICENSE": [3],
    }
    arguments = ("-o", tmp_path / "m.smoe", "--calibration", ids_file, "--encoding", "f32")
    done = _python(hub, tmp_path, "-m", "smoe.prep", "build", "acme/mixtral@v1", *arguments)
    assert done.returncode == 0, done.stderr
    assert hub.served.broken == 12
    manifest = open_bundle(tmp_path / "m.smoe", hashes=True).manifest
    assert manifest.files == open_bundle(bundles("mixtral")).manifest.files
    assert manifest.provenance["source"] == f"acme/mixtral@{repository.commit}"
    asked = {line.rpartition("/")[2] for line in hub.served.asked}
    assert not asked & {"modeling_acme.py", "consolidated.safetensors", "params.json"}
    hub.served.asked.clear()
    opened = _opened(hub, tmp_path, "acme/mixtral@v1", str(source), HF_HUB_OFFLINE="1")
    assert opened[0][1:] == [manifest.provenance["source"], opened[1][2]]
    assert not hub.served.asked


@pytest.mark.parametrize("kept", ["config.json", "model.safetensors.index.json"])
def test_what_was_only_inspected_needs_a_network(root, hub, tmp_path, kept):
    source = root / "examples" / "reference"
    repository = hub.served.add("acme/reference", source)
    if kept == "config.json":
        repository.files = {
            "config.json": repository.files["config.json"],
            "model.safetensors": repository.files["model-00001-of-00002.safetensors"],
        }
    _python(hub, tmp_path, "-m", "smoe.prep", "inspect", "acme/reference", "--prices", "0")
    (said,) = _opened(hub, tmp_path, "acme/reference", HF_HUB_OFFLINE="1")
    assert said.startswith("acme/reference is not whole in ")
    assert said.endswith("the hub does not answer; run this again with a network.")


def test_a_killed_fetch_is_gone_on_with(root, hub, tmp_path):
    source, file = root / "examples" / "reference", "model-00002-of-00002.safetensors"
    hub.served.add("acme/reference", source)
    size = (source / file).stat().st_size
    hub.served.dying, hub.served.breaks = {file}, {file: [size - 50_000]}
    killed = subprocess.Popen(
        [sys.executable, "-c", OPEN, "acme/reference"], env=_environment(hub, tmp_path)
    )
    while not hub.served.broken:
        time.sleep(0.02)
    time.sleep(0.2)  # for what is under way
    killed.kill()
    killed.wait()
    hub.served.dead, hub.served.dying, hub.served.sent = set(), set(), 0
    ((path, _, _),) = _opened(hub, tmp_path, "acme/reference")
    assert (Path(path) / file).read_bytes() == (source / file).read_bytes()
    assert hub.served.sent < 50_000 + 500_000  # and headers, and the tokenizer


def test_what_cannot_be_fetched_is_a_sentence(checkpoints, hub, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    hub.served.add("acme/gated", source).refused = "GatedRepo"
    hub.served.add("acme/tiny", source)
    lost = hub.served.add("acme/lost", source).files
    lost["model.safetensors.index.json"] = _content({"weight_map": {"x": "a.safetensors"}})
    hub.served.add("acme/damaged", source).files["model.safetensors"] = Content(
        b"x" * 20_000, 20_000
    )
    hub.served.add("acme/noconfig", source).files.pop("config.json")
    other = json.loads((source / "config.json").read_text())
    hub.served.add("acme/other", source).files["config.json"] = _content(
        other | {"hidden_size": 48}
    )
    hub.served.add("acme/dense", source).files["config.json"] = _content({"model_type": "gpt2"})
    code = {"model_type": "acme", "auto_map": {"AutoConfig": "configuration_acme.AcmeConfig"}}
    coded = hub.served.add("acme/code", source).files
    coded["config.json"] = _content(code)
    coded["configuration_acme.py"] = Content(b"raise SystemExit", 16)
    hub.served.repositories["acme/endless"] = Repository(
        hub.served.repositories["acme/tiny"].files | {"tokenizer.json": Content(b"", 10**15)}
    )
    hub.served.add("acme/sizes", source).files["notes.txt"] = Content(b"", "many")  # type: ignore
    expected = {
        "acme/sizes": "acme/sizes at http",
        "acme/gated": "acme/gated is gated: accept its terms at http",
        "acme/none": "acme/none is neither a path on this disk nor a model that http",
        "acme/tiny@v9": "acme/tiny has no revision 'v9'",
        "acme/lost": "1 of 1 weight files are not in the repository, a.safetensors first",
        "acme/damaged": "cannot be used: Failed to parse safetensors header",
        "acme/noconfig": "acme/noconfig at http",
        "acme/other": "have another shape than config.json says",
        "acme/dense": "gpt2 model without experts",
        "acme/code": "runs no code out of a checkpoint",
        "acme/endless": "acme/endless needs 1000000.00 GB more",
        "./acme": "acme is not a directory",
        "acme/tiny/x": "acme/tiny/x is not a directory",
    }
    for said, wanted in zip(_opened(hub, tmp_path, *expected), expected.values(), strict=True):
        assert wanted in said and "\n" not in said, said
    weights = {name for name in _fetched(hub) if name.endswith(".safetensors")}
    assert "configuration_acme.py" not in _fetched(hub) and weights <= {"model.safetensors"}


def _content(data: dict) -> Content:
    text = json.dumps(data).encode()
    return Content(text, len(text))


LARGE = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
FILES = 16


def _tensors() -> dict[str, list[int]]:
    """What the checkpoint of a model of 30 billion parameters stores."""
    hidden, width = LARGE["hidden_size"], LARGE["moe_intermediate_size"]
    tensors = {"model.embed_tokens.weight": [151936, hidden], "lm_head.weight": [151936, hidden]}
    tensors["model.norm.weight"] = [hidden]
    for layer in range(48):
        at = f"model.layers.{layer}"
        for name, shape in {
            "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [4096, hidden], "self_attn.k_proj": [512, hidden],
            "self_attn.v_proj": [512, hidden], "self_attn.o_proj": [hidden, 4096],
            "self_attn.q_norm": [128], "self_attn.k_norm": [128], "mlp.gate": [128, hidden],
        }.items():  # fmt: skip
            tensors[f"{at}.{name}.weight"] = shape
        for expert in range(128):
            tensors[f"{at}.mlp.experts.{expert}.gate_proj.weight"] = [width, hidden]
            tensors[f"{at}.mlp.experts.{expert}.up_proj.weight"] = [width, hidden]
            tensors[f"{at}.mlp.experts.{expert}.down_proj.weight"] = [hidden, width]
    return tensors


def _sixty_gigabytes() -> Repository:
    tensors = list(_tensors().items())
    files: dict[str, Content] = {}
    placed = {}
    for number in range(FILES):
        file = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        header, offset = {}, 0
        for name, shape in tensors[number::FILES]:
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            offset, placed[name] = offset + size, file
        text = json.dumps(header).encode()
        files[file] = Content(struct.pack("<Q", len(text)) + text, 8 + len(text) + offset)
    files["model.safetensors.index.json"] = _content({"metadata": {}, "weight_map": placed})
    files["config.json"] = _content(transformers.Qwen3MoeConfig(**LARGE).to_dict())
    files["tokenizer.json"] = Content(b"{", 11 << 20)
    return Repository(files)


def test_inspect_moves_a_few_bytes_of_sixty_gigabytes(hub, tmp_path):
    hub.served.repositories["acme/large"] = _sixty_gigabytes()
    done = _python(hub, tmp_path, "-m", "smoe.prep", "inspect", "acme/large", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["weights"] == "" and said["refusal"] == ""
    assert said["download"] == pytest.approx(61.1e9, rel=0.01) and said["layers"] == 48
    assert hub.served.sent < 8e6
