"""The reader and the cache by every order of request, guess, arrival, error, withdrawal, interrupt
and close.

No threads: a script says what happens next, where threads would leave it to chance.
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parts import accounted, placed

from smoe.runtime import EngineError
from smoe.runtime.cache.cache import ExpertCache
from smoe.runtime.cache.eviction import NextUse, eviction_named
from smoe.runtime.cache.frames import Frames
from smoe.runtime.cache.reader import Load, Reader
from smoe.runtime.cache.residency import Residency
from smoe.runtime.stats import Stats

EXPERTS = [4, 4]
SIZES = [np.array([0, 3, 5, 6])] * 2  # bytes of the first planes
WHOLE = 6
Groups = list[tuple[int, int, int]]  # expert, level, tokens
ACTIONS = ("read", "begin", "end", "fail", "guess", "forget", "interrupt", "close")


class ByHand(Reader):
    """Nobody reads but the script, which goes on whenever the cache waits."""

    script: "Script"

    def serve(self) -> bool:
        return False

    def wait(self, loads) -> bool:
        self.changed.wait = self._go_on
        return super().wait(loads)

    def _go_on(self, timeout: float | None = None) -> None:
        happened = self.script.go_on()
        assert happened or self.refused, "This would wait for ever."


class Script:
    """What happens next, by the numbers of `ACTIONS`; after the last of them all is read."""

    def __init__(self, actions: list[int], capacity: int):
        self.actions = actions[::-1]
        self.failing = False
        self.reading: list[Load] = []
        self.residency = Residency(EXPERTS, capacity, NextUse(EXPERTS), [s[1:] for s in SIZES])
        self.frames = Frames(len(self.residency.frame_bytes), WHOLE, capacity)
        self.made: list[ByHand] = []
        self.cache = ExpertCache(
            self.residency, self.frames, self.read, 2, Stats(), threads=0, make_reader=self.make
        )
        (self.reader,) = self.made

    def make(self, *how) -> ByHand:
        self.made.append(ByHand(*how))
        self.made[0].script = self
        return self.made[0]

    def read(self, layer: int, expert: int, into: np.ndarray, since: int, level: int) -> int:
        if self.failing:
            raise OSError("the disk is gone")
        start, end = SIZES[layer][since], SIZES[layer][level]
        into[start:end] = content(layer, expert)[start:end]
        return int(end - start)

    def go_on(self) -> bool:
        """One event; whether there was one."""
        self.check()
        action = ACTIONS[self.actions.pop()] if self.actions else "read"
        if action == "interrupt":
            raise KeyboardInterrupt
        if action == "close":
            self.end_all()
            self.reader.close()
        elif action in ("guess", "forget"):
            self.cache.expect([(1, 3), (0, 2), (1, 0)] if action == "guess" else [])
        elif action == "begin":
            return self.begin() or bool(self.reading)
        elif action == "read":
            self.begin()
            return self.end()
        else:
            return self.end(failing=action == "fail") or self.begin()
        return True

    def begin(self) -> bool:
        load = self.reader.take() if len(self.reading) < 2 else None
        if load is None:
            return False
        self.reading.append(load)
        return True

    def end(self, failing: bool = False) -> bool:
        if not self.reading:
            return False
        self.failing = failing
        self.reader.finish(self.reading.pop())  # the last first
        self.failing = False
        return True

    def end_all(self) -> None:
        while self.end():
            pass

    def check(self) -> None:
        assert self.residency.total == self.residency.frame_bytes.sum()
        assert self.residency.total <= self.residency.capacity
        if not any(load.claimed for load in self.reader.loads()):
            assert accounted(self.residency, SIZES)
        assert placed(self.residency) or not self.cache.still

    def step(self, layer: int, groups: Groups) -> list[tuple[int, int]]:
        """What a step does; every group comes once, with its planes, which stay until it was used.
        In which order groups came."""
        experts, levels, tokens = np.array(groups).T
        self.cache.observe(layer, np.unique(experts)[None], None)
        given: list[int] = []
        bring = self.cache.bring(layer, experts, levels, tokens)
        try:
            for ready in bring:
                given += ready.tolist()
                if self.actions:
                    self.go_on()
                for expert, level, _ in [groups[i] for i in ready]:
                    frame = self.residency.find((layer, expert))
                    end = SIZES[layer][level]
                    record = content(layer, expert)[:end]
                    assert np.array_equal(self.frames.rows[frame, :end], record)
        finally:
            bring.close()
        assert sorted(given) == list(range(len(groups)))
        return [groups[i][:2] for i in given]


def content(layer: int, expert: int) -> np.ndarray:
    return np.arange(WHOLE, dtype=np.uint8) + 50 * layer + 7 * expert + 1


def at(level: int, experts: list[int]) -> Groups:
    """One token each."""
    return [(expert, level, 1) for expert in experts]


def groups_of(experts: int):
    """Some experts at some levels, rising, each for some tokens."""
    keys = st.tuples(st.integers(0, experts - 1), st.integers(1, 3))
    counts = st.dictionaries(keys, st.integers(1, 5), min_size=1, max_size=2 * experts)
    return counts.map(lambda counts: sorted((*key, tokens) for key, tokens in counts.items()))


steps = st.lists(groups_of(4), min_size=1, max_size=4)  # the layers take turns


@settings(max_examples=400, deadline=None)
@given(steps, st.lists(st.integers(0, len(ACTIONS) - 1), max_size=30), st.integers(WHOLE, 26))
def test_every_order_of_events_gives_every_group_once_or_a_sentence(wanted, actions, capacity):
    script = Script(actions, capacity)
    for number, groups in enumerate(wanted):
        try:
            script.step(number % 2, groups)
        except KeyboardInterrupt:
            continue
        except EngineError as error:
            said = str(error)
            assert "is closed" in said or "the disk is gone" in said, said
            assert "is closed" not in said or script.reader.closed
    script.actions = []
    script.end_all()
    script.check()
    if not script.reader.closed:  # all of it lives on
        for layer in (0, 1):
            script.step(layer, at(3, [0, 1, 2, 3]))
        script.cache.expect([])
        script.end_all()
        assert not script.reader.loads()
    script.reader.close()
    assert accounted(script.residency, SIZES) and not script.reader.loads()


def test_a_step_that_is_overtaken_while_it_is_paused_goes_on():
    """A prompt's reads fill all frames; a step in between gets its own, and the prompt goes on."""
    script = Script([], capacity=10)
    prompt = script.cache.bring(0, np.arange(4), np.full(4, 2), np.ones(4, np.int64))
    next(prompt)  # nothing is there: all is asked for
    while script.begin():
        pass
    assert len(script.reading) == 2 and script.residency.total == 10
    script.step(1, at(2, [0, 1, 2]))
    given = [i for ready in prompt for i in ready.tolist()]
    assert sorted(given) == [0, 1, 2, 3]
    script.end_all()
    assert accounted(script.residency, SIZES)


