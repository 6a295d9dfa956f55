"""Licences in a bundle: files of a folder of their own, which old readers do not know."""

import json
from pathlib import Path

import pytest

from smoe.artifacts import BundleError, open_bundle
from smoe.artifacts.licence import Licence
from smoe.artifacts.validate import file_at


def _provenance(bundle: Path, **entries: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["provenance"] |= entries
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def licensed(copied) -> Path:
    (copied / "licence").mkdir()
    (copied / "licence" / "LICENSE").write_text("You may.")
    files = {"licence/LICENSE": file_at(copied / "licence" / "LICENSE")}
    _provenance(copied, **Licence(card="apache-2.0", files=files).provenance())
    return copied


def test_a_licence_is_read_as_it_was_written(licensed):
    licence = Licence.of(open_bundle(licensed, hashes=True).manifest)
    assert licence.card == "apache-2.0" and licence.files["licence/LICENSE"].size == 8
    assert licence.as_dict(licensed) == {
        "licence": "apache-2.0",
        "licence_files": "licence/LICENSE",
    }


def test_bundles_of_every_version_state_none(goldens):
    for path in goldens:
        licence = Licence.of(open_bundle(path).manifest)
        assert licence.as_dict(path) == {"licence": "not stated", "licence_files": "none"}


def test_a_bundle_opens_without_its_texts_but_is_not_whole(licensed):
    (licensed / "licence" / "LICENSE").unlink()
    licence = Licence.of(open_bundle(licensed).manifest)
    assert licence.as_dict(licensed)["licence_files"] == "licence/LICENSE (missing)"
    with pytest.raises(BundleError, match="licence/LICENSE is missing"):
        open_bundle(licensed, hashes=True)


def test_a_text_that_was_changed_or_leads_elsewhere_is_refused(licensed, tmp_path):
    text = licensed / "licence" / "LICENSE"
    text.write_text("You must")
    open_bundle(licensed)
    with pytest.raises(BundleError, match="licence/LICENSE has SHA-256"):
        open_bundle(licensed, hashes=True)
    text.unlink()
    (tmp_path / "secret").write_text("12345678")
    text.symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="not a plain file of the bundle"):
        open_bundle(licensed)


@pytest.mark.parametrize(
    "listed",
    [
        "[]",
        "nonsense",
        '{"licence/LICENSE": 5}',
        '{"licence/LICENSE": {"size": "x", "sha256": ""}}',
        '{"licence/../../etc/passwd": {"size": 1, "sha256": ""}}',
        '{"licence/.hidden": {"size": 1, "sha256": ""}}',
        '{"backbone/x": {"size": 1, "sha256": ""}}',
        '{"licence/a/b": {"size": 1, "sha256": ""}}',
        "[" * 100_000,
    ],
)
def test_a_listing_of_anything_else_is_refused(copied, listed):
    _provenance(copied, licence_files=listed)
    with pytest.raises(BundleError, match="provenance: licence_files"):
        open_bundle(copied)


def test_what_a_card_says_is_one_line_of_bounded_length(copied):
    _provenance(copied, licence="mit\nbytes 5\n" * 1000)
    said = Licence.of(open_bundle(copied).manifest)
    assert "\n" not in said.card and len(said.card) == 300
    assert Licence(card="", files={}).provenance() == {}
