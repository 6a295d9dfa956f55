"""The cache with threads: guesses never stand in the way, what fails is said, what is closed says
so."""

import gc
import threading
import time

import numpy as np
import pytest
from support.parts import accounted

from smoe.runtime import EngineError
from smoe.runtime.cache.cache import ExpertCache
from smoe.runtime.cache.eviction import LeastRecentlyUsed
from smoe.runtime.cache.residency import Residency
from smoe.runtime.stats import Stats

EXPERTS = [4, 4]
SIZES = [np.array([0, 1])] * 2
PATIENCE = 5.0  # seconds until what should happen at once has not


class Disk:
    """Reads that are held up until they are let go, each in its turn."""

    def __init__(self):
        self.begun: list[tuple[int, int]] = []
        self.held: set[tuple[int, int]] = set()
        self.error: Exception | None = None
        self.once = False  # whether it is raised no more than once
        self.changed = threading.Condition()

    def read(self, layer: int, expert: int, into: np.ndarray, since: int, level: int) -> int:
        with self.changed:
            self.begun.append((layer, expert))
            self.changed.notify_all()
            self.changed.wait_for(lambda: (layer, expert) not in self.held)
            error, self.error = self.error, None if self.once else self.error
            if error is not None:
                raise error
        return 1

    def until_begun(self, key: tuple[int, int]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.begun, PATIENCE)

    def let_go(self) -> None:
        with self.changed:
            self.held = set()
            self.changed.notify_all()


class Borrower:
    """Somebody who may be referred to weakly."""


class Setup:
    def __init__(self, capacity: int, experts: list[int]):
        self.disk, self.stats = Disk(), Stats()
        self.residency = Residency(experts, capacity, LeastRecentlyUsed(experts))
        self.cache = ExpertCache(self.residency, None, self.disk.read, 2, self.stats)

    def resident(self) -> set[tuple[int, int]]:
        return {(la, e) for la in (0, 1) for e in range(4) if self.cache.levels(la)[e]}

    def step(self, layer: int, experts: list[int]) -> list[int]:
        wanted, ones = np.array(experts), np.ones(len(experts), np.int64)
        self.cache.observe(layer, wanted[None], None)
        ready = [i for part in self.cache.bring(layer, wanted, ones, ones) for i in part.tolist()]
        return [experts[i] for i in ready]


@pytest.fixture
def setup():
    made = []

    def make(capacity: int, experts: list[int] = EXPERTS) -> Setup:
        made.append(Setup(capacity, experts))
        return made[-1]

    yield make
    for each in made:
        each.disk.let_go()
        each.cache.close()
        assert accounted(each.residency, SIZES)


def in_time(call, *arguments):
    """What `call` gives or raises, if it comes within `PATIENCE` seconds."""
    outcome: list = []

    def run() -> None:
        try:
            outcome.append(call(*arguments))
        except EngineError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert outcome, "it waits for ever"
    if isinstance(outcome[0], EngineError):
        raise outcome[0]
    return outcome[0]


def test_a_step_never_waits_for_its_own_guess(setup):
    case = setup(8)
    case.step(0, [0, 1])
    case.disk.held = {(1, 3)}
    case.cache.expect([(1, 3)])
    case.disk.until_begun((1, 3))
    assert sorted(in_time(case.step, 0, [0, 1])) == [0, 1]  # all are resident
    assert sorted(in_time(case.step, 0, [0, 2])) == [0, 2]  # one is read on the other thread
    assert case.stats.guesses_used == 0
    case.disk.let_go()
    assert in_time(case.step, 1, [3]) == [3]
    assert case.stats.guesses_read == case.stats.guesses_used == 1


def test_a_guess_evicts_nothing_before_its_read_begins(setup):
    case = setup(4)
    for layer in (0, 1):
        case.step(layer, [0, 1])
    before = case.resident()
    assert len(before) == 4
    case.disk.held = {(0, 2), (0, 3)}
    case.cache.expect([(0, 2), (0, 3)])
    case.disk.until_begun((0, 2))
    assert len(case.resident() & before) == 3  # one frame is claimed, by the read that has begun
    case.cache.expect([])  # the second is forgotten
    case.disk.let_go()
    assert in_time(case.step, 0, [2]) == [2]
    assert (0, 3) not in case.disk.begun and len(case.resident() & before) == 3


def test_no_guess_is_read_while_a_step_waits(setup):
    case = setup(8)
    case.disk.held = {(0, 0)}
    waiting = threading.Thread(target=case.step, args=(0, [0]), daemon=True)
    waiting.start()
    case.disk.until_begun((0, 0))
    case.cache.expect([(1, 1)])
    time.sleep(0.05)
    assert (1, 1) not in case.disk.begun
    case.disk.let_go()
    case.disk.until_begun((1, 1))
    waiting.join(PATIENCE)