def test_a_step_waits_where_a_guess_that_is_being_read_holds_the_only_frame():
    # It is tried, and refused, twice before the guess ends.
    script = Script([ACTIONS.index("begin")] * 2, capacity=WHOLE)
    script.cache.expect([(1, 3)])
    assert script.begin()
    script.step(0, at(2, [0]))
    assert script.residency.level((0, 0)) == 2 and len(script.residency) == 1


# -- in which order planes are read ----------------------------------------------------------------


def queues(groups: Groups) -> list[tuple[int, int]]:
    """D²MoE's schedule of what `groups` need where nothing is there: of the heads of all experts'
    queues of planes always the one that most tokens need; of equals the lower planes, then the
    expert of the lower number. Planes that nobody wants apart are one entry."""
    needed = {
        (expert, level): sum(n for e, upper, n in groups if e == expert and upper >= level)
        for expert, level, _ in groups
    }
    waiting = {expert: sorted(k for k in needed if k[0] == expert) for expert, _ in needed}
    order = []
    while any(waiting.values()):
        heads = [queue[0] for queue in waiting.values() if queue]
        head = min(heads, key=lambda key: (-needed[key], key[1], key[0]))
        order.append(waiting[head[0]].pop(0))
    return order


class Disk:
    """One reading thread that begins once all is asked for: what it read, in order."""

    def __init__(self, experts: int, capacity: int, order: str, eviction: str = "next-use"):
        self.read: list[tuple[int, int, int]] = []  # expert, planes before, planes after
        sizes = [SIZES[0][1:]]
        self.residency = Residency([experts], capacity, eviction_named(eviction, [experts]), sizes)
        self.cache = ExpertCache(
            self.residency, None, self._fetch, 2, Stats(), threads=1, order=order
        )

    def _fetch(self, layer: int, expert: int, into: np.ndarray, since: int, level: int) -> int:
        self.read.append((expert, since, level))
        return int(SIZES[0][level] - SIZES[0][since])

    def bring(self, groups: Groups) -> list[tuple[int, int]]:
        experts, levels, tokens = np.array(groups).T
        ready = list(self.cache.bring(0, experts, levels, tokens))
        self.cache.close()
        return [groups[i][:2] for part in ready for i in part]


@settings(max_examples=100, deadline=None)
@given(groups_of(7))
def test_the_planes_that_most_tokens_wait_for_are_read_first(groups):
    disk = Disk(7, 7 * WHOLE, "hottest")
    assert sorted(disk.bring(groups)) == [group[:2] for group in groups]
    assert [(expert, level) for expert, _, level in disk.read] == queues(groups)


@settings(max_examples=50, deadline=None)
@given(groups_of(7))
def test_or_one_expert_after_another(groups):
    disk = Disk(7, 7 * WHOLE, "expert")
    assert sorted(disk.bring(groups)) == [group[:2] for group in groups]
    assert [(expert, level) for expert, _, level in disk.read] == [g[:2] for g in groups]


def test_a_read_ends_where_somebody_wants_fewer_planes_and_nowhere_else():
    disk = Disk(3, 3 * WHOLE, "hottest")
    disk.bring([(0, 3, 1), (1, 1, 1), (1, 3, 4), (2, 2, 3)])
    assert disk.read == [(1, 0, 1), (1, 1, 3), (2, 0, 2), (0, 0, 3)]


@settings(max_examples=100, deadline=None)
@given(groups_of(9), st.integers(1, 9))
def test_where_room_is_scarce_every_plane_is_still_read_once(groups, room):
    """Or a second time, where it had to go before it was wanted; in any case within the memory."""
    disk = Disk(9, room * WHOLE, "hottest")
    assert sorted(disk.bring(groups)) == [group[:2] for group in groups]
    assert disk.residency.total <= disk.residency.capacity
    assert [(e, level) for e, _, level in sorted(disk.read)] == [group[:2] for group in groups]
