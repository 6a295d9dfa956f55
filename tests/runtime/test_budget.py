"""What is allowed where no memory is stated: all experts where they fit, what the machine leaves
where they do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, system
from smoe.runtime.budget import RESERVE, default_budget, memory_for, plan_memory

MIB = 1 << 20


@given(st.integers(0, 1 << 40), st.one_of(st.none(), st.integers(0, 1 << 40)))
def test_the_default_leaves_a_reserve_of_what_is_spare(whole, spare):
    budget = default_budget(whole, spare)
    if spare is None:
        assert budget is None  # the system does not say
    elif budget is None:
        assert whole <= spare - spare // RESERVE
    else:
        assert budget == spare - spare // RESERVE < whole


def test_without_a_budget_an_engine_takes_what_the_machine_leaves(golden, monkeypatch):
    opened = open_bundle(golden)
    for experts, held in ((14, 14), (6, 6)):
        room = plan_memory(opened, None, 300).total
        if experts < 14:
            room = memory_for(opened, experts, 300)
        spare = -(-room * RESERVE // (RESERVE - 1))
        monkeypatch.setattr(system, "spare_memory", lambda budget, spare=spare: spare - budget)
        with Engine.open(golden, context=300) as engine:
            assert engine.plan.capacity == held
    monkeypatch.setattr(system, "spare_memory", lambda budget: 5 * MIB)
    with pytest.raises(EngineError, match="too small: this bundle needs at least"):
        Engine.open(golden, context=300)
    monkeypatch.setattr(system, "spare_memory", lambda budget: None)
    with Engine.open(golden, context=300) as engine:
        assert engine.plan.capacity == 14


class Cgroup:
    """A memory cgroup of version 1 or 2, below that of this process; an `OSError` where none can be
    made."""

    def __init__(self):
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        names = {kinds: name.lstrip("/") for _, kinds, name in lines}
        first = "memory" in names
        root = Path("/sys/fs/cgroup/memory" if first else "/sys/fs/cgroup")
        self.folder = root / names["memory" if first else ""] / f"smoe-test-{os.getpid()}"
        self.folder.mkdir()
        self.limit = self.folder / ("memory.limit_in_bytes" if first else "memory.max")
        if not self.limit.exists():
            self.folder.rmdir()
            raise OSError("the memory controller is not there")

    def enter(self) -> None:
        """Called by the child that goes in."""
        (self.folder / "cgroup.procs").write_text("0")


@pytest.fixture
def cgroup():
    try:
        group = Cgroup()
    except (OSError, KeyError) as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    group.folder.rmdir()


SCRIPT = """
import json, sys
from pathlib import Path
from smoe.artifacts import open_bundle
from smoe.runtime import Engine
from smoe.runtime.budget import RESERVE, memory_for, plan_memory

bundle, limit = sys.argv[1], Path(sys.argv[2])
plan = plan_memory(open_bundle(bundle), None, 300)
room = memory_for(open_bundle(bundle), 7, 300)
spare = room * RESERVE // (RESERVE - 1) + plan.record
fields = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
used = int(fields.get("total_rss", fields.get("anon", 0)))
limit.write_text(str(used + spare))
with Engine.open(bundle, context=300) as engine:
    tokens = [token.id for token in engine.generate([1, 2, 3], max_new_tokens=4)]
    print(json.dumps([engine.plan.capacity, engine.plan.total, spare, tokens]))
"""


def test_in_a_memory_cgroup_the_default_is_what_its_limit_leaves(golden, cgroup):
    """Not all experts fit below the limit: the engine takes fewer, says the same, and is not
    killed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(golden), str(cgroup.limit)],
        preexec_fn=cgroup.enter,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    capacity, total, spare, tokens = json.loads(done.stdout)
    assert 3 <= capacity <= 10 and total <= spare
    with Engine.open(golden, context=300) as engine:
        assert tokens == [token.id for token in engine.generate([1, 2, 3], max_new_tokens=4)]
