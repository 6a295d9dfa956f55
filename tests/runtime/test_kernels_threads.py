"""What the kernels say where the system gives no more threads."""

import os
import subprocess
import sys

import pytest

from smoe.runtime import kernels

NATIVE = kernels.available() != ["reference"]

WITHOUT_THREADS = """
import resource, sys
import numpy as np
from smoe.artifacts import record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import ExpertActivation
from smoe.runtime import EngineError, kernels
shape = ExpertShape(512, 512)
layout = record_layout(shape, "f32", 4096)
layer = kernels.choose(threads=9).layer(ExpertActivation("gated", "silu"), shape, "f32", layout)
records, x = np.zeros((1, layout.nbytes), np.uint8), np.ones((1, 512), np.float32)
work = kernels.Work(np.array([0]), np.array([1]), np.array([0, 1]), np.array([0]))
pages = int(open("/proc/self/statm").read().split()[0])
unlimited = resource.getrlimit(resource.RLIMIT_AS)
room = pages * resource.getpagesize() + (12 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, unlimited[1]))
try:
    np.empty(64 << 20, np.uint8)
    print("not limited")
except MemoryError:
    pass
try:
    layer(records, work, x)
except EngineError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, unlimited)
assert not layer(records, work, x).any()
"""


@pytest.mark.skipif(not NATIVE or sys.platform != "linux", reason="native kernels on Linux")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="ASan needs the memory")
def test_a_thread_that_the_system_does_not_give_is_a_sentence():
    done = subprocess.run([sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("not limited"):
        pytest.skip("RLIMIT_AS holds nothing back here: an emulator")
    assert done.stdout.startswith("The system gives no thread more than")
