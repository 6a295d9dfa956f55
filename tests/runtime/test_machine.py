"""What machine and control groups leave: read from written files for both versions, and seen from
inside real groups, quotas and affinities."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cgroup
from smoe.runtime import Engine, EngineError, machine
from smoe.runtime.budget import RESERVE
from smoe.runtime.machine import Processors, Room, held_memory, memory_room, processors

MIB = 1 << 20
REASON = cgroup.unavailable()
limited = pytest.mark.skipif(REASON is not None, reason=REASON or "")


# -- written files -----------------------------------------------------------------------


class Proc:
    """A machine with 1000 MiB to give and a process that holds 50 MiB of its own and 20 of files,
    with control groups mounted in a folder."""

    def __init__(self, folder: Path):
        self.proc, self.groups = folder / "proc", folder / "a group"
        (self.proc / "self").mkdir(parents=True)
        self.write("meminfo", f"MemTotal: 9 kB\nMemAvailable: {1000 << 10} kB\n")
        self.write("self/status", f"RssAnon: {40 << 10} kB\nRssShmem: {10 << 10} kB\n")
        self.write("self/smaps_rollup", f"00-ff [rollup]\nRss:   {70 << 10} kB\n")
        self.mounts: list[str] = []
        self.write("self/cgroup", "")

    def write(self, name: str, text: str) -> None:
        (self.proc / name).write_text(text)

    def mount(self, kind: str, settings: str, name: str, root: str = "/") -> Path:
        """The folder in which the hierarchy is seen; this process is in the group `name` of it."""
        place = self.groups / f"{kind}-{settings}"
        place.mkdir(parents=True)
        shown = str(place).replace(" ", r"\040")
        self.mounts.append(f"9 1 0:9 {root} {shown} rw,nosuid shared:4 - {kind} none rw,{settings}")
        self.write("self/mountinfo", "8 1 8:1 / / rw - ext4 /dev/a rw\n" + "\n".join(self.mounts))
        controllers = "" if kind == "cgroup2" else settings
        with open(self.proc / "self/cgroup", "a") as file:
            file.write(f"4:{controllers}:{name}\n")
        return place


@pytest.fixture
def proc(tmp_path):
    return Proc(tmp_path)


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


STAT2 = f"anon {60 * MIB}\nfile {90 * MIB}\nshmem {5 * MIB}\nslab_unreclaimable {MIB}\n"
STAT1 = f"rss 1\ntotal_rss {60 * MIB}\ntotal_cache {90 * MIB}\ntotal_shmem {6 * MIB}\n"


def test_without_groups_the_room_is_what_the_machine_gives(proc):
    assert memory_room(proc.proc) == Room(1050 * MIB, "this machine")
    assert held_memory(proc.proc) == 70 * MIB
    proc.write("meminfo", "MemFree: 5 kB\n")
    assert memory_room(proc.proc) is None
    assert memory_room(proc.proc / "none") is None


@pytest.mark.parametrize("limit", ["memory__max", "memory__high"])
def test_version_2_counts_what_cannot_be_reclaimed(proc, limit):
    place = proc.mount("cgroup2", "nsdelegate", "/user/app")
    _group(place / "user/app", memory__stat=STAT2, **{limit: f"{200 * MIB}\n"})
    # 66 MiB cannot be reclaimed, of which 50 are this process's own
    assert memory_room(proc.proc) == Room(184 * MIB, "this container")
    _group(place / "user", memory__max=f"{180 * MIB}\n", memory__stat=STAT2)
    assert memory_room(proc.proc).nbytes == 164 * MIB, "an outer group may leave less"
    _group(place / "user", memory__max="max\n")
    assert memory_room(proc.proc).nbytes == 184 * MIB


def test_version_1_counts_a_group_with_those_below_it(proc):
    place = proc.mount("cgroup", "memory", "/docker/abc")
    _group(place / "docker/abc", memory__limit_in_bytes=f"{200 * MIB}\n", memory__stat=STAT1)
    assert memory_room(proc.proc) == Room(184 * MIB, "this container")
    _group(place / "docker/abc", memory__limit_in_bytes="9223372036854771712\n")
    assert memory_room(proc.proc).keeper == "this machine"


@pytest.mark.parametrize("name", ["/docker/abc", "/", "/../elsewhere"])
def test_a_container_sees_its_own_group_as_the_outermost(proc, name):
    """Mounted at its own group, whatever it calls that."""
    place = proc.mount("cgroup2", "", name, root=name if name != "/../elsewhere" else "/")
    _group(place, memory__max=f"{200 * MIB}\n", memory__stat=STAT2, cpu__max="50000 100000\n")
    assert memory_room(proc.proc).nbytes == 184 * MIB
    assert processors(proc.proc).count == 1


def test_what_came_into_the_group_later_is_not_counted_twice(proc):
    place = proc.mount("cgroup2", "", "/new")
    _group(place / "new", memory__max=f"{200 * MIB}\n", memory__stat="anon 0\nfile 0\n")
    assert memory_room(proc.proc).nbytes == 200 * MIB


@pytest.mark.parametrize("text", ["", "max\n", "garbage\n", "-1\n"])
def test_files_that_say_nothing_limit_nothing(proc, text):
    place = proc.mount("cgroup2", "", "/app")
    _group(place / "app", memory__max=text.replace("-1", "x"), cpu__max=text, memory__stat=text)
    assert memory_room(proc.proc).keeper == "this machine"
    assert processors(proc.proc, proc.proc).count == len(os.sched_getaffinity(0))
    proc.write("self/mountinfo", text)
    proc.write("self/cgroup", text)
    assert memory_room(proc.proc).keeper == "this machine"


@pytest.mark.parametrize(("quota", "count"), [
    (10_000, 1), (100_000, 1), (150_000, 1), (199_999, 2),
])  # fmt: skip
def test_quotas_of_both_versions_count(proc, quota, count, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert processors(proc.proc, proc.proc) == Processors(64, "as many as there are processors")
    place = proc.mount("cgroup2", "", "/a/b")
    _group(place / "a/b", cpu__max="max 100000\n")
    assert processors(proc.proc, proc.proc).count == 64
    _group(place / "a", cpu__max="3200000 100000\n")
    assert processors(proc.proc) == Processors(32, "a quota of 32 processors")
    place = proc.mount("cgroup", "cpu,cpuacct", "/c")
    _group(place / "c", cpu__cfs_quota_us=f"{quota}\n", cpu__cfs_period_us="100000\n")
    there = processors(proc.proc)
    assert (there.count, there.reason) == (count, f"a quota of {quota / 1e5:.3g} processors")
    _group(place / "c", cpu__cfs_quota_us="-1\n")
    assert processors(proc.proc).count == 32


def test_processors_of_one_core_count_once(proc, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert processors(proc.proc, tmp_path) == Processors(4, "as many as there are cores")
    assert processors(proc.proc, tmp_path / "none").count == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4})
    there = processors(proc.proc, tmp_path)
    assert there == Processors(2, "allowed 3 of 8 processors, 2 cores")
    _group(proc.mount("cgroup2", "", "/a") / "a", cpu__max="150000 100000\n")
    assert processors(proc.proc, tmp_path) == Processors(1, "a quota of 1.5 processors")


# -- the real thing ----------------------------------------------------------------------


SHORT = ("--ids", "--max-new-tokens", "4")


def _smoe(*arguments: object, **how) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "smoe.runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **how)


@contextlib.contextmanager
def _quota(microseconds: int):
    """A group below this process's own that gives so much of a processor in every tenth of a
    second; what puts a process into it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    names = {kinds: name.lstrip("/") for _, kinds, name in (line.split(":", 2) for line in lines)}
    first = next((kinds for kinds in names if "cpu" in kinds.split(",")), None)
    root = Path("/sys/fs/cgroup") / (first or "")
    folder = root / names.get(first or "", "") / f"smoe-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no group for processors can be made here: {error}")
    try:
        try:
            if first:
                (folder / "cpu.cfs_period_us").write_text("100000")
                (folder / "cpu.cfs_quota_us").write_text(str(microseconds))
            else:
                (folder / "cpu.max").write_text(f"{microseconds} 100000")
        except OSError as error:
            pytest.skip(f"no quota can be set here: {error}")
        yield lambda: (folder / "cgroup.procs").write_text("0")
    finally:
        folder.rmdir()