def test_a_step_that_is_given_up_leaves_no_read_behind_that_has_not_begun(setup):
    case = setup(8)
    case.disk.held = {(0, 0), (0, 1)}
    wanted, ones = np.arange(4), np.ones(4, np.int64)
    bring = case.cache.bring(0, wanted, ones, ones)
    assert len(next(bring)) == 0  # nothing is left but to wait
    for expert in (0, 1):
        case.disk.until_begun((0, expert))
    bring.close()
    case.disk.let_go()
    assert in_time(case.step, 1, [0]) == [0]
    assert {(0, 2), (0, 3)}.isdisjoint(case.disk.begun)


def test_a_guess_that_a_step_wants_is_read_once(setup):
    case = setup(8)
    case.disk.held = {(0, 0)}
    case.cache.expect([(0, 0)])
    case.disk.until_begun((0, 0))
    step = threading.Thread(target=case.step, args=(0, [0, 1]), daemon=True)
    step.start()
    case.disk.until_begun((0, 1))
    case.disk.let_go()
    step.join(PATIENCE)
    assert case.disk.begun.count((0, 0)) == 1
    assert case.stats.guesses_read == case.stats.guesses_used == 1


@pytest.mark.parametrize(
    "error, said",
    [
        (EngineError("the shard ends"), "the shard ends"),
        (ValueError("no such plane"), r"Reading expert 1 of layer 0 failed: ValueError\('no such"),
        (AttributeError("preadv"), r"Reading expert 1 of layer 0 failed: AttributeError"),
        (MemoryError(), r"Reading expert 1 of layer 0 failed: MemoryError"),
    ],
)
def test_whatever_a_read_raises_reaches_the_step_and_no_thread_dies(setup, error, said):
    case = setup(4)
    for _ in range(4):  # more often than there are threads
        case.disk.error = error
        with pytest.raises(EngineError, match=said):
            in_time(case.step, 0, [1])
        assert (0, 1) not in case.resident() and case.residency.total == 0
        case.disk.error = None
    assert sorted(in_time(case.step, 0, [1, 2])) == [1, 2]


def test_a_failed_guess_is_said_only_where_it_is_wanted(setup):
    case = setup(4)
    case.disk.error = ValueError("the disk is gone")
    case.cache.expect([(1, 1)])
    case.disk.until_begun((1, 1))
    case.disk.error = None
    assert in_time(case.step, 0, [1]) == [1]
    assert in_time(case.step, 1, [1]) == [1]


def test_a_step_that_waits_when_the_cache_is_closed_gets_a_sentence(setup):
    case = setup(4)
    case.disk.held = {(0, 0)}
    closing = threading.Thread(
        target=lambda: (case.disk.until_begun((0, 0)), case.cache.close()), daemon=True
    )
    closing.start()
    with pytest.raises(EngineError, match="This engine is closed; open the bundle again"):
        in_time(case.step, 0, [0, 1, 2, 3])
    with pytest.raises(EngineError, match="This engine is closed"):
        in_time(case.step, 1, [1])
    case.disk.let_go()
    closing.join(PATIENCE)


def test_filling_raises_what_a_read_raises(setup):
    case = setup(8)
    keys = [(layer, expert) for layer in (0, 1) for expert in range(4)]
    case.disk.error = ValueError("the disk is gone")
    with pytest.raises(EngineError, match="the disk is gone"):
        in_time(case.cache.fill, keys, 1)
    case.disk.error = None
    in_time(case.cache.fill, keys, 1)
    assert case.resident() == set(keys)


def test_a_warm_start_keeps_every_layer_within_its_share():
    counts = [np.array([9, 8, 7, 6]), np.array([1, 2, 3, 4])]
    residency = Residency(EXPERTS, 4, LeastRecentlyUsed(EXPERTS), None, True)
    cache = ExpertCache(residency, None, Disk().read, 2, Stats(), threads=0)
    cache.warm(counts, 4, 1)
    assert residency.levels(0).tolist() == [1, 1, 0, 0]
    assert residency.levels(1).tolist() == [0, 0, 1, 1]


def test_more_experts_than_frames_stream_through_and_are_read_once_each(setup):
    case = setup(2)
    case.step(1, [0, 1])
    before = case.stats.loads
    assert sorted(in_time(case.step, 0, [0, 1, 2, 3])) == [0, 1, 2, 3]
    assert case.stats.loads - before == 4


