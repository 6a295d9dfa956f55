"""The device's description: what is measured, what is made of it, and what is no description."""

import dataclasses
import json

import numpy as np
import pytest

from smoe.artifacts import open_bundle
from smoe.runtime import EngineError
from smoe.runtime.device_profile import Device, measure_device

LAYERS = ((2e-3, 3e-3, 5e-3), (4e-3, 6e-3, 9e-3))
DEVICE = Device("b", 10**9, "direct", 1e-4, 1e9, 2e-3, LAYERS, (1000, 3000), "avx2")


def test_a_step_is_looked_up_between_what_was_measured():
    # computed, records, bytes; seconds: of computing at level 2 (2e-3 an expert), and of reading
    cases = [
        (2, 0, 0, 4e-3),
        (1, 0, 0, 2e-3),
        (0, 0, 0, 0),
        (2, 1, 3000, 4e-3 + 2e-3),
        (2, 2, 6000, 4e-3 + 5e-3),
        (2, 2, 2000, 4e-3 + 3e-3),  # two whole records of level 1
        (2, 1, 2000, 4e-3 + 1.5e-3),
        (1, 1, 500, 2e-3 + 0.75e-3),  # less than a level: on the same line
    ]
    computed, records, nbytes, wanted = map(np.array, zip(*cases, strict=True))
    assert np.allclose(DEVICE.step_seconds(computed, 2, records, nbytes), wanted)
    assert np.allclose(DEVICE.step_seconds(computed, 1, records, nbytes), wanted - computed * 1e-3)
    one = dataclasses.replace(DEVICE, layer_seconds=LAYERS[1:], record_bytes=(3000,))
    assert np.allclose(one.step_seconds(computed[:5], 1, records[:5], nbytes[:5]), wanted[:5])


@pytest.mark.parametrize("number", [0, 2])
def test_a_machine_is_measured_and_written_and_read_again(goldens, tmp_path, number):
    found = measure_device(goldens[number])
    levels = 4 if number else 1
    assert len(found.layer_seconds) == len(found.record_bytes) == levels and found.io in (
        "direct",
        "buffered",
    )
    rows = np.array(found.layer_seconds)
    k = max(layer.top_k for layer in open_bundle(goldens[number]).manifest.layers)
    assert (
        rows.shape == (levels, k + 1)
        and (np.diff(rows) >= 0).all()
        and (rows >= 0).all()
        and (rows < 1).all()
    )
    assert 0 <= found.read_latency < 1 and 0 < found.backbone_seconds < 1
    assert 1e6 < found.read_bandwidth < 1e12 and found.memory > 1e6
    (tmp_path / "d.json").write_text(found.to_json())
    assert Device.load(tmp_path / "d.json") == found


def _changed(**change) -> str:
    return json.dumps(dataclasses.asdict(DEVICE) | change)


@pytest.mark.parametrize("text, sentence", [
    ("", "no device description"),
    ("[]", "it needs backbone_seconds, bundle"),
    ("{}", "it needs backbone_seconds, bundle"),
    (_changed(more=1), "it needs"),
    (_changed(memory="lots"), "no device description"),
    (_changed(layer_seconds=3), "no device description"),
    (_changed(layer_seconds=[]), "a row for each of record_bytes"),
    (_changed(layer_seconds=[[1, 2], [1]]), "a row for each of record_bytes"),
    (_changed(layer_seconds=[[1], [1]]), "k \\+ 1 times"),
    (_changed(record_bytes=[3000, 1000]), "rise from level to level"),
    (_changed(record_bytes=[0, 1000]), "not zero"),
    (_changed(read_bandwidth=0), "not zero"),
    (_changed(backbone_seconds=0), "not zero"),
    (_changed(memory=float("inf")), "no device description"),
    (_changed(memory=10**30), "finite"),
    (_changed(record_bytes=[1000, float("inf")]), "no device description"),
    (_changed(read_latency=10**400), "no device description"),
    ("[" * 100_000, "no device description"),
    (_changed(read_latency=-1), "not negative"),
    (_changed(backbone_seconds=float("nan")), "finite"),
])  # fmt: skip
def test_what_is_no_description_is_a_sentence(tmp_path, text, sentence):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(EngineError, match=sentence):
        Device.load(tmp_path / "d.json")
    with pytest.raises(EngineError, match="no device description"):
        Device.load(tmp_path / "none.json")
