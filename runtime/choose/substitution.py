"""What stands in for a missing expert: other ids and weights for a layer's slots, chosen among what
is resident.

Each class is a `routing.Chooser`: an id that equals the number of experts is no expert, and adds
nothing; whatever is left missing is loaded. All of them change the model's output."""

from __future__ import annotations

import numpy as np

from smoe.artifacts.manifest import Routing
from smoe.runtime.routing import Assignment, Available, Routed, weigh


def missing_slots(routed: Routed, available: Available) -> np.ndarray:
    """bool `[T, k]`: slots whose expert is not resident."""
    return ~np.append(available.resident, True)[routed.ids]


def free_experts(
    routed: Routed, available: Available, token: int, taken: np.ndarray | list[int]
) -> np.ndarray:
    """Resident experts that are not in `taken`, best gate score of `token` first; masked experts
    never."""
    scores = _known(routed.scores)[token]
    able = available.resident & np.isfinite(scores)
    able[[e for e in taken if e < len(able)]] = False
    experts = np.flatnonzero(able)
    return experts[np.argsort(-scores[experts], kind="stable")]


class Smoe:
    """SMoE's Algorithm 1 (expert-cache router), for any number of tokens at once.

    With S_{k+1} the best rejected gate score of a token, active experts of at least (1 + alpha)
    S_{k+1} are top-score and always computed: C is their union over all tokens, and what is in C is
    as good as resident. A low-score active expert that is neither there nor in C gives way to the
    best inactive one that is, if its score is at least (1 - alpha) S_{k+1}; of several missing ones
    those of lowest score give way. A stand-in has its own score's weight."""

    def __init__(self, alpha: float):
        self.alpha = alpha

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        score = _known(routed.gate_scores)
        tokens, k = routed.ids.shape
        if k == score.shape[1]:
            return Assignment(ids=routed.ids, weights=routed.weights)
        active = np.zeros((tokens, score.shape[1] + 1), bool)
        np.put_along_axis(active, routed.ids, True, axis=1)
        active = active[:, :-1]
        limit = np.where(active, -np.inf, score).max(1, keepdims=True)  # S_{k+1}
        top = active & (score >= (1 + self.alpha) * limit)
        resident = available.resident | top.any(0)
        may = ~active & resident & (score >= (1 - self.alpha) * limit) & np.isfinite(score)
        gives = active & ~top & ~resident
        ids = routed.ids.copy()
        for t in np.flatnonzero(gives.any(1) & may.any(1)):
            stand_ins = np.flatnonzero(may[t])
            stand_ins = stand_ins[np.argsort(-score[t, stand_ins], kind="stable")]
            missing = np.flatnonzero(gives[t])
            missing = missing[np.argsort(score[t, missing], kind="stable")][: len(stand_ins)]
            # The n that give way are those of lowest score; which stand-in takes whose place does
            # not matter.
            for gone, new in zip(missing, stand_ins, strict=False):
                ids[t, ids[t] == gone] = new
        return _weighed(routed, ids)


class CachePrior:
    """Mixture of Cache-Conditional Experts (arXiv 2412.00099, section 3): z + lambda * D * m
    decides, with z the router's logits, D the running mean of their range in this layer, m = 1 for
    resident experts and for the best `always`. Weights are those of the router for the experts
    chosen. Where scores are probabilities, z is their logarithm."""

    def __init__(self, strength: float, always: int = 2):
        self.strength, self.always = strength, always
        self._range: dict[int, tuple[float, int]] = {}  # by layer: sum, tokens

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        z = _known(routed.scores).astype(np.float64)
        if _rule(routed).normaliser != "softmax":
            z = np.where(z > 0, np.log(np.maximum(z, 1e-30)), -np.inf)
        finite = np.isfinite(z)
        spread = np.where(finite, z, -np.inf).max(1) - np.where(finite, z, np.inf).min(1)
        total, count = self._range.get(routed.layer, (0.0, 0))
        total, count = total + float(spread.sum()), count + len(spread)
        self._range[routed.layer] = total, count
        boosted = z + self.strength * total / count * available.resident
        top = np.argsort(-z, axis=1, kind="stable")[:, : min(self.always, routed.ids.shape[1])]
        np.put_along_axis(boosted, top, np.inf, axis=1)
        ids = np.argsort(-boosted, axis=1, kind="stable")[:, : routed.ids.shape[1]]
        # Ranks stay where the experts stayed, and rows where nothing changed stay as they are, to
        # the bit.
        ids = np.array([_in_place(old, new) for old, new in zip(routed.ids, ids, strict=True)])
        return _weighed(routed, ids)


