"""The door: the golden bundle passes, and every broken one is refused with a sentence that names
what is wrong."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import program_bundle

from smoe.artifacts import BundleError, Manifest, open_bundle
from smoe.artifacts.manifest import ACTIVATIONS, VERSION
from smoe.artifacts.validate import sha256


def test_the_golden_bundle_of_every_version_opens(goldens):
    for version, path in enumerate(goldens, 1):
        manifest = open_bundle(path, hashes=True).manifest
        assert manifest.version == version
        assert Manifest.parse(manifest.to_json(), "again") == manifest
    assert version == VERSION


def test_older_bundles_have_no_kind_of_state_and_no_recurrent_one(goldens):
    for path in goldens[:6]:
        assert "state_kind" not in (path / "manifest.json").read_text()
        opened = open_bundle(path)
        assert opened.manifest.backbone.state_kind == ""
        assert opened.program is None or opened.program.recurrent == ()


def _edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        change(manifest)
        (bundle / "manifest.json").write_text(json.dumps(manifest))

    return damage


def _set(*path_and_value) -> Callable[[Path], None]:
    *path, key, value = path_and_value

    def change(manifest: dict) -> None:
        for step in path:
            manifest = manifest[step]
        manifest[key] = value

    return _edit(change)


def _rename_file(new: str) -> Callable[[Path], None]:
    def change(manifest: dict) -> None:
        manifest["files"][new] = manifest["files"].pop("tokenizer.json")

    return _edit(change)


def _truncate(name: str, by: int, tell: bool = False) -> Callable[[Path], None]:
    """Cut a file; with `tell`, the manifest agrees with the new size, as an attacker would have
    it."""

    def damage(bundle: Path) -> None:
        size = (bundle / name).stat().st_size - by
        os.truncate(bundle / name, size)
        if tell:
            _set("files", name, {"size": size, "sha256": sha256(bundle / name)})(bundle)

    return damage


def _link(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to("/etc/passwd")


def _link_folder(bundle: Path) -> None:
    (bundle / "experts").rename(bundle.parent / "elsewhere")
    (bundle / "experts").symlink_to(bundle.parent / "elsewhere")


def _append(name: str) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        with open(bundle / name, "ab") as file:
            file.write(b"\0" * 4096)
        _set("files", name, "size", (bundle / name).stat().st_size)(bundle)

    return damage


def _noise(name: str) -> Callable[[Path], None]:
    return lambda bundle: (
        (bundle / name).write_bytes(os.urandom((bundle / name).stat().st_size)) and None
    )


def _swap_shards(bundle: Path) -> None:
    (bundle / "experts/layer-01.safetensors").write_bytes(
        (bundle / "tables.safetensors").read_bytes()
    )
    size = (bundle / "experts/layer-01.safetensors").stat().st_size
    _set("files", "experts/layer-01.safetensors", "size", size)(bundle)


BROKEN = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "no manifest.json"),
    "manifest is not json": (lambda b: (b / "manifest.json").write_text("{"), "not JSON"),
    "manifest is not utf-8": (
        lambda b: (b / "manifest.json").write_bytes(b"\xff\xfe"),
        "not UTF-8",
    ),
    "manifest nests deeply": (
        lambda b: (b / "manifest.json").write_text("[" * 200_000),
        "not JSON",
    ),
    "another format": (_set("format", "gguf"), "not a smoe bundle"),
    "from the future": (
        _set("version", VERSION + 1),
        f"format version {VERSION + 1}, this smoe reads 1 to {VERSION}",
    ),
    "version zero": (_set("version", 0), "format version 0, this smoe reads 1"),
    "version true": (_set("version", True), "format version True, this smoe reads 1"),
    "state in a kind that there is not": (
        _set("backbone", "state_kind", "f64"),
        "backbone.state_kind is 'f64', one of .* or nothing was wanted",
    ),
    "gate without a limit": (
        _set(
            "experts", "gate", {"kind": "bounded", "activation": "silu", "alpha": 0.0, "limit": 0.0}
        ),
        "limit, alpha is .0.0, 0.0., numbers from 1e-6 to 1e6",
    ),
    "gate without a number": (
        _set(
            "experts",
            "gate",
            {"kind": "softcapped", "activation": "", "alpha": float("nan"), "limit": 7.0},
        ),
        "limit, alpha is .7.0, nan., numbers from",
    ),
    "gate with a number beyond float32": (
        _set(
            "experts",
            "gate",
            {"kind": "softcapped", "activation": "", "alpha": 1e300, "limit": 7.0},
        ),
        "limit, alpha is .7.0, 1e.300., numbers from",
    ),
    "number beyond any float": (
        _set("experts", "gate", "limit", 10**400),
        "limit: float was wanted",
    ),
    "gate without its limit": (
        _edit(lambda m: m["experts"]["gate"].pop("limit")),
        "limit are missing or unknown",
    ),
    "normed, but its records are not": (_set("experts", "normed", True), "the manifest wants"),
    "unknown field": (_set("surprise", 1), "surprise are missing or unknown"),
    "missing field": (_edit(lambda m: m.pop("experts")), "experts are missing or unknown"),
    "text for a number": (_set("model", "vocabulary", "many"), "vocabulary: int was wanted"),
    "true for a number": (_set("layers", 0, "experts", True), "experts: int was wanted"),
    "no layers": (_set("layers", []), "number of layers"),
    "more experts than there are": (
        _set("layers", 0, "experts", 8),
        "layer-00.safetensors: tensor",
    ),
    "fewer experts than there are": (
        _set("layers", 0, "experts", 6),
        "layer-00.safetensors: tensor",
    ),
    "absurd experts": (_set("layers", 0, "experts", 2**40), r"layers\[0\].experts"),
    "absurd width": (_set("layers", 1, "width", 2**40), "hidden, width"),
    "another width": (_set("layers", 1, "width", 41), "layer-01.safetensors: tensor"),
    "top_k above experts": (_set("layers", 0, "top_k", 8), "top_k"),
    "another encoding": (_set("experts", "encoding", "int8"), "layer-00.safetensors: tensor"),
    "unknown encoding": (_set("experts", "encoding", "zip"), "no encoding 'zip'"),
    "odd page": (_set("experts", "page", 1000), "experts.page"),
    "unknown gate": (_set("experts", "gate", "kind", "eval"), "experts.gate"),
    "unknown activation": (_set("experts", "gate", "activation", "os.system"), "experts.gate"),
    "unknown normaliser": (_set("layers", 0, "routing", "normaliser", "max"), "normaliser"),
    "wires to nowhere": (_set("layers", 0, "wires", "hidden", "nothing"), "which no segment gives"),
    "input from nowhere": (_set("backbone", "segments", 1, "inputs", ["ghost"]), "takes 'ghost'"),
    "too few segments": (
        _edit(lambda m: m["backbone"]["segments"].pop()),
        "2 segments for 2 layers",
    ),
    "state of no segment": (_set("backbone", "state", 0, "segment", 9), "does not exist"),
    "state of unknown dtype": (_set("backbone", "state", 0, "dtype", "Q7"), "dtype 'Q7'"),
    "state of absurd product": (
        _set("backbone", "state", 0, "shape", [1, 2**30, 5, 2**20]),
        "do not trust it",
    ),
    "weight of negative shape": (
        _set("backbone", "initializers", 0, "shape", [-307, -48]),
        "outside",
    ),
    "weights file with a tail": (_append("backbone/weights.data"), "its last weight ends at"),
    "linked folder": (_link_folder, "not a plain file of the bundle"),
    "trace of random bytes": (_noise("trace.safetensors"), "trace.safetensors"),
    "state of absurd size": (_set("backbone", "state", 0, "shape", [1, 2, 2**40, 8]), "has shape"),
    "weight outside its file": (
        _set("backbone", "initializers", 0, "offset", 2**40),
        "outside backbone/weights.data",
    ),
    "weight before its file": (
        _set("backbone", "initializers", 0, "offset", -64),
        "outside backbone/weights.data",
    ),
    "weight of absurd shape": (
        _set("backbone", "initializers", 0, "shape", [2**40, 2**40]),
        "outside",
    ),
    "absolute path": (_rename_file("/etc/passwd"), "outside the bundle"),
    "path that climbs": (_rename_file("../../etc/passwd"), "outside the bundle"),
    "path with a null": (_rename_file("a\0b"), "outside the bundle"),
    "file that is no part": (_rename_file("run_me.py"), "no part of a bundle"),
    "link for a file": (_link, "not a plain file of the bundle"),
    "missing shard": (
        lambda b: (b / "experts/layer-00.safetensors").unlink(),
        "layer-00.safetensors is missing",
    ),
    "shard cut short": (_truncate("experts/layer-00.safetensors", 1), "layer-00.safetensors has"),
    "shard cut, manifest agrees": (
        _truncate("experts/layer-00.safetensors", 512, tell=True),
        "layer-00.safetensors",
    ),
    "shard is another file": (_swap_shards, "layer-01.safetensors"),
    "weights cut, manifest agrees": (
        _truncate("backbone/weights.data", 64, tell=True),
        "weights.data",
    ),
    "tables cut": (_truncate("tables.safetensors", 8, tell=True), "tables.safetensors"),
    "weights not listed": (
        _edit(lambda m: m["files"].pop("backbone/weights.data")),
        "does not list backbone/weights",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_refused(copied, name):
    damage, expected = BROKEN[name]
    damage(copied)
    with pytest.raises(BundleError, match=expected):
        open_bundle(copied)


def test_a_flipped_bit_is_found_by_its_hash(copied):
    file = copied / "experts" / "layer-01.safetensors"
    data = bytearray(file.read_bytes())
    data[-20000] ^= 1
    file.write_bytes(data)
    open_bundle(copied)
    with pytest.raises(BundleError, match="layer-01.safetensors has SHA-256"):
        open_bundle(copied, hashes=True)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("x"), lambda p: p.mkdir()])
def test_what_is_not_a_bundle_is_said(tmp_path, make):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(BundleError, match="thing"):
        open_bundle(path)


def test_the_manifest_knows_the_activations_that_the_runtime_runs():
    from smoe.runtime.kernels import activations

    assert set(ACTIVATIONS) == set(activations.ACTIVATIONS)


@pytest.fixture
def planes(goldens, tmp_path) -> Path:
    """The golden bundle whose experts are in planes, to be damaged."""
    return Path(shutil.copytree(goldens[2], tmp_path / "planes.smoe"))


@pytest.mark.parametrize("encoding, said", [
    ("nested:5+1+1:32", "tensor"),  # a plane fewer than there are
    ("nested:4+1+1+1:32", "tensor"),  # a base of another size
    ("nested:5+1+1+1:64", "tensor"),  # other groups
    ("nested:5+1+1+1", "was wanted"),  # not the one spelling
    ("nested:5+1+1+1/5+1+1+1:32", "was wanted"),
    ("nested:5+1+1+1+1:32", "8 in all"),
    ("nested:5+1+1+1:33", "groups of 33"),
    ("nested:" + "1+" * 4000, "is no nested encoding"),
])  # fmt: skip
def test_planes_that_are_not_there_are_refused(planes, encoding, said):
    _set("experts", "encoding", encoding)(planes)
    with pytest.raises(BundleError, match=re.escape(said)):
        open_bundle(planes)


@pytest.fixture
def newest(goldens, tmp_path) -> Path:
    """The golden bundle of the current version, to be damaged."""
    return Path(shutil.copytree(goldens[-1], tmp_path / "newest.smoe"))


def test_a_study_need_not_travel_and_is_checked_where_it_does(newest):
    full = open_bundle(newest)
    assert full.study("trace.safetensors") == newest / "study" / "trace.safetensors"
    assert {"saliency", "counts"} <= set(full.tables.layers()[0])
    (newest / "study" / "profile.json").unlink()  # some of it is as good as none
    assert open_bundle(newest, hashes=True).study("profile.json") is None
    for name in ("tables.safetensors", "trace.safetensors"):
        file = newest / "study" / name
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        with pytest.raises(BundleError, match=f"study/{name} has"):
            open_bundle(newest)
        file.write_bytes(b"x" * len(data))
        with pytest.raises(BundleError, match=f"study/{name}"):
            open_bundle(newest)
        file.write_bytes(data)
    shutil.rmtree(newest / "study")
    alone = open_bundle(newest, hashes=True)
    assert alone.study("trace.safetensors") is None
    assert "counts" in alone.tables.layers()[0] and "saliency" not in alone.tables.layers()[0]
    (newest / "study").symlink_to("/nowhere")
    open_bundle(newest)


def test_files_of_a_study_have_one_place_in_each_version(newest, copied):
    for bundle, found, other in (
        (newest, "study/trace.safetensors", "trace.safetensors"),
        (copied, "trace.safetensors", "study/trace.safetensors"),
    ):
        _edit(lambda m, a=found, b=other: m["files"].update({b: m["files"].pop(a)}))(bundle)
        with pytest.raises(BundleError, match="no part of a bundle"):
            open_bundle(bundle)


def test_graphs_need_not_travel_with_a_program_that_knows_them_all(tmp_path):
    whole = program_bundle.write(tmp_path / "whole.smoe")
    part = program_bundle.write(tmp_path / "part.smoe", {2: "it has a node LSTM"})
    assert open_bundle(whole).graphs
    for bundle in (whole, part):
        graphs = [*(bundle / "backbone").glob("*.onnx"), bundle / "backbone/weights.data"]
        assert len(graphs) > 2
        for some in (graphs[:1], graphs[:-1]):  # some are as bad as any other missing file
            kept = {file: file.read_bytes() for file in some}
            for file in some:
                file.unlink()
            with pytest.raises(BundleError, match=f"{some[0].name} is missing"):
                open_bundle(bundle)
            for file, data in kept.items():
                file.write_bytes(data)
        for file in graphs:
            file.unlink()
    assert not open_bundle(whole, hashes=True).graphs
    with pytest.raises(BundleError, match="does not know segment 2; copy the bundle again"):
        open_bundle(part)
    (whole / "backbone/weights.data").symlink_to("/nowhere")
    with pytest.raises(BundleError, match="missing"):
        open_bundle(whole)
