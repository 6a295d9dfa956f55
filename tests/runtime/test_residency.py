"""Residency against a brute-force model: records, planes, guesses, pins and shares."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.parts import placed

from smoe.runtime.cache.eviction import LeastRecentlyUsed
from smoe.runtime.cache.residency import FREE, PINNED, SHIELDED, Residency


def _lru(capacity: int, experts: int = 10, **how) -> Residency:
    return Residency([experts], capacity, LeastRecentlyUsed([experts]), **how)


def _use(residency: Residency, layer: int, expert: int) -> int:
    """A step uses it; how many guesses came true."""
    residency.eviction.observe(layer, np.array([[expert]]), None)
    return residency.use(layer, np.arange(residency.eviction.experts[layer]) == expert)


def _load(residency: Residency, key, level: int = 1, guessed: bool = False) -> int:
    frame = residency.reserve(key, level)
    residency.commit(key, frame, level, guessed)
    return frame


def _ask(residency: Residency, key) -> tuple[int, bool]:
    """(frame, hit), as the cache asks."""
    _use(residency, *key)
    frame = residency.find(key)
    if frame is not None:
        return frame, True
    return _load(residency, key), False


def _pins(residency: Residency, **kinds: list[tuple[int, int]]) -> np.ndarray:
    pins = np.full(residency.eviction.first[-1], FREE, np.int8)
    for name, keys in kinds.items():
        pins[[residency.flat(key) for key in keys]] = {"pinned": PINNED, "shielded": SHIELDED}[name]
    return pins


def _resident(residency: Residency, layer: int) -> list[bool]:
    return (residency.levels(layer) > 0).tolist()


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=80))
def test_residency_is_least_recently_used(capacity, requests):
    residency = _lru(capacity)
    held: list[int] = []  # least recently used first
    where: dict[int, int] = {}
    for expert in requests:
        frame, hit = _ask(residency, (0, expert))
        assert hit == (expert in held)
        if hit:
            held.remove(expert)
            assert where[expert] == frame
        elif len(held) == capacity:
            assert where.pop(held.pop(0)) == frame  # the victim's frame is taken over
        held.append(expert)
        where[expert] = frame
        assert len(set(where.values())) == len(where) and 0 <= frame < capacity
        assert {e for e in range(10) if (0, e) in residency} == set(held)
        assert _resident(residency, 0) == [e in held for e in range(10)]
        assert len(residency) == residency.total == len(held)
        assert residency.frames(0, np.arange(10)).tolist() == [where.get(e, -1) for e in range(10)]
        assert placed(residency)


def test_a_frame_that_was_not_filled_claims_nothing_and_is_free_again():
    residency = _lru(2)
    _ask(residency, (0, 1))
    frame = residency.reserve((0, 2), 1)
    assert len(residency) == 1 and (0, 2) not in residency and residency.total == 2
    residency.abort((0, 2), frame)  # the read failed
    assert residency.total == 1
    assert _ask(residency, (0, 3)) == (frame, False) and (0, 1) in residency


def test_below_one_cycle_least_recently_used_never_hits():
    residency = _lru(3)
    assert not any(_ask(residency, (0, e))[1] for _ in range(20) for e in range(4))


def test_what_a_step_is_about_to_use_is_pinned():
    residency = _lru(2)
    _ask(residency, (0, 1))
    _ask(residency, (0, 2))
    assert residency.reserve((0, 3), 1, _pins(residency, pinned=[(0, 1), (0, 2)])) is None
    assert len(residency) == 2
    frame = residency.reserve((0, 3), 1, _pins(residency, pinned=[(0, 1)]))
    assert (0, 1) in residency and (0, 2) not in residency
    residency.commit((0, 3), frame, 1)


def test_what_a_step_has_used_goes_only_where_nothing_else_may():
    residency = _lru(3)
    for expert in (1, 2, 3):
        _ask(residency, (0, expert))
    pins = _pins(residency, shielded=[(0, 1)], pinned=[(0, 2)])
    residency.commit((0, 4), residency.reserve((0, 4), 1, pins), 1)
    assert [e for e in range(6) if (0, e) in residency] == [1, 2, 4]
    pins = _pins(residency, shielded=[(0, 1)], pinned=[(0, 2), (0, 4)])
    residency.commit((0, 5), residency.reserve((0, 5), 1, pins), 1)
    assert [e for e in range(6) if (0, e) in residency] == [2, 4, 5]


def test_a_frame_that_is_being_read_into_does_not_go():
    residency = _lru(2)
    residency.reserve((0, 1), 1)
    _ask(residency, (0, 2))
    _ask(residency, (0, 3))
    assert (0, 2) not in residency and residency.total == 2
    assert residency.reserve((0, 4), 1, _pins(residency, pinned=[(0, 3)])) is None


def test_a_guess_goes_first_once_its_layer_has_passed_without_it():
    residency = _lru(3)
    for expert, guessed in ((1, True), (2, True), (3, False)):
        _load(residency, (0, expert), guessed=guessed)
    assert _use(residency, 0, 2) == 1
    assert _use(residency, 0, 2) == 0  # a guess comes true once
    _use(residency, 0, 3)
    residency.end(0)
    _ask(residency, (0, 4))
    assert [e for e in range(5) if (0, e) in residency] == [2, 3, 4]
    _use(residency, 0, 2)
    _ask(residency, (0, 5))  # no expired guess is left: least recently used again
    assert (0, 3) not in residency


def test_an_expired_guess_that_a_step_uses_after_all_is_pinned_like_others():
    """As a stand-in, which the router did not name: others go instead."""
    residency = _lru(2)
    _load(residency, (0, 1), guessed=True)
    residency.end(0)
    _ask(residency, (0, 2))
    frame = residency.reserve((0, 3), 1, _pins(residency, pinned=[(0, 1)]))
    assert frame is not None and (0, 1) in residency and (0, 2) not in residency


def test_bytes_and_shares():
    """Records of 2 and 3 bytes in 12; with shares each of two layers keeps to 6."""
    for shares, kept in ((False, (1, 3)), (True, (3, 2))):
        residency = Residency([6, 6], 12, LeastRecentlyUsed([6, 6]), [2, 3], shares)
        assert [residency.room(layer) for layer in (0, 1)] == ([3, 2] if shares else [6, 4])
        for key in [(0, e) for e in range(4)] + [(1, e) for e in range(3)]:
            _ask(residency, key)
        assert (sum(_resident(residency, 0)), sum(_resident(residency, 1))) == kept
        assert residency.used == [2 * kept[0], 3 * kept[1]]


class _ByPlanes(LeastRecentlyUsed):
    """Goes by planes: the highest of whatever was used least recently."""

    by_planes = True


ENDS = [np.array([5, 7, 10]), np.array([6, 7, 9])]  # of records of two layers, by level


@given(
    st.integers(20, 60),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(1, 3)), max_size=60),
)
def test_planes_are_held_and_let_go_one_by_one(capacity, requests):
    residency = Residency([5, 5], capacity, _ByPlanes([5, 5]), ENDS)
    held: dict[tuple[int, int], int] = {}  # level by key, least recently used first
    for layer, expert, level in requests:
        key = (layer, expert)
        _use(residency, layer, expert)
        if key in held:
            held[key] = held.pop(key)
        if residency.levels(layer)[expert] < level:
            frame = residency.reserve(key, level)
            while sum(ENDS[la][at - 1] for (la, _), at in (held | {key: level}).items()) > capacity:
                victim = next(k for k in held if k != key)
                held[victim] -= 1
                if not held[victim]:
                    del held[victim]
            residency.commit(key, frame, level)
            held[key] = level
        for la in (0, 1):
            assert residency.levels(la).tolist() == [held.get((la, e), 0) for e in range(5)]
        assert all(residency.level(k) == at for k, at in held.items()) and placed(residency)
        assert residency.frame_bytes.sum() == residency.total <= capacity
        frames = {residency.find(k) for k in held}
        assert {int(residency.frame_bytes[residency.find(k)]) for k in held} <= {
            int(end) for ends in ENDS for end in ends
        }
        assert len(frames) == len(held)


def test_planes_that_were_not_added_claim_nothing():
    residency = Residency([5, 5], 30, _ByPlanes([5, 5]), ENDS)
    _load(residency, (0, 1), level=1)
    frame = residency.reserve((0, 1), 3)
    assert residency.total == 10 and residency.levels(0)[1] == 1
    residency.abort((0, 1), frame)  # the read failed
    assert residency.total == 5 and residency.levels(0)[1] == 1 and residency.find((0, 1)) == frame


def test_what_grows_is_not_let_go_for_it():
    residency = Residency([5, 5], 12, _ByPlanes([5, 5]), ENDS)
    for expert in (0, 1):
        _load(residency, (0, expert), level=1)
    _load(residency, (0, 0), level=3)
    assert residency.levels(0).tolist() == [3, 0, 0, 0, 0]
    assert residency.reserve((0, 1), 1, _pins(residency, pinned=[(0, 0)])) is None
