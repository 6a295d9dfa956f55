"""What a router said, what runs for it, and on which expert: pure values, without I/O and without a
clock.

`Routed` comes out of a segment; a `Chooser` makes an `Assignment` of it (the router's word, or
shortcuts); `Dispatch` says which slots run on which expert at which level, and is what caches,
kernels, nodes and devices take. Below them are the router's own rules (FORMAT.md, "Routing")."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smoe.artifacts.manifest import Routing
from smoe.runtime.step import Step

BLOCK = 16  # tokens that are mixed at once


@dataclass(frozen=True, eq=False)
class Routed:
    """What a segment says of one layer's T tokens.

    hidden float32 `[T, H]`, ids int64 (E: no expert) and mixing weights float32 `[T, k]`; selection
    `scores` and `raw` weights float32 `[T, E]`, None with `rule` where it is not known how ids and
    weights follow from them."""

    layer: int
    step: Step
    hidden: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    scores: np.ndarray | None = None
    raw: np.ndarray | None = None
    rule: Routing | None = None
    rows: np.ndarray | None = None  # of the step, where these are not all of its tokens

    @property
    def owner(self) -> np.ndarray:
        """int64 `[T]`: the span of every token."""
        return self.step.owner if self.rows is None else self.step.owner[self.rows]

    @property
    def counts(self) -> list[int]:
        """Tokens of every span."""
        if self.rows is None:
            return [len(span.ids) for span in self.step.spans]
        return np.bincount(self.owner, minlength=len(self.step.spans)).tolist()

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def gate_scores(self) -> np.ndarray | None:
        """float32 `[T, E]`, None where they are not known."""
        if self.rule is None or self.scores is None:
            return None
        return gate_scores(self.rule, self.scores)

    def take(self, rows: np.ndarray) -> Routed:
        """The tokens at `rows` (int64) alone; `step` stays whole."""

        def part(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[rows]

        return Routed(
            layer=self.layer,
            step=self.step,
            hidden=self.hidden[rows],
            ids=self.ids[rows],
            weights=self.weights[rows],
            scores=part(self.scores),
            raw=part(self.raw),
            rule=self.rule,
            rows=rows if self.rows is None else self.rows[rows],
        )


@dataclass(frozen=True, eq=False)
class Available:
    """What a chooser may know of the world: `level` int `[E]` at which each expert is resident (0:
    not), the `full` level that is wanted, and `seconds` float32 `[E, full + 1]` to have it at each
    level, None where reading is all there is."""

    level: np.ndarray
    full: int
    seconds: np.ndarray | None = None

    @property
    def resident(self) -> np.ndarray:
        """bool `[E]`."""
        return self.level > 0


@dataclass(frozen=True, eq=False)
class Assignment:
    """What runs: ids int64 (E: nothing) and mixing weights float32 `[T, k]`, the level of every
    slot int `[T, k]` (None: the full one), and what each token's shortcuts should cost by their
    prices, float64 `[T]` in nats (None: nothing)."""

    ids: np.ndarray
    weights: np.ndarray
    levels: np.ndarray | None = None
    nats: np.ndarray | None = None


class Chooser(Protocol):
    """Decides what runs for every slot of a layer. Whatever is assigned and not resident is
    loaded."""

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        """`routed.owner` and the step's ledgers say who pays."""
        ...


def as_routed(routed: Routed, available: Available) -> Assignment:
    """The router's word: lossless."""
    return Assignment(ids=routed.ids, weights=routed.weights)


def assign(chooser: Chooser, routed: Routed, available: Available) -> Assignment:
    """The chooser's word for the tokens that may take shortcuts, the router's for others: what
    those use is here whole, for the former too."""
    shortened = routed.step.shortened
    if not shortened.any() or chooser is as_routed:
        return as_routed(routed, available)
    if shortened.all():
        return chooser(routed, available)
    rows, level = np.flatnonzero(shortened), np.append(available.level, 0)
    level[routed.ids[~shortened]] = available.full
    chosen = chooser(routed.take(rows), dataclasses.replace(available, level=level[:-1]))
    ids, weights = routed.ids.copy(), routed.weights.copy()
    levels, nats = np.full(ids.shape, available.full), np.zeros(len(ids))
    ids[rows], weights[rows] = chosen.ids, chosen.weights
    if chosen.levels is not None:
        levels[rows] = chosen.levels
    if chosen.nats is not None:
        nats[rows] = chosen.nats
    return Assignment(ids=ids, weights=weights, levels=levels, nats=nats)


