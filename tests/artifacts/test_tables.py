"""Tables are kept where the version of their bundle has them."""

import shutil

import numpy as np

from smoe.artifacts import open_bundle, safetensors_file
from smoe.artifacts.tables import key, load_tables, names_in, save_tables


def _rewritten(bundle, experts):
    """The tables of a bundle read, changed, written and read again."""
    file = bundle / "tables.safetensors"
    tables = load_tables(file, experts)
    tables[0]["counts"] = tables[0]["counts"] + 1
    save_tables(file, tables, {"made": "again"})
    return tables, load_tables(file, experts)


def _experts_of(bundle):
    return [layer.experts for layer in open_bundle(bundle).manifest.layers]


def _same(ours, theirs):
    return all(
        set(a) == set(b) and all(np.array_equal(a[n], b[n], equal_nan=True) for n in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_tables_of_this_version_lie_in_two_files(goldens, tmp_path):
    bundle = shutil.copytree(goldens[-1], tmp_path / "b.smoe")
    assert _same(*_rewritten(bundle, _experts_of(bundle)))
    for file, study in (("tables.safetensors", False), ("study/tables.safetensors", True)):
        entries = set(safetensors_file.read_header(bundle / file).entries)
        first = {name.partition(".")[2] for name in entries if name.startswith("00.")}
        assert first and first <= set(names_in(study))


def test_tables_of_an_older_version_stay_in_one_file(copied):
    assert _same(*_rewritten(copied, [7, 7]))
    assert not (copied / "study").exists()
    entries = safetensors_file.read_header(copied / "tables.safetensors").entries
    assert {key(0, "counts"), key(0, "saliency")} <= set(entries)


def test_tables_without_their_study_are_read_alone(goldens, tmp_path):
    shutil.copyfile(goldens[-1] / "tables.safetensors", tmp_path / "tables.safetensors")
    tables = load_tables(tmp_path / "tables.safetensors", _experts_of(goldens[-1]))
    assert "counts" in tables[0] and "saliency" not in tables[0]
