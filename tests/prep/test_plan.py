"""Plans: what the replay expects is what the engine does, wishes are granted or refused, and the
command says so."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from bench.budgets import budget_for_share
from smoe.artifacts import open_bundle, safetensors_file
from smoe.artifacts.encodings import record_layout
from smoe.prep.errors import PrepError
from smoe.prep.replay import plan as planning
from smoe.prep.replay.plan import Candidate, choose, plan
from smoe.runtime import Engine, Policies
from smoe.runtime.allowance import usual_process
from smoe.runtime.budget import plan_memory
from smoe.runtime.device_profile import Device
from smoe.runtime.options import tables_bytes
from smoe.runtime.sizes import MIB

DEVICE = Device(
    "",
    10**9,
    "direct",
    1e-4,
    1e8,
    2e-3,
    (tuple(4e-5 + m * 1e-3 for m in range(5)),),
    (10**5,),
    "avx2",
)
TOKENS = 220


@pytest.fixture(scope="module")
def budget(reference_bundle):
    """Bytes of a whole process on the device in which 40 % of the experts stay."""
    own = budget_for_share(reference_bundle, 0.4, 256)
    return own + usual_process(own, False) + MIB


@pytest.fixture(scope="module")
def short(reference_bundle):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planning, "TOKENS", TOKENS)
        patched.setattr(planning, "SETTLE", 10**6)  # count all of it
        yield


def _engine(bundle, budget, policies) -> dict:
    tokens = safetensors_file.load(bundle / "study" / "trace.safetensors")["tokens"][:TOKENS]
    beside = budget - usual_process(budget, False)
    with Engine.open(bundle, beside=beside, context=256, policies=policies) as engine:
        list(engine.score(tokens))
        return engine.stats.as_dict()


def test_what_is_expected_is_what_the_engine_does(reference_bundle, budget, short):
    found = {c.policies.loss: c for c in plan(reference_bundle, DEVICE, [budget], 256)}
    for loss, expected in found.items():
        policies = Policies(loss=loss, prefetch="none")
        stats = _engine(reference_bundle, budget, policies)
        held = plan_memory(
            open_bundle(reference_bundle),
            budget,
            256,
            None,
            tables_bytes(policies, open_bundle(reference_bundle)),
            usual_process(budget, False),
        )
        assert expected.resident == held.capacity and expected.memory == held.total <= budget
        # With shortcuts the real run's hidden states are a little others, and so is what its
        # routers choose.
        close = 1e-9 if loss == 0 else 0.1
        assert np.isclose(expected.bytes_per_token, stats["bytes_read"] / TOKENS, rtol=close)
        assert np.isclose(expected.loss, stats["nats_spent"] / TOKENS, rtol=close)
    assert list(found) == [0, 0.003, 0.01, 0.03]
    assert all(
        a.tokens_per_second < b.tokens_per_second for a, b in itertools.pairwise(found.values())
    )


def test_the_time_of_a_token_is_the_sum_of_its_steps(reference_bundle, short, budget):
    (lossless, *_) = plan(reference_bundle, DEVICE, [budget], 256)
    record = record_layout(*_experts(reference_bundle)).nbytes
    reads = lossless.bytes_per_token / record
    assert np.isclose(1 / lossless.tokens_per_second, 2e-3 + 6 * 4e-5 + reads * 1e-3, rtol=1e-6)
    everything = plan_memory(open_bundle(reference_bundle), None, 256).total
    (alone,) = plan(reference_bundle, DEVICE, [2 * everything], 256)
    assert alone.options == "" and np.isclose(alone.tokens_per_second, 1 / (2e-3 + 6 * 4e-5))


def _experts(bundle):
    manifest = open_bundle(bundle).manifest
    return manifest.expert_shape(0), manifest.experts.encoding, manifest.experts.page


def test_smoe_is_planned_by_alpha(reference_bundle, short, budget):
    found = plan(reference_bundle, DEVICE, [budget], 256, smoe=True)
    assert [c.options for c in found][:2] == [
        "--eviction score --substitution smoe:0.1",
        "--eviction score --substitution smoe:0.25",
    ]
    assert all(
        a.bytes_per_token >= b.bytes_per_token and a.loss <= b.loss
        for a, b in itertools.pairwise(found)
    )
    assert found[-1].loss > 0.005


def _candidate(speed, loss, size=1) -> Candidate:
    return Candidate(size, 0, 4, 9, 0, Policies(loss=loss or 0), speed, loss, 0.5, 1.0)


def test_wishes():
    slow, fast, faster = _candidate(10, 0.0), _candidate(20, 0.003), _candidate(30, 0.02)
    unknown = _candidate(99, None)
    every = [faster, unknown, slow, fast]
    assert (
        choose(every, 15, None) == fast
        and choose(every, 5, None) == slow
        and choose(every, None, 0.01) == fast
    )
    assert (
        choose(every, None, 0) == slow
        and choose([*every, _candidate(10, 0.0, 0)], 5, None).memory == 0
    )
    over = dataclasses.replace(
        fast, loss=0.0031
    )  # a short replay may end above what its account allows
    assert choose([slow, over], None, 0.003) == over
    with pytest.raises(
        PrepError,
        match="31 tokens per second are out of reach; the fastest way gives 30.0 .without prices",
    ):
        choose(every, 31, None)
    with pytest.raises(PrepError, match="has no prices"):
        choose([unknown], 31, None)
    with pytest.raises(PrepError, match="within 0.001 nats"):
        choose([faster, unknown], None, 0.001)


def test_the_command(reference_bundle, smoe_prep, tmp_path, budget):
    (tmp_path / "d.json").write_text(DEVICE.to_json())
    common = ("plan", reference_bundle, "--machine", tmp_path / "d.json", "--context", "256")
    done = smoe_prep(*common, "--memory", str(budget), "--loss", "0.01")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"smoe run {reference_bundle} --memory ") and last.endswith(
        " --context 256 --loss 0.01"
    )
    done = smoe_prep(*common, "--memory", str(budget), "--speed", "1e9")
    assert done.returncode == 1 and "out of reach" in done.stderr and "Traceback" not in done.stderr
    done = smoe_prep(*common, "--speed", "1", "--loss", "0.01")
    assert done.returncode == 2 and "the other one follows" in done.stderr
    done = smoe_prep(*common, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and len(found["candidates"]) == 1 and found["chosen"] is None
    (tmp_path / "d.json").write_text(
        dataclasses.replace(
            DEVICE, layer_seconds=DEVICE.layer_seconds * 2, record_bytes=(1, 2)
        ).to_json()
    )
    done = smoe_prep(*common)
    assert done.returncode == 1 and "experts of 2 levels" in done.stderr
