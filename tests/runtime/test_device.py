"""The device's description: what is measured, what is made of it, and what is no description."""

import dataclasses
import json

import numpy as np
import pytest

from smoe.runtime import EngineError
from smoe.runtime.device import Device, measure_device

DEVICE = Device("b", 10**9, "direct", 1e-4, 1e9, 2e-3, (1e-5, 2e-5), "avx2")


def test_a_step_is_the_longer_of_computing_and_reading():
    computed, records, nbytes = np.array([4e-3, 1e-5, 0, 8e-5]), np.array([1, 2, 0, 0]), np.array([10**6, 2 * 10**6, 0, 0])
    found = DEVICE.step_seconds(computed, records, nbytes)
    assert np.allclose(found, [4e-3, 1e-4 + 2e-3 + 2e-5, 0, 8e-5])


@pytest.mark.parametrize("number", [0, 2])
def test_a_machine_is_measured_and_written_and_read_again(goldens, tmp_path, number):
    found = measure_device(goldens[number])
    assert len(found.expert_seconds) == (4 if number else 1) and found.io in ("direct", "buffered")
    times = [found.read_latency, found.backbone_seconds, *found.expert_seconds]
    assert all(0 <= seconds < 1 for seconds in times) and found.backbone_seconds > 0 < min(found.expert_seconds)
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
    (_changed(expert_seconds=3), "no device description"),
    (_changed(expert_seconds=[]), "the bandwidth is not zero"),
    (_changed(read_bandwidth=0), "the bandwidth is not zero"),
    (_changed(read_latency=-1), "not negative"),
    (_changed(backbone_seconds=float("nan")), "finite"),
])  # fmt: skip
def test_what_is_no_description_is_a_sentence(tmp_path, text, sentence):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(EngineError, match=sentence):
        Device.load(tmp_path / "d.json")
    with pytest.raises(EngineError, match="no device description"):
        Device.load(tmp_path / "none.json")
