"""What a bundle need not have to be opened and run, and what it has without saying so."""

import json
import os
import shutil

import pytest

from smoe.artifacts import open_bundle, safetensors_file
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.cache.storage import IO


def _budget(bundle, experts):
    return memory_for(open_bundle(bundle), experts, 200)


def _unlist(bundle, name):
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"][name]
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _greedy(bundle, prompt, **options):
    with Engine.open(bundle, context=200, **options) as engine:
        return [token.id for token in engine.generate(prompt, max_new_tokens=24)]


def test_an_unlisted_tables_file_is_not_used(copied):
    _unlist(copied, "tables.safetensors")
    assert open_bundle(copied).tables.layers("counts") == [{}, {}]
    (copied / "tables.safetensors").write_bytes(b"not even a header")
    open_bundle(copied)
    with pytest.raises(EngineError):
        policies = Policies(prefetch="predicted")
        Engine.open(copied, beside=_budget(copied, 8), context=200, policies=policies)


def test_a_bundle_without_tables_opens_and_runs_under_a_budget(copied, answer):
    _unlist(copied, "tables.safetensors")
    (copied / "tables.safetensors").unlink()
    prompt = answer["prompt"].tolist()
    assert _greedy(copied, prompt) == answer["greedy"].tolist()
    assert _greedy(copied, prompt, beside=_budget(copied, 8)) == answer["greedy"].tolist()


def test_a_bundle_without_its_study_runs_as_with_it(goldens, tmp_path):
    newest, prompt = goldens[-1], list(range(1, 40))
    alone = shutil.copytree(newest, tmp_path / "alone.smoe", ignore=lambda *_: ["study"])
    policies = [  # what is lossy without prefetch: with it, what is there is a matter of time
        Policies(prefetch="predicted"),
        Policies(prefetch="transition"),
        Policies(loss=0.02),
        Policies(substitution="buddy"),
        Policies(substitution="similar"),
        Policies(substitution="smoe", eviction="score"),
    ]
    for policy in policies:
        options = {"beside": _budget(newest, 8), "policies": policy}
        assert _greedy(alone, prompt, **options) == _greedy(newest, prompt, **options)


@pytest.mark.parametrize("io", [None, *IO])
def test_records_are_read_where_the_system_cannot_empty_its_page_cache(
    golden, answer, io, monkeypatch
):
    monkeypatch.delattr(os, "posix_fadvise")  # as on macOS
    prompt = answer["prompt"].tolist()
    assert _greedy(golden, prompt, beside=_budget(golden, 8), io=io) == answer["greedy"].tolist()


def test_tables_are_read_as_they_are_asked_for(golden):
    tables, file = open_bundle(golden).tables, golden / "tables.safetensors"
    stored = safetensors_file.load(file)
    assert (tables.column("counts")[1] == stored["01.counts"]).all()
    assert len(tables.column("transition")) == 1