@dataclass(frozen=True, eq=False)
class Dispatch:
    """Which slots run on which expert at which level: group g is expert `experts[g]` at level
    `levels[g]` and has the slots `starts[g]` to `starts[g + 1]`, of which slot s is `tokens[s]` and
    rank `ranks[s]`. All int64; groups rise by (expert, level). Slots without an expert are in
    none."""

    experts: np.ndarray
    levels: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of(cls, assignment: Assignment, available: Available) -> Dispatch:
        """What `assignment` makes of a layer; slots without a level are at the full one."""
        experts, full, k = len(available.level), available.full, assignment.ids.shape[1]
        keys = assignment.ids.reshape(-1)
        if assignment.levels is not None:
            keys = keys * (full + 1) + assignment.levels.reshape(-1)
            experts *= full + 1
        slots = keys.argsort(kind="stable")
        ordered = keys[slots]
        count = int(ordered.searchsorted(experts))
        slots, ordered = slots[:count], ordered[:count]
        changes = np.ones(count + 1, bool)
        np.not_equal(ordered[1:], ordered[:-1], out=changes[1:-1])
        starts = changes.nonzero()[0]
        groups = ordered[starts[:-1]]
        if assignment.levels is None:
            levels = np.full(len(groups), full)
        else:
            groups, levels = groups // (full + 1), groups % (full + 1)
        return cls(
            experts=groups,
            levels=levels,
            starts=starts,
            tokens=slots // k,
            ranks=slots % k,
        )

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self.tokens)

    @property
    def counts(self) -> np.ndarray:
        """int64 `[groups]`: the slots of each."""
        return self.starts[1:] - self.starts[:-1]

    def take(self, groups: np.ndarray) -> Dispatch:
        """A part: these groups (int64, rising)."""
        if len(groups) == len(self.experts):
            return self
        if len(groups) == 1:
            return self._one(int(groups[0]))
        counts = self.counts[groups]
        starts = np.concatenate([[0], np.cumsum(counts)])
        slots = np.repeat(self.starts[groups] - starts[:-1], counts) + np.arange(starts[-1])
        return Dispatch(
            experts=self.experts[groups],
            levels=self.levels[groups],
            starts=starts,
            tokens=self.tokens[slots],
            ranks=self.ranks[slots],
        )

    def _one(self, group: int) -> Dispatch:
        low, high = self.starts[group : group + 2].tolist()
        return Dispatch(
            experts=self.experts[group : group + 1],
            levels=self.levels[group : group + 1],
            starts=np.array([0, high - low]),
            tokens=self.tokens[low:high],
            ranks=self.ranks[low:high],
        )

    def batches(self, slots: int) -> Iterator[Dispatch]:
        """Parts of up to so many slots each, in order; a group may be cut."""
        if self.slots <= slots:
            yield self
            return
        for low in range(0, self.slots, slots):
            high = min(low + slots, self.slots)
            first = int(self.starts.searchsorted(low, side="right")) - 1
            last = int(self.starts.searchsorted(high, side="left"))
            yield Dispatch(
                experts=self.experts[first:last],
                levels=self.levels[first:last],
                starts=np.clip(self.starts[first : last + 1], low, high) - low,
                tokens=self.tokens[low:high],
                ranks=self.ranks[low:high],
            )


def combine(outputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum over ranks of outputs `[T, k, H]` times weights `[T, k]`, float32 `[T, H]`, rank
    after rank: neither the budget nor the order in which experts arrived changes a bit of it."""
    combined = np.empty((len(outputs), outputs.shape[2]), np.float32)
    for start in range(0, len(outputs), BLOCK):  # products of all tokens would be as large again
        block = slice(start, start + BLOCK)
        products = outputs[block] * weights[block, :, None]
        # Along an outer axis one after another, from the zero that changes nothing.
        np.add.reduce(products, axis=1, out=combined[block], initial=-0.0)
    return combined


def route(
    rule: Routing, scores: np.ndarray, raw: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[T, k]` int64, best first, and mixing weights `[T, k]` float32, from scores and raw
    weights `[T, E]`."""
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    return ids, weigh(rule, raw, ids)


def weigh(rule: Routing, raw: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Mixing weights of any choice of ids `[T, k]`, from the raw weights `[T, E]`: float32 `[T,
    k]`."""
    w = np.take_along_axis(raw, ids, axis=-1).astype(np.float32)
    if rule.normaliser == "softmax":
        w = np.exp(w - w.max(-1, keepdims=True))
        w = w / w.sum(-1, keepdims=True)
    elif rule.normaliser == "sum":
        w = w / (w.sum(-1, keepdims=True) + np.float32(rule.epsilon))
    return w * np.float32(rule.scale)


def gate_scores(rule: Routing, scores: np.ndarray) -> np.ndarray:
    """What SMoE compares: a softmax or sigmoid over all experts, float32 `[T, E]`. Routers whose
    weights are a softmax over the selected select by logits, which are brought to a softmax over
    all here; others' scores are taken as they are (a masked one stays -inf)."""
    if rule.normaliser != "softmax":
        return scores
    z = np.exp(scores - scores.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)
