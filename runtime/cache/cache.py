"""The one owner of an expert's life: absent → reserved → reading → resident at a level → fewer
planes → absent.

`ExpertCache.bring` is the page to read: the loop that the engine and the simulator share. What
stays is `residency`'s and `eviction`'s word, when something is read `reader`'s, how `storage`'s.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np

from smoe.runtime.cache.frames import Frames
from smoe.runtime.cache.reader import Load, Reader, State, raise_first
from smoe.runtime.cache.residency import FREE, PINNED, SHIELDED, Key, Residency
from smoe.runtime.cache.run import Run
from smoe.runtime.cache.uses import Uses
from smoe.runtime.errors import EngineError
from smoe.runtime.stats import Stats

READERS = 2  # threads that read (python -m bench reads)
GUESSES = 2  # waiting or on their way at once
STREAMS = 4  # demands on their way at once, where a step reads more than a token uses
ORDERS = ("hottest", "expert")  # planes that most tokens wait for first, or expert after expert

NONE = np.zeros(0, np.int64)

# Reads the planes of a record after the first `since`, up to `level`, into a frame: the bytes, or
# an exception.
Read = Callable[[int, int, np.ndarray, int, int], int]


class ExpertCache:
    """Experts in the frames of one memory.

    `residency` says who is there, `frames` hold the bytes (None: there are none, in a simulation),
    `read` fetches them on `threads` threads (0: at once). `uses` is how many experts of a layer one
    token uses at most. Without `streams` a step's experts are shielded however many they are, as
    replays of others do. `order` is one of `ORDERS`. Counts go to `stats`. `make_reader` is for who
    wants to say in which order things happen."""

    def __init__(
        self,
        residency: Residency,
        frames: Frames | None,
        read: Read,
        uses: int,
        stats: Stats,
        threads: int = READERS,
        streams: bool = True,
        order: str = ORDERS[0],
        make_reader: Callable[..., Reader] = Reader,
    ):
        self._residency, self._frames = residency, frames
        self._read_planes, self.stats = read, stats
        self._reader = make_reader(self._begin, self._read, self._end, threads)
        self._uses, self._at_once = uses, max(STREAMS, uses) if streams else 1 << 62
        self._hottest, self._capacity = order == "hottest", residency.capacity
        self._lent: dict[int, int] = {}  # bytes, by the id of who borrowed them
        self._seen = Uses(residency, stats)
        self._pins = np.zeros(residency.eviction.first[-1], np.int8)
        self._active: object = None  # whose pins these are
        self._unsettled = False  # where an interrupt may have left a change half done

    @property
    def rows(self) -> np.ndarray:
        """uint8 `[frames, bytes]`, for kernels."""
        assert self._frames is not None
        return self._frames.rows

    def frames_of(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """int64: where these resident experts lie in `rows`."""
        return self._residency.frames(layer, experts)

    def levels(self, layer: int) -> np.ndarray:
        """int64 `[E]`: the level at which each expert is resident, 0 where it is not."""
        with self._reader.lock:
            self._settle()
            return self._residency.levels(layer)

    def room(self, layer: int) -> int:
        """How many whole records of a layer there may be, if there are no others."""
        return self._residency.room(layer)

    def lend(self, borrower: object, nbytes: int) -> bool:
        """Do with so much less memory until `borrower` asks for another amount (0: it needs no
        more, and neither does it once it is gone); whether that was possible. What is worth least
        goes."""
        with self._reader.lock:
            self._settle()
            if id(borrower) not in self._lent:
                weakref.finalize(borrower, self._have_back, id(borrower)).atexit = False
            self._seen.learn()
            self._lent[id(borrower)] = nbytes
            self._unsettled = True
            left = self._capacity - sum([*self._lent.values()])
            lent = self._residency.resize(left, self._pins, self._uses)
            self._unsettled = False
            if not lent or not nbytes:
                self._have_back(id(borrower))
            if nbytes and self._frames is not None:
                self._frames.release(self._residency.frame_bytes)
            return lent

    def _have_back(self, borrower: int) -> None:
        with self._reader.lock:
            self._lent.pop(borrower, None)
            self._residency.capacity = self._capacity - sum([*self._lent.values()])

    @property
    def needs_scores(self) -> bool:
        """Whether `observe` wants scores."""
        return self._residency.eviction.needs_scores

    def close(self) -> None:
        """End what has begun, forget the rest; whoever waits gets an `EngineError`."""
        self._reader.close()

    def release(self) -> None:
        """Give the frames' memory back; it cannot be used afterwards."""
        if self._frames is not None:
            self._frames.release(np.zeros(len(self.rows), np.int64))

    # -- what a step says ------------------------------------------------------------------------

    def observe(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        """The router of `layer` chose `ids` int64 `[T, k]` (E: no expert), by `scores` `[T, E]`
        where they are known: what eviction and the statistics go by, before any substitution."""
        with self._reader.lock:
            self._seen.observe(layer, ids, scores)

    @property
    def still(self) -> bool:
        """Whether nothing comes or goes until somebody asks for it. Then a step may use what is
        resident whole, as `where` says, and afterwards say so by `used`, in place of `observe` and
        `bring`."""
        with self._reader.lock:
            return not (self._unsettled or self._reader.busy or self.needs_scores)

    def where(self, layer: int) -> np.ndarray:
        """int64 `[E + 1]`, as it changes: where each expert of a layer lies in `rows`, -1 if it is
        not resident whole, or is no expert (the last)."""
        return self._residency.where(layer)

    def used(
        self,
        layer: int,
        ids: np.ndarray,
        instead: np.ndarray | None = None,
        levels: np.ndarray | None = None,
    ) -> None:
        """A step used the experts `ids` int64 `[T, k]` (E: no expert) of `layer`, as its router
        chose them, or in their place others, `instead`, at `levels`, int64 `[n]` both."""
        with self._reader.lock:
            self._seen.note(layer, ids, instead)
            if instead is not None and levels is not None:
                self._residency.eviction.need(layer, instead, levels)

    def expect(self, guesses: Iterable[Key]) -> None:
        """Read the likeliest of `guesses` (likeliest first) once nobody waits for a read. Guesses
        of before whose read has not begun are forgotten. Nothing is evicted before a read begins,
        and nobody waits for one."""
        experts = self._residency.eviction.experts
        keys = [key for key in dict.fromkeys(guesses) if key[1] < experts[key[0]]]
        with self._reader.lock:
            before = [load for load in self._reader.loads() if load.guess]
            if not keys and not before:
                return
            self._reader.withdraw([load for load in before if load.key not in keys])
            loads = {load.key: load for load in self._reader.loads()}
            room = GUESSES - sum(load.guess for load in loads.values())
            new = [key for key in keys if key not in loads and key not in self._residency]
            for key in new[: max(0, room)]:
                level = self._residency.full_level(key[0])
                self._reader.put(Load(key=key, level=level, guess=True))

    # -- what a step needs -----------------------------------------------------------------------

    def bring(
        self, layer: int, experts: np.ndarray, levels: np.ndarray, tokens: np.ndarray
    ) -> Generator[np.ndarray, np.ndarray | None, None]:
        """Indices int64 of the groups (`experts`, `levels`), rising, of so many `tokens` each, that
        are resident, some at a time until each was given once; what is missing is read meanwhile,
        an expert's planes apart where groups want them apart, in the `order` of this cache. Whoever
        iterates computes all that it is given before it asks for more, or sends the indices of what
        it did; then it closes this. An empty array, once, says that nothing is left but to wait.

        What the step still needs is not evicted once it is whole, and what it has used, or has in
        fewer planes than it needs, only if nothing else can go (SMoE's shield). Where more is
        missing than may be on its way at once, as for a prompt, experts stream: what was used may
        go at once, so that a few frames serve them all. A failed read is an `EngineError`."""
        run = Run(layer, experts, levels, tokens, hottest=self._hottest)
        idle = False
        try:
            while run.left:
                given = self._look(run)
                if len(given):
                    done = yield given
                    run.took(given if done is None else done)
                if run.behind or (len(given) and (run.ordered or not run.waits())):
                    continue
                if run.loads and not idle:
                    idle = True
                    yield NONE
                if not run.arrived:
                    self._go_on(run)
        finally:
            with self._reader.lock:
                unsettled, self._unsettled = self._unsettled, True
                self._reader.withdraw(run.loads.values())
                if self._active is run:
                    self._pins[:] = FREE
                self._unsettled = unsettled
        with self._reader.lock:
            self._residency.end(layer)

    def _look(self, run: Run) -> np.ndarray:
        """What of `run` can be taken now, indices int64; what is missing is asked for."""
        with self._reader.lock:
            self._settle()
            resident = self._residency.levels_of(run.layer, run.experts) >= run.levels
            run.ready = run.remaining & resident
            given, missing = run.ready.nonzero()[0], (run.remaining & ~resident).nonzero()[0]
            if run.first:
                run.first = False
                self._begin_run(run, missing)
                if not len(missing):
                    self._pin(run, PINNED)
                    return given
            elif run.ordered and len(given):
                given = run.next_of(given)
            self._pin(run, run.pins(resident))
            if len(missing):
                self._demand(run, missing)
            # Where frames are few, one expert after another, too.
            run.ordered |= bool(self._reader.refused)
            run.waiting = [load for load in run.loads.values() if load.on_its_way]
            run.arrived = any(
                not run.ready[i] for i, load in run.loads.items() if not load.on_its_way
            )
        return given

    def _begin_run(self, run: Run, missing: np.ndarray) -> None:
        """Count what is here, and line up the others. Where levels differ all of them are asked for
        at once, if there is room: their planes have turns of their own."""
        if self._residency.eviction.by_planes:
            self._residency.eviction.need(run.layer, run.experts, run.levels)
        lacking = run.line_up(missing)
        self.stats.hits += run.count - lacking
        self.stats.misses += lacking
        run.at_once = self._at_once
        if run.mixed and lacking <= self._residency.room(run.layer):
            run.at_once = max(run.at_once, lacking)
        run.ordered = lacking > run.at_once
        run.used = FREE if run.ordered else SHIELDED

    def _go_on(self, run: Run) -> None:
        """Wait for a read. Where none will arrive for want of a frame, what was taken gives way,
        whatever its place: it may hold the frame that the others need."""
        started = time.perf_counter()
        arrived = bool(run.waiting) and (self._reader.wait(run.waiting) or self._reader.retry())
        self.stats.stall_seconds += time.perf_counter() - started
        if not (arrived or run.ready.any() or self._here(run).any()) and run.yields:
            raise EngineError(
                f"There is no room for {len(run.waiting)} experts of layer {run.layer}; state more "
                "memory, or leave out shares."
            )
        run.yields = not arrived

    def _here(self, run: Run) -> np.ndarray:
        """bool `[n]`: what of `run` could be taken now; a guess may have brought it meanwhile."""
        with self._reader.lock:
            resident = self._residency.levels_of(run.layer, run.experts)
            return run.remaining & (resident >= run.levels)

    def warm(self, counts: Sequence[np.ndarray], capacity: int, level: int) -> None:
        """Before the first step: read the `capacity` experts that calibration used most, by
        `counts` `[E]` of every layer (none: nothing is known, and nothing is read), each layer's
        within its share."""
        if not counts:
            return
        share = np.concatenate([layer / max(1, layer.sum()) for layer in counts])
        self._residency.eviction.warm(share)
        layers = self._residency.eviction.layer_of
        room = [self._residency.room(layer) for layer in range(len(counts))]
        keys: list[Key] = []
        for flat in np.argsort(-share, kind="stable").tolist():
            layer = int(layers[flat])
            if room[layer] and len(keys) < capacity:
                room[layer] -= 1
                keys.append((layer, flat - int(self._residency.eviction.first[layer])))
        self.fill(sorted(keys), level)  # in the order of the files

    def fill(self, keys: Iterable[Key], level: int) -> None:
        """Read these records, in order; a failed read is raised."""
        left = iter(keys)
        loads: list[Load] = []
        while True:
            for key in itertools.islice(left, self._at_once - len(loads)):
                loads.append(Load(key=key, level=level))
                self._reader.put(loads[-1])
            if not loads:
                return
            if not self._reader.wait(loads) and not self._reader.retry():
                self._reader.withdraw(loads)
            raise_first([load for load in loads if not load.on_its_way])
            loads = [load for load in loads if load.on_its_way]

    def _demand(self, run: Run, missing: np.ndarray) -> None:
        """Ask for those of `missing` that are due."""
        loads = run.loads
        if loads:
            raise_first([load for load in loads.values() if load not in run.adopted])
            # What came and went again meanwhile, or was another run's, is asked for once more.
            for i in [i for i in missing.tolist() if i in loads and not loads[i].on_its_way]:
                del loads[i]
        absent = [groups for groups in run.due(missing) if groups[0] not in loads]
        begun = {load.key: load for load in self._reader.loads()} if absent else {}
        for groups in absent:
            key = (run.layer, int(run.experts[groups[0]]))
            if key not in begun:
                loads.update(run.chain(groups))
                self._reader.put(loads[groups[0]])
                continue
            load = begun[key]  # another run's may be of fewer planes: then it is asked for again
            loads.update(dict.fromkeys(groups, load))
            run.adopted.add(load)
            if load.guess:
                self.stats.guesses_used += load.state is State.READING
                self._reader.demand(load, run.turn(groups[0]))

    def _pin(self, run: Run, pins: np.ndarray | int) -> None:
        """Another run, paused meanwhile, loses its own: what of it was evicted is read again."""
        if self._active is not run:
            self._pins[:] = FREE
            self._active = run
        self._pins[self._residency.eviction.first[run.layer] + run.distinct] = pins
        if self._reader.refused:
            self._reader.retry()

    # -- for the reader, the first and the last under its lock -------------------------------------

    def _begin(self, load: Load) -> bool:
        """A frame; what has to go for it goes now."""
        self._settle()
        self._unsettled = True
        claimed = self._claim(load)
        self._unsettled = False
        return claimed

    def _settle(self) -> None:
        """Mend what an interrupt left half done."""
        if self._unsettled:
            loads = [load for load in self._reader.loads() if load.frame >= 0]
            self._residency.repair([(load.key, load.frame, load.top) for load in loads])
            self._unsettled = False

    def _claim(self, load: Load) -> bool:
        """For all planes that follow, too, so that none of them waits for a frame."""
        top = load.top
        if self._residency.level(load.key) >= top:  # it came on another load
            return True
        self._seen.learn()
        frame = self._residency.reserve(load.key, top, self._pins)
        self._trim()
        if frame is None:
            return False
        load.frame = frame
        self.stats.guesses_read += load.guess
        return True

    def _read(self, load: Load) -> int:
        load.since = self._residency.level(load.key)
        if load.frame < 0 or load.since >= load.level:
            return 0
        into = self._frames.rows[load.frame] if self._frames is not None else np.empty(0, np.uint8)
        return self._read_planes(*load.key, into, load.since, load.level)

    def _end(self, load: Load) -> None:
        if load.frame < 0:
            return
        if load.error is None and load.state is not State.WITHDRAWN:
            level = max(load.level, load.since)
            self._residency.commit(load.key, load.frame, level, load.guess, load.goes_on)
            flat = self._residency.flat(load.key)
            if self._pins[flat] == SHIELDED:  # the step waits for it: it stays until it was given
                self._pins[flat] = PINNED
            self.stats.bytes_read += load.nbytes
            self.stats.loads += load.since < load.level
        else:
            self._residency.abort(load.key, load.frame)
            self._trim()

    def _trim(self) -> None:
        if self._frames is not None:
            self._frames.trim(self._residency.frame_bytes)
