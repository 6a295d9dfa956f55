"""Drafts by name, as `Policies.draft` asks for them: NAME or NAME:MOST, like ngram:8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smoe.artifacts import Bundle
from smoe.runtime.budget import MemoryPlan
from smoe.runtime.cache.predict import Predictor
from smoe.runtime.draft.decoder import Decoder, Proposer
from smoe.runtime.draft.ngrams import NGrams
from smoe.runtime.draft.resident import OnResident, ResidentExperts, on_resident
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import Division
from smoe.runtime.experts import LocalExperts
from smoe.runtime.model import FEW, Model
from smoe.runtime.options import Policies, number_of
from smoe.runtime.program.layout import StateLayout
from smoe.runtime.stats import Stats

MOST = 16
SURE = 0.4  # of the probability; less is not guessed on resident experts (not varied so far)
NewProposer = Callable[[], Proposer]


@dataclass(frozen=True)
class Kind:
    """A draft by name: how many guesses it makes at most, if that is not said, whether it is for
    where experts are missing alone, and how who makes them is made, for an engine and then for each
    generation."""

    most: int
    missing: bool
    make: Callable[[Model, LocalExperts], NewProposer]


def _on_resident(model: Model, experts: LocalExperts) -> NewProposer:
    nobody, mine = Predictor(), ResidentExperts(experts)
    alone = Model(model.backbone, mine, on_resident, nobody, Stats(), model.layers)
    return lambda: OnResident(alone, SURE)


DRAFTS = {
    "ngram": Kind(most=8, missing=False, make=lambda model, experts: NGrams),
    "resident": Kind(most=4, missing=True, make=_on_resident),
}


def make_decoder(
    policies: Policies, division: Division, plan: MemoryPlan, model: Model, experts: LocalExperts
) -> Decoder:
    """With the draft that `policies` ask for. An `EngineError` where it cannot be, or would have no
    effect."""
    if policies.draft == "none":
        return Decoder(model.step, model.stats)
    name, most = _asked(policies.draft)
    _check(policies, division)
    kind = DRAFTS[name]
    if kind.missing and plan.capacity == plan.experts:
        raise EngineError(
            f"Draft {name} is the model without its missing experts, and here none is missing; "
            "use ngram, or leave it out."
        )
    return Decoder(model.step, model.stats, kind.make(model, experts), most)


def draft_bytes(policies: Policies, bundle: Bundle) -> int:
    """What drafts take at most: logits of every token of a step, and the state of a fork beyond
    what it shares."""
    if policies.draft == "none":
        return 0
    nbytes = 4 * FEW * bundle.manifest.model.vocabulary
    if _asked(policies.draft)[0] == "resident" and bundle.program is not None:
        nbytes += StateLayout.of(bundle.program, "f32").nbytes(MOST)
    return nbytes


def _asked(text: str) -> tuple[str, int]:
    """A name, and how many guesses."""
    name, colon, number = text.partition(":")
    if name not in DRAFTS:
        raise EngineError(f"There is no draft {name[:40]!r}; there are none, {', '.join(DRAFTS)}.")
    most = number_of(text, number if colon else DRAFTS[name].most, "number of guesses", 1, MOST)
    if most != int(most):
        raise EngineError(f"{text!r}: the number of guesses is a whole one.")
    return name, int(most)


def _check(policies: Policies, division: Division) -> None:
    if not policies.lossless:
        raise EngineError(
            f"Draft {policies.draft} and what is lossy exclude each other: guesses are checked "
            "together, and shortcuts of one token would be others' too. Leave one out."
        )
    if division.needs_onnxruntime:
        left = next(reason for reason in division.reasons if reason)
        raise EngineError(
            f"Draft {policies.draft} needs a backbone that the bundle's program runs whole, since "
            "ONNX Runtime's bits are others for one token than for many; here it runs some of it "
            f"({left}). Leave the draft out."
        )