def test_a_guess_that_failed_is_read_again_by_whoever_needs_it(setup):
    case = setup(8)
    case.disk.held, case.disk.once = {(1, 3)}, True
    case.disk.error = EngineError("the disk is gone")
    case.cache.expect([(1, 3)])
    case.disk.until_begun((1, 3))
    waiting = threading.Thread(target=case.step, args=(1, [3]), daemon=True)
    waiting.start()
    while case.stats.guesses_used == 0:  # until the step waits for the guess
        time.sleep(0.001)
    case.disk.let_go()
    waiting.join(PATIENCE)
    assert case.disk.begun == [(1, 3)] * 2 and (1, 3) in case.resident()


# -- memory that is lent ---------------------------------------------------------------------------


def test_what_is_lent_goes_by_eviction_and_comes_back(setup):
    case, prompt, other = setup(6), Borrower(), Borrower()
    for expert in (0, 1, 2):
        for layer in (0, 1):
            case.step(layer, [expert])
    assert case.cache.lend(prompt, 2)
    assert case.resident() == {(0, 1), (1, 1), (0, 2), (1, 2)}  # least recently used first
    assert sorted(in_time(case.step, 0, [0, 3])) == [0, 3] and len(case.resident()) == 4
    assert case.cache.lend(other, 1) and len(case.resident()) == 3
    assert case.cache.lend(prompt, 0) and case.cache.lend(other, 0)
    before = case.resident()
    for layer, expert in ((0, 1), (1, 0), (1, 3)):
        case.step(layer, [expert])
    assert len(case.resident()) == 6 and before < case.resident()


def test_what_a_step_is_computing_is_not_lent(setup):
    case, prompt = setup(4), Borrower()
    ones = np.ones(3, np.int64)
    step = case.cache.bring(0, np.arange(3), ones, ones)
    taken = [i for _ in range(2) for i in next(step).tolist()]
    before = case.resident()
    assert not case.cache.lend(prompt, 4)  # not even one frame would be left
    assert case.resident() == before
    assert case.cache.lend(prompt, 0) and len(case.resident() & {(0, i) for i in taken})
    assert sorted(taken + [i for part in step for i in part.tolist()]) == [0, 1, 2]


def test_a_loan_that_is_refused_evicts_nothing(setup):
    case, ones = setup(4), np.ones(3, np.int64)
    case.step(0, [0, 1, 2])
    case.step(1, [0])
    step, before = case.cache.bring(0, np.arange(3), ones, ones), case.resident()
    assert len(next(step)) == 3 and len(before) == 4  # three are being computed
    assert not case.cache.lend(Borrower(), 2) and case.resident() == before
    step.close()
    assert case.cache.lend(prompt := Borrower(), 2) and len(case.resident()) == 2
    assert case.cache.lend(prompt, 0)


def test_a_share_that_would_hold_nothing_is_not_lent():
    residency = Residency(EXPERTS, 4, LeastRecentlyUsed(EXPERTS), shares=True)
    assert residency.share == 2 and residency.resize(2) and residency.share == 1
    assert not residency.resize(1)


def test_what_was_lent_to_somebody_who_is_gone_comes_back(setup):
    case, prompt = setup(6), Borrower()
    assert case.cache.lend(prompt, 2) and case.residency.capacity == 4
    del prompt
    gc.collect()
    assert case.residency.capacity == 6


def test_a_guess_that_takes_the_only_frame_is_taken_itself(setup):
    """More is missing than is asked for at once, and all of it waits for the guess's frame."""
    case = setup(1, [7, 7])
    case.disk.held = {(1, 5)}
    case.cache.expect([(1, 5)])
    case.disk.until_begun((1, 5))
    threading.Timer(0.2, case.disk.let_go).start()
    assert sorted(in_time(case.step, 1, list(range(7)))) == list(range(7))


def test_what_is_given_in_bites_is_given_on_while_others_are_read():
    """A prompt's slots of an expert that is here are many steps of the kernel: none of them waits
    for a read of another expert."""
    setup = Setup(4, [4, 4])
    setup.step(0, [1])
    setup.disk.held = {(0, 2)}
    ones, wanted = np.ones(2, np.int64), np.array([1, 2])
    bring = setup.cache.bring(0, wanted, ones, 1000 * ones)
    given = next(bring)
    for _ in range(4):  # some of its slots
        assert given.tolist() == [0]
        given = bring.send(given[:0])
    assert given.tolist() == [0] and not setup.cache.levels(0)[2]
    setup.disk.let_go()
    rest = bring.send(given).tolist()
    while rest != [1]:
        assert not rest  # nothing is left but to wait
        rest = bring.send(None).tolist()
    with pytest.raises(StopIteration):
        bring.send(None)
    setup.cache.close()
