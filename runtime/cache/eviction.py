"""Which resident expert goes when another needs its place.

A policy keeps a number per expert; among those that may go, the one with the least goes. Experts
have flat numbers here: `first[layer] + expert`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from smoe.runtime.cache.planes import PlaneUses
from smoe.runtime.errors import EngineError

# Tokens of a step that count as one: what is kept of a prompt must not depend on how many of its
# chunks share a read.
CHUNK = 128
DEFAULT_EVICTION, PLANES = "next-use", "planes"


class Eviction:
    """Least recently used, and the base of the others."""

    needs_scores = False
    by_planes = False  # whether a record may lose its highest plane alone

    def __init__(self, experts: Sequence[int]):
        """`experts[l]`: how many experts layer l has."""
        self.experts = list(experts)
        self.first = np.concatenate([[0], np.cumsum(experts)])
        self.layer_of = np.repeat(np.arange(len(experts)), experts)
        self.clock = 0  # chunks that passed a layer, summed over layers
        self.last = np.zeros(self.first[-1])  # when each was used last, by that clock

    def observe(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        """The router of `layer` chose `ids` int64 `[T, k]` (E: no expert) for the tokens of a step,
        whether their experts are resident or not; selection `scores` `[T, E]` where they are
        known."""
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            self._use(layer, ids[part].reshape(-1))
            self.count(layer, ids[part], None if scores is None else scores[part])

    def observe_layers(self, first: int, ids: np.ndarray) -> None:
        """The same for one layer after another from `first` on, whose routers chose `ids` int64
        `[n, T, k]`. For policies that need no scores, and no more than `CHUNK` tokens."""
        for layer, chosen in enumerate(ids, first):
            self.observe(layer, chosen, None)

    def _use(self, layer: int, slots: np.ndarray) -> None:
        when = self.clock + _order(len(slots))
        used = slots < self.experts[layer]
        if not used.all():
            slots, when = slots[used], when[used]
        self.last[self.first[layer] + slots] = when  # of several uses the latest
        self.clock += 1

    def count(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        """The same for up to `CHUNK` tokens: what a policy keeps beside times."""

    def need(self, layer: int, experts: np.ndarray, levels: np.ndarray) -> None:
        """A step runs these `experts` of `layer`, each once or more, at these `levels`."""

    def warm(self, share: np.ndarray) -> None:
        """Before the first step: `share` float64 `[all experts]` of its layer's slots that each got
        in calibration."""
        self.last = share - 1  # before anything that is used

    def values(self, keys: np.ndarray) -> np.ndarray:
        """float64 for each of `keys`: what is kept longest has the most. Ties go to the first."""
        return self.last[keys]

    def planes(self, keys: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """The same for what would go of each, where they are resident up to `levels`."""
        return self.values(keys)

    def uses_of(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """int64 `[E]`: how many slots of `ids` each expert has."""
        count = self.experts[layer]
        return np.bincount(ids.reshape(-1), minlength=count + 1)[:count]


class LeastRecentlyUsed(Eviction):
    """LRU."""


class LeastFrequentlyUsed(Eviction):
    """LFU since the start; of equals the one that was not used for longest."""

    def __init__(self, experts: Sequence[int]):
        super().__init__(experts)
        self.steps = np.zeros(self.first[-1])  # that used each

    def count(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        low, high = self.first[layer], self.first[layer + 1]
        self.steps[low:high] += self.uses_of(layer, ids) > 0

    def values(self, keys: np.ndarray) -> np.ndarray:
        return self.steps[keys] + self.last[keys] / (max(self.last.max(), 0) + 1)


class DecayedFrequency(Eviction):
    """Uses, of which each counts half as much after `half_life` more tokens (LRFU of Lee et al.
    2001, in tokens rather than references, so that it means the same in every layer)."""

    def __init__(self, experts: Sequence[int], half_life: float = 32.0):
        super().__init__(experts)
        self.growth = 2 ** (1 / half_life)
        # Tokens after which nothing is left of a use; more of them would overflow.
        self.forgotten = 300 * half_life
        # What one use counts now, per layer: it grows instead of all else decaying.
        self.unit = np.ones(len(experts))
        self.uses = np.zeros(self.first[-1])

    def count(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        low, high = self.first[layer], self.first[layer + 1]
        self.unit[layer] *= self.growth ** min(len(ids), self.forgotten)
        if self.unit[layer] > 1e100:
            self.uses[low:high] /= self.unit[layer]
            self.unit[layer] = 1
        self.uses[low:high] += self.unit[layer] * (self.uses_of(layer, ids) > 0)

    def warm(self, share: np.ndarray) -> None:
        super().warm(share)
        self.uses = share * self.unit[self.layer_of]

    def values(self, keys: np.ndarray) -> np.ndarray:
        return self.uses[keys] / self.unit[self.layer_of[keys]] + self.last[keys] * 1e-12


class GateScore(Eviction):
    """SMoE: the mean gate score over the last `window` tokens, of experts that were not active too
    (paper III-D, Eq. 3; its n is not given). The protection shield is the cache's, for every
    policy."""

    needs_scores = True

    def __init__(self, experts: Sequence[int], window: int = 8):
        super().__init__(experts)
        self.window = window
        self.recent = [np.zeros((0, n)) for n in experts]
        self.mean = np.zeros(self.first[-1])

    def count(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        if scores is None:
            raise EngineError(
                "Eviction by gate scores needs the router's scores, which are not known here; use "
                "another."
            )
        self.recent[layer] = np.concatenate([self.recent[layer], scores])[-self.window :]
        self.mean[self.first[layer] : self.first[layer + 1]] = self.recent[layer].mean(0)

    def warm(self, share: np.ndarray) -> None:
        super().warm(share)
        self.mean = share.astype(np.float64)

    def values(self, keys: np.ndarray) -> np.ndarray:
        return self.mean[keys] + self.last[keys] * 1e-12


class NextUse(Eviction):
    """Belady's rule with an estimate: what is expected to be needed furthest in the future goes.

    Every token passes every layer once, so an expert is next needed after the way to its layer, d
    of a token's way through the model (0 < d <= 1), and as many more tokens as its layer does not
    choose it. If the layer chooses it with probability p each time, that is d + (1 - p) / p tokens
    ahead on average. p is estimated as

        (1 - again) * how often it was used, each token counting half as much after `half_life` more
        tokens + again * (1 if the layer's last step used it, otherwise 0)

    The second term is what plain frequency lacks: 35 to 45 % of the experts of a token are used by
    the next one too. d is what plain recency lacks, and why LRU, which lets go of the layers that
    come next, never hits below one token's cycle. A chunk of more than `most` tokens, part of a
    prompt, counts as that many, since what is generated resembles the prompt only so far. A start
    from calibration counts as the evidence of `warmth` tokens.

    Where `plane_value` says what the highest plane of each record is good for at every use, the
    plane of least value per token goes."""

    plane_value: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None  # of keys and levels
    plane_uses: PlaneUses | None = None

    def __init__(
        self,
        experts: Sequence[int],
        half_life: float = 32.0,
        again: float = 0.2,
        most: int = 8,
        warmth: float = 4.0,
    ):
        super().__init__(experts)
        self.growth, self.again, self.most, self.warmth = 2 ** (1 / half_life), again, most, warmth
        # What one use counts now, per layer: it grows instead of all else decaying.
        self.unit = np.ones(len(experts))
        self.seen = np.zeros(len(experts))  # tokens, decayed alike
        self.uses = np.zeros(self.first[-1])
        self.share: np.ndarray | None = None
        self.chance = np.zeros(self.first[-1])  # p
        # d of every layer, seen from each.
        layers = np.arange(len(experts))
        self._ahead_of = ((layers - layers[:, None] - 1) % len(experts) + 1) / len(experts)
        self.ahead = np.ones(len(experts))

    def count(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        self._count(slice(layer, layer + 1), self.uses_of(layer, ids)[None], len(ids))

    def observe_layers(self, first: int, ids: np.ndarray) -> None:
        layers, (n, tokens, k) = slice(first, first + len(ids)), ids.shape
        experts, slots = self.experts[first], tokens * k
        if self.experts[layers] != [experts] * n or ids.max() >= experts:
            super().observe_layers(first, ids)
            return
        at = np.arange(n)[:, None]
        flat = ids.reshape(n, slots) + experts * at
        self.last[self.first[first] + flat] = self.clock + at + _order(slots)
        self.clock += n
        uses = np.bincount(flat.reshape(-1), minlength=n * experts)
        self._count(layers, uses.reshape(n, experts), tokens)

    def _count(self, layers: slice, uses: np.ndarray, tokens: int) -> None:
        """So many `tokens` have `uses` `[n, E]` of the experts of n `layers`, which have as many
        experts each."""
        part = slice(self.first[layers.start], self.first[layers.stop])
        fade = self.growth ** -min(tokens, self.most)
        weight = (1 - fade) / (1 - 1 / self.growth)  # of all tokens, the last counting 1
        seen, unit = self.seen[layers], self.unit[layers]
        seen *= fade
        seen += weight
        unit /= max(fade, 1e-100)
        decayed = self.uses[part].reshape(uses.shape)
        large = unit > 1e100
        if large.any():
            decayed[large] /= unit[large, None]
            unit[large] = 1
        decayed += weight / tokens * unit[:, None] * uses
        share = None if self.share is None else self.share[part].reshape(uses.shape)
        chance = self.chance[part].reshape(uses.shape)
        chance[:] = (1 - self.again) * self._frequency(decayed / unit[:, None], seen, share)
        chance += self.again * (uses > 0)
        self.ahead = self._ahead_of[layers.stop - 1]

    def warm(self, share: np.ndarray) -> None:
        super().warm(share)
        self.share = share
        self.chance = share * 1.0

    def values(self, keys: np.ndarray) -> np.ndarray:
        return self.last.take(keys) * 1e-12 - self._waits(keys)

    @property
    def by_planes(self) -> bool:  # type: ignore[override]
        return self.plane_value is not None

    def learn_planes(self, levels: int) -> None:
        """Of records of so many `levels`, a plane is good for what its uses so far say."""
        self.plane_value = self.plane_uses = PlaneUses(self.experts, levels)

    def need(self, layer: int, experts: np.ndarray, levels: np.ndarray) -> None:
        if self.plane_uses is not None:
            self.plane_uses.need(layer, experts, levels)

    def planes(self, keys: np.ndarray, levels: np.ndarray) -> np.ndarray:
        if self.plane_value is None:
            return self.values(keys)
        return self.plane_value(keys, levels) / self._waits(keys)

    def _waits(self, keys: np.ndarray) -> np.ndarray:
        """Tokens until each is needed next."""
        chance = np.maximum(self.chance.take(keys), 1e-6)
        return self.ahead.take(self.layer_of.take(keys)) + 1 / chance

    def _frequency(
        self, used: np.ndarray, seen: np.ndarray, share: np.ndarray | None
    ) -> np.ndarray:
        """float64 `[n, E]`: how often each expert is used, of n layers that have `seen` `[n]`
        tokens."""
        if share is None:
            return used / seen[:, None]
        slots = used.sum(1) / seen
        prior = (self.warmth * slots)[:, None] * share
        return (used + prior) / (seen + self.warmth)[:, None]


def _order(slots: int) -> np.ndarray:
    """float64 `[slots]`, rising, between 0 and 1: when the slots of a step come within it."""
    return np.arange(1, slots + 1) / (slots + 1)


class HighPlanesFirst(Eviction):
    """D²MoE's memory budget: planes go from high to low, first those of the layer that was passed
    last, which is the last to be passed again, then those of the layers before it. The lowest
    planes of all layers stay until nothing else is left. Of equals what was used longest ago
    goes."""

    by_planes = True

    def __init__(self, experts: Sequence[int]):
        super().__init__(experts)
        self.passed = np.zeros(len(experts))  # when each layer was, by the clock
        self.place = np.zeros(len(experts))  # 0: the layer that was passed last

    def count(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        self.passed[layer] = self.clock
        self.place[np.argsort(-self.passed, kind="stable")] = np.arange(len(self.passed))

    def values(self, keys: np.ndarray) -> np.ndarray:
        return self.planes(keys, np.ones(len(keys)))

    def planes(self, keys: np.ndarray, levels: np.ndarray) -> np.ndarray:
        lowest = (levels == 1) * len(self.place)
        recent = (self.last.take(keys) + 1) / (self.clock + 2)  # below 1
        return lowest + self.place.take(self.layer_of.take(keys)) + (recent / 2 - levels) / 64


class Belady(Eviction):
    """The optimum where all records are as long: what is needed furthest in the future goes. For
    simulation only, since it knows `future`: (layer, ids `[T, k]`) of every step to come, in
    order."""

    def __init__(self, experts: Sequence[int], future: Iterable[tuple[int, np.ndarray]]):
        super().__init__(experts)
        self.step = -1
        self.uses: list[list[int]] = [[] for _ in range(self.first[-1])]  # next one last
        for step, (layer, ids) in enumerate(future):
            for expert in np.unique(ids[ids < self.experts[layer]]).tolist():
                self.uses[self.first[layer] + expert].append(step)
        self.next = np.array([-float(uses[0]) if uses else -np.inf for uses in self.uses])
        for uses in self.uses:
            uses.reverse()

    def observe(self, layer: int, ids: np.ndarray, scores: np.ndarray | None) -> None:
        self.step += 1
        for expert in np.unique(ids[ids < self.experts[layer]]).tolist():
            key = self.first[layer] + expert
            uses = self.uses[key]
            while uses and uses[-1] <= self.step:
                uses.pop()
            self.next[key] = -uses[-1] if uses else -np.inf

    def values(self, keys: np.ndarray) -> np.ndarray:
        return self.next[keys]


EVICTIONS: dict[str, type[Eviction]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "decay": DecayedFrequency,
    "score": GateScore,
    "next-use": NextUse,
    PLANES: HighPlanesFirst,
}


def eviction_named(name: str, experts: Sequence[int]) -> Eviction:
    """The policy of that name for layers of so many experts; `name:number` sets its one parameter
    (`decay:64`)."""
    kind, _, number = name.partition(":")
    if kind not in EVICTIONS:
        raise EngineError(f"There is no eviction {name[:40]!r}; there are {', '.join(EVICTIONS)}.")
    make: Callable[..., Eviction] = EVICTIONS[kind]
    if not number:
        return make(experts)
    takes = list(inspect.signature(make).parameters.values())[1:]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not takes or not 1 <= value <= 1e6:
        requirement = (
            f"it takes {takes[0].name} from 1 to 1000000" if takes else "it takes no parameter"
        )
        raise EngineError(f"Eviction {name[:40]!r}: {requirement}.")
    return make(experts, int(value) if isinstance(takes[0].default, int) else value)
