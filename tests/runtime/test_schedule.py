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
from smoe.runtime.cache.eviction import NextUse
from smoe.runtime.cache.frames import Frames
from smoe.runtime.cache.reader import Load, Reader
from smoe.runtime.cache.residency import Residency
from smoe.runtime.stats import Stats

EXPERTS = [4, 4]
SIZES = [np.array([0, 3, 5])] * 2  # bytes of the first planes
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
        self.frames = Frames(len(self.residency.frame_bytes), 5, capacity)
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

    def step(self, layer: int, experts: list[int], level: int) -> None:
        """What a step does; every expert comes once, whole, and stays until it was used."""
        wanted = np.array(experts)
        self.cache.observe(layer, wanted[None], None)
        given: list[int] = []
        levels, tokens = np.full(len(wanted), level), np.ones(len(wanted), np.int64)
        bring = self.cache.bring(layer, wanted, levels, tokens)
        try:
            for ready in bring:
                given += ready.tolist()
                if self.actions:
                    self.go_on()
                for expert in wanted[ready].tolist():
                    frame = self.residency.find((layer, expert))
                    end = SIZES[layer][level]
                    record = content(layer, expert)[:end]
                    assert np.array_equal(self.frames.rows[frame, :end], record)
        finally:
            bring.close()
        assert sorted(given) == list(range(len(wanted)))


def content(layer: int, expert: int) -> np.ndarray:
    return np.arange(5, dtype=np.uint8) + 50 * layer + 7 * expert + 1


@st.composite
def steps(draw) -> list[tuple[int, list[int], int]]:
    """(layer, experts, level), the layers taking turns."""
    experts = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(sorted)
    count = draw(st.integers(1, 4))
    return [(i % 2, draw(experts), draw(st.integers(1, 2))) for i in range(count)]


@settings(max_examples=400, deadline=None)
@given(steps(), st.lists(st.integers(0, len(ACTIONS) - 1), max_size=30), st.integers(5, 22))
def test_every_order_of_events_gives_every_expert_once_or_a_sentence(wanted, actions, capacity):
    script = Script(actions, capacity)
    for step in wanted:
        try:
            script.step(*step)
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
            script.step(layer, [0, 1, 2, 3], 2)
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
    script.step(1, [0, 1, 2], 2)
    given = [i for ready in prompt for i in ready.tolist()]
    assert sorted(given) == [0, 1, 2, 3]
    script.end_all()
    assert accounted(script.residency, SIZES)


def test_a_step_waits_where_a_guess_that_is_being_read_holds_the_only_frame():
    # It is tried, and refused, twice before the guess ends.
    script = Script([ACTIONS.index("begin")] * 2, capacity=5)
    script.cache.expect([(1, 3)])
    assert script.begin()
    script.step(0, [0], 2)
    assert script.residency.level((0, 0)) == 2 and len(script.residency) == 1
