"""What a program keeps keys and values in is measured where it may be narrower than float32."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from smoe.artifacts import open_bundle
from smoe.artifacts.manifest import STATE_KINDS, VERSION
from smoe.prep import state_kind
from smoe.prep.errors import PrepError
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress
from smoe.runtime import Engine

QUIET = Progress(True)
IDS = np.random.default_rng(7).integers(1, 307, 400)


def _log_probabilities(bundle: Path, kind: str) -> np.ndarray:
    with Engine.open(bundle, context=300, state=kind) as engine:
        logits = engine.logits(IDS[:300])[-state_kind.KEPT :].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_narrowest_within_the_limit_is_chosen(goldens, monkeypatch):
    """Of a context shorter than the texts it is else measured on."""
    bundle, exact = goldens[5], _log_probabilities(goldens[5], "f32")
    nats = {}
    for kind in ("int8", "f16"):
        other = _log_probabilities(bundle, kind)
        nats[kind] = (np.exp(exact) * (exact - other)).sum(-1).mean()
    assert nats["int8"] > nats["f16"] > 0
    for limit, wanted in (
        (nats["int8"] * 1.1, "int8"),
        (nats["f16"] * 1.1, "f16"),
        (nats["f16"] * 0.9, "f32"),
    ):
        monkeypatch.setattr(state_kind, "LIMIT", limit)
        chosen = state_kind.choose(bundle, IDS, None, QUIET)
        assert chosen.kind == wanted and f"limit is {limit:g}" in chosen.reason
        for kind, measured in chosen.nats.items():
            assert measured[300] == pytest.approx(nats[kind], rel=0.06)
        assert list(chosen.nats) == [*STATE_KINDS[:2]][: 1 if wanted == "int8" else 2]


def test_what_is_not_measured_says_why(goldens, tmp_path):
    few = state_kind.choose(goldens[5], IDS[:299], None, QUIET)
    assert few.kind == "" and "300 tokens of text are too many" in few.reason
    asked = state_kind.choose(goldens[5], IDS, "int8", QUIET)
    assert (asked.kind, asked.reason) == ("int8", "asked for")
    none = state_kind.choose(goldens[0], IDS, "int8", QUIET)
    assert none.kind == "" and "--state int8 has no effect" in none.reason
    exact = Path(shutil.copytree(goldens[5], tmp_path / "exact.smoe"))
    manifest = open_bundle(exact).manifest
    backbone = dataclasses.replace(manifest.backbone, precision="f32")
    (exact / "manifest.json").write_text(dataclasses.replace(manifest, backbone=backbone).to_json())
    assert state_kind.choose(exact, IDS, None, QUIET).kind == "f32"
    with pytest.raises(PrepError, match="no state 'f8'; there are int8, f16, f32"):
        state_kind.refuse_unknown_kind("f8")


def test_a_build_writes_it_and_every_command_says_it(
    exports, smoe_prep, checkpoints, ids_file, tmp_path
):
    bundle = tmp_path / "b.smoe"
    options = ("--calibration", ids_file, "--encoding", "nested:2+1+1:32", "--quantiser", "nearest")
    options = (*options, "--self", 0, "--prices", 0, "--backbone", "int8")
    exports.begin(checkpoints("qwen3_moe"), bundle, Recipe("nested:2+1+1:32", "int8"))
    done = smoe_prep("build", checkpoints("qwen3_moe"), "-o", bundle, *options, "--json")
    assert done.returncode == 0, done.stderr
    said, manifest = json.loads(done.stdout), open_bundle(bundle).manifest
    kind = manifest.backbone.state_kind
    assert kind == said["state"] in STATE_KINDS and manifest.version == VERSION
    assert (
        manifest.provenance["state"].startswith(kind)
        and "256 tokens" in manifest.provenance["state"]
    )
    assert "state: int8 costs" in done.stderr
    wider = STATE_KINDS[STATE_KINDS.index(kind) :]
    for other in STATE_KINDS:
        with Engine.open(bundle, state=other) as engine:
            assert engine.lossless == (other in wider)
            assert ("LOSSY" in "\n".join(engine.mode_lines())) == (other not in wider)
    done = smoe_prep("build", checkpoints("qwen3_moe"), "-o", tmp_path / "x", "--state", "f8")
    assert done.returncode == 1 and "no state 'f8'" in done.stderr
