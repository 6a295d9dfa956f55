"""Bundles by name, from a hub on this machine that speaks as the real one does."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.hub_server import HubServer

from smoe.artifacts import open_bundle
from smoe.artifacts.licence import Licence
from smoe.artifacts.validate import file_at

pytest.importorskip("huggingface_hub", "1.31", reason="bundles by name need smoe[hub]")


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def bundle(goldens, tmp_path) -> Path:
    """A golden bundle of three layers, with a licence."""
    copied = Path(shutil.copytree(goldens[3], tmp_path / "tiny.smoe"))
    (copied / "licence").mkdir()
    (copied / "licence" / "LICENSE").write_text("You may.")
    _edit(copied, _licensed)
    return copied


def _licensed(manifest: dict, bundle: Path) -> None:
    files = {"licence/LICENSE": file_at(bundle / "licence" / "LICENSE")}
    manifest["provenance"] |= Licence(card="apache-2.0", files=files).provenance()


def _edit(bundle: Path, change) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest, bundle)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _environment(hub: HubServer, home: Path, **variables: str) -> dict[str, str]:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)} | variables
    if "HF_HUB_OFFLINE" not in variables:
        environment.pop("HF_HUB_OFFLINE", None)
    return environment


def _smoe(hub: HubServer, home: Path, *arguments: object, **variables: str):
    command = [sys.executable, "-m", "smoe.runtime", *map(str, arguments)]
    environment = _environment(hub, home, **variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _bodies(hub: HubServer) -> list[str]:
    """The files whose bytes were asked for."""
    return sorted({line.rpartition("/")[2] for line in hub.served.asked if "GET" in line})


def test_a_bundle_is_fetched_through_breaks_and_runs_as_the_one_on_disk(hub, bundle, tmp_path):
    random.seed(3)
    hub.served.add("acme/tiny", bundle)
    for name, file in hub.served.repositories["acme/tiny"].files.items():
        hub.served.breaks[name] = [random.randrange(file.size // 2)]
    expected = _smoe(hub, tmp_path, "run", bundle, "x", "--max-new-tokens", 8)
    said = _smoe(hub, tmp_path, "run", "acme/tiny", "x", "--max-new-tokens", 8)
    assert expected.returncode == 0 and said.stdout == expected.stdout, said.stderr
    assert "acme/tiny: " in said.stderr and hub.served.broken == 14
    (fetched,) = (tmp_path / "smoe" / "acme--tiny").iterdir()
    manifest = open_bundle(fetched, hashes=True).manifest
    names = {str(f.relative_to(fetched)) for f in fetched.rglob("*") if f.is_file()}
    listed = {name for name in manifest.files if not name.startswith("study/")}
    assert names == listed | {"manifest.json", "licence/LICENSE"}
    for name in names:
        assert (fetched / name).read_bytes() == (bundle / name).read_bytes()


def test_a_second_run_fetches_nothing_and_needs_no_network(hub, bundle, tmp_path):
    repository = hub.served.add("acme/tiny", bundle)
    repository.branches = ("main", "v1")
    assert _smoe(hub, tmp_path, "verify", "acme/tiny").returncode == 0
    hub.served.asked.clear()
    repository.commit = "f" * 40  # somebody mended the card
    said = _smoe(hub, tmp_path, "info", "acme/tiny@v1")
    assert "apache-2.0" in said.stdout and "licence/LICENSE" in said.stdout
    assert set(_bodies(hub)) <= {"agent-harnesses", "manifest.json"}
    repository.refused = "RepoNotFound"
    hub.served.repositories.clear()
    assert _smoe(hub, tmp_path, "info", "acme/tiny", HF_HUB_OFFLINE="1").returncode == 0
    unreachable = _smoe(hub, tmp_path, "info", "acme/tiny", HF_ENDPOINT="http://127.0.0.1:1")
    assert unreachable.returncode == 0, unreachable.stderr
    none = _smoe(hub, tmp_path, "info", "acme/other", HF_HUB_OFFLINE="1")
    assert none.returncode == 1 and "does not answer" in none.stderr


def test_a_killed_fetch_is_gone_on_with(hub, bundle, tmp_path):
    hub.served.add("acme/tiny", bundle)
    file = "experts/layer-02.safetensors"
    size = (bundle / file).stat().st_size
    hub.served.dying, hub.served.breaks = {file}, {file: [size - 100]}
    command = [sys.executable, "-m", "smoe.runtime.hub", "acme/tiny"]
    killed = subprocess.Popen(command, env=_environment(hub, tmp_path))
    while not hub.served.broken:
        time.sleep(0.02)
    time.sleep(0.2)  # for what is under way
    killed.kill()
    killed.wait()
    offline = _smoe(hub, tmp_path, "verify", "acme/tiny", HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "acme/tiny is not whole in" in offline.stderr
    hub.served.dead, hub.served.dying, hub.served.sent = set(), set(), 0
    assert _smoe(hub, tmp_path, "verify", "acme/tiny").returncode == 0
    assert hub.served.sent < 100 + 100_000  # and the small files that come after it


def test_a_file_that_ends_too_early_is_not_waited_for_for_ever(hub, bundle, tmp_path):
    hub.served.add("acme/tiny", bundle)
    hub.served.short = {"experts/layer-00.safetensors": 400_000}
    answer = _smoe(hub, tmp_path, "info", "acme/tiny")
    assert "layer-00.safetensors ended after 400000 of 475136 bytes" in answer.stderr
    assert answer.returncode == 1 and "it goes on where it stopped" in answer.stderr
    assert "Traceback" not in answer.stderr and answer.stderr.count("smoe: ") == 1


@pytest.mark.parametrize(
    "asked, said",
    [
        ("acme/gated", "acme/gated is gated: accept its terms at http"),
        ("acme/none", "acme/none is neither a path on this disk nor a model that http"),
        ("acme/tiny@v9", "acme/tiny has no revision 'v9'"),
        ("acme/model", "no manifest.json, so it is no bundle.*smoe-prep build acme/model"),
        ("acme/large", "manifest.json has .* bytes, more than one has"),
        ("acme/outside", "not fetched: manifest.json: files names '../../x', a path outside"),
        ("acme/odd", "not fetched: manifest.json: files lists setup.py, which no part"),
        ("acme/licence", "provenance: licence_files names 'licence/../x'"),
        ("acme/huge", "acme/huge needs 1000000.* GB more at"),
        ("acme/other", "tokenizer.json came with the SHA-256 .* was wanted.*ask its owner"),
        ("acme/page", "acme/page is no bundle .*: manifest.json is not JSON.*Ask its owner"),
        ("acme/a/b", "acme/a/b does not exist; a bundle is the directory"),
        ("acme/a--b", "acme/a--b does not exist"),
    ],
)
def test_what_cannot_be_fetched_is_a_sentence(hub, bundle, tmp_path, asked, said):
    hub.served.add("acme/tiny", bundle)
    hub.served.add("acme/gated", bundle).refused = "GatedRepo"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    hub.served.add("acme/model", tmp_path / "m")
    name = asked.rpartition("/")[2]
    changes = {
        "outside": lambda m, _: m["files"].update({"../../x": {"size": 1, "sha256": ""}}),
        "odd": lambda m, _: m["files"].update({"setup.py": {"size": 1, "sha256": ""}}),
        "licence": lambda m, _: m["provenance"].update(
            licence_files='{"licence/../x": {"size": 1, "sha256": ""}}'
        ),
        "huge": lambda m, _: m["files"]["backbone/weights.data"].update(size=10**15),
        "other": lambda m, _: m["files"]["tokenizer.json"].update(sha256=""),
    }
    if name in changes:
        _edit(bundle, changes[name])
        hub.served.add(asked, bundle)
    if name in ("large", "page"):
        (bundle / "manifest.json").write_bytes(b"<html>" if name == "page" else bytes(65 << 20))
        hub.served.add(asked, bundle)
    answer = _smoe(hub, tmp_path / "home", "info", asked)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert re.search(said, answer.stderr), answer.stderr
    assert not list(tmp_path.rglob("setup.py")) and not (tmp_path / "x").exists()


def test_a_cache_that_cannot_be_written_is_a_sentence_that_names_it(hub, bundle, tmp_path):
    hub.served.add("acme/tiny", bundle)
    (tmp_path / "home").write_text("a file")
    answer = _smoe(hub, tmp_path / "home", "info", "acme/tiny")
    assert answer.returncode == 1 and "let HF_HOME name a folder that can" in answer.stderr
    assert "again" not in answer.stderr


def test_a_path_that_exists_is_never_a_name(hub, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    bundle.rename(tmp_path / "acme" / "tiny")
    assert _smoe(hub, tmp_path, "verify", "acme/tiny").returncode == 0
    assert not hub.served.asked


def test_without_the_extra_a_name_says_what_to_install(hub, tmp_path):
    absent = tmp_path / "absent" / "huggingface_hub"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text(
        "raise ModuleNotFoundError('none', name='huggingface_hub')\n"
    )
    path = os.pathsep.join([str(absent.parent), os.environ.get("PYTHONPATH", "")])
    answer = _smoe(hub, tmp_path, "info", "acme/tiny", PYTHONPATH=path)
    assert answer.returncode == 1 and "pip install 'smoe[hub]'" in answer.stderr
    assert "acme/tiny is no path on this disk" in answer.stderr
