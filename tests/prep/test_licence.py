"""The licence of a checkpoint travels with the bundle, and `smoe info` says it."""

import json
import shutil

import pytest

from smoe.artifacts import open_bundle
from smoe.prep.checkpoint.licence import copy_licence
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress
from smoe.runtime.__main__ import main

QUIET = Progress(True)
TEXTS = ("LICENSE", "license-code.txt", "LICENCE.md", "COPYING", "Notice", "USE_POLICY.md")
TEXTS += ("USAGE_POLICY", "MODEL_LICENSE", "THIRD_PARTY_NOTICES.md", "terms.txt")


def test_texts_and_card_are_in_the_bundle_and_info_says_them(
    exports, checkpoints, ids_file, tmp_path, monkeypatch, capsys
):
    source, bundle = tmp_path / "model", tmp_path / "m.smoe"
    shutil.copytree(checkpoints("mixtral"), source)
    for name in TEXTS:
        (source / name).write_text(f"terms of {name}")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: pico-research\n"
        "license_link: https://example.org/LICENSE\n---\n# Pico\n"
    )
    exports.build(source, bundle, Calibration(str(ids_file)), Recipe("f32", prices=0))
    manifest = open_bundle(bundle, hashes=True).manifest
    for name in TEXTS:
        assert (bundle / "licence" / name).read_text() == f"terms of {name}"
    assert not any(name.startswith("licence") for name in manifest.files)  # old readers open it
    monkeypatch.setattr("sys.argv", ["smoe", "info", str(bundle)])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "other (pico-research) https://example.org/LICENSE" in said
    assert all(f"licence/{name}" in said for name in TEXTS)


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\nlanguage: en\n---\n", ""),
        ("# A card without front matter", ""),
        (None, ""),
    ],
)
def test_what_a_card_says(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert copy_licence(tmp_path, tmp_path / "out", QUIET).card == expected


@pytest.mark.parametrize(
    "card", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "---\na: \udcff\n---\n"]
)
def test_a_card_that_cannot_be_read_is_said_and_no_more(tmp_path, capsys, card):
    (tmp_path / "README.md").write_text(card, errors="surrogateescape")
    assert copy_licence(tmp_path, tmp_path / "out", Progress()).card == ""
    assert "README.md has no front matter that can be read" in capsys.readouterr().err


def test_names_that_a_bundle_cannot_have_are_written_otherwise(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("LICENSE (2) é.txt", "LICENSE _2_ ü.txt", "LICENSE" + "x" * 200):
        (tmp_path / name).write_text(name)
    files = copy_licence(tmp_path, tmp_path / "out", QUIET).files
    assert len(files) == 3 and json.dumps(files, default=vars).isascii()
    assert {(tmp_path / "out" / name).read_text()[:7] for name in files} == {"LICENSE"}
