"""An older bundle is given a program without packing it again, and is what it was if that fails."""

import dataclasses
import json
import shutil
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from smoe.artifacts import BundleError, Manifest, open_bundle
from smoe.artifacts.manifest import VERSION
from smoe.artifacts.program import PROGRAM, PROGRAM_WEIGHTS
from smoe.artifacts.validate import file_at
from smoe.prep import add
from smoe.prep.cli import cli
from smoe.prep.errors import PrepError


def _files(bundle: Path) -> dict[str, bytes]:
    return {str(f.relative_to(bundle)): f.read_bytes() for f in bundle.rglob("*") if f.is_file()}


@pytest.mark.parametrize("version", [1, 3, 4, 5])
def test_an_older_bundle_is_given_a_program(goldens, tmp_path, version):
    bundle = Path(shutil.copytree(goldens[version - 1], tmp_path / "old.smoe"))
    before = _files(bundle)
    added = add.add_program(bundle)
    opened = open_bundle(bundle, hashes=True)
    assert opened.program is not None and opened.program.parts == added.parts
    assert not opened.manifest.backbone.prelude
    assert opened.manifest.version == (VERSION if version >= 4 else version)
    after = _files(bundle)
    assert after.keys() - before.keys() == {PROGRAM, PROGRAM_WEIGHTS}
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    reasons = {n: part.reason for n, part in enumerate(added.parts) if part.ops is None}
    assert added.as_dict()["in_onnx_runtime"] == reasons
    assert all(any(reason in line for line in added.lines()) for reason in reasons.values())
    with pytest.raises(PrepError, match="has a program already"):
        add.add_program(bundle)


def test_a_backbone_of_which_nothing_is_known_stays_as_it_is(copied):
    """Every graph has nodes that no operation does."""
    manifest = Manifest.parse((copied / "manifest.json").read_text(), "manifest.json")
    files = dict(manifest.files)
    for file in sorted((copied / "backbone").glob("*.onnx")):
        model = onnx.load(str(file), load_external_data=False)
        for node in model.graph.node:
            node.domain = "nobody's"
        file.write_bytes(model.SerializeToString())
        files[f"backbone/{file.name}"] = file_at(file)
    (copied / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    before = _files(copied)
    with pytest.raises(PrepError, match="No segment of this backbone compiles: .*no operation"):
        add.add_program(copied)
    assert _files(copied) == before


def test_what_fails_leaves_the_bundle_as_it_was(copied, monkeypatch):
    before = _files(copied)

    def fails(directory, *_):
        (directory / PROGRAM).write_text("{")
        raise failure

    monkeypatch.setattr(add, "compile", fails)
    failure: BaseException = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        add.add_program(copied)
    assert _files(copied) == before
    failure = RuntimeError("no such node\nat all")
    with pytest.raises(PrepError, match="cannot be read: no such node$"):
        add.add_program(copied)
    assert _files(copied) == before


def test_a_program_that_the_door_refuses_is_not_added(copied, monkeypatch):
    before = _files(copied)

    def writes(directory, *_):
        (directory / PROGRAM).write_text("{}")
        (directory / PROGRAM_WEIGHTS).touch()

    monkeypatch.setattr(add, "compile", writes)
    with pytest.raises(BundleError, match="missing or unknown"):
        add.add_program(copied)
    assert _files(copied) == before


def test_a_program_that_does_something_else_is_not_added(copied, monkeypatch):
    before, right = _files(copied), add.compile

    def wrong(directory, *others):
        right(directory, *others)
        table = json.loads((directory / PROGRAM).read_text())
        norm = next(op for op in table["parts"][1]["ops"] if op["kind"] in ("norm", "add_norm"))
        norm["numbers"]["epsilon"] = 0.5
        (directory / PROGRAM).write_text(json.dumps(table))

    monkeypatch.setattr(add, "compile", wrong)
    with pytest.raises(PrepError, match="logits are off by .* not added"):
        add.add_program(copied)
    assert _files(copied) == before


def test_an_interrupted_run_leaves_files_that_do_no_harm(copied, tmp_path):
    """Killed before the manifest was replaced: also where somebody put a link in their place."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (copied / PROGRAM).symlink_to(outside)
    (copied / PROGRAM_WEIGHTS).write_text("half")
    assert open_bundle(copied).program is None
    add.add_program(copied)
    assert open_bundle(copied, hashes=True).program is not None
    assert outside.read_text() == "mine"


def test_the_command_says_what_it_added(copied):
    said = CliRunner().invoke(cli, ["add", str(copied), "--program", "--json"])
    assert said.exit_code == 0
    assert json.loads(said.stdout)["segments"] == 3
    nothing = CliRunner().invoke(cli, ["add", str(copied)])
    assert nothing.exit_code == 2 and "Say what to add: --program" in nothing.output
