"""A damaged bundle behaves or is refused with a sentence: a few hundred of support/mutate.py's
mutations, with all experts resident and under every kind of policy. (`python -m bench soak
mutations` runs 10,000, in processes of their own.)"""

import os
import shutil
import signal
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mutate


def _too_long(*_):
    raise TimeoutError("20 seconds")


@pytest.mark.parametrize("policies", mutate.POLICIES, ids=str)
def test_the_bundle_of_this_version_behaves_under_every_policy(goldens, policies):
    assert mutate.outcome(goldens[-1], policies) == mutate.BEHAVED


# The same ones each time: of a thousand damaged graphs two compute for ever in ONNX Runtime 1.23
# (an Add in place of a Mul), which only a process of its own survives (bench soak mutations).
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_a_mutated_bundle_behaves_or_is_refused(goldens, seed):
    random = Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        os.mkfifo(Path(scratch) / "canary.xy")  # whoever reads outside the bundle would wait here
        bundle = Path(shutil.copytree(random.choice(goldens), Path(scratch) / "bundle"))
        mutate.mutate(bundle, random)
        previous = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(20)
        try:
            policies = random.choice(mutate.POLICIES)
            assert mutate.outcome(bundle, policies) in (mutate.BEHAVED, mutate.REFUSED)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