class Buddy:
    """BuddyMoE (arXiv 2511.10054): who was active together with the missing expert takes its place
    and its weight.

    `coactivation[l]` are joint counts. A token whose active experts' weights are too unequal
    (entropy over log k at most `entropy`) keeps its experts, and so does one of which at least a
    part of `most_missing` is missing. Buddies are the fewest that hold `mass` of the joint counts,
    16 at most; the one of largest q * (1 + eta * score) goes first; at most `per_token` a token.
    (The paper's term for hops between devices has no meaning here.)"""

    def __init__(
        self,
        coactivation: list[np.ndarray],
        entropy: float = 0.95,
        most_missing: float = 1.01,
        mass: float = 0.9,
        eta: float = 1.0,
        per_token: int = 4,
    ):
        self.entropy, self.most_missing, self.eta, self.per_token = (
            entropy,
            most_missing,
            eta,
            per_token,
        )
        self._buddies = [_buddies(counts, mass) for counts in coactivation]

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        ids, missing = routed.ids.copy(), missing_slots(routed, available)
        k = ids.shape[1]
        score = _known(routed.gate_scores)
        for t in np.flatnonzero(missing.any(1)):
            p = routed.weights[t] / max(float(routed.weights[t].sum()), 1e-30)
            equal = -(p * np.log(np.maximum(p, 1e-30))).sum() / np.log(max(k, 2))
            if equal <= self.entropy or missing[t].mean() >= self.most_missing:
                continue
            for rank in np.flatnonzero(missing[t])[: self.per_token]:
                who, q = self._buddies[routed.layer][ids[t, rank]]
                able = available.resident[who] & ~np.isin(who, ids[t])
                if able.any():
                    fit = q * (1 + self.eta * np.maximum(score[t, who], 0)) * able
                    ids[t, rank] = who[fit.argmax()]
        return Assignment(ids=ids, weights=routed.weights)


def _buddies(counts: np.ndarray, mass: float) -> list[tuple[np.ndarray, np.ndarray]]:
    out = []
    for expert, row in enumerate(counts.astype(np.float64)):
        row[expert] = 0
        q = row / max(row.sum(), 1.0)
        order = np.argsort(-q, kind="stable")
        order = order[: min(16, int(np.searchsorted(np.cumsum(q[order]), mass)) + 1)]
        out.append((order[q[order] > 0], q[order][q[order] > 0]))
    return out


class ThresholdControls:
    """The controls: only slots whose mixing weight is less than `below` give way, each to what
    `pick` says.

    zero: nothing takes the place. live: the resident expert of best gate score, with its own
    weight, the others keeping theirs. random: any resident expert, with the missing one's weight.
    similar: the resident expert of least output error by the tables (`errors[l]` `[E, E]`), with
    the missing one's weight."""

    def __init__(
        self, pick: str, below: float, errors: list[np.ndarray] | None = None, seed: int = 0
    ):
        self.pick, self.below, self._errors = pick, below, errors
        self._random = np.random.default_rng(seed)

    def __call__(self, routed: Routed, available: Available) -> Assignment:
        ids, weights = routed.ids.copy(), routed.weights.copy()
        gives = missing_slots(routed, available) & (routed.weights < self.below)
        nothing = _known(routed.scores).shape[1]
        for t in np.flatnonzero(gives.any(1)).tolist():
            ranks = np.flatnonzero(gives[t])
            for rank in ranks[np.argsort(-weights[t, ranks], kind="stable")]:
                if self.pick == "zero":
                    ids[t, rank], weights[t, rank] = nothing, 0
                    continue
                free = free_experts(routed, available, t, ids[t])
                if not len(free):
                    continue
                if self.pick == "random":
                    new = self._random.choice(free)
                elif self.pick == "similar":
                    assert self._errors is not None
                    new = free[self._errors[routed.layer][routed.ids[t, rank], free].argmin()]
                else:
                    new = free[0]
                    weights[t, rank] = _own_weight(routed, t, int(new))
                ids[t, rank] = new
        return Assignment(ids=ids, weights=weights)


def _own_weight(routed: Routed, token: int, expert: int) -> np.float32:
    """What the router would have mixed `expert` with, if the others' weights stay."""
    extended = np.append(routed.ids[token], expert)[None]
    rule, raw = _rule(routed), _known(routed.raw)[token : token + 1]
    if rule.normaliser == "none":
        return np.float32(weigh(rule, raw, extended)[0, -1])
    # The ratio of two experts' weights depends on neither's company.
    pair = weigh(rule, raw, np.array([[routed.ids[token, 0], expert]]))[0]
    return np.float32(routed.weights[token, 0] * pair[1] / max(float(pair[0]), 1e-30))


def _weighed(routed: Routed, ids: np.ndarray) -> Assignment:
    """The router's weights for other ids; a token that keeps its ids keeps its weights to the
    bit."""
    changed = (ids != routed.ids).any(1)
    weights = routed.weights
    if changed.any():
        weights = weights.copy()
        weights[changed] = weigh(_rule(routed), _known(routed.raw)[changed], ids[changed])
    return Assignment(ids=ids, weights=weights)


def _in_place(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The set `new` with what is also in `old` at the same ranks."""
    common = np.isin(old, new)
    out = old.copy()
    out[~common] = new[~np.isin(new, old)]
    return out


def _known(array: np.ndarray | None) -> np.ndarray:
    """Choosers by score are made only where the router's rule is known."""
    assert array is not None
    return array


def _rule(routed: Routed) -> Routing:
    assert routed.rule is not None
    return routed.rule