def test_under_a_real_quota_no_more_threads_are_made(golden):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor only")
    with _quota(100_000) as enter:
        done = _smoe("run", golden, "1 2", *SHORT, preexec_fn=enter)
    assert done.returncode == 0, done.stderr
    assert "up to 1 threads (a quota of 1 processors)" in done.stderr
    with _quota(100_000) as enter:
        done = _smoe("run", golden, "1", *SHORT, "--threads", 2, preexec_fn=enter)
    assert "up to 2 threads (asked for)" in done.stderr


def test_an_affinity_counts(golden):
    able = sorted(os.sched_getaffinity(0))
    if len(able) < 2:
        pytest.skip("one processor only")
    done = _smoe(
        "run", golden, "1 2", *SHORT,
        preexec_fn=lambda: os.sched_setaffinity(0, able[:1]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"up to 1 threads (allowed 1 of {os.cpu_count()} processors)" in done.stderr


@pytest.mark.parametrize("command", ["run", "bench", "chat"])
def test_where_little_is_left_it_is_said_and_nobody_is_killed(golden, tmp_path, command):
    """Without --memory, inside real limits from what holds no bundle on."""
    if REASON:
        pytest.skip(REASON)
    (tmp_path / "text").write_text("some text to measure on " * 20)
    rest = {
        "run": ("x", "--max-new-tokens", "4"),
        "bench": ("--text", str(tmp_path / "text"), "--tokens", "16"),
        "chat": (),
    }[command]
    arguments = [sys.executable, "-m", "smoe.runtime", command, str(golden), *rest]
    ran = []
    for limit in (48, 60, 80, 96, 140):
        with cgroup.Group("machine", limit * MIB) as group:
            done = group.run(arguments, timeout=60)
        assert not done.killed and done.code in (0, 1), (limit, done.err)
        ran.append(done.code == 0)
        if done.code:
            assert "What this container leaves, " in done.err and "less a reserve of" in done.err
            assert "needs at least" in done.err and "Traceback" not in done.err
        elif command != "chat":
            assert "that this container leaves" in done.err, done.err
    assert ran == sorted(ran) and not ran[1] and ran[-1], "from a limit on it runs"


@limited
def test_a_budget_beyond_the_limit_is_said(golden):
    arguments = [sys.executable, "-m", "smoe.runtime", "run", str(golden), "1", *SHORT]
    with cgroup.Group("machine", 160 * MIB) as group:
        done = group.run([*arguments, "--memory", "4GiB"])
    assert done.code == 0 and "of 4096.0MiB stated, though this container leaves 1" in done.err


def test_the_machine_is_asked_where_nothing_is_stated(golden, monkeypatch):
    plenty = Room(1 << 40, "this machine")
    monkeypatch.setattr(machine, "memory_room", lambda: plenty)
    with Engine.open(golden, context=300) as engine:
        assert engine.plan.capacity == 14 and engine.plan.budget is None
        assert "of 1048576.0MiB that this machine leaves: process " in engine.plan.lines()[0]
        needed = engine.plan.total
    enough = -(-needed * RESERVE // (RESERVE - 1)) + 64 * MIB
    monkeypatch.setattr(machine, "memory_room", lambda: Room(enough, "this container"))
    with Engine.open(golden, context=300) as engine:
        assert engine.plan.total <= enough - enough // RESERVE
    monkeypatch.setattr(machine, "memory_room", lambda: Room(30 * MIB, "this container"))
    with pytest.raises(EngineError, match="leaves, 30.0MiB less a reserve of .* context.$"):
        Engine.open(golden, context=300)
    monkeypatch.setattr(machine, "memory_room", lambda: None)
    with Engine.open(golden, context=300) as engine:
        assert "this system does not say what it leaves" in engine.plan.lines()[0]


def test_the_reserve_is_offered_where_it_is_enough(golden, monkeypatch):
    monkeypatch.setattr(machine, "held_memory", lambda: 100 * MIB)
    monkeypatch.setattr(machine, "memory_room", lambda: None)
    with Engine.open(golden, context=300) as engine:
        least = engine.plan.minimum + MIB
    monkeypatch.setattr(machine, "memory_room", lambda: Room(least, "this container"))
    with pytest.raises(EngineError, match=r"; --memory .* takes the reserve, too\.") as refused:
        Engine.open(golden, context=300)
    memory = re.search(r"--memory (\S+)", str(refused.value))[1]
    Engine.open(golden, context=300, memory=memory).close()


def test_where_the_system_does_not_say_what_a_process_holds_the_mode_line_does(golden, monkeypatch):
    monkeypatch.setattr(machine, "held_memory", lambda: None)
    with Engine.open(golden, memory="1GiB", context=300) as engine:
        assert "of which this system does not say what they hold" in engine.plan.lines()[0]
        assert engine.plan.process < 8 * MIB


def test_info_says_the_least_and_the_most_of_a_process(golden):
    said = json.loads(_smoe("info", golden, "--json", "--context", 100).stdout)
    least, most = said["memory_minimum"], said["memory_all_resident"]
    assert 20 * MIB < said["memory_process"] < least
    for memory, experts in ((least, 3), (most + 8 * MIB, 14)):
        options = ("--ids", "--json", "--context", 100, "--max-new-tokens", 2, "--memory", memory)
        done = _smoe("run", golden, "1 2", *options)
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)["memory"]
        assert plan["resident_experts"] >= experts and plan["total"] <= memory
