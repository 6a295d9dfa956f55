"""The memory of a process: what it is where nothing is stated, and that it keeps to what is."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import promise

from bench import cgroup
from smoe.artifacts import open_bundle
from smoe.runtime.budget import (
    RESERVE,
    default_budget,
    memory_for,
    plan_memory,
)
from smoe.runtime.sizes import MIB

REASON = cgroup.unavailable()
limited = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_the_default_leaves_a_reserve_of_what_is_there(whole, room):
    budget = default_budget(whole, room)
    if budget is None:
        assert whole <= room - room // RESERVE
    else:
        assert budget == room - room // RESERVE < whole


@given(st.integers(0, 1 << 40), st.integers(3, 14))
def test_what_the_process_holds_takes_nothing_from_experts_that_are_paid_for(golden, held, experts):
    opened = open_bundle(golden)
    alone = memory_for(opened, experts, 300)
    assert plan_memory(opened, alone, 300).capacity == experts
    both = plan_memory(opened, alone + held, 300, process=held)
    assert both.capacity == experts and both.total <= alone + held
    assert both.minimum >= plan_memory(opened, None, 300).minimum + held


def test_what_the_process_holds_before_is_counted(golden):
    # In a process of its own: what others freed in this one would be there for the ballast.
    code = """
import sys
from smoe.runtime import Engine
with Engine.open(sys.argv[1], memory="8GiB", context=300) as engine:
    before = engine.plan.process
ballast = b"1" * (40 << 20)
with Engine.open(sys.argv[1], memory="8GiB", context=300) as engine:
    print(engine.plan.process - before, engine.plan.process)
    print(engine.plan.lines()[0])
"""
    done = subprocess.run([sys.executable, "-c", code, golden], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures, line = done.stdout.splitlines()
    more, held = map(int, figures.split())
    assert abs(more - 40 * MIB) < 8 * MIB
    assert f"process {held / MIB:.1f}MiB" in line


def test_what_a_closed_engine_leaves_is_counted_once(golden):
    code = """
import json, sys
from smoe.runtime import Engine
least = int(sys.argv[2])
plans = []
for _ in range(4):
    with Engine.open(sys.argv[1], memory=least, context=300) as engine:
        list(engine.generate([1, 2, 3], max_new_tokens=200))
        plans.append(engine.plan.process)
print(json.dumps(plans))
"""
    info = [sys.executable, "-m", "smoe.runtime", "info", golden, "--context", "300", "--json"]
    least = json.loads(subprocess.run(info, capture_output=True, check=True).stdout)
    arguments = [sys.executable, "-c", code, golden, str(least["memory_minimum"])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plans = json.loads(done.stdout)
    # Counted twice it would be more by what an engine leaves, some 20 MiB.
    assert max(plans) - min(plans) < 4 * MIB, plans


@limited
@pytest.mark.parametrize("version", [1, 6])  # the latter without ONNX Runtime
def test_a_stated_memory_is_kept_in_a_cgroup_of_just_that(goldens, version):
    golden = goldens[version - 1]
    alone = plan_memory(open_bundle(golden), None, 300)
    info = [sys.executable, "-m", "smoe.runtime", "info", golden, "--context", "300", "--json"]
    said = json.loads(subprocess.run(info, capture_output=True, check=True).stdout)
    assert said["memory_minimum"] > alone.minimum + 20 * MIB
    told = promise.kept(golden, said["memory_minimum"], 300, 200)
    assert len({run["logits"] for run in told}) == 1
