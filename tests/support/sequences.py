"""Sequences that are forked, rewound, joined in steps, given up and saved at random, and what a
fresh one says of the same tokens."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smoe.runtime import kernels
from smoe.runtime.program.layout import REWIND

from .programs import Layers, same

CONTEXT, MOST = 900, 5  # tokens of a sequence, sequences at a time
PROGRAMS = {
    "grouped": dict(),
    "windows": dict(layers=3, window=(0, 40, 1), softcap=2.0, sinks=True),
    "latent": dict(latent=True, window=(0, 70)),
    "carried": dict(carries=True, layers=3, window=(0, 0, 40)),
}


@dataclass
class Held:
    """A sequence: its state and ids. `back`: tokens by which it can be rewound for sure."""

    state: object
    ids: list[int] = field(default_factory=list)
    back: int = 0


class Sequences:
    """Some of one program, whose state is of one kind."""

    def __init__(self, folder: Path, program: str, kind: str, seed: int):
        self.model = Layers("int8", **PROGRAMS[program])
        self.executable = self.model.open(folder, kernels.available()[0], 2, self.model.wires)
        self.random, self.kind = np.random.default_rng(seed), kind
        self.held = [self._new()]
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def act(self) -> None:
        """One thing, drawn at random."""
        acts = (self.step, self.fork, self.rewind, self.give_up, self.undo, self.save)
        act = acts[self.random.choice(len(acts), p=(0.4, 0.15, 0.2, 0.1, 0.1, 0.05))]
        self.done[act.__name__] += 1
        act()

    def _new(self) -> Held:
        return Held(self.executable.state(CONTEXT, self.kind))

    def _one(self) -> Held:
        return self.held[self.random.integers(len(self.held))]

    def _tokens(self, held: Held) -> np.ndarray:
        """Of its next step: one, some, or more than a window and what is kept for rewinds."""
        most = (1, 40, 500)[self.random.choice(3, p=(0.5, 0.35, 0.15))]
        count = min(int(self.random.integers(1, most + 1)), CONTEXT - len(held.ids))
        return self.random.integers(0, self.model.VOCABULARY, count)

    def step(self) -> None:
        """Some sequences join."""
        count = int(self.random.integers(1, len(self.held) + 1))
        chosen = [self.held[i] for i in self.random.permutation(len(self.held))[:count]]
        news = [(held, self._tokens(held)) for held in chosen]
        news = [(held, new) for held, new in news if len(new)]
        if not news:
            return
        spans = [(held.state, len(held.ids), new) for held, new in news]
        ends = np.cumsum([len(new) for _, new in news]) - 1
        logits = self.model.logits(self.executable, spans, ends)
        for (held, new), found in zip(news, logits, strict=True):
            held.ids += new.tolist()
            held.back = min(held.back + len(new), REWIND)
            if not same(found, self.fresh(held.ids)):
                self.wrong.append(f"{len(held.ids)} tokens after {dict(self.done)}")

    def fresh(self, ids: list[int]) -> np.ndarray:
        """The logits of the last token, of a sequence that has done nothing else."""
        state = self.executable.state(len(ids), self.kind)
        spans = [(state, 0, np.array(ids))]
        return self.model.logits(self.executable, spans, np.array([len(ids) - 1]))[0]

    def fork(self) -> None:
        """One goes two ways; where there are too many, another goes."""
        held = self._one()
        copy = Held(held.state.fork(len(held.ids)), list(held.ids), held.back)
        if len(self.held) == MOST:
            self.held.pop(int(self.random.integers(MOST)))
        self.held.append(copy)

    def rewind(self) -> None:
        held = self._one()
        most = (3, REWIND, len(held.ids))[self.random.integers(3)]
        wanted = max(0, len(held.ids) - int(self.random.integers(0, most + 1)))
        reached = held.state.rewind(wanted)
        sure = not any(self.model.windows) or len(held.ids) - wanted <= held.back
        sure = sure and not self.model.carries
        if reached > wanted or (sure and reached < wanted):
            self.wrong.append(f"a rewind from {len(held.ids)} to {wanted} went to {reached}")
        held.back = max(0, held.back - (len(held.ids) - reached))
        del held.ids[reached:]

    def give_up(self) -> None:
        """A step that is begun, and not counted."""
        held = self._one()
        new = self._tokens(held)
        if len(new):
            spans = [(held.state, len(held.ids), new)]
            self.model.logits(self.executable, spans, np.array([0]))
            held.back = min(held.back, max(0, REWIND - len(new)))

    def undo(self) -> None:
        """Some steps, and back."""
        held = self._one()
        length, taken = len(held.ids), held.state.snapshot(len(held.ids))
        at = length
        for _ in range(3):
            new = self._tokens(Held(None, [0] * at))
            if len(new):
                self.model.logits(self.executable, [(held.state, at, new)], np.array([0]))
                at += len(new)
        held.state.restore(taken)
        held.back = 0 if at > length else held.back

    def save(self) -> None:
        """Through arrays, into a state that did something else before."""
        held = self._one()
        length = len(held.ids)
        arrays = {name: array.copy() for name, array in held.state.arrays(length)}
        another = self._one()
        other = another.state.fork(len(another.ids))
        other.check({name: (a.dtype, a.shape) for name, a in arrays.items()}, length)
        other.load(arrays, length)
        held.state = other


def many(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """So many things in all, on each program and in each kind: what was done, and what went
    wrong."""
    done: Counter[str] = Counter()
    wrong: list[str] = []
    cases = [(program, kind) for program in PROGRAMS for kind in ("f32", "f16", "int8")]
    with tempfile.TemporaryDirectory() as folder:
        for number, (program, kind) in enumerate(cases):
            some = Sequences(Path(folder), program, kind, seed + number)
            for _ in range(-(-count // len(cases))):
                some.act()
            done += some.done
            wrong += [f"{program}, {kind}: {text}" for text in some.wrong]
    return done, wrong
